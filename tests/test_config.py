"""Configurations: every problem at once, the nearest key, exact round trips, and every shipped file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rsmtdf.config import RECIPES, Experiment, load_experiment, parse_experiment, read_yaml, with_train
from rsmtdf.errors import ConfigError

CONFIGS = Path(__file__).parents[1] / "configs"
MINIMAL: dict[str, Any] = {"dataset": {"name": "x", "classes": ["a", "b"], "palette": [[0, 0, 0], [9, 9, 9]]}}


def problem(data: dict[str, Any], *overrides: str) -> str:
    with pytest.raises(ConfigError) as error:
        parse_experiment(data, overrides=overrides, where="my.yaml")
    return str(error.value)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.stem)
def test_every_shipped_config_loads_and_round_trips(path: Path) -> None:
    experiment = load_experiment(path)
    assert Experiment.model_validate(experiment.as_dict()) == experiment
    assert path.read_text().startswith("# "), "the first line says what it is"


def test_an_unknown_key_names_the_nearest() -> None:
    assert "trian: no such key; did you mean train?" in problem({**MINIMAL, "trian": {}})
    assert "train.conf_treshold: no such key; did you mean conf_threshold?" in problem(
        {**MINIMAL, "train": {"conf_treshold": 0.9}}
    )
    text = problem({"dataset": {**MINIMAL["dataset"], "tile_pixels": 3}})
    assert "dataset.tile_pixels: no such key; did you mean tile_px?" in text


def test_all_problems_are_reported_at_once() -> None:
    text = problem({**MINIMAL, "train": {"batch": 0, "seed": "x"}, "cache": {"seeds": 0}, "veiws": {}})
    assert "4 problems" in text
    assert all(where in text for where in ("train.batch", "train.seed", "cache.seeds", "veiws"))


@pytest.mark.parametrize("value", ["nan", ".nan", ".inf"])
def test_a_number_that_is_none_is_refused(value: str) -> None:
    assert "finite" in problem(MINIMAL, f"train.backbone_lr={value}")
    assert "finite" in problem(MINIMAL, f"views.hflip_p={value}")


def test_a_duplicate_key_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "twice.yaml"
    path.write_text("train:\n  seed: 1\n  seed: 2\n")
    with pytest.raises(ConfigError, match=r"twice.yaml is not valid YAML: key 'seed' is given twice"):
        load_experiment(path)


def test_python_objects_in_yaml_are_refused() -> None:
    with pytest.raises(ConfigError, match="not valid YAML"):
        read_yaml("a: !!python/object/apply:os.getcwd []", where="evil.yaml")


def test_a_crop_off_the_patch_names_the_nearest_crop() -> None:
    assert "crop_px 500 is no multiple of the student's patch of 14 px; the nearest is 504" in problem(
        MINIMAL, "views.crop_px=500"
    )


def test_missing_file_and_missing_parts(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read the configuration"):
        load_experiment(tmp_path / "none.yaml")
    assert "dataset: missing" in problem({})
    assert "dataset.classes: missing" in problem({"dataset": {"name": "x", "palette": []}})


def test_palette_and_classes_must_match() -> None:
    assert "2 classes but 1 palette colours" in problem({"dataset": {**MINIMAL["dataset"], "palette": [[0, 0, 0]]}})


def test_overrides_reach_nested_values_and_lists() -> None:
    overrides = ["train.backbone_lr=5e-6", "dataset.classes.1=tree", "splits.labels=5%"]
    experiment = parse_experiment(MINIMAL, overrides=overrides, where="x")
    assert experiment.train.backbone_lr == 5e-6, "PyYAML reads 5e-6 as a string"
    assert experiment.dataset.classes == ("a", "tree")
    assert experiment.splits.labels == "5%"
    assert "should read key.key=value" in problem(MINIMAL, "train.seed")
    assert "no position in a list" in problem(MINIMAL, "dataset.classes.7=tree")


def test_the_recipe_fills_what_is_not_given() -> None:
    paper = parse_experiment({**MINIMAL, "train": {"recipe": "paper", "batch": 8}}, where="x").train
    assert (paper.epochs, paper.batch, paper.normalise) == (60, 8, "per_rank")
    assert (paper.backbone_lr, paper.head_lr_factor, paper.weight_decay) == (5e-6, 40, 0.01)
    assert (paper.conf_threshold, paper.ema_ratio, paper.poly_power) == (0.95, 0.996, 0.9)
    practical = parse_experiment(MINIMAL, where="x").train
    assert practical.steps == RECIPES["practical"]["steps"]


def test_one_length_only() -> None:
    train = parse_experiment({**MINIMAL, "train": {"budget": "2h"}}, where="x").train
    assert (train.budget, train.steps, train.epochs) == ("2h", None, None)
    assert "a run has one length" in problem({**MINIMAL, "train": {"budget": "2h", "steps": 5}})


def test_options_change_the_recipe_and_the_length() -> None:
    before = parse_experiment({**MINIMAL, "train": {"steps": 5, "seed": 3}}, where="x")
    after = with_train(before, {"recipe": "paper", "batch": None}, where="x")
    assert (after.train.recipe, after.train.epochs, after.train.steps, after.train.seed) == ("paper", 60, None, 3)
    shorter = with_train(before, {"budget": "10-steps"}, where="x")
    assert (shorter.train.budget, shorter.train.steps) == ("10-steps", None)


def test_teachers_are_named_once_and_leave_the_student_a_share() -> None:
    assert "teacher named twice: t" in problem({**MINIMAL, "teachers": [{"name": "t"}, {"name": "t"}]})
    text = problem({**MINIMAL, "teachers": [{"name": "t", "fusion_weight": 0.6}, {"name": "u", "fusion_weight": 0.4}]})
    assert "the student's own share would be none" in text
