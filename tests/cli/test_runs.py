"""A run keeps what it began with: folders grow, stores grow, images move, and its tiles and steps stay the same."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rsmtdf.cli.runs import begun
from rsmtdf.cli.training import TrainOptions, train_run
from rsmtdf.cli.using import score_run
from rsmtdf.errors import CheckpointError, ConfigError, DatasetError
from rsmtdf.signals import Interrupted, StopFlag

Say = Callable[[str], None]


class StopAt(StopFlag):
    """Raised as if by SIGTERM, once the loop has looked `n` times."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self._left = n

    def __bool__(self) -> bool:
        self._left -= 1
        if self._left <= 0:
            self.signum = 15
        return self.signum is not None


def run(tiny: Any, out: Path, say: Say, *, stop: StopFlag | None = None, **options: Any) -> dict[str, Any]:
    given = TrainOptions(cache=tiny.store, out=out, device="cpu", **options)
    return train_run(given, stop=StopFlag() if stop is None else stop, say=say)


def interrupted(tiny: Any, out: Path, say: Say, **options: Any) -> None:
    with pytest.raises(Interrupted):
        run(tiny, out, say, stop=StopAt(5), **options)


def score(path: Path, split: str = "test", root: Path | None = None) -> dict[str, Any]:
    return score_run(path, split=split, root=root, device="cpu", stop=StopFlag())


def last_bits(path: Path) -> bytes:
    return (path / "checkpoints" / "last.safetensors").read_bytes()


def test_a_resumed_run_does_not_see_what_the_store_has_grown_by(tiny: Any, tmp_path: Path, say: Say) -> None:
    run(tiny, tmp_path / "whole", say)
    interrupted(tiny, tmp_path / "cut", say)
    tiny.cache("cache.seeds=4", "cache.weak_views=9", labels="9")
    run(tiny, tmp_path / "cut", say, resume=True)
    assert last_bits(tmp_path / "whole") == last_bits(tmp_path / "cut")


def test_a_run_is_scored_on_the_tiles_it_drew_however_its_lists_change(tiny: Any, tmp_path: Path, say: Say) -> None:
    run(tiny, tmp_path / "run", say, train={"budget": "2-steps"})
    before = score(tmp_path / "run")
    lists = tiny.folder / "data" / "lists"
    (lists / "test.txt").write_text((lists / "train.txt").read_text())
    assert score(tmp_path / "run")["confusion"] == before["confusion"]
    drawn = begun(tmp_path / "run").tiles
    assert not set(drawn["test"]) & (set(drawn["labelled"]) | set(drawn["val"]))
    assert score(tmp_path / "run", "train")["tiles"] == len(drawn["labelled"]) == 6


def test_tiles_that_are_gone_are_named(tiny: Any, tmp_path: Path, say: Say) -> None:
    interrupted(tiny, tmp_path / "run", say)
    record = json.loads((tmp_path / "run" / "config.json").read_text())
    record["tiles"]["val"].append("99/0_0")
    (tmp_path / "run" / "config.json").write_text(json.dumps(record))
    with pytest.raises(DatasetError, match=r"1 tiles that the run was begun with are not below .*first: 99/0_0"):
        run(tiny, tmp_path / "run", say, resume=True)


def test_a_store_with_other_views_is_refused(tiny: Any, tmp_path: Path, say: Say) -> None:
    interrupted(tiny, tmp_path / "run", say)
    shutil.rmtree(tiny.store)
    tiny.cache("cache.seeds=1")
    with pytest.raises(CheckpointError, match="views for its steps are no longer those it began with"):
        run(tiny, tmp_path / "run", say, resume=True)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"overrides": ["student.fusion=false"]}, "student.fusion: the run has True, now False"),
        ({"train": {"seed": 3}}, "train.seed: the run has 0, now 3"),
        ({"labels": "4"}, "splits.labels: the run has 6, now 4"),
        ({"teachers": "online"}, "teachers: the run has"),
    ],
)
def test_every_changed_setting_is_named(
    tiny: Any, tmp_path: Path, say: Say, options: dict[str, Any], named: str
) -> None:
    interrupted(tiny, tmp_path / "run", say)
    with pytest.raises(ConfigError, match=named):
        run(tiny, tmp_path / "run", say, resume=True, **options)


def test_online_resumes_online(tiny: Any, tmp_path: Path, say: Say) -> None:
    run(tiny, tmp_path / "whole", say, teachers="online")
    interrupted(tiny, tmp_path / "cut", say, teachers="online")
    run(tiny, tmp_path / "cut", say, resume=True)
    assert last_bits(tmp_path / "whole") == last_bits(tmp_path / "cut")


def test_what_changes_no_weight_may_differ(tiny: Any, tmp_path: Path, say: Say) -> None:
    run(tiny, tmp_path / "whole", say)
    interrupted(tiny, tmp_path / "cut", say)
    run(
        tiny,
        tmp_path / "cut",
        say,
        resume=True,
        overrides=["train.workers=3", "cache.batch=5", "train.feature_threads=2"],
    )
    assert last_bits(tmp_path / "whole") == last_bits(tmp_path / "cut")


def test_a_shuffle_by_windows_of_shards_resumes(tiny: Any, tmp_path: Path, say: Say) -> None:
    window = ["train.shuffle_window=1"]
    run(tiny, tmp_path / "whole", say, overrides=window)
    interrupted(tiny, tmp_path / "cut", say, overrides=window)
    with pytest.raises(ConfigError, match=r"train.shuffle_window: the run has 1, now 2"):
        run(tiny, tmp_path / "cut", say, resume=True, overrides=["train.shuffle_window=2"])
    run(tiny, tmp_path / "cut", say, resume=True)
    assert last_bits(tmp_path / "whole") == last_bits(tmp_path / "cut")


def test_scores_come_from_the_images_the_run_was_trained_on(tiny: Any, tmp_path: Path, say: Say) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny.folder / "data", other)
    run(tiny, tmp_path / "run", say, root=other, train={"budget": "2-steps"})
    shutil.rmtree(tiny.folder / "data" / "Val")
    assert score(tmp_path / "run")["tiles"] == 8
    shutil.rmtree(other)
    with pytest.raises(DatasetError):
        score(tmp_path / "run")


def test_a_folder_that_grows_keeps_its_held_out_tiles(tmp_path: Path, tiny_experiment: Any, say: Say) -> None:
    """Generated splits: a new image, and a mask for one that had none, train; nothing moves into or out of test."""
    import yaml

    from rsmtdf.cli.caching import run_cache
    from rsmtdf.cli.planning import CacheJob, plan_cache
    from rsmtdf.cli.workspace import data_root, load_source
    from rsmtdf.testing.scenes import write_folder

    data = tmp_path / "data"
    write_folder(data, scenes=9, size=(64, 64), unlabelled=3)
    spec = {**tiny_experiment["dataset"], "layout": "folder", "label_map": []}
    experiment = {**tiny_experiment, "root": str(data), "dataset": spec, "splits": {"by": "scene", "labels": "all"}}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(experiment))

    def plan() -> CacheJob:
        source = load_source(dataset=None, config=tmp_path / "c.yaml", overrides=())
        return plan_cache(source, root=data_root(source, root=None), out=tmp_path / "s.zarr")

    first = plan()
    run_cache(first, device="cpu", stop=StopFlag(), say=say)
    images = sorted(p for p in (data / "images").iterdir())
    masks = {p.stem: p for p in (data / "masks").iterdir()}
    unlabelled = next(p for p in images if p.stem not in masks)
    shutil.copy(next(iter(masks.values())), data / "masks" / f"{unlabelled.stem}{next(iter(masks.values())).suffix}")
    shutil.copy(images[0], images[0].with_stem("aaa_new"))
    again = plan()
    assert (again.workspace.splits.val, again.workspace.splits.test) == (
        first.workspace.splits.val,
        first.workspace.splits.test,
    )
    assert set(again.workspace.labelled) - set(first.workspace.labelled) == {f"{unlabelled.stem}/0_0"}
    assert set(again.workspace.pool) - set(first.workspace.pool) == {"aaa_new/0_0"}
