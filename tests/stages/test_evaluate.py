"""Evaluation of a student on labelled tiles, and of a run on its own data set."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from rsmtdf.config import parse_experiment
from rsmtdf.data.dataset import Dataset
from rsmtdf.data.splits import make_splits
from rsmtdf.data.synthetic import CLASSES
from rsmtdf.errors import CheckpointError, DatasetError
from rsmtdf.inference.whole import whole_image
from rsmtdf.learning.run import RunFolder
from rsmtdf.pixels import normalise
from rsmtdf.signals import Interrupted, StopFlag
from rsmtdf.specs import to_dict
from rsmtdf.stages.evaluate import evaluate, evaluate_run
from rsmtdf.student.artifact import save_student
from rsmtdf.student.model import StudentSpec, build_student
from rsmtdf.testing.scenes import AwkwardScenes, write_awkward_scenes

CPU = torch.device("cpu")
TINY = StudentSpec(
    classes=7,
    backbone="vit_small_patch16_224",
    overrides=(("depth", 4), ("embed_dim", 16), ("num_heads", 2), ("patch_size", 10)),
    img_px=60,
    layers=(0, 1, 2, 3),
    dpt_features=8,
    dpt_channels=(8, 8, 8, 8),
    translator_hidden=8,
)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> AwkwardScenes:
    return write_awkward_scenes(tmp_path_factory.mktemp("awkward"))


@pytest.fixture(scope="module")
def dataset(scenes: AwkwardScenes) -> Dataset:
    return Dataset(scenes.alpha_spec, scenes.alpha)


@pytest.fixture(scope="module")
def student():
    built = build_student(TINY, seed=1)
    with torch.no_grad():
        built.decoder.predict[-1].bias.sub_(built(torch.zeros(1, 3, 60, 60)).logits.mean(dim=(0, 2, 3)))
    return built


def test_scores_are_those_of_the_pixels_that_are_labelled_and_valid(dataset: Dataset, student) -> None:
    tiles = [t for t in dataset.tiles() if t.mask is not None]
    seen: list[tuple[int, int]] = []
    student.train()
    found = evaluate(student, dataset, tiles, device=CPU, batch=4, progress=lambda *s: seen.append(s))
    assert student.training
    confusion = np.zeros((7, 7), np.int64)
    for tile in tiles:
        rgb, valid = dataset.read_image(tile)
        label = dataset.read_label(tile)
        x = normalise(torch.from_numpy(rgb)[None])
        with torch.no_grad():
            predicted = whole_image(lambda x: student(x).logits, x, patch_px=10).argmax(1)[0].numpy()
        counted = valid & (label != 255)
        np.add.at(confusion, (label[counted], predicted[counted]), 1)
    assert found["confusion"] == confusion.tolist()
    assert found["pixels"] == confusion.sum()
    assert found["tiles"] == len(tiles)
    assert found["miou"] == pytest.approx(
        np.mean([c["iou"] for c in found["per_class"].values() if c["iou"] is not None])
    )
    assert {"per_class", "oa", "mf1", "kappa", "seconds"} <= set(found)
    assert list(found["per_class"]) == list(CLASSES)
    assert seen[-1] == (len(tiles), len(tiles))
    assert len(seen) == -(-len(tiles) // 4)
    json.dumps(found, allow_nan=False)


def test_batch_size_and_workers_do_not_matter(dataset: Dataset, student) -> None:
    tiles = [t for t in dataset.tiles() if t.mask is not None][:5]
    one = evaluate(student, dataset, tiles, device=CPU, batch=1, workers=1)
    many = evaluate(student, dataset, tiles, device=CPU, batch=8, workers=3)
    difference = np.abs(np.array(one["confusion"]) - np.array(many["confusion"])).sum()
    assert difference <= 2, "more than ties differ"


def test_labels_are_needed(dataset: Dataset, student) -> None:
    with pytest.raises(DatasetError, match=r"labels needed: 1 of \d+ tiles to evaluate have no mask \(corner/0_0\)"):
        evaluate(student, dataset, dataset.tiles(), device=CPU)
    with pytest.raises(DatasetError, match="no tile to evaluate"):
        evaluate(student, dataset, [], device=CPU)


def test_another_number_of_classes_is_refused(scenes: AwkwardScenes, dataset: Dataset) -> None:
    other = build_student(StudentSpec.from_dict({**TINY.to_dict(), "classes": 5}), seed=1)
    with pytest.raises(CheckpointError, match="tells 5 classes apart, data set awkward-alpha has 7"):
        evaluate(other, dataset, [t for t in dataset.tiles() if t.mask], device=CPU)


def test_a_stop_ends_between_batches(dataset: Dataset, student) -> None:
    flag = StopFlag()
    flag.signum = 2
    tiles = [t for t in dataset.tiles() if t.mask is not None]
    student.eval()
    with pytest.raises(Interrupted, match="after 2 of"):
        evaluate(student, dataset, tiles, device=CPU, batch=2, stop=flag)


def test_a_run_is_evaluated_on_a_split_of_its_own_data_set(
    tmp_path: Path, scenes: AwkwardScenes, dataset: Dataset, student
) -> None:
    experiment = parse_experiment(
        {
            "dataset": to_dict(scenes.alpha_spec),
            "splits": {"by": "tile", "fractions": [0.4, 0.2, 0.4]},
            "views": {"crop_px": 60},
            "student": {"backbone": TINY.backbone, "overrides": {"patch_size": 10}},
        },
        where="test",
    )
    splits = make_splits(dataset, dataset.tiles(), experiment.splits, base=tmp_path)
    tiles = {"labelled": splits.train, "val": splits.val, "test": splits.test}
    run = RunFolder.create(tmp_path / "run", config={"config": experiment.as_dict(), "tiles": tiles})
    with pytest.raises(CheckpointError, match="no such file"):
        evaluate_run(run.path, root=scenes.alpha, device=CPU)
    meta = {"dataset": to_dict(scenes.alpha_spec), "crop_px": 60, "run": {"step": 12}}
    save_student(run.best, student, meta=meta)
    found = evaluate_run(run.path, root=scenes.alpha, device=CPU, split="test")
    direct = evaluate(student, dataset, [dataset.tile(i) for i in splits.test], device=CPU)
    assert splits.test
    assert found["confusion"] == direct["confusion"]
    assert (found["split"], found["step"], found["run"]) == ("test", 12, str(run.path))
    with pytest.raises(DatasetError, match=r"no split or list file 'tset'.*did you mean test"):
        evaluate_run(run.path, root=scenes.alpha, device=CPU, split="tset")
    with pytest.raises(CheckpointError, match="no run folder"):
        evaluate_run(tmp_path, root=scenes.alpha, device=CPU)
