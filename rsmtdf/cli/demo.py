"""`rsmtdf demo`: every stage once on a synthetic world, with random-weight surrogates for the teachers."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from rsmtdf.cli import training, using
from rsmtdf.cli.cache_summary import summary_text
from rsmtdf.cli.caching import run_cache
from rsmtdf.cli.configs import shipped_config
from rsmtdf.cli.planning import plan_cache
from rsmtdf.cli.terminal import Bar, say
from rsmtdf.cli.workspace import Source
from rsmtdf.config import load_experiment
from rsmtdf.data.synthetic.world import write_world
from rsmtdf.errors import ConfigError
from rsmtdf.signals import Interrupted, StopFlag, stop_flag

SCENES = {"train": 36, "val": 8, "test": 8}
SCENE_PX = 1024


def run_demo(out: Path, *, device: str) -> str:
    """Data, store, RS-MTDF and FixMatch runs, scores and a map under `out`; run again, it goes on.

    Returns:
        The summary.
    """
    begun = time.perf_counter()
    data, store, map_path = out / "data", out / "feats.zarr", out / "map.tif"
    source = Source(load_experiment(shipped_config("synthetic")), shipped_config("synthetic").parent)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot make the folder {out}: {error.strerror}; choose another --out") from error
    with Bar("1/5 drawing the synthetic world", unit="scene") as bar:
        world = write_world(
            data, tile_px=source.experiment.dataset.tile_px, seed=0, scene_px=SCENE_PX, progress=bar.update_to, **SCENES
        )
    say(f"1/5 data   {data}: {SCENES['train']} training scenes, {SCENES['val'] + SCENES['test']} to validate and test")
    with stop_flag() as stop:
        say("2/5 stage 1: the surrogate teachers look at every view once")
        job = plan_cache(source, root=data, out=store)
        say(job.text())
        say(summary_text(run_cache(job, device=device, stop=stop, say=say)))
        runs = {
            method: _train(store, run, method, step, device, stop)
            for step, method, run in (("3/5", "rs-mtdf", out / "run"), ("4/5", "fixmatch", out / "run-fixmatch"))
        }
        say("5/5 scores on the test tiles, and a map")
        scores = {
            method: using.score_run(run, split="test", root=data, device=device, stop=stop)
            for method, run in runs.items()
        }
        assert world.scene is not None
        drawn = using.map_image(
            runs["rs-mtdf"], world.scene, map_path, overwrite=True, device=device, batch=16, stop=stop
        )
    return _summary(scores, drawn, runs, seconds=time.perf_counter() - begun)


def _train(store: Path, run: Path, method: str, step: str, device: str, stop: StopFlag) -> Path:
    say(f"{step} stage 2: {method}")
    options = training.TrainOptions(
        cache=store, out=run, train={"method": method}, device=device, resume=(run / "config.json").exists()
    )
    try:
        result = training.train_run(options, stop=stop, say=say)
    except Interrupted as stopped:
        raise Interrupted(stopped.exit_code - 128, "stopped; run the demo again to go on from here") from None
    say(training.summary_text(result))
    return run


def _summary(scores: dict[str, Any], drawn: dict[str, Any], runs: dict[str, Path], *, seconds: float) -> str:
    lines = [f"{method:<9} test mIoU {100 * result['miou']:.2f}  ({runs[method]})" for method, result in scores.items()]
    return "\n".join(
        [
            "",
            using.scores_text(scores["rs-mtdf"]),
            "",
            *lines,
            using.map_text(drawn),
            f"done in {seconds / 60:.1f} min. The images are synthetic, the teachers surrogates with random weights:",
            "these numbers show that the machinery works, not what the method gains.",
        ]
    )
