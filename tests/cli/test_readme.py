"""README's promises, kept: its commands run, its options and files exist, and every command explains itself."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import rasterio
import yaml
from typer.main import get_command

from rsmtdf.cli import demo
from rsmtdf.cli.main import app
from rsmtdf.config import RECIPES
from rsmtdf.learning.methods import METHODS
from rsmtdf.testing.scenes import write_folder

Run = Callable[..., Any]

OWN_IMAGES = {
    # README's line: what is run instead (None: as it stands)
    "rsmtdf init mydata": None,
    "rsmtdf data check --config mydata/rsmtdf.yaml": None,
    "rsmtdf plan --config mydata/rsmtdf.yaml --out feats.zarr": None,
    "rsmtdf cache-features --config mydata/rsmtdf.yaml --out feats.zarr": None,
    "rsmtdf train --cache feats.zarr --budget 2h": "rsmtdf train --cache feats.zarr --budget 4-steps",
    "rsmtdf evaluate runs/latest --split test": None,
    "rsmtdf predict runs/latest scene.tif map.tif": None,
}
"""Run in this order, in a folder that holds mydata/ and scene.tif; between the first and the second, mydata/rsmtdf.yaml
gets models of a few thousand random weights (AMENDED), for `init` proposes DINOv2 and CLIP, which need a download."""
AMENDED = ("teachers", "student", "views", "cache")

ONLY_OPTIONS = {
    "rsmtdf cache-features --dataset loveda": "downloads the teachers' weights and needs the data set",
    "rsmtdf train --cache ./feats.zarr": "needs the store of the command before",
}
"""Not run here: their subcommands and options must exist."""

MAKE = {"make demo", "make test", "make lint"}
INSTALL = {"uv venv && uv pip install -e .": "tests/packaging installs the wheel in an empty environment"}


@pytest.fixture(scope="session")
def readme(repo: Path) -> str:
    return (repo / "README.md").read_text(encoding="utf-8")


def blocks(text: str) -> list[list[str]]:
    """The commands of each fenced block of commands, without comments, continued lines joined."""
    found = []
    for language, body in re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE):
        lines = [line.partition(" #")[0].strip() for line in body.replace("\\\n", " ").splitlines()]
        commands = [line for line in lines if line and not line.startswith("#")]
        if language in {"bash", "sh", "console"} or all(c.startswith("rsmtdf ") for c in commands):
            found.append(commands)
    return found


def spans(text: str) -> Iterator[str]:
    """Every `rsmtdf ...` in running text and tables, its alternatives (`ls|show|cp`) written out."""
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    for span in re.findall(r"`(rsmtdf [^`]+)`", prose):
        words = span.replace("\\|", "|").split()
        yield from (" ".join(choice) for choice in product(*(word.split("|") for word in words)))


def commands_below(command: Any, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    """Words -> click's command, groups included."""
    found = {path: command}
    for name, child in getattr(command, "commands", {}).items():
        found |= commands_below(child, (*path, name))
    return found


COMMANDS = commands_below(get_command(app))


def check_options(line: str) -> None:
    """Fails unless the subcommand that `line` names, and every option it gives, exist."""
    words = shlex.split(line)[1:]
    depth = 0
    while tuple(words[: depth + 1]) in COMMANDS and depth < len(words):
        depth += 1
    command = COMMANDS[tuple(words[:depth])]
    rest = words[depth:]
    is_group = hasattr(command, "commands")
    assert not is_group or not rest or rest in (["COMMAND", "--help"], ["--help"]), f"no such command: {line}"
    known = {option for parameter in command.params for option in parameter.opts} | {"--help"}
    for word in rest:
        if word.startswith("-"):
            assert word in known, f"{line}: no option {word}"


def test_every_command_of_every_block_is_known_to_this_test(readme: str) -> None:
    known = {*OWN_IMAGES, *ONLY_OPTIONS, *MAKE, *INSTALL}
    found = [command for commands in blocks(readme) for command in commands]
    assert set(found) == known, "README and this test must name the same commands"


def test_the_two_commands_come_first(readme: str) -> None:
    assert blocks(readme)[0] == list(ONLY_OPTIONS)


def test_commands_that_need_a_download_name_what_exists(readme: str) -> None:
    for line in [*ONLY_OPTIONS, *OWN_IMAGES]:
        check_options(line)


def test_commands_named_in_the_text_exist(readme: str) -> None:
    named = list(spans(readme))
    assert len(named) > 10
    for line in named:
        check_options(line)


@pytest.mark.parametrize("line", ["rsmtdf tarin --cache x", "rsmtdf train --cahce x", "rsmtdf cache inof x"])
def test_a_command_that_does_not_exist_would_be_found(line: str) -> None:
    with pytest.raises(AssertionError):
        check_options(line)


def test_choices_named_in_the_text_are_those_there_are(readme: str) -> None:
    text = readme.replace("\\|", "|")
    methods, recipes = re.findall(r"`--method ([\w|-]+)`", text), re.findall(r"`--recipe ([\w|-]+)`", text)
    assert methods
    assert all(set(found.split("|")) == set(METHODS) for found in methods)
    assert recipes
    assert all(set(found.split("|")) == set(RECIPES) for found in recipes)


def test_your_own_images_runs_as_written(
    readme: str, here: Path, command: Run, tiny_experiment: dict[str, Any]
) -> None:
    block = next(b for b in blocks(readme) if b[0] == "rsmtdf init mydata")
    assert block == list(OWN_IMAGES)
    write_folder(here / "mydata", scenes=8, size=(128, 128), unlabelled=2, images="tif")
    (here / "mydata" / "images" / "scene7.tif").rename(here / "scene.tif")
    printed = {}
    for line in block:
        said = command(*shlex.split(OWN_IMAGES[line] or line)[1:])
        assert said.code == 0, f"{line}: exit {said.code}\n{said.out}\n{said.err}"
        printed[line] = said.out
        if line == block[0]:
            next_lines = re.findall(r"^  (rsmtdf .*)$", said.out, flags=re.MULTILINE)
            assert len(next_lines) == 3
            amend(here / "mydata" / "rsmtdf.yaml", tiny_experiment)
    for line in next_lines:
        check_options(line)
    assert "no problems found" in printed["rsmtdf data check --config mydata/rsmtdf.yaml"]
    assert "4 of 4 steps" in printed["rsmtdf train --cache feats.zarr --budget 2h"]
    assert re.search(r"mIoU +\d+\.\d+ .* tiles of test", printed["rsmtdf evaluate runs/latest --split test"])
    with rasterio.open(here / "map.tif") as made, rasterio.open(here / "scene.tif") as source:
        assert (made.crs, made.transform, made.shape) == (source.crs, source.transform, source.shape)
    assert (here / "runs" / "latest" / "run.json").is_file()


def amend(config: Path, tiny: dict[str, Any]) -> None:
    """Small random models and few views in place of what `init` proposed; the data set's description stays."""
    proposed = yaml.safe_load(config.read_text())
    assert [t["name"] for t in proposed["teachers"]] == ["dinov2_vitb14", "clip_vitl14"]
    train = {k: v for k, v in tiny["train"].items() if k not in {"steps", "epochs", "budget"}}
    changed = {**proposed, **{key: tiny[key] for key in AMENDED}, "train": {**proposed["train"], **train}}
    changed["train"] |= {"batch": 2, "micro_batch": 2}
    config.write_text(yaml.safe_dump(changed))


def test_the_demo_runs(
    repo: Path, here: Path, command: Run, monkeypatch: pytest.MonkeyPatch, tiny_experiment: dict[str, Any]
) -> None:
    """`rsmtdf demo` with a smaller world and tiny models; `make demo` runs it at its size, in minutes."""
    config = yaml.safe_load((repo / "configs" / "synthetic.yaml").read_text())
    config |= {key: tiny_experiment[key] for key in (*AMENDED, "train")}
    config["dataset"]["tile_px"], config["splits"]["labels"], config["train"]["steps"] = 64, 6, 4
    (here / "synthetic.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.setattr(demo, "SCENES", {"train": 5, "val": 2, "test": 2})
    monkeypatch.setattr(demo, "SCENE_PX", 160)
    monkeypatch.setattr(demo, "shipped_config", lambda name: here / f"{name}.yaml")
    said = command("demo")
    assert said.code == 0, said.err
    for text in ("rs-mtdf   test mIoU", "fixmatch  test mIoU", "surrogates with random weights"):
        assert text in said.out
    out = here / "out" / "demo"
    for name in ("data", "feats.zarr", "run/checkpoints/best.safetensors", "run-fixmatch/run.json", "map.tif"):
        assert (out / name).exists(), name
    again = command("demo")
    assert again.code == 0, "run again, it goes on"
    assert "nothing to do: every view is there" in again.err


def test_the_small_commands_of_the_table_run(cached_tiny: Any, here: Path, command: Run) -> None:
    said = {
        line: command(*line.split(), *more)
        for line, more in {
            "cache info": [cached_tiny.store],
            "configs ls": [],
            "configs show loveda": [],
            "configs cp loveda mine.yaml": [],
            "teachers ls": [],
            "--version": [],
        }.items()
    }
    assert [s.code for s in said.values()] == [0] * len(said)
    assert "complete" in said["cache info"].out
    assert (here / "mine.yaml").read_text() == said["configs show loveda"].out
    assert "dinov2_vitb14" in said["teachers ls"].out
    assert json.loads(command("cache", "info", cached_tiny.store, "--json").out)["complete"] is True


def test_make_targets_exist(repo: Path, readme: str) -> None:
    targets = set(re.findall(r"^([a-z]+):", (repo / "Makefile").read_text(), flags=re.MULTILINE))
    code = [command for commands in blocks(readme) for command in commands] + re.findall("`(.*?)`", readme)
    named = set(re.findall(r"\bmake ([a-z]+)\b", "\n".join(code)))
    assert {f"make {name}" for name in named} >= MAKE
    assert named <= targets


def file_map(readme: str) -> dict[str, str]:
    """Path -> its clause."""
    body = re.search(r"^## File map\n+```\n(.*?)^```$", readme, flags=re.DOTALL | re.MULTILINE)
    assert body
    found: dict[str, str] = {}
    folder = ""
    for line in body[1].splitlines():
        entry = re.fullmatch(r"( *)(\S+)(?: +(\S.*))?", line)
        assert entry, line
        if not entry[1]:
            folder = entry[2]
        found[(folder if entry[1] else "") + entry[2]] = entry[3] or ""
    return found


def test_the_file_map_names_what_is_there(repo: Path, readme: str) -> None:
    named = file_map(readme)
    for name, clause in named.items():
        path = repo / name
        assert path.is_dir() if name.endswith("/") else path.is_file(), f"{name} is in the file map, but not there"
        assert clause or name == "rsmtdf/", f"{name} has no clause"
    modules = {f"rsmtdf/{p.name}" for p in (repo / "rsmtdf").glob("*.py") if not p.name.startswith("_")}
    packages = {f"rsmtdf/{p.parent.name}/" for p in (repo / "rsmtdf").glob("*/__init__.py")}
    assert modules | packages == {name for name in named if name.startswith("rsmtdf/")} - {"rsmtdf/"}
    folders = {
        f"{p.name}/" for p in repo.iterdir() if p.is_dir() and p.name in {"configs", "docs", "tests", "pipelines"}
    }
    assert folders <= named.keys()


def test_links_lead_somewhere(repo: Path, readme: str) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", readme):
        if not target.startswith("https://"):
            assert (repo / target.partition("#")[0]).exists(), f"README links to {target}, which is not there"


HELP = """
import contextlib, io, json, sys
from typer.main import get_command
from rsmtdf.cli.main import app
said = {}
for words in json.loads(sys.argv[1]):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        get_command(app).main([*words, "--help"], prog_name="rsmtdf", standalone_mode=False)
    said[" ".join(words)] = out.getvalue()
heavy = {"torch", "timm", "open_clip", "rasterio", "zarr", "dask"} & set(sys.modules)
print(json.dumps({"said": said, "heavy": sorted(heavy)}))
"""


def test_help_of_every_command_explains_it_and_imports_no_torch(run_python: Callable[..., str]) -> None:
    result = json.loads(run_python(HELP, json.dumps([list(words) for words in COMMANDS])))
    assert result["heavy"] == []
    assert len(result["said"]) == len(COMMANDS) > 15
    for words, command in COMMANDS.items():
        text = result["said"][" ".join(words)]
        assert "Usage: rsmtdf" in text
        assert len((command.help or "").split()) >= 4, f"rsmtdf {' '.join(words)} does not say what it does"
        first = (command.help or "").split("\n")[0].split()[:4]
        assert " ".join(first) in " ".join(text.split())
        unexplained = [p.name for p in command.params if p.param_type_name == "option" and not getattr(p, "help", None)]
        assert not unexplained, f"rsmtdf {' '.join(words)}: options without a word: {unexplained}"
