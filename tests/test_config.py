"""Configurations: every problem at once, the nearest key, exact round trips, and every shipped file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rsmtdf.config import RECIPES, Experiment, load_experiment, parse_experiment, read_yaml
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
    after = parse_experiment(before.as_dict(), train={"recipe": "paper", "batch": None}, where="x")
    assert (after.train.recipe, after.train.epochs, after.train.steps, after.train.seed) == ("paper", 60, None, 3)
    shorter = parse_experiment(before.as_dict(), train={"budget": "10-steps"}, where="x")
    assert (shorter.train.budget, shorter.train.steps) == ("10-steps", None)


def recorded(**train: Any) -> dict[str, Any]:
    """As a store or a run records it: every value explicit."""
    return parse_experiment({**MINIMAL, "train": train}, where="x").as_dict()


@pytest.mark.parametrize(
    ("overrides", "length"),
    [
        (["train.epochs=60"], (60, None, None)),
        (["train.steps=7"], (None, 7, None)),
        (["train.budget=2h"], (None, None, "2h")),
        (["train.steps=7", "train.steps=9"], (None, 9, None)),
    ],
)
def test_a_length_given_replaces_the_recorded_one(overrides: list[str], length: tuple[Any, ...]) -> None:
    for record in (recorded(), recorded(epochs=3), recorded(budget="20-steps")):
        train = parse_experiment(record, overrides=overrides, where="x").train
        assert (train.epochs, train.steps, train.budget) == length


def test_two_lengths_given_together_are_refused() -> None:
    assert "epochs and steps are all given" in problem(recorded(), "train.epochs=6", "train.steps=7")


def test_the_recipe_is_the_same_change_however_it_is_given() -> None:
    record = recorded(seed=3, workers=1, method="fixmatch", batch=4, precision="bfloat16", backbone_lr=0.5)
    by_option = parse_experiment(record, train={"recipe": "paper"}, where="x").train
    assert by_option == parse_experiment(record, overrides=["train.recipe=paper"], where="x").train
    assert (by_option.recipe, by_option.epochs, by_option.steps, by_option.batch) == ("paper", 60, None, 32)
    assert (by_option.normalise, by_option.patience, by_option.precision) == ("per_rank", None, "float32")
    assert (by_option.seed, by_option.workers, by_option.method) == (3, 1, "fixmatch"), "no part of a recipe"
    same = parse_experiment(record, overrides=["train.recipe=practical"], where="x").train
    assert same.batch == 4, "it is of that recipe already"


def test_set_wins_over_options_and_options_over_the_recipe() -> None:
    record = recorded(seed=3)
    given = ["train.precision=bfloat16", "train.micro_batch=8", "train.seed=7", "train.epochs=2"]
    for train in (
        parse_experiment(
            record, train={"recipe": "paper", "batch": 8, "budget": "2h"}, overrides=given, where="x"
        ).train,
        parse_experiment(
            record, train={"batch": 8, "budget": "2h"}, overrides=[*given, "train.recipe=paper"], where="x"
        ).train,
    ):
        assert (train.recipe, train.normalise, train.batch) == ("paper", "per_rank", 8)
        assert (train.precision, train.micro_batch, train.seed) == ("bfloat16", 8, 7)
        assert (train.epochs, train.steps, train.budget) == (2, None, None)
    # Only the end must be sound: a micro-batch of 32 is none of the recorded batch of 16.
    both = parse_experiment(record, train={"recipe": "paper"}, overrides=["train.micro_batch=32"], where="x").train
    assert both.micro_batch == 32
    last = parse_experiment(record, train={"recipe": "paper"}, overrides=["train.recipe=practical"], where="x").train
    assert last.recipe == "practical", "--set wins over --recipe too"


def test_a_change_of_recipe_hides_no_typing_error() -> None:
    text = problem({**MINIMAL, "train": {"conf_treshold": 0.9}}, "train.recipe=paper")
    assert "train.conf_treshold: no such key" in text
    assert "train.recipe" in problem(recorded(), "train.recipe=papre")


@pytest.mark.parametrize(
    ("yaml_text", "message"),
    [
        ("dataset: {name: 2024-05-01}", r"dataset.name is read as a date \(2024-05-01\).*in quotes"),
        ("splits: {labels: !!binary aGk=}", "splits.labels is read as a bytes"),
        ("dataset: {classes: !!set {a, b}}", "dataset.classes is read as a set"),
        ("dataset: {name: 2024-13-45}", "not valid YAML: month must be in 1..12"),
        ("? [a, b]\n: c", r"not valid YAML: a key should be a word, not \['a', 'b'\]"),
        ("dataset: &d {classes: [*d]}", "dataset.classes.0 is nested more than 40 deep"),
        ("[" * 3000, "nested too deep"),
    ],
)
def test_what_yaml_reads_and_no_key_takes_is_named(tmp_path: Path, yaml_text: str, message: str) -> None:
    (tmp_path / "my.yaml").write_text(yaml_text)
    with pytest.raises(ConfigError, match=rf"my\.yaml.*{message}"):
        load_experiment(tmp_path / "my.yaml")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("cache.batch.x.y=1", "--set cache.batch.x.y: cache.batch is a value (8), not a section"),
        ("dataset.name.x=1", "--set dataset.name.x: dataset.name is a value ('x'), not a section"),
        ("dataset.name=2024-05-01", "--set dataset.name: the value is read as a date (2024-05-01)"),
        ("dataset.name=2024-13-45", "the value is not valid YAML: month must be in 1..12"),
        ("dataset.name={[a]: b}", "the value is not valid YAML"),
        ("train.steps.x.y=1", "train.steps"),
    ],
)
def test_an_override_that_fits_nowhere_says_so(override: str, message: str) -> None:
    assert message in problem({**MINIMAL, "cache": {"batch": 8}}, override)


def test_an_override_fills_an_empty_section() -> None:
    data = {**MINIMAL, "train": None, "cache": None}
    experiment = parse_experiment(data, overrides=["train.seed=4", "cache.batch=2"], where="x")
    assert (experiment.train.seed, experiment.cache.batch) == (4, 2)


def test_teachers_are_named_once_and_leave_the_student_a_share() -> None:
    assert "teacher named twice: t" in problem({**MINIMAL, "teachers": [{"name": "t"}, {"name": "t"}]})
    text = problem({**MINIMAL, "teachers": [{"name": "t", "fusion_weight": 0.6}, {"name": "u", "fusion_weight": 0.4}]})
    assert "the student's own share would be none" in text
