import numpy as np
import pytest

from rsmtdf.data.dataset import Dataset
from rsmtdf.data.folder import FolderLayout, mask_key
from rsmtdf.data.layouts import LAYOUTS, layout_of
from rsmtdf.data.loveda import LOVEDA
from rsmtdf.errors import DatasetError
from rsmtdf.specs import DatasetSpec


def scan(root, **fields):
    spec = DatasetSpec(name="toy", classes=("a",), palette=((0, 0, 0),), **fields)
    return FolderLayout().scan(spec, root)


@pytest.fixture
def touch(tmp_path):
    def touch(*names):
        for name in names:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).touch()
        return tmp_path

    return touch


def test_scenes_are_image_paths_without_suffix_and_masks_mirror_them(touch):
    root = touch("images/b.JPG", "images/x/a.tif", "images/c.png", "masks/b.png", "masks/x/a.tiff", "images/notes.txt")
    touch("images/.hidden.png", "images/__MACOSX/c.png", "masks/._b.png")
    found = scan(root)
    assert [(s.id, s.image, s.mask) for s in found.scenes] == [
        ("b", "images/b.JPG", "masks/b.png"),
        ("c", "images/c.png", None),
        ("x/a", "images/x/a.tif", "masks/x/a.tiff"),
    ]
    assert not found.orphan_masks
    assert not found.problems


def test_images_in_the_root_itself(touch):
    root = touch("a.png", "masks/a.png", "sub/b.png")
    assert [s.id for s in scan(root, images=".").scenes] == ["a", "sub/b"]


@pytest.mark.parametrize(
    ("image", "mask", "rule"),
    [
        ("1_sat.jpg", "1_mask.png", "{stem:_sat=_mask}"),
        ("1.png", "1_mask.png", "{stem}_mask"),
        ("1.jpg", "gt_1.png", "gt_{stem}"),
    ],
)
def test_masks_beside_their_images(touch, image, mask, rule):
    found = scan(touch(f"d/{image}", f"d/{mask}", "d/2.png"), images="d", masks="d", mask_name=rule)
    assert {(s.image, s.mask) for s in found.scenes} == {(f"d/{image}", f"d/{mask}"), ("d/2.png", None)}


@pytest.mark.parametrize("rule", ["mask", "{stem", "{name}", "{stem}/x", "{stem.__class__}", "{stem:=x}"])
def test_a_mask_name_that_is_no_rule(rule):
    with pytest.raises(DatasetError, match=r"must hold \{stem\} or \{stem:OLD=NEW\}"):
        mask_key("a", rule)


def test_two_images_of_one_name_are_ambiguous(touch):
    (problem,) = scan(touch("images/a.png", "images/a.jpg")).problems
    assert "same name 'a': images/a.jpg and images/a.png" in problem
    (problem,) = scan(touch("images/b.png", "masks/b.png", "masks/b.tif")).problems[1:]
    assert "scene 'b' has 2 masks: masks/b.png, masks/b.tif" in problem


def test_a_mask_without_an_image(touch):
    root = touch("images/a.png", "masks/a.png", "masks/b.png")
    assert scan(root).orphan_masks == ("masks/b.png",)
    with pytest.raises(DatasetError, match=r"none of the 2 masks.*images/a.png a mask called 'a_m'.*`mask_name:`"):
        scan(root, mask_name="{stem}_m")


def test_nothing_where_images_should_be(touch, tmp_path):
    with pytest.raises(DatasetError, match=r"no folder 'images'.*found: pictures/.*`images:`"):
        scan(touch("pictures/a.png"))
    (tmp_path / "images").mkdir()
    with pytest.raises(DatasetError, match=r"no images in \S+images: expected .png.*folder is empty"):
        scan(tmp_path)
    touch("images/a.bmp")
    with pytest.raises(DatasetError, match=r"found \.bmp"):
        scan(tmp_path)


@pytest.mark.parametrize("where", ["..", "../other", "/etc", "images/../../x"])
def test_folders_stay_inside_the_root(touch, where):
    with pytest.raises(DatasetError, match=r"(leads out of|lies outside) the data root"):
        scan(touch("images/a.png"), masks=where)


def test_linked_folders_are_followed_but_not_in_circles(touch):
    root = touch("far/a.png", "images/b.png")
    (root / "images/link").symlink_to(root / "far")
    (root / "far/loop").symlink_to(root / "far")
    assert [s.id for s in scan(root).scenes] == ["b", "link/a"]


def test_sub_folders_are_the_official_split(touch, write, picture, spec):
    root = touch()
    for name in ("train/a", "train/b", "val/c", "test/d", "extra/e"):
        write(root / f"images/{name}.png", picture(32, 32))
        if name != "test/d":
            write(root / f"masks/{name}.png", picture(32, 32, 1)[..., 0] % 3)
    data = Dataset(spec, root)
    parts = {}
    for tile in data.tiles():
        parts.setdefault(data.scene(tile).part, []).append(tile)
    assert FolderLayout().official_splits(parts, seed=0) == (
        ["train/a/0_0", "train/b/0_0", "extra/e/0_0", "test/d/0_0"],
        ["val/c/0_0"],
        [],
    )


def test_a_layout_that_does_not_exist():
    with pytest.raises(DatasetError, match="no layout 'lovda'; there are folder, loveda; did you mean loveda"):
        layout_of("lovda")
    assert set(LAYOUTS) == {"folder", "loveda"}


@pytest.fixture
def loveda(tmp_path, write, picture):
    """Six whole scenes of 64 px in `whole`, the same ones cropped in `cropped`."""
    for number, (part, domain) in enumerate(
        [
            ("Train", "Rural"),
            ("Train", "Urban"),
            ("Val", "Rural"),
            ("Val", "Urban"),
            ("Test", "Rural"),
            ("Train", "Rural"),
        ]
    ):
        image, mask = picture(64, 64, seed=number), picture(64, 64, 1, seed=number)[..., 0] % 8
        write(tmp_path / f"whole/{part}/{domain}/images_png/{number}.png", image)
        if part != "Test":
            write(tmp_path / f"whole/{part}/{domain}/masks_png/{number}.png", mask)
        for k in range(4):
            y, x = 32 * (k // 2), 32 * (k % 2)
            base = f"cropped/{part}/{domain}"
            write(tmp_path / f"{base}/images_png/{number}_{k + 1}.png", image[y : y + 32, x : x + 32])
            if part != "Test":
                crop = np.dstack([mask[y : y + 32, x : x + 32]] * 3)  # as the public script writes them
                write(tmp_path / f"{base}/masks_png/{number}_{k + 1}.png", crop)
    return tmp_path


@pytest.fixture
def small():
    from dataclasses import replace

    return replace(LOVEDA, tile_px=32)


def test_loveda_whole_and_cropped_are_the_same_tiles(loveda, small):
    whole, cropped = Dataset(small, loveda / "whole"), Dataset(small, loveda / "cropped")
    assert [t.id for t in whole.tiles()] == [t.id for t in cropped.tiles()]
    assert [t.id for t in whole.tiles()][:5] == ["0/0_0", "0/0_1", "0/1_0", "0/1_1", "1/0_0"]
    for one, other in zip(whole.tiles(), cropped.tiles(), strict=True):
        for a, b in zip(whole.read_image(one), cropped.read_image(other), strict=True):
            assert np.array_equal(a, b)
        assert np.array_equal(whole.read_label(one), cropped.read_label(other))
        assert whole.scene(one).domain == cropped.scene(other).domain


def test_loveda_labels_are_raw_minus_one_and_no_data_is_ignored(loveda, small, picture):
    data = Dataset(small, loveda / "whole")
    raw = (picture(64, 64, 1, seed=0)[..., 0] % 8)[32:, :32]
    assert np.array_equal(data.read_label(data.tile("0/1_0")), np.where(raw == 0, 255, raw - 1))
    assert (data.read_label(data.tile("4/0_0")) == 255).all(), "test images have no masks"


@pytest.mark.parametrize("tree", ["whole", "cropped"])
def test_loveda_names_of_either_tree_resolve(loveda, small, tree):
    data = Dataset(small, loveda / tree)

    def ids(name):
        return [t.id for t in data.resolve_name(name)]

    assert (
        ids("Train/Urban/images_png/1_3.png") == ids("./Train/Urban/masks_png/1_3.png") == ids("1_3.png") == ["1/1_0"]
    )
    assert ids("1") == ids("1.png") == ids("Train/Urban/images_png/1.png") == ["1/0_0", "1/0_1", "1/1_0", "1/1_1"]
    assert ids("1/1_1") == ["1/1_1"]
    for wrong in ("Train/Rural/images_png/1_3.png", "1_5.png", "77.png"):
        with pytest.raises(DatasetError, match="is no tile, scene or image of data set 'loveda'"):
            ids(wrong)


def test_loveda_both_trees_at_once_are_ambiguous(loveda, small, write, picture):
    write(loveda / "whole/Train/Rural/images_png/0_1.png", picture(32, 32))
    with pytest.raises(DatasetError, match=r"1 scene\(s\) are there both whole and cropped: 0"):
        Dataset(small, loveda / "whole").tiles()
    write(loveda / "cropped/Val/Rural/images_png/0_1.png", picture(32, 32))
    with pytest.raises(DatasetError, match=r"scene 0 appears twice: Train/Rural/images_png/0_1\.png and Val/"):
        Dataset(small, loveda / "cropped").tiles()


def test_a_cropped_tree_has_one_tile_size(loveda, small):
    from dataclasses import replace

    with pytest.raises(DatasetError, match=r"is a crop of 32 x 32, but tile_px is 16.*`tile_px: 32`"):
        Dataset(replace(small, tile_px=16), loveda / "cropped").tiles()


def test_something_else_where_loveda_should_be(folder, small):
    with pytest.raises(DatasetError, match=r"no LoveDA images.*found: images, masks.*`layout: folder`"):
        Dataset(small, folder).tiles()
