"""Specs are data: they go to a dict and back exactly, and their digests are frozen."""

from __future__ import annotations

import dataclasses
import inspect
import json
import typing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rsmtdf import specs
from rsmtdf.specs import DatasetSpec, FeatureSpec, SplitSpec, Tile, ViewRecipe, digest, from_dict, to_dict

SPECS = (DatasetSpec, SplitSpec, Tile, ViewRecipe, FeatureSpec)

DATASET = DatasetSpec(name="toy", classes=("water", "wäld"), palette=((0, 0, 255), (0, 128, 0)))
FEATURE = FeatureSpec(
    name="dino", library="timm", model="vit_base_patch14_dinov2", weights_sha256="0" * 64, input_px=(518, 518)
)


def values(hint: object) -> st.SearchStrategy:
    """Values of a field's type, NaN and infinity left out (no JSON has them)."""
    if hint is float:
        return st.floats(allow_nan=False, allow_infinity=False)
    if typing.get_origin(hint) is tuple:
        inner = typing.get_args(hint)
        if inner[-1] is Ellipsis:
            return st.lists(values(inner[0]), max_size=4).map(tuple)
        return st.tuples(*map(values, inner))
    if type(None) in typing.get_args(hint):
        rest = [h for h in typing.get_args(hint) if h is not type(None)]
        return st.none() | st.one_of([values(h) for h in rest])
    return st.from_type(hint)


def instances(cls: type) -> st.SearchStrategy:
    hints = typing.get_type_hints(cls)
    return st.builds(cls, **{f.name: values(hints[f.name]) for f in dataclasses.fields(cls)})


# --- round trip -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", SPECS)
@given(data=st.data())
def test_round_trip_through_json_is_exact(cls, data):
    spec = data.draw(instances(cls))
    again = from_dict(cls, json.loads(json.dumps(to_dict(spec))))
    assert again == spec
    assert hash(again) == hash(spec)
    assert digest(to_dict(again)) == digest(to_dict(spec))


@pytest.mark.parametrize("cls", SPECS)
@given(data=st.data())
def test_restored_values_have_the_declared_types(cls, data):
    """A list where a tuple was declared would not hash, and 0 for 0.0 would have another digest."""
    spec = data.draw(instances(cls))
    again = from_dict(cls, to_dict(spec))

    def shape(value: object) -> object:
        return [type(value).__name__, *map(shape, value)] if isinstance(value, tuple) else type(value).__name__

    for field in dataclasses.fields(cls):
        assert shape(getattr(again, field.name)) == shape(getattr(spec, field.name)), field.name


def test_to_dict_is_plain_json_data():
    data = to_dict(FEATURE)
    assert json.loads(json.dumps(data)) == data
    assert data["input_px"] == [518, 518]


def test_integers_become_floats_where_floats_are_declared():
    """YAML and JSON write 1 for 1.0."""
    recipe = from_dict(ViewRecipe, {"scale": [1, 2], "hflip_p": 1})
    assert recipe == ViewRecipe(scale=(1.0, 2.0), hflip_p=1.0)
    assert isinstance(recipe.scale[0], float)
    assert isinstance(recipe.hflip_p, float)
    dataset = from_dict(DatasetSpec, {**to_dict(DATASET), "scaling": [[0, 3000]] * 3, "nodata": 0})
    assert isinstance(dataset.scaling[2][1], float)
    assert isinstance(dataset.nodata, float)


# --- errors -----------------------------------------------------------------------------------------------------


def test_unknown_field_is_named():
    with pytest.raises(ValueError, match=r"ViewRecipe has no field blurr, crop$"):
        from_dict(ViewRecipe, {"crop": 518, "crop_px": 518, "blurr": 1})


def test_missing_field_is_named():
    with pytest.raises(ValueError, match=r"DatasetSpec lacks classes, palette$"):
        from_dict(DatasetSpec, {"name": "x"})


def test_wrong_tuple_length_is_an_error():
    with pytest.raises(ValueError):
        from_dict(ViewRecipe, {"scale": [0.5, 1.0, 2.0]})


@pytest.mark.parametrize("cls", SPECS)
def test_specs_are_frozen_and_slotted(cls):
    spec = {DatasetSpec: DATASET, FeatureSpec: FEATURE, Tile: Tile("a/0_0", "a.tif", None, 0, 0, 5, 5)}.get(cls)
    spec = spec if spec is not None else cls()
    field = dataclasses.fields(cls)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(spec, field, "other")
    assert not hasattr(spec, "__dict__")


# --- digests ----------------------------------------------------------------------------------------------------


def test_digest_golden():
    """Frozen: a change here is a change of the identity of every store ever written."""
    assert digest({}) == "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"
    assert digest({"b": [1, 2.5, None, True], "a": "wäld"}) == (
        "820b262963823299e09eff038b005937a891cd9074e12fe2bfeb7e93429f9725"
    )
    assert digest(to_dict(ViewRecipe())) == "95dd73baa033ecf5d34e607a9fd5789f473aa61d6745997a8118d2a4f1d13c08"
    assert digest(FEATURE.identity()) == "ff05c49554c5b9f60f76cabdb52954a2e986e785fb70a1ad6790dd7c95dc68ca"
    assert digest(DATASET.pixel_fields()) == "650cf3a257c1f8fe22f12ce61d8aad7f0fd12a6b0919be149977f9e3d9e0a51e"


def test_digest_does_not_see_key_order_but_sees_list_order():
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    assert digest([1, 2]) != digest([2, 1])


def test_digest_of_a_tuple_is_that_of_its_list():
    assert digest(DATASET.pixel_fields()) == digest(json.loads(json.dumps(DATASET.pixel_fields())))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_digest_refuses_what_json_cannot_say(value):
    with pytest.raises(ValueError):
        digest({"x": value})


# --- what is in which identity ----------------------------------------------------------------------------------


def changed(spec: object, name: str) -> object:
    """`spec` with another value in field `name`."""
    value = getattr(spec, name)
    other = {
        bool: lambda: not value,
        int: lambda: value + 1,
        float: lambda: value + 0.125,
        str: lambda: value + "x",
        tuple: lambda: value[::-1] if value[::-1] != value else (*value[:-1], value[-1] + 1) if value else (1,),
        type(None): lambda: 3.0,
    }[type(value)]()
    return dataclasses.replace(spec, **{name: other})


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(FeatureSpec)])
def test_every_field_of_a_feature_but_its_name_is_identity(name):
    other = changed(FEATURE, name)
    assert other != FEATURE
    assert (digest(other.identity()) == digest(FEATURE.identity())) == (name == "name")


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(ViewRecipe)])
def test_every_field_of_a_view_recipe_changes_its_digest(name):
    assert digest(to_dict(changed(ViewRecipe(), name))) != digest(to_dict(ViewRecipe()))


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(DatasetSpec)])
def test_only_pixel_fields_of_a_dataset_are_identity(name):
    """Correcting a mask's classes must cost no features."""
    other = changed(DATASET, name)
    assert other != DATASET
    is_pixel = name in {"bands", "scaling", "nodata", "tile_px"}
    assert (digest(other.pixel_fields()) != digest(DATASET.pixel_fields())) == is_pixel


# --- small things -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tile_id", "scene"), [("a/0_0", "a"), ("Urban/1366/2_3", "Urban/1366"), ("part 1/sc.ene/0_0", "part 1/sc.ene")]
)
def test_scene_of_a_tile(tile_id, scene):
    assert Tile(tile_id, "i.png", None, 0, 0, 512, 512).scene == scene


def test_tokens_are_rows_times_columns():
    assert dataclasses.replace(FEATURE, grid=(37, 45)).tokens == 1665


def test_specs_import_the_standard_library_only(run_python):
    code = "import sys, rsmtdf.specs; print(sorted({'torch', 'numpy', 'pydantic', 'zarr'} & set(sys.modules)))"
    assert run_python(code).strip() == "[]"


def test_public_names():
    public = {
        n for n, v in vars(specs).items() if not n.startswith("_") and getattr(v, "__module__", "") == specs.__name__
    }
    assert {n for n in public if inspect.isclass(getattr(specs, n)) or inspect.isfunction(getattr(specs, n))} == {
        "DatasetSpec",
        "SplitSpec",
        "Tile",
        "ViewRecipe",
        "FeatureSpec",
        "TileReader",
        "Teacher",
        "FeatureSource",
        "to_dict",
        "from_dict",
        "digest",
    }
    assert specs.IGNORE_INDEX == 255
    assert specs.STREAMS == ("plain", "weak", "strong", "strong2")
