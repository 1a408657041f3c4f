import json
from dataclasses import replace

import numpy as np
import pytest

from rsmtdf.data.check import UnknownValue, check_dataset
from rsmtdf.data.dataset import Dataset
from rsmtdf.errors import DatasetError


@pytest.mark.parametrize("workers", [0, 2])
def test_counts_of_a_data_set_in_order(folder, spec, workers):
    data = Dataset(spec, folder)
    seen = []
    report = check_dataset(data, workers=workers, progress=lambda *counts: seen.append(counts))
    assert report.ok
    assert (report.images, report.masks, report.tiles, report.labelled_tiles) == (11, 10, 44, 40)
    assert report.sizes == {"64 x 64": 11}
    assert report.kinds == {"3 x uint8": 11}
    labels = np.concatenate([data.read_label(t).ravel() for t in data.tiles() if t.mask])
    assert report.class_pixels == {name: int((labels == i).sum()) for i, name in enumerate(spec.classes)}
    assert report.ignored_pixels == 0
    assert report.images_without_mask == ["images/u.png"]
    assert seen == [(i, 11) for i in range(1, 12)]
    assert json.loads(json.dumps(report.to_dict()))["class_pixels"] == report.class_pixels
    assert "no problems found" in report.text()
    assert "road" in report.text()


def test_everything_wrong_is_reported_at_once(folder, spec, write, picture):
    write(folder / "masks/a.png", np.full((64, 64), 77, np.uint8))
    write(folder / "masks/b.png", np.zeros((64, 60), np.uint8))
    write(folder / "masks/extra.png", np.zeros((64, 64), np.uint8))
    (folder / "masks/c.png").write_bytes((folder / "masks/c.png").read_bytes()[:200])
    (folder / "images/d.png").write_bytes((folder / "images/d.png").read_bytes()[:200])
    jpeg = write(folder / "images/e.jpg", picture(64, 64))
    report = check_dataset(Dataset(spec, folder))
    assert not report.ok
    assert report.unknown_values == [UnknownValue("masks/a.png", 77, 4096)]
    assert report.size_mismatches == ["mask masks/b.png is 60 x 64, but its image images/b.png is 64 x 64"]
    assert report.masks_without_image == ["masks/extra.png"]
    assert set(report.unreadable) == {"masks/c.png", "images/d.png"}
    problems = "\n".join(report.problems)
    assert "same name 'e': images/e.jpg and images/e.png" in problems
    assert "2 file(s) cannot be read" in problems
    assert "1 mask(s) hold values outside the classes: mask masks/a.png holds value 77 (4096 pixels)" in problems
    assert "0/255" in problems
    assert "1 mask(s) belong to no image: masks/extra.png" in problems
    assert json.loads(json.dumps(report.to_dict()))["unknown_values"][0]["value"] == 77
    assert report.text().count("PROBLEM") == len(report.problems) == 5
    jpeg.unlink()
    assert check_dataset(Dataset(replace(spec, unknown_labels="ignore"), folder)).ignored_pixels == 4096


def test_masks_of_0_and_255_are_not_taken_for_one_class(folder, spec, write, picture):
    for name in "abcdefghij":
        write(folder / f"masks/{name}.png", (picture(64, 64, 1)[..., 0] // 128) * 255)
    two = replace(spec, classes=("other", "roof"), palette=spec.palette[:2])
    (problem,) = check_dataset(Dataset(two, folder)).problems
    assert "only 0 and 255" in problem
    assert "`label_map: [[0, 0], [255, 1]]`" in problem
    mapped = check_dataset(Dataset(replace(two, label_map=((0, 0), (255, 1))), folder))
    assert mapped.ok
    assert mapped.class_pixels["roof"] > 1000


def test_a_class_that_never_occurs_is_worth_a_note(folder, spec):
    more = replace(spec, classes=(*spec.classes, "water"), palette=(*spec.palette, (9, 9, 9)))
    report = check_dataset(Dataset(more, folder))
    assert report.ok
    assert "no pixel is labelled water" in report.notes[0]


def test_images_that_cannot_be_bytes_are_a_problem_not_a_crash(folder, spec, write):
    write(folder / "images/deep.tif", np.ones((64, 64, 3), np.uint16))
    (problem,) = check_dataset(Dataset(spec, folder)).problems
    assert "1 of 12 image(s) are uint16" in problem
    assert "scaling: [[" in problem
    write(folder / "images/grey.png", np.ones((64, 64), np.uint8))
    problems = check_dataset(Dataset(spec, folder)).problems
    assert any("grey.png has 1 colour band" in problem for problem in problems)


def test_nothing_but_nodata_is_a_problem(tmp_path, write, spec):
    write(tmp_path / "images/a.tif", np.zeros((64, 64, 3), np.uint8), nodata=0)
    report = check_dataset(Dataset(spec, tmp_path))
    assert (report.tiles, report.left_out_tiles) == (0, 4)
    assert "no tile has 25% valid pixels: check nodata" in report.problems[0]


def test_only_the_files_of_some_tiles(folder, spec):
    data = Dataset(spec, folder)
    (folder / "masks/b.png").write_bytes(b"broken")
    report = check_dataset(data, tiles=[data.tile("a/0_0"), data.tile("a/0_1")])
    assert report.ok
    assert (report.images, report.tiles) == (1, 4)


def test_no_data_set_is_an_error(tmp_path, spec):
    with pytest.raises(DatasetError, match="no folder 'images'"):
        check_dataset(Dataset(spec, tmp_path))
