"""The readers on real files that lie beside the checkout: 72 aerial scenes, and GeoTIFFs of every awkward kind."""

import re
from dataclasses import replace

import numpy as np
import pytest
import rasterio

from rsmtdf.data.check import check_dataset
from rsmtdf.data.dataset import Dataset, usable_tiles
from rsmtdf.data.discover import propose
from rsmtdf.data.raster import read_header, read_pixels
from rsmtdf.data.scaling import suggest_scaling, to_bytes
from rsmtdf.data.splits import labelled_tiles, make_splits
from rsmtdf.errors import DatasetError
from rsmtdf.specs import DatasetSpec, SplitSpec

DUBAI = DatasetSpec(
    name="dubai",
    classes=("building", "land", "road", "vegetation", "water"),
    palette=((60, 16, 152), (132, 41, 246), (110, 193, 228), (254, 221, 58), (226, 169, 41)),
)


@pytest.fixture
def dubai(shared):
    return Dataset(DUBAI, shared / "dubai")


@pytest.fixture
def geotiff(shared):
    def path(start):
        (found,) = (shared / "geotiff").glob(f"{start}*.tif")
        return found

    return path


def read(path, bands=None, nodata=None):
    return read_pixels(path, read_header(path), bands=bands, nodata=nodata)


def test_dubai_is_split_by_group_without_leaks(dubai, tmp_path):
    tiles = dubai.tiles()
    assert len({t.scene for t in tiles}) == 72
    splits = make_splits(dubai, tiles, SplitSpec(by="group", group=r"^(tile\d+)_"), base=tmp_path)
    groups = [{i.split("_")[0] for i in part} for part in (splits.train, splits.val, splits.test)]
    assert sum(map(len, groups)) == len(set.union(*groups)) == 8
    assert len(splits.train + splits.val + splits.test) == len(tiles)
    assert len(labelled_tiles(dubai, splits.train, "6", seed=0, base=tmp_path)) == 6


def test_dubai_passes_the_check(dubai):
    some = [t for t in dubai.tiles() if t.scene.endswith("part001") and t.scene < "tile5"]
    report = check_dataset(dubai, tiles=some)
    assert report.ok, report.problems
    assert report.images == 4
    assert min(report.class_pixels.values()) > 0


def test_the_original_colour_masks_give_the_same_labels(dubai, shared):
    # Some are palette PNGs, some RGB; grey (155) and black are unlabelled.
    colour = replace(
        DUBAI, masks="masks_color_original", mask_encoding="rgb", label_map=((0x9B9B9B, 255), (0x000000, 255))
    )
    other = Dataset(colour, shared / "dubai")
    for name in ("tile1_part002/0_0", "tile2_part001/0_0", "tile2_part003/0_0"):
        labels = dubai.read_label(dubai.tile(name))
        assert np.array_equal(other.read_label(other.tile(name)), labels)
        assert len(np.unique(labels)) > 1


def test_a_user_who_types_init_gets_a_description_that_works(shared):
    proposal = propose(shared / "dubai")
    assert (proposal.spec.images, proposal.spec.masks) == ("images", "masks")
    assert len(proposal.spec.classes) == 5
    assert proposal.splits.by == "group"


def test_nodata_agrees_with_gdals_own_mask_where_the_rules_agree(geotiff):
    for name in ("rasterio_RGB", "landsat"):
        path = geotiff(name)
        with rasterio.open(path) as source:
            mask = source.dataset_mask() > 0
        assert np.array_equal(read(path).valid, mask)
        assert 0.6 < mask.mean() < 0.7


def test_an_internal_mask_and_four_bands(geotiff):
    path = geotiff("hro_rgb_u8_epsg26913_0.15m_internalmask")
    with rasterio.open(path) as source:
        assert np.array_equal(read(path).valid, source.dataset_mask() > 0)
    naip = geotiff("naip")
    header = read_header(naip)
    assert header.gsd_m == 5.0
    with rasterio.open(naip) as source:
        data = np.moveaxis(source.read(), 0, 2)
    assert np.array_equal(read(naip).bands, data[..., :3])
    assert np.array_equal(read(naip, bands=(4, 1, 2)).bands, data[..., [3, 0, 1]])


def test_sixteen_bits_are_scaled_by_the_proposed_limits(geotiff):
    path = geotiff("landsat")
    header = read_header(path)
    scaling = suggest_scaling([(path, header)], bands=None, nodata=None)
    pixels = read(path)
    out = to_bytes(pixels, scaling)
    clipped = ((out[pixels.valid] == 0) | (out[pixels.valid] == 255)).mean(axis=0)
    assert ((clipped > 0.03) & (clipped < 0.06)).all(), "about 2 % at either end"
    assert not out[~pixels.valid].any()


def test_a_mixed_folder_stops_with_what_to_set(shared, geotiff):
    spec = DatasetSpec(name="mixed", classes=("a",), palette=((0, 0, 0),), images=".", tile_px=256)
    (odd,) = Dataset(spec, shared / "geotiff").unreadable.values()
    assert re.search(r"sentinel1\S+ has 1 colour band.*`bands: \[1, 1, 1\]`", odd)
    with pytest.raises(DatasetError, match=r"1 of 5 image\(s\) are uint16"):
        Dataset(spec, shared / "geotiff").tiles()
    with pytest.raises(DatasetError, match=r"2 of 6 image\(s\) are uint16"):
        Dataset(replace(spec, bands=(1, 1, 1)), shared / "geotiff").tiles()
    data = Dataset(replace(spec, bands=(1, 1, 1), scaling=((0.0, 4000.0),) * 3), shared / "geotiff")
    found = usable_tiles(data, data.tiles())
    assert found.left_out
    assert {t.scene for t in found.kept} == {p.stem for p in (shared / "geotiff").glob("*.tif")}
    assert read_header(geotiff("sentinel1")).gsd_m is None, "ground control points are no resolution"
