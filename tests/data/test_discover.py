import numpy as np
import pytest
from PIL import Image

from rsmtdf.data.check import check_dataset
from rsmtdf.data.dataset import Dataset
from rsmtdf.data.discover import propose
from rsmtdf.data.loveda import LOVEDA
from rsmtdf.data.splits import make_splits
from rsmtdf.errors import DatasetError


def accepted(root):
    """The proposal, after its own description has read the folder without a problem."""
    proposal = propose(root)
    report = check_dataset(Dataset(proposal.spec, root))
    assert report.ok, report.problems
    assert proposal.notes
    return proposal


def test_a_plain_folder(folder):
    spec, splits = (proposal := accepted(folder)).spec, proposal.splits
    assert (spec.images, spec.masks, spec.mask_name, spec.mask_encoding) == ("images", "masks", "{stem}", "index")
    assert spec.classes == ("class_0", "class_1", "class_2")
    assert len(set(spec.palette)) == 3
    assert spec.tile_px == 64
    assert splits.by == "scene"
    assert any("11 images, 10 with a mask" in note for note in proposal.notes)
    data = Dataset(spec, folder)
    assert make_splits(data, data.tiles(), splits, base=folder).test


@pytest.mark.parametrize(
    ("image", "mask", "fields"),
    [
        ("imgs/{}.jpg", "labels/{}.png", ("imgs", "labels", "{stem}")),
        ("JPEGImages/{}.jpg", "SegmentationClass/{}.png", ("JPEGImages", "SegmentationClass", "{stem}")),
        ("rgb/{}_RGB.tif", "gt/{}_label.tif", ("rgb", "gt", "{stem:_RGB=_label}")),
        ("images/{}.png", "masks/{}_mask.png", ("images", "masks", "{stem}_mask")),
        ("data/{}_sat.jpg", "data/{}_mask.png", ("data", "data", "{stem:_sat=_mask}")),
        ("{}.png", "masks/{}.png", (".", "masks", "{stem}")),
        ("{}.png", "{}_mask.png", (".", ".", "{stem}_mask")),
    ],
)
def test_where_images_and_masks_are(tmp_path, write, picture, image, mask, fields):
    for i in range(6):
        write(tmp_path / image.format(i), picture(40, 40, seed=i))
        write(tmp_path / mask.format(i), picture(40, 40, 1, seed=i)[..., 0] % 4)
    spec = accepted(tmp_path).spec
    assert (spec.images, spec.masks, spec.mask_name) == fields
    assert len(spec.classes) == 4
    assert all(tile.mask for tile in Dataset(spec, tmp_path).tiles())


@pytest.mark.parametrize(
    ("values", "classes", "label_map"),
    [
        ([0, 255], ("background", "foreground"), ((0, 0), (255, 1))),
        ([0, 1, 2, 255], ("class_0", "class_1", "class_2"), ()),
        ([10, 20, 90], ("value_10", "value_20", "value_90"), ((10, 0), (20, 1), (90, 2))),
    ],
)
def test_mask_values(tmp_path, write, picture, values, classes, label_map):
    for i in range(3):
        write(tmp_path / f"images/{i}.png", picture(40, 40))
        write(tmp_path / f"masks/{i}.png", np.array(values, np.uint8)[picture(40, 40, 1)[..., 0] % len(values)])
    spec = accepted(tmp_path).spec
    assert spec.classes == classes
    assert spec.label_map == label_map


def test_colour_masks_and_palette_masks(tmp_path, write, picture):
    colours = np.array([(255, 0, 0), (0, 0, 0), (0, 200, 0)], np.uint8)
    labels = np.zeros((40, 40), np.uint8)
    labels[:12], labels[12:18] = 1, 2
    for kind in ("rgb", "palette"):
        write(tmp_path / kind / "images/a.png", picture(40, 40))
        path = tmp_path / kind / "masks/a.png"
        if kind == "rgb":
            write(path, colours[labels])
        else:
            path.parent.mkdir()
            image = Image.fromarray(labels)
            image.putpalette(colours.reshape(-1).tolist())
            image.save(path)
    rgb = accepted(tmp_path / "rgb")
    assert rgb.spec.mask_encoding == "rgb"
    assert rgb.spec.palette == ((255, 0, 0), (0, 0, 0), (0, 200, 0)), "most frequent first"
    assert any("black may mean unlabelled" in note for note in rgb.notes)
    palette = accepted(tmp_path / "palette")
    assert palette.spec.mask_encoding == "index"
    assert palette.spec.palette == ((255, 0, 0), (0, 0, 0), (0, 200, 0)), "the file's own colours"


def test_deep_images_get_a_scaling_and_maps_a_resolution(tmp_path, write):
    import rasterio

    ramp = (np.arange(600 * 600).reshape(600, 600) % 3000).astype(np.uint16)
    transform = rasterio.Affine(0.25, 0, 0, 0, -0.25, 0)
    write(tmp_path / "images/a.tif", np.dstack([ramp] * 4), crs="EPSG:32633", transform=transform)
    proposal = accepted(tmp_path)
    assert proposal.spec.scaling == ((60.0, 2939.0),) * 3
    assert proposal.spec.gsd_m == 0.25
    assert proposal.spec.tile_px == 512
    assert any("no masks found" in note for note in proposal.notes)


def test_one_band_is_shown_as_grey(tmp_path, write, picture):
    write(tmp_path / "images/a.png", picture(40, 40, 1)[..., 0])
    assert accepted(tmp_path).spec.bands == (1, 1, 1)


def test_groups_sub_folders_and_lists(tmp_path, write, picture):
    def make(root, names):
        for name in names:
            write(root / f"images/{name}.png", picture(40, 40))
            write(root / f"masks/{name}.png", picture(40, 40, 1)[..., 0] % 2)
        return root

    groups = accepted(make(tmp_path / "g", [f"site{i}_part{j}" for i in range(4) for j in range(3)]))
    assert groups.splits.by == "group"
    data = Dataset(groups.spec, tmp_path / "g")
    splits = make_splits(data, data.tiles(), groups.splits, base=tmp_path)
    assert {i.split("_")[0] for i in splits.train}.isdisjoint({i.split("_")[0] for i in splits.val + splits.test})
    assert accepted(make(tmp_path / "s", ["train/a", "train/b", "val/c"])).splits.by == "official"
    assert accepted(make(tmp_path / "t", ["a", "b"])).splits.by == "tile"
    (make(tmp_path / "l", ["a", "b", "c"]) / "splits").mkdir()
    (tmp_path / "l/splits/train.txt").write_text("a\n")
    (tmp_path / "l/splits/val.txt").write_text("b\n")
    lists = accepted(tmp_path / "l").splits
    assert (lists.train, lists.val, lists.test) == ("splits/train.txt", "splits/val.txt", None)


def test_lovedas_tree_is_recognised(tmp_path, write, picture):
    write(tmp_path / "Train/Rural/images_png/0.png", picture(40, 40))
    proposal = propose(tmp_path)
    assert proposal.spec == LOVEDA
    assert proposal.splits.by == "official"


def test_folders_that_cannot_be_described(tmp_path, write, picture):
    with pytest.raises(DatasetError, match="does not exist"):
        propose(tmp_path / "gone")
    with pytest.raises(DatasetError, match="no images in"):
        propose(tmp_path)
    write(tmp_path / "a/images/x.png", picture(40, 40))
    write(tmp_path / "a/masks/y.png", picture(40, 40, 1)[..., 0] % 2)
    with pytest.raises(DatasetError, match="no names in common: found x and y"):
        propose(tmp_path / "a")
    write(tmp_path / "b/images/x.png", picture(40, 40))
    write(tmp_path / "b/masks/x.jpg", picture(40, 40))
    with pytest.raises(DatasetError, match="JPEG changes colours"):
        propose(tmp_path / "b")


def test_folders_that_are_links_to_another_disk(tmp_path, write, picture):
    mine, disk = tmp_path / "mine", tmp_path / "disk"
    for i in range(6):
        write(disk / f"{i}.png", picture(40, 40, seed=i))
        write(mine / "masks" / f"{i}.png", picture(40, 40, 1, seed=i)[..., 0] % 4)
    (mine / "images").symlink_to(disk)
    (mine / "again").symlink_to(mine)
    spec = accepted(mine).spec
    assert (spec.images, spec.masks) == ("images", "masks")
