"""Bad input, as its user meets it: exit code 2, one clear message, no traceback, and nothing half-written."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import yaml
from PIL import Image

from rsmtdf.data.synthetic import CLASSES, PALETTE, World
from rsmtdf.signals import Interrupted, StopFlag
from rsmtdf.testing.scenes import write_awkward_scenes, write_folder

Command = Callable[..., Any]


def tree(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


@pytest.fixture
def refused(command: Command, tmp_path: Path) -> Callable[..., str]:
    """Runs a command that must fail as a user error, and returns its message.

    Everything below the test's own folder must be as it was: files, their bytes, and folders.
    """

    def run(*arguments: object) -> str:
        before = tree(tmp_path)
        said = command(*arguments)
        assert said.code == 2, f"exit {said.code}:\n{said.out}\n{said.err}"
        assert not said.out, "a result on stdout, though there is none"
        assert "Traceback" not in said.err
        assert said.err.count("error: ") == 1, said.err
        after = tree(tmp_path)
        assert after.keys() == before.keys(), f"left or took away: {sorted(after.keys() ^ before.keys())}"
        assert after == before, "an existing file was changed"
        message = said.err.partition("error: ")[2].strip()
        assert message
        assert "\n\n" not in message, "one message, not several"
        return message

    return run


Refused = Callable[..., str]


def holds(message: str, *parts: str) -> None:
    for part in parts:
        assert part in message, f"{part!r} is not in: {message}"


# What the options and the configuration say


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--dataset", "lovda"], ["no data set called 'lovda'", "did you mean loveda?", "rsmtdf init DIR"]),
        (["--dataset", "zzz"], ["no data set called 'zzz'", "shipped: folder, loveda"]),
        ([], ["either --dataset NAME", "or --config FILE"]),
        (["--dataset", "loveda", "--config", "x.yaml"], ["either --dataset NAME", "or --config FILE"]),
        (["--dataset", "loveda"], ["where are the images of loveda?", "--root DIR", "RSMTDF_DATA"]),
        (["--dataset", "loveda", "--root", "gone"], ["data root gone (from --root) is not a folder", "by --root DIR"]),
        (["--config", "none.yaml"], ["cannot read the configuration none.yaml", "No such file"]),
        (["--config", "."], ["cannot read the configuration .", "Is a directory"]),
    ],
)
def test_no_such_data_set_root_or_configuration(refused: Refused, arguments: list[str], parts: list[str]) -> None:
    for verb in (["plan"], ["cache-features", "--out", "new.zarr"]):
        holds(refused(*verb, *arguments), *parts)


def test_a_root_of_another_layout_is_named(refused: Refused, here: Path) -> None:
    (here / "photos").mkdir()
    message = refused("cache-features", "--dataset", "loveda", "--root", "photos", "--out", "new.zarr")
    holds(message, "no LoveDA images in photos", "expected Train/Urban/images_png", "found: nothing")


@pytest.mark.parametrize(
    ("option", "value", "parts"),
    [
        ("--labels", "0", ["0 labelled tiles asked for", "20 training tiles have masks", "1 to 20"]),
        ("--labels", "9999", ["9999 labelled tiles asked for", "20 training tiles have masks"]),
        ("--labels", "200%", ["'200%' is not between 0 % and 100 %"]),
        ("--labels", "0%", ["'0%' is not between 0 % and 100 %"]),
        ("--labels", "1%", ["1% of 20 training tiles with masks is less than one tile", "--labels 20"]),
        ("--labels", "lists/few.txt", ["a share such as 5%", "a list file", "there is no file"]),
        ("--labels", "", ["expected `all`"]),
        ("--seeds", "0", ["cache.seeds=0", "cache.seeds: must be auto or at least 1 (found 0)"]),
        ("--seeds", "x", ["1 problem", "cache.seeds: Input should be 'auto', or Input should be a valid integer"]),
        ("--weak-views", "many", ["cache.weak_views", "(found 'many')"]),
        ("--max-gb", "0", ["cache.max_gb", "greater than 0"]),
        ("--max-gb", "nan", ["cache.max_gb", "finite number"]),
        ("--teacher", "dinov2_vitb", ["no teacher preset 'dinov2_vitb'", "did you mean 'dinov2_vitb14'?"]),
        ("--teacher", "nobody", ["no teacher preset 'nobody'", "known: dinov2_vitb14"]),
        ("--codec", "zip", ["cache.codec", "'fp16'", "found 'zip'"]),
        ("--set", "foo", ["--set 'foo' should read key.key=value", "--set train.seed=1"]),
        ("--set", "=1", ["should read key.key=value"]),
        ("--set", "train.sed=1", ["train.sed: no such key", "did you mean seed?"]),
        ("--set", "a.b.c=1", ["a: no such key", "known here: cache, dataset"]),
        ("--set", "train.seed=[", ["--set 'train.seed=['", "not valid YAML"]),
        ("--set", "teachers.9.name=a", ["'9' is no position in a list of 2"]),
        ("--set", "views.crop_px.x=2", ["views.crop_px is a value (56), not a section"]),
        ("--set", "views.jitter_p=.nan", ["views.jitter_p", "finite number"]),
        ("--set", "cache.max_gb=.inf", ["cache.max_gb", "finite number"]),
        ("--set", "dataset.tile_px=.nan", ["dataset.tile_px", "finite number"]),
        ("--set", "views.crop_px=57", ["57 is no multiple of the student's patch of 14 px", "the nearest is 56"]),
        ("--set", "dataset.layout=lovda", ["lovda", "loveda"]),
    ],
)
def test_options_that_make_no_sense(
    cached_tiny: Any, refused: Refused, option: str, value: str, parts: list[str]
) -> None:
    holds(refused("cache-features", "--config", cached_tiny.config, "--out", "new.zarr", option, value), *parts)


@pytest.mark.parametrize("device", ["gpu", "meta", "cuda:99", ""])
def test_a_device_that_is_not_there(cached_tiny: Any, refused: Refused, device: str) -> None:
    wanted = (f"device {device!r} cannot be used here", "--device auto picks one")
    holds(refused("cache-features", "--config", cached_tiny.config, "--out", "new.zarr", "--device", device), *wanted)
    holds(refused("train", "--cache", cached_tiny.store, "--out", "run", "--device", device), *wanted)


def test_no_room_prices_the_ways_out(cached_tiny: Any, refused: Refused) -> None:
    small = ["--seeds", "auto", "--max-gb", "0.00003", "--weak-views", "1"]
    message = refused("cache-features", "--config", cached_tiny.config, "--out", "new.zarr", *small)
    holds(message, "fewer than 3 strong seeds of 20 tiles", "Ways out:", "--seeds 1 or 2 (", "--weak-views (now 1 for")
    assert "--max-gb 0.001, with --out on a larger disk" in message


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("root: a\nroot: b\n", ["not valid YAML", "key 'root' is given twice", "line 2"]),
        ("views: {crop_px: 56, crop_px: 70}\n", ["key 'crop_px' is given twice"]),
        ("train: {seed: .nan}\n", ["train.seed", "finite number", "found nan"]),
        ("trian: {seed: 1}\n", ["trian: no such key", "did you mean train?"]),
        ("dataset: {clases: [a, b]}\n", ["dataset.clases: no such key; did you mean classes?", "classes: missing"]),
        ("views: [\n", ["not valid YAML"]),
        ("- 1\n", ["should hold a mapping", "not list"]),
        ("", ["is empty"]),
    ],
)
def test_a_wrong_configuration(refused: Refused, here: Path, text: str, parts: list[str]) -> None:
    (here / "mine.yaml").write_text(text)
    holds(refused("cache-features", "--config", "mine.yaml", "--out", "new.zarr"), "mine.yaml", *parts)


def test_a_configuration_that_is_no_text(refused: Refused, here: Path) -> None:
    (here / "mine.yaml").write_bytes(b"\xff\xfe\x00")
    holds(refused("plan", "--config", "mine.yaml"), "mine.yaml is not a text file in UTF-8")


def test_every_problem_of_a_configuration_is_reported_at_once(refused: Refused, here: Path) -> None:
    (here / "mine.yaml").write_text("dataset: {name: x, clases: [a]}\ntrain: {seed: .nan}\nviews: {jiter_p: 1}\n")
    message = refused("plan", "--config", "mine.yaml")
    holds(message, "mine.yaml: 5 problems", "did you mean classes?", "did you mean jitter_p?", "train.seed")
    assert len(message.splitlines()) == 6


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train"], "Missing option '--cache'"),
        (["train", "--cache"], "requires an argument"),
        (["train", "--cache", "x", "--nope"], "No such option: --nope"),
        (["train", "--cache", "x", "--seed", "x"], "Invalid value for '--seed'"),
        (["plan", "--max-gb", "x"], "Invalid value for '--max-gb'"),
        (["predict", "run"], "Missing argument"),
        (["trian"], "No such command 'trian'"),
        (["cache", "inof", "x"], "No such command 'inof'"),
        (["--nope"], "No such option"),
    ],
)
def test_usage_errors_are_user_errors(command: Command, here: Path, arguments: list[str], said: str) -> None:
    result = command(*arguments)
    assert result.code == 2
    assert said in result.err
    assert "Traceback" not in result.err
    assert not list(here.iterdir())


def test_a_number_of_labels_needs_no_quotes(cached_tiny: Any, command: Command, here: Path) -> None:
    data = yaml.safe_load(cached_tiny.config.read_text())
    data |= {"root": str(cached_tiny.folder / "data"), "splits": {**data["splits"], "labels": 5}}
    data["splits"] |= {p: str(cached_tiny.folder / data["splits"][p]) for p in ("train", "val", "test")}
    (here / "mine.yaml").write_text(yaml.safe_dump(data))
    assert "20 in the pool, 5 labelled" in command("plan", "--config", "mine.yaml").out


# What lies on disk


@dataclass(frozen=True)
class Folder:
    """A folder data set of four scenes of 128 px, sixteen tiles of 64 px, with the models of the tiny experiment."""

    path: Path
    experiment: dict[str, Any]

    @property
    def config(self) -> Path:
        return self.path / "rsmtdf.yaml"

    def change(self, **sections: dict[str, Any]) -> None:
        data = {**self.experiment, **{k: {**self.experiment.get(k, {}), **v} for k, v in sections.items()}}
        self.config.write_text(yaml.safe_dump(data, sort_keys=False))

    def image(self, index: int) -> Path:
        return next(self.path.glob(f"images/scene{index}.*"))

    def mask(self, index: int) -> Path:
        return next(self.path.glob(f"masks/scene{index}.*"))

    def paint(self, index: int, value: Any, *, box: tuple[slice, slice] = (slice(0, 3), slice(0, 5))) -> None:
        """Fifteen pixels of a mask, unless said otherwise."""
        label = np.array(Image.open(self.mask(index)))
        label[box] = value
        Image.fromarray(label).save(self.mask(index))


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Kind of images and masks -> a folder data set, shared and read-only."""
    world, root = World(), tmp_path_factory.mktemp("written")
    kinds: dict[str, dict[str, Any]] = {
        "png": {},
        "tif": {"images": "tif"},
        "rgb": {"masks": "rgb"},
        "unlabelled": {"unlabelled": 4},
    }
    for name, kind in kinds.items():
        write_folder(root / name, scenes=4, size=(128, 128), world=world, **kind)
    return {name: root / name for name in kinds}


@pytest.fixture
def folder(written: dict[str, Path], cached_tiny: Any, here: Path) -> Callable[..., Folder]:
    def make(kind: str = "png") -> Folder:
        shutil.copytree(written[kind], here / "mydata")
        experiment = yaml.safe_load(cached_tiny.config.read_text())
        experiment["root"] = "."
        experiment["dataset"] = {
            "name": "mine",
            "classes": list(CLASSES),
            "palette": [list(colour) for colour in PALETTE],
            "tile_px": 64,
        }
        experiment["splits"] = {"by": "tile", "labels": "all"}
        made = Folder(here / "mydata", experiment)
        made.change()
        return made

    return make


MakeFolder = Callable[..., Folder]
CACHE = ("cache-features", "--config", "mydata/rsmtdf.yaml", "--out", "new.zarr")
CHECK = ("data", "check", "--config", "mydata/rsmtdf.yaml")


def test_the_folder_is_sound_before_it_is_spoilt(folder: MakeFolder, command: Command) -> None:
    folder()
    assert command(*CHECK).code == 0
    assert command(*CACHE).code == 0
    said = command("train", "--cache", "new.zarr", "--out", "run", "--budget", "1-steps")
    assert said.code == 0, said.err


def test_an_empty_folder(folder: MakeFolder, refused: Refused) -> None:
    mine = folder()
    for path in mine.path.rglob("*.png"):
        path.unlink()
    for verb in (CHECK, CACHE):
        holds(refused(*verb), "no images in mydata/images", "expected .png", "the folder is empty")
    mine.config.unlink()
    holds(refused("init", "mydata"), "no images in mydata", "expected .png")
    holds(refused("init", "mydata/nothing"), "mydata/nothing is not a folder", "give the one that holds your images")
    shutil.rmtree(mine.path / "images")
    mine.change()
    holds(refused(*CACHE), "no folder 'images' in mydata", "found: masks/", "set `images:`")


def test_init_never_overwrites(folder: MakeFolder, refused: Refused) -> None:
    folder()
    holds(refused("init", "mydata"), "mydata/rsmtdf.yaml exists already", "--overwrite")


def test_no_image_has_a_mask(folder: MakeFolder, refused: Refused) -> None:
    folder("unlabelled")
    holds(refused(*CACHE), "none of the 16 training tiles has a mask", "expected masks in 'masks'", "mask_name:")


def test_an_image_without_a_mask_where_one_is_needed(folder: MakeFolder, refused: Refused) -> None:
    mine = folder()
    mine.mask(3).unlink()
    (mine.path / "held-out.txt").write_text("scene2\nimages/scene3.png\n")
    for part in ("val", "test", "labels"):
        mine.change(splits={part: "held-out.txt"})
        holds(refused(*CACHE), "held-out.txt", "no mask", "line 2 (images/scene3.png)")


def test_masks_without_an_image(
    folder: MakeFolder, command: Command, refused: Refused, caplog: pytest.LogCaptureFixture
) -> None:
    mine = folder()
    mine.image(0).unlink()
    said = command(*CHECK)
    assert said.code == 1, "findings, listed"
    assert "PROBLEM 1 mask(s) belong to no image: masks/scene0.png" in said.out
    (mine.path / "few.txt").write_text("scene1\nmasks/scene0.png\n")
    mine.change(splits={"labels": "few.txt"})
    holds(refused(*CACHE), "few.txt", "line 2: 'masks/scene0.png' is no tile, scene or image", "did you mean masks/")
    mine.change()
    assert command("plan", "--config", mine.config).code == 0
    assert "1 mask(s) belong to no image and are not used (masks/scene0.png)" in caplog.text
    for path in (mine.path / "masks").iterdir():
        path.rename(path.with_name(f"label_{path.name}"))
    holds(refused(*CACHE), "none of the 4 masks in 'masks' belongs to an image", "'scene1' is expected", "mask_name:")


def spoilt_size(mine: Folder) -> None:
    Image.fromarray(np.zeros((100, 128), np.uint8)).save(mine.mask(3))


def spoilt_value(mine: Folder) -> None:
    mine.paint(3, 77)


def spoilt_mask(mine: Folder) -> None:
    mine.mask(3).write_bytes(mine.mask(3).read_bytes()[:300])


MASKS: dict[str, tuple[Callable[[Folder], None], list[str]]] = {
    "size": (spoilt_size, ["masks/scene3.png is 128 x 100", "images/scene3.png is 128 x 128"]),
    "value": (
        spoilt_value,
        ["masks/scene3.png holds value 77 (15 pixels)", "expected one of 0, 1, 2", "RGB", "0/255", "label_map:"],
    ),
    "truncated": (spoilt_mask, ["masks/scene3.png cannot be read", "truncated"]),
}


@pytest.mark.parametrize("what", MASKS)
@pytest.mark.parametrize("part", ["train", "val"])
def test_a_wrong_mask_stops_training_before_it_begins(
    folder: MakeFolder, command: Command, refused: Refused, what: str, part: str
) -> None:
    """Stage 1 reads no masks (a corrected mask costs no caching), so stage 2 is where they count: all, and first."""
    mine = folder()
    for name, scenes in (("train", "scene0 scene1 scene2"), ("held-out", "scene3")):
        (mine.path / f"{name}.txt").write_text(scenes.replace(" ", "\n"))
    if part == "val":
        mine.change(splits={"train": "train.txt", "val": "held-out.txt", "test": None, "by": "tile"})
    else:
        mine.change(splits={"by": "tile", "fractions": [1.0, 0.0, 0.0]})
    spoil, parts = MASKS[what]
    spoil(mine)
    assert command(*CACHE).code == 0
    holds(refused("train", "--cache", "new.zarr", "--out", "run"), *parts)
    said = command(*CHECK)
    assert said.code == 1
    holds(said.out, "PROBLEM", *parts[:1])


def test_a_colour_outside_the_palette(folder: MakeFolder, command: Command, refused: Refused) -> None:
    mine = folder("rgb")
    for index in range(4):
        mine.paint(index, (1, 2, 3))
    assert command(*CACHE).code == 0
    message = refused("train", "--cache", "new.zarr", "--out", "run")
    holds(message, "holds colour (1, 2, 3) (15 pixels)", "colour of the palette of 7", "palette:")


def test_colour_masks_read_as_indices_say_so(folder: MakeFolder, command: Command, refused: Refused) -> None:
    folder("rgb").change(dataset={"mask_encoding": "index"})
    assert command(*CACHE).code == 0
    message = refused("train", "--cache", "new.zarr", "--out", "run")
    holds(message, "3 bands that differ", "colours, not class indices", "`mask_encoding: rgb`")


def test_masks_of_0_and_255_get_the_line_that_reads_them(folder: MakeFolder, command: Command) -> None:
    mine = folder()
    for index in range(4):
        label = np.array(Image.open(mine.mask(index)))
        Image.fromarray(((label > 2) * 255).astype(np.uint8)).save(mine.mask(index))
    said = command(*CHECK)
    assert said.code == 1
    holds(said.out, "all masks hold only 0 and 255", "label_map: [[0, 0], [255, 1]]")


def test_all_labelled_pixels_ignored(folder: MakeFolder, command: Command, refused: Refused) -> None:
    mine = folder()
    for index in range(4):
        mine.paint(index, 255, box=(slice(None), slice(None)))
    assert command(*CACHE).code == 0
    message = refused("train", "--cache", "new.zarr", "--out", "run")
    holds(message, "all pixels of the", "labelled tiles are ignored (255)", "label_map", "--labels")


def test_a_truncated_png_is_left_out_and_named(folder: MakeFolder, command: Command) -> None:
    """Exit 1: finished with a failure it lists. The rest is cached and trains."""
    mine = folder()
    mine.image(1).write_bytes(mine.image(1).read_bytes()[:3000])
    said = command(*CACHE)
    assert said.code == 1
    holds(said.out, "unreadable images/scene1.png", "the PNG is truncated (it ends at byte 3000")
    assert command("train", "--cache", "new.zarr", "--out", "run", "--budget", "1-steps").code == 0
    said = command(*CHECK)
    assert said.code == 1
    holds(said.out, "PROBLEM 1 file(s) cannot be read", "images/scene1.png", "truncated")


def test_a_truncated_tiff_is_left_out_and_named(
    folder: MakeFolder, command: Command, caplog: pytest.LogCaptureFixture
) -> None:
    """Its header is whole, so it shows when its pixels are read; labelled or not, training goes on without it."""
    mine = folder("tif")
    mine.change(splits={"by": "tile", "fractions": [1.0, 0.0, 0.0]})
    mine.image(1).write_bytes(mine.image(1).read_bytes()[:-3000])
    said = command(*CACHE)
    assert said.code == 1
    holds(said.out, "unreadable scene1/", "images/scene1.tif cannot be read", "failed")
    said = command("train", "--cache", "new.zarr", "--out", "run", "--budget", "1-steps")
    assert said.code == 0, said.err
    assert "labelled tile(s) left out: stage 1 could not read them (scene1/" in caplog.text


@pytest.mark.parametrize(("kind", "size"), [("png", 3000), ("png", 0), ("tif", 3000), ("tif", 5)])
def test_nothing_but_truncated_images(folder: MakeFolder, refused: Refused, kind: str, size: int) -> None:
    mine = folder(kind)
    for index in range(4):
        mine.image(index).write_bytes(mine.image(index).read_bytes()[:size])
    holds(refused(*CACHE), "none of the", f"images/scene0.{kind} cannot be")


def test_one_band_images_get_the_line_that_shows_them(folder: MakeFolder, command: Command, refused: Refused) -> None:
    mine = folder()
    for index in range(4):
        Image.open(mine.image(index)).convert("L").save(mine.image(index))
    message = refused(*CACHE)
    holds(message, "images/scene0.png has 1 colour band(s) (uint8), but three are needed", "data set's section")
    line = re.search(r"`(bands: .*?)`", message)
    assert line
    mine.change(dataset=yaml.safe_load(line[1]))
    assert command(*CACHE).code == 0, "the line it printed works"


def test_16_bit_images_get_the_line_that_scales_them(
    here: Path, folder: MakeFolder, command: Command, refused: Refused
) -> None:
    mine = folder()
    scenes = write_awkward_scenes(here / "awkward")
    shutil.rmtree(mine.path)
    shutil.copytree(scenes.deep, mine.path)
    mine.change(dataset={"bands": [2, 3, 4]})
    message = refused(*CACHE)
    holds(message, "3 of 3 image(s) are uint16", "no scaling to 8 bit is set", "add this line")
    line = next(text for text in message.splitlines() if text.startswith("scaling:"))
    holds(command(*CHECK).out, line)
    text = mine.config.read_text()
    assert text.count("dataset:\n") == 1
    mine.config.write_text(text.replace("dataset:\n", f"dataset:\n  {line}\n"))
    said = command(*CACHE)
    assert said.code == 0, f"the line it printed does not work: {said.err}"


def test_images_of_nothing_but_nodata(folder: MakeFolder, command: Command, refused: Refused) -> None:
    mine = folder("tif")
    for index in range(4):
        with rasterio.open(mine.image(index), "r+") as image:
            image.nodata = 0
            image.write(np.zeros((3, 128, 128), np.uint8))
    holds(refused(*CACHE), "none of the 16 tile(s)", "25% valid pixels", "nodata is 0.0", "`min_valid:`")
    said = command(*CHECK)
    assert said.code == 1
    holds(said.out, "PROBLEM no tile has 25% valid pixels", "nodata")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("scene0\nscene9\n", ["1 wrong line(s)", "line 2: 'scene9' is no tile, scene or image", "did you mean scene"]),
        ("# nothing\n", ["names no tile"]),
        ("scene0\nscene0\n", ["line 2: 'scene0' repeats line 1"]),
        ("../../etc/passwd\n", ["line 1"]),
    ],
)
def test_a_wrong_list(folder: MakeFolder, refused: Refused, text: str, parts: list[str]) -> None:
    mine = folder()
    (mine.path / "list.txt").write_text(text)
    for part in ("train", "val", "labels"):
        mine.change(splits={part: "list.txt"})
        holds(refused(*CACHE), "list.txt", *parts)
    mine.change(splits={"val": "gone.txt"})
    holds(refused(*CACHE), "the val list", "there is no file", "gone.txt")


def test_a_tile_in_two_lists(folder: MakeFolder, refused: Refused) -> None:
    mine = folder()
    (mine.path / "list.txt").write_text("scene1\n")
    mine.change(splits={"val": "list.txt", "test": "list.txt"})
    holds(refused(*CACHE), "tile scene1/0_0 is in the val list (line 1) and in the test list (line 1)")


# The store


@pytest.mark.parametrize("verb", [("train", "--out", "run", "--cache"), ("cache", "info")])
def test_no_store(cached_tiny: Any, refused: Refused, here: Path, verb: tuple[str, ...]) -> None:
    holds(refused(*verb, "none.zarr"), "no feature store at none.zarr: there is nothing", "rsmtdf cache-features")
    (here / "empty").mkdir()
    holds(refused(*verb, "empty"), "no feature store at empty", "a folder without Zarr metadata")
    holds(refused(*verb, cached_tiny.config), "no feature store at", "there is a file")


def test_a_store_is_not_made_over_something_else(cached_tiny: Any, refused: Refused, here: Path) -> None:
    (here / "notes").mkdir()
    (here / "notes" / "a.txt").write_text("mine")
    for out in ("notes", "notes/a.txt", "notes/a.txt/x.zarr"):
        holds(
            refused("cache-features", "--config", cached_tiny.config, "--out", out),
            f"cannot make a feature store at {out}",
        )


class StopAfter(StopFlag):
    """As Ctrl-C after stage 1 has looked `n` times."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self._left = n

    def check(self, message: str) -> None:
        self._left -= 1
        if self._left < 0:
            self.signum = 2
        super().check(message)


def test_a_store_that_stage_one_has_not_finished(tiny: Any, command: Command, refused: Refused) -> None:
    with pytest.raises(Interrupted):
        tiny.cache("cache.seeds=9", stop=StopAfter(3))
    message = refused("train", "--cache", tiny.store, "--out", "run")
    found = re.search(r"cover (\d+) of (\d+) views", message)
    assert found
    assert 70 <= int(found[1]) < int(found[2]) == 9 * 20 + 6 * 5
    holds(message, "features of 'dense'", "feats.zarr", "finish them with", "cache-features")
    said = command("cache", "info", tiny.store)
    assert (said.code, "INCOMPLETE" in said.out and "next       rsmtdf cache-features" in said.out) == (0, True)


def test_a_store_without_views_of_these_labels(cached_tiny: Any, refused: Refused) -> None:
    message = refused("train", "--cache", cached_tiny.store, "--out", "run", "--labels", "12")
    holds(message, "no finished weak views of 6 of 12 labelled tiles", "first: ", "add them with")


VIEWS = ["views.crop_px=70", "views.hflip_p=0.25", "dataset.bands=[3,2,1]"]
TEACHER = ["teachers.0.final_norm=false", "teachers.0.layer=2"]


def overrides(values: list[str]) -> list[str]:
    return [word for value in values for word in ("--set", value)]


def test_a_store_of_other_views_lists_each_field(tiny: Any, refused: Refused) -> None:
    stage_1 = ("cache-features", "--config", tiny.config, "--out", tiny.store)
    for verb in (stage_1, ("train", "--cache", tiny.store, "--out", "run")):
        message = refused(*verb, *overrides(VIEWS))
        holds(
            message,
            "feats.zarr was made for other views",
            "recipe.crop_px: expected 70, found 56",
            "recipe.hflip_p: expected 0.25, found 0.5",
            "pixels.bands: expected (3, 2, 1), found None",
            "or write another store",
        )
        assert message.count("expected") == len(VIEWS), "every field that differs, and no other"


def test_a_store_of_another_teacher_lists_each_field(tiny: Any, refused: Refused) -> None:
    for verb in (("cache-features", "--config", tiny.config, "--out", tiny.store), ("train", "--cache", tiny.store)):
        message = refused(*verb, *overrides(TEACHER))
        holds(message, "teacher 'dense'", "is another one", "final_norm: expected False, found True")
        holds(message, "layer: expected 2, found 3", "Give yours another name")
        assert message.count("expected") == len(TEACHER)
    message = refused("cache-features", "--config", tiny.config, "--out", tiny.store, "--set", "teachers.0.seed=9")
    holds(message, "weights_sha256: expected", "found")
    assert message.count("expected") == 1


def test_a_store_moved_away_from_its_images(tiny: Any, command: Command, refused: Refused, here: Path) -> None:
    (tiny.folder / "data").rename(here / "elsewhere")
    train = ("train", "--cache", tiny.store, "--out", "run", "--budget", "1-steps", "--labels", "6")
    holds(refused(*train), "data root", "is not a folder", "give the folder with the images by --root DIR")
    (here / "other").mkdir()
    write_folder(here / "other", scenes=1, size=(64, 64))
    holds(refused(*train, "--root", "other"), "no LoveDA images in other", "expected Train/Urban")
    lists = {p: f"splits.{p}={here / 'elsewhere' / 'lists' / f'{p}.txt'}" for p in ("train", "val", "test")}
    assert command(*train, "--root", "elsewhere", *overrides(list(lists.values()))).code == 0


# Training


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--method", "magic"], ["no method 'magic'", "there are: ", "rs-mtdf"]),
        (["--recipe", "magic"], ["train.recipe", "'paper' or 'practical'", "found 'magic'"]),
        (["--teachers", "magic"], ["--teachers magic", "cached or online"]),
        (["--budget", "nonsense"], ["budget 'nonsense'", "45min, 2h", "20000-steps"]),
        (["--budget", "0-steps"], ["budget '0-steps'"]),
        (["--batch", "3"], ["train.batch", "multiple of 2"]),
        (["--batch", "400"], ["needs 400 unlabelled tiles", "only 20 in pairs", "lower train.batch to 20"]),
        (["--batch", "6"], ["batch 6 is no multiple of micro_batch 4"]),
        (["--labels", "0"], ["0 labelled tiles asked for"]),
        (["--labels", "9999"], ["9999 labelled tiles asked for", "20 training tiles have masks"]),
        (["--labels", "200%"], ["not between 0 % and 100 %"]),
        (["--resume"], ["run is no run folder"]),
        (["--set", "train.steps=3", "--set", "train.epochs=2"], ["epochs and steps are all given"]),
        (["--set", "student.weights=no.safetensors"], ["no weights file at", "no.safetensors"]),
        (["--set", "student.backbone=vit_nope"], ["no model 'vit_nope'"]),
        (["--set", "student.layers=[0,1,2,9]"], ["[0, 1, 2, 9] must be 3", "has 4 blocks"]),
        (["--set", "student.dpt_channels=[8,8,8,0]"], ["student.dpt_channels.3", "greater than or equal to 1"]),
        (["--set", "teachers=[{name: dinov2_vitb14}]"], ["no features of dinov2_vitb14", "it has dense, coarse"]),
        (["--config", "none.yaml"], ["cannot read the configuration none.yaml"]),
        (["--root", "nowhere"], ["data root nowhere (from --root) is not a folder"]),
    ],
)
def test_training_that_cannot_start_leaves_no_run(
    cached_tiny: Any, refused: Refused, arguments: list[str], parts: list[str]
) -> None:
    holds(refused("train", "--cache", cached_tiny.store, "--out", "run", *arguments), *parts)


def test_a_default_run_folder_is_not_made_either(cached_tiny: Any, refused: Refused) -> None:
    refused("train", "--cache", cached_tiny.store, "--budget", "nonsense")
    holds(refused("train", "--cache", cached_tiny.store, "--resume"), "--resume needs --out RUN")


# A run's use


@pytest.fixture(scope="session")
def trained(cached_tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step; shared and read-only."""
    from rsmtdf.cli.training import TrainOptions, train_run

    out = tmp_path_factory.mktemp("trained") / "run"
    train_run(
        TrainOptions(cache=cached_tiny.store, out=out, device="cpu", train={"budget": "1-steps"}),
        stop=StopFlag(),
        say=lambda line: None,
    )
    return out


@pytest.fixture
def run(trained: Path, here: Path) -> Path:
    """A copy of one's own."""
    shutil.copytree(trained, here / "run")
    return Path("run")


@pytest.fixture
def scene(cached_tiny: Any) -> Path:
    return Path(cached_tiny.folder / "data" / "scene" / "scene.tif")


def test_runs_are_never_overwritten(cached_tiny: Any, run: Path, refused: Refused, here: Path) -> None:
    train = ("train", "--cache", cached_tiny.store, "--out")
    holds(refused(*train, run), "run exists already", "never overwritten", "another --out or --resume")
    (here / "a.txt").write_text("mine")
    holds(refused(*train, "a.txt"), "a.txt exists already")
    holds(refused(*train, "a.txt/run"), "cannot make a run folder at a.txt/run", "choose another --out")


def test_a_folder_that_is_no_run(run: Path, refused: Refused, scene: Path, here: Path) -> None:
    (here / "empty").mkdir()
    for folder in ("empty", "none"):
        holds(refused("evaluate", folder), f"{folder} is no run folder", "config.json")
    holds(refused("predict", "empty", scene, "map.tif"), "empty is no run folder")
    holds(refused("predict", "none", scene, "map.tif"), "none", "no such file")


def test_a_run_without_a_checkpoint(run: Path, refused: Refused, scene: Path) -> None:
    best = run / "checkpoints" / "best.safetensors"
    data = best.read_bytes()
    best.write_bytes(data[:500])
    for verb in (("evaluate", run), ("predict", run, scene, "map.tif")):
        holds(refused(*verb), "run/checkpoints/best.safetensors", "no complete safetensors file")
    best.unlink()
    for verb in (("evaluate", run), ("predict", run, scene, "map.tif")):
        holds(refused(*verb), "run/checkpoints/best.safetensors", "there is no such file")


@pytest.mark.parametrize(
    ("text", "part"), [("{", "cannot be read"), ("{}", "lacks config, base"), ("[]", "should hold a JSON object")]
)
def test_a_run_with_a_damaged_record(run: Path, refused: Refused, text: str, part: str) -> None:
    (run / "config.json").write_text(text)
    holds(refused("evaluate", run), "run/config.json", part)


def test_no_such_split(run: Path, refused: Refused, here: Path) -> None:
    holds(refused("evaluate", run, "--split", "tset"), "no split or list file 'tset'", "did you mean test?")
    holds(refused("evaluate", run, "--split", "x.txt"), "no split or list file 'x.txt'", "train, val, test or a file")
    (here / "l.txt").write_text("5\nzzz\n")
    holds(refused("evaluate", run, "--split", "l.txt"), "l.txt has 1 wrong line(s)", "line 2: 'zzz'")


def test_evaluating_on_tiles_without_masks(tiny: Any, trained: Path, refused: Refused, here: Path) -> None:
    (tiny.folder / "data" / "Train" / "Urban" / "masks_png" / "4.png").unlink()
    (here / "l.txt").write_text("6\n4\n")
    message = refused("evaluate", trained, "--root", tiny.folder / "data", "--split", "l.txt")
    holds(message, "1 image(s) named in l.txt have no mask", "line 2 (Train/Urban/images_png/4.png)", "add the masks")


def test_evaluating_without_the_images(run: Path, refused: Refused, here: Path) -> None:
    (here / "other").mkdir()
    holds(refused("evaluate", run, "--root", "gone"), "data root gone (from --root) is not a folder")
    holds(refused("evaluate", run, "--root", "other"), "no LoveDA images in other")


@pytest.mark.parametrize(
    ("dst", "parts"),
    [
        ("map.jpg", ["cannot write a map to map.jpg", ".tif or .png", "JPEG would blur"]),
        ("map", ["ends in .tif or .png"]),
        ("no/map.tif", ["there is no folder", "make it first"]),
        ("here.png", ["here.png exists already", "--overwrite"]),
        ("folder.tif", ["it is a folder"]),
    ],
)
def test_a_map_that_cannot_be_written(
    run: Path, refused: Refused, scene: Path, here: Path, dst: str, parts: list[str]
) -> None:
    (here / "here.png").write_bytes(b"mine")
    (here / "folder.tif").mkdir()
    holds(refused("predict", run, scene, dst), *parts)


def test_a_map_never_replaces_its_source(run: Path, refused: Refused, scene: Path, here: Path) -> None:
    shutil.copy(scene, here / "scene.tif")
    holds(refused("predict", run, "scene.tif", "scene.tif", "--overwrite"), "cannot replace its own source")


def test_a_source_that_is_no_image(run: Path, refused: Refused, scene: Path, here: Path) -> None:
    holds(refused("predict", run, "none.tif", "map.tif"), "none.tif does not exist")
    holds(refused("predict", run, "run", "map.tif"), "run is not a file")
    (here / "notes.tif").write_text("not an image")
    holds(refused("predict", run, "notes.tif", "map.tif"), "notes.tif cannot be opened")
    (here / "cut.tif").write_bytes(scene.read_bytes()[:9000])
    holds(refused("predict", run, "cut.tif", "map.tif"), "cut.tif cannot be read")
    Image.fromarray(np.zeros((70, 70), np.uint8)).save(here / "grey.png")
    holds(refused("predict", run, "grey.png", "map.tif"), "grey.png has 1 colour band(s)", "bands: [1, 1, 1]")
    with rasterio.open(scene) as source:
        profile = {**source.profile, "dtype": "uint16"}
        data = source.read().astype(np.uint16) * 9
    with rasterio.open(here / "deep.tif", "w", **profile) as deep:
        deep.write(data)
    holds(refused("predict", run, "deep.tif", "map.tif"), "deep.tif is uint16", "8-bit images of data set tiny")
    holds(refused("predict", run, scene, "map.tif", "--batch", "0"), "at least 1")


# The other commands


def test_configurations_by_name(refused: Refused, command: Command, here: Path) -> None:
    for verb in (("configs", "show", "lovda"), ("configs", "cp", "lovda", "mine.yaml")):
        holds(refused(*verb), "no data set called 'lovda'", "did you mean loveda?")
    assert command("configs", "cp", "loveda", "mine.yaml").code == 0
    holds(refused("configs", "cp", "loveda", "mine.yaml"), "mine.yaml exists already", "another name")
    holds(refused("configs", "cp", "loveda", "no/mine.yaml"), "the folder no does not exist")


def test_teachers_by_name(refused: Refused) -> None:
    holds(refused("teachers", "fetch", "dinov9"), "no teacher preset called dinov9", "dinov2_vitb14")


def test_a_demo_where_a_file_is(refused: Refused, here: Path) -> None:
    (here / "a.txt").write_text("mine")
    holds(refused("demo", "--out", "a.txt"), "cannot make the folder a.txt", "choose another --out")
