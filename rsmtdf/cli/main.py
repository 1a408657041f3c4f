"""`rsmtdf`: the command line. Bodies only: they load what they need when called, so that --help stays instant."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from rsmtdf.cli import stage_one_commands
from rsmtdf.cli.options import ConfigFile, DatasetName, Device, Json, Labels, Root, Set
from rsmtdf.cli.store_commands import cache_app
from rsmtdf.cli.terminal import log_to_stderr, say, show
from rsmtdf.errors import RsmtdfError
from rsmtdf.objects import store_path

app = typer.Typer(
    name="rsmtdf",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Land-cover maps from a few labels.\n\nFrozen vision foundation models look at your images once "
    "(cache-features); a small student learns from their cached features and your few labels (train); it draws "
    "the map (predict). Start with: rsmtdf demo, or rsmtdf init DIR for your own images.",
)
data_app = typer.Typer(no_args_is_help=True, help="Look at images and masks before anything is computed.")
configs_app = typer.Typer(no_args_is_help=True, help="The configurations that come with rsmtdf.")
teachers_app = typer.Typer(no_args_is_help=True, help="The teachers that rsmtdf knows by name.")
app.add_typer(cache_app, name="cache")
app.add_typer(data_app, name="data")
app.add_typer(configs_app, name="configs")
app.add_typer(teachers_app, name="teachers")

Run = Annotated[Path, typer.Argument(help="A run folder, as train made it.")]


app.command("plan")(stage_one_commands.plan)
app.command("cache-features")(stage_one_commands.cache_features)


@app.command("train")
def train(
    cache: Annotated[
        Any,
        typer.Option("--cache", metavar="STORE", parser=store_path, help="The feature store of stage 1."),
    ],
    method: Annotated[str | None, typer.Option("--method", help="rs-mtdf, fixmatch or supervised.")] = None,
    recipe: Annotated[str | None, typer.Option("--recipe", help="paper (as published) or practical.")] = None,
    labels: Labels = None,
    root: Root = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Run folder; default runs/<dataset>-<labels>-<method>-<n>.")
    ] = None,
    budget: Annotated[str | None, typer.Option("--budget", help="45min, 2h, or 20k-steps.")] = None,
    batch: Annotated[
        int | None, typer.Option("--batch", help="Labelled (and as many unlabelled) images a step.")
    ] = None,
    device: Device = "auto",
    seed: Annotated[int | None, typer.Option("--seed", help="Of the run: order of images, initial weights.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    teachers: Annotated[
        str, typer.Option("--teachers", help="cached, or online: run the teachers in every step (to compare).")
    ] = "cached",
    through_codec: Annotated[
        bool, typer.Option("--through-codec", help="With online: round features as the store does.")
    ] = False,
    config: ConfigFile = None,
    set_: Set = None,
    as_json: Json = False,
) -> None:
    """Stage 2: train the student from a feature store. No teacher runs.

    Example: rsmtdf train --cache feats.zarr --budget 2h
    """
    from rsmtdf.cli import training
    from rsmtdf.signals import stop_flag

    given = {"method": method, "recipe": recipe, "budget": budget, "batch": batch, "seed": seed}
    options = training.TrainOptions(
        cache=cache,
        config=config,
        root=root,
        labels=labels,
        out=out,
        train=given,
        overrides=set_ or [],
        teachers=teachers,
        through_codec=through_codec,
        device=device,
        resume=resume,
    )
    with stop_flag() as stop:
        result = training.train_run(options, stop=stop, say=say)
    show(result, as_json=as_json, text=training.summary_text(result))


@app.command("evaluate")
def evaluate(
    run: Run,
    split: Annotated[str, typer.Option("--split", help="val, test, train, or a list file.")] = "val",
    root: Root = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Score a run's student on labelled tiles: mIoU, per-class IoU, confusion matrix."""
    from rsmtdf.cli import using
    from rsmtdf.signals import stop_flag

    with stop_flag() as stop:
        result = using.score_run(run, split=split, root=root, device=device, stop=stop)
    show(result, as_json=as_json, text=using.scores_text(result))


@app.command("predict")
def predict(
    run: Run,
    src: Annotated[Path, typer.Argument(help="An image or raster: GeoTIFF, PNG, JPEG.")],
    dst: Annotated[Path, typer.Argument(help="The map: GeoTIFF (keeps the CRS) or PNG.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace DST if it exists.")] = False,
    batch: Annotated[int, typer.Option("--batch", help="Windows per forward pass.")] = 8,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Draw the land-cover map of an image or GeoTIFF, in blended windows, keeping its georeference."""
    from rsmtdf.cli import using
    from rsmtdf.signals import stop_flag

    with stop_flag() as stop:
        result = using.map_image(run, src, dst, overwrite=overwrite, device=device, batch=batch, stop=stop)
    show(result, as_json=as_json, text=using.map_text(result))


@app.command("init")
def init(
    folder: Annotated[Path, typer.Argument(help="A folder with images, and masks for some of them.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing rsmtdf.yaml.")] = False,
) -> None:
    """Look at a folder of images and masks, write DIR/rsmtdf.yaml, and print the next three commands."""
    from rsmtdf.cli.looking import init_folder

    print(init_folder(folder, overwrite=overwrite))


data_app.command("init")(init)


@data_app.command("check")
def data_check(
    dataset: DatasetName = None,
    config: ConfigFile = None,
    root: Root = None,
    set_: Set = None,
    as_json: Json = False,
) -> None:
    """Read every image and mask and list whatever is wrong. Exit code 1 if anything is."""
    from rsmtdf.cli.looking import check

    result, text = check(dataset=dataset, config=config, root=root, overrides=set_ or [])
    show(result, as_json=as_json, text=text)
    if result["problems"]:
        raise typer.Exit(1)


@configs_app.command("ls")
def configs_ls(as_json: Json = False) -> None:
    """List the shipped configurations."""
    from rsmtdf.cli.configs import shipped_configs, summary

    found = {name: summary(path) for name, path in shipped_configs().items()}
    show(found, as_json=as_json, text="\n".join(f"{name:12} {text}" for name, text in found.items()))


@configs_app.command("show")
def configs_show(name: str) -> None:
    """Print a shipped configuration."""
    from rsmtdf.cli.configs import shipped_config

    print(shipped_config(name).read_text(encoding="utf-8"), end="")


@configs_app.command("cp")
def configs_cp(name: str, dst: Path) -> None:
    """Copy a shipped configuration, to make it your own."""
    from rsmtdf.cli.looking import copy_config

    print(copy_config(name, dst))


@teachers_app.command("ls")
def teachers_ls(as_json: Json = False) -> None:
    """List the teacher presets: model, source, licence, bytes per view."""
    from rsmtdf.cli.looking import list_teachers

    result, text = list_teachers()
    show(result, as_json=as_json, text=text)


@teachers_app.command("fetch")
def teachers_fetch(names: Annotated[list[str], typer.Argument(help="Presets, by name.")]) -> None:
    """Download teachers' weights into the hub cache, for nodes without a network."""
    from rsmtdf.cli.looking import fetch_teachers

    print(fetch_teachers(names))


@app.command("demo")
def demo(
    out: Annotated[Path, typer.Option("--out", help="Where everything goes.")] = Path("out/demo"),
    device: Device = "auto",
) -> None:
    """The whole tour on a synthetic world, in minutes and without a download: data, store, two runs, a map."""
    from rsmtdf.cli.demo import run_demo

    print(run_demo(out, device=device))


def _print_version(wanted: bool) -> None:
    if wanted:
        from rsmtdf import __version__

        print(__version__)
        raise typer.Exit


# A callback of the option, not of the command: without a subcommand, the latter is never reached.
VersionFlag = Annotated[
    bool, typer.Option("--version", help="Print the version and stop.", is_eager=True, callback=_print_version)
]


@app.callback()
def _root(version: VersionFlag = False) -> None:
    pass


def handled(command: Callable[[], None]) -> int:
    """Runs `command` and returns the exit code, explaining what went wrong on stderr.

    0 done, 1 done with failures listed, 2 user error, 130 and 143 ended by a signal. Anything else is a bug and
    shows its traceback.
    """
    from rsmtdf.signals import Interrupted

    log_to_stderr()
    try:
        command()
    except RsmtdfError as error:
        say(f"error: {error}")
        return 2
    except Interrupted as stopped:
        say(str(stopped))
        return stopped.exit_code
    except KeyboardInterrupt:
        say("stopped")
        return 130
    except BrokenPipeError:
        return 1
    return 0


def main() -> None:
    """Runs the command line; see `handled` for the exit codes."""
    sys.exit(handled(app))
