"""One YAML = one complete experiment: frozen pydantic models, and `load_experiment`, which reports every problem.

Defaults live here and in the specs only; the parts take keyword-only arguments without hidden hyper-parameters.
There is no interpolation, inheritance or include; the two training recipes are two visible dicts below.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from rsmtdf.errors import ConfigError
from rsmtdf.specs import DatasetSpec, SplitSpec, ViewRecipe, to_dict

Width = Annotated[int, Field(ge=1)]
Dtype = Literal["float32", "bfloat16", "float16"]


class Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


class TeacherConfig(Model):
    """A teacher: a preset's name alone, a preset with changes, or any timm / open_clip model described in full."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    preset: str | None = None
    """None: the preset called `name`, unless `library` and `model` are given."""
    library: str | None = None
    model: str | None = None
    weights: str | None = None
    """hub, random (asked for, never a fallback), or a file."""
    seed: int | None = None
    input_px: int | None = None
    layer: int | None = None
    final_norm: bool | None = None
    pos_embed: Literal["official", "timm", "native"] | None = None
    overrides: dict[str, bool | int | float | str] | None = None
    """Further arguments of the timm model, or fields of the open_clip vision config."""
    compute_dtype: Dtype | None = None
    fusion_weight: float = Field(0.1, ge=0, le=1)
    """The teacher's share in the fused features (0.1 in the paper, the student keeps the rest)."""

    def changes(self) -> dict[str, Any]:
        """The fields that were given, for `rsmtdf.teachers` to lay over the preset."""
        return self.model_dump(exclude_none=True, exclude={"name", "preset", "fusion_weight"})


class CacheConfig(Model):
    """Stage 1: how many views, in which codec, and how it runs."""

    codec: Literal["int8", "int4", "fp16"] = "int8"
    """Of the teachers' features: a half, 0.28 and all of half precision's bytes (docs/store-format.md)."""
    seeds: Literal["auto"] | int = "auto"
    """Strong views per tile of the pool; auto: at most 10, fitted to `max_gb`."""
    weak_views: Literal["auto"] | int = "auto"
    """Weak views per labelled tile; auto: clamp(20000 / labelled tiles, 64, 1000), at most what training can use."""
    plain: bool = False
    """Also the un-augmented view of every tile (for probes)."""
    store_pixels: bool = False
    """Also the views' pixels: training then neither decodes images nor augments them."""
    pool: Literal["train", "unlabelled"] = "train"
    """train: every training tile, so one cache serves all label sets; unlabelled: the paper's strict form."""
    pool_tiles: int | None = Field(None, ge=1)
    """Strong views of so many tiles of the pool, drawn by key (fewer are part of more); None: of all."""
    max_gb: float | None = Field(None, gt=0)
    """Of the store; None: half the free space."""
    batch: Literal["auto"] | int = "auto"
    """Views that teachers see at a time; auto: 8 on a CPU, on a GPU what is fastest there and fits its memory."""
    compile: bool = False
    """Run the teachers through torch.compile: faster on a GPU after a minute, and other last bits of features."""
    workers: int = Field(2, ge=0)
    max_failures: int = Field(0, ge=0)

    @field_validator("seeds", "weak_views", "batch")
    @classmethod
    def _at_least_one(cls, value: int | str) -> int | str:
        if isinstance(value, int) and value < 1:
            raise ValueError("must be auto or at least 1")
        return value


class StudentConfig(Model):
    """The student: a timm ViT, four of its layers, a DPT decoder, translators (design, section 1)."""

    backbone: str = "vit_small_patch14_dinov2"
    weights: str = "hub"
    """hub (the timm tag of `backbone`), random, or a file: an original DINOv2 .pth, a state dict, safetensors."""
    overrides: dict[str, bool | int | float | str] = {}
    img_px: int = Field(518, gt=0)
    """The input its position table is made for: 518 for DINOv2."""
    layers: tuple[int, int, int, int] = (2, 5, 8, 11)
    pos_embed: Literal["official", "timm"] = "official"
    dpt_features: int = Field(64, ge=4)
    dpt_channels: tuple[Width, Width, Width, Width] = (48, 96, 192, 384)
    translator_hidden: int = Field(1024, ge=1)
    fusion: bool = True


class TrainConfig(Model):
    """Stage 2. The values of `paper` are the published ones; `practical` differs where RECIPES says."""

    recipe: Literal["paper", "practical"] = "practical"
    method: str = "rs-mtdf"
    epochs: int | None = Field(None, ge=1)
    steps: int | None = Field(None, ge=1)
    budget: str | None = None
    """`20000-steps`, `20k-steps`, `2h`, `45min`: fitted once and frozen in the run; over `epochs` and `steps`."""
    batch: int = Field(32, ge=2, multiple_of=2)
    """Labelled images per step over all ranks; as many unlabelled ones join them."""
    micro_batch: int = Field(2, ge=2, multiple_of=2)
    """Of each kind, per forward pass; even, because a CutMix pair never leaves one micro-batch."""
    backbone_lr: float = Field(5e-6, gt=0)
    head_lr_factor: float = Field(40.0, gt=0)
    weight_decay: float = Field(0.01, ge=0)
    poly_power: float = 0.9
    ema_ratio: float = Field(0.996, ge=0, lt=1)
    conf_threshold: float = Field(0.95, ge=0, le=1)
    distill_loss: Literal["mse"] = "mse"
    normalise: Literal["global", "per_rank"] = "global"
    min_token_valid: float = Field(0.0, ge=0, le=1)
    """Tokens with a smaller valid share are left out of the distillation loss; 0 keeps all (as published)."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the forward passes; float16 would need loss scaling."""
    validate_every: int | None = Field(None, ge=1)
    """Steps between validations; None: once an epoch of the pool."""
    patience: int | None = Field(None, ge=1)
    """Validations without a better mIoU before training ends; None: never."""
    log_every: int = Field(10, ge=1)
    """Steps between lines of metrics.jsonl."""
    workers: int = Field(2, ge=1)
    """Threads that decode images and make views."""
    feature_threads: int | None = Field(None, ge=1)
    """Threads that read cached features ahead; None: as many as cores, at most 4 (16 for object storage)."""
    shuffle_window: int | None = Field(None, ge=1)
    """For network disks: an epoch's pairs come from this many shards at a time; None: from all (a full shuffle)."""
    stored_pixels: Literal["auto", "never"] = "auto"
    """auto: views whose pixels the store keeps are read from there; the batches are the same either way."""
    pixel_mismatch: Literal["error", "warn"] = "error"
    """What to do with a view whose pixels differ from those the teachers saw."""
    seed: int = 0

    @model_validator(mode="after")
    def _one_length(self) -> TrainConfig:
        given = [key for key in SCHEDULE_KEYS if getattr(self, key) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are all given: a run has one length")
        if self.batch % self.micro_batch:
            raise ValueError(f"batch {self.batch} is no multiple of micro_batch {self.micro_batch}")
        return self


SCHEDULE_KEYS = ("epochs", "steps", "budget")
METHOD_KEYS = ("method", "seed", "workers", "feature_threads", "shuffle_window")
"""What a change of recipe leaves as it is."""
DEFAULT_RECIPE = "practical"
MAX_DEPTH = 40
"""Of a configuration; a YAML alias can make it endless."""
RECIPES: dict[str, dict[str, Any]] = {
    # Section 1 of the design: 60 epochs, batch 32 + 32, fp32, thresholds and rates as published.
    "paper": {"epochs": 60, "normalise": "per_rank", "min_token_valid": 0.0, "patience": None},
    # A schedule in steps, frozen in the run; padding is not distilled; stops when validation stops improving.
    "practical": {"steps": 8000, "batch": 16, "min_token_valid": 0.5, "validate_every": 400, "patience": 10},
}


class Experiment(Model):
    """A complete experiment. `root` is where the images are; the command line's --root comes before it."""

    dataset: DatasetSpec
    root: str | None = None
    splits: SplitSpec = SplitSpec()
    views: ViewRecipe = ViewRecipe()
    teachers: tuple[TeacherConfig, ...] = (
        TeacherConfig(name="dinov2_vitb14"),
        TeacherConfig(name="clip_vitl14"),
    )
    cache: CacheConfig = CacheConfig()
    student: StudentConfig = StudentConfig()
    train: TrainConfig = TrainConfig.model_validate(RECIPES[DEFAULT_RECIPE])

    @field_validator("splits", mode="before")
    @classmethod
    def _labels_may_be_a_number(cls, splits: Any) -> Any:
        # `labels: 20` is what one writes, and YAML reads it as a number.
        if isinstance(splits, dict) and type(splits.get("labels")) is int:
            return {**splits, "labels": str(splits["labels"])}
        return splits

    @field_validator("teachers")
    @classmethod
    def _unique_names(cls, teachers: tuple[TeacherConfig, ...]) -> tuple[TeacherConfig, ...]:
        names = [t.name for t in teachers]
        if twice := sorted({n for n in names if names.count(n) > 1}):
            raise ValueError(f"teacher named twice: {', '.join(twice)}")
        if (total := sum(t.fusion_weight for t in teachers)) >= 1:
            raise ValueError(f"the fusion weights sum to {total:g}; the student's own share would be none")
        return teachers

    @field_validator("dataset")
    @classmethod
    def _sound_dataset(cls, spec: DatasetSpec) -> DatasetSpec:
        if not spec.classes:
            raise ValueError("classes is empty: name at least two")
        if len(spec.palette) != len(spec.classes):
            raise ValueError(f"{len(spec.classes)} classes but {len(spec.palette)} palette colours: one each")
        if len(set(spec.classes)) != len(spec.classes):
            raise ValueError("a class name occurs twice")
        if any(not 0 <= v <= 255 for colour in spec.palette for v in colour):
            raise ValueError("palette values are 0..255")
        if missing := [c for c in spec.excluded if c not in spec.classes]:
            raise ValueError(f"excluded names no class: {', '.join(missing)}")
        return spec

    @model_validator(mode="after")
    def _crop_fits_patch(self) -> Experiment:
        if self.views.crop_px < 1:
            raise ValueError(f"views.crop_px is {self.views.crop_px}")
        patch = self.student.overrides.get("patch_size") or _patch_of(self.student.backbone)
        if patch and self.views.crop_px % int(patch):
            near = round(self.views.crop_px / int(patch)) * int(patch)
            raise ValueError(
                f"views.crop_px {self.views.crop_px} is no multiple of the student's patch of {patch} px; "
                f"the nearest is {near}"
            )
        return self

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready; `Experiment.model_validate` is its inverse."""
        plain = self.model_dump(mode="json")
        for name in ("dataset", "splits", "views"):
            plain[name] = to_dict(getattr(self, name))
        return plain


def _patch_of(backbone: str) -> int | None:
    found = re.search(r"patch(\d+)", backbone)
    return int(found.group(1)) if found else None


def load_experiment(path: Path, *, train: Mapping[str, Any] | None = None, overrides: Sequence[str] = ()) -> Experiment:
    """The experiment in YAML file `path`, changed as `parse_experiment` says.

    Raises:
        ConfigError: no such file, no YAML, a duplicate key, or any invalid value; all of them in one message, each
            with the nearest known key where one is unknown.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not a text file in UTF-8") from error
    return parse_experiment(read_yaml(text, where=str(path)), train=train, overrides=overrides, where=str(path))


def parse_experiment(
    data: Mapping[str, Any], *, train: Mapping[str, Any] | None = None, overrides: Sequence[str] = (), where: str
) -> Experiment:
    """The experiment that `data` describes, with changes laid over it, each winning over what comes before.

    First a change of recipe, whether from `train` or from `overrides`: it puts that recipe's values in place of all
    of `train` but METHOD_KEYS. Then the other fields in `train`, then `overrides`. A length (one of SCHEDULE_KEYS)
    replaces whatever length came before it.

    Args:
        data: what a YAML file or a record holds; what it leaves out has its default.
        train: fields of the section `train`; None as a value says nothing.
        overrides: `a.b=value`, the value in YAML.
        where: names the origin of `data` in errors (see `load_experiment`).
    """
    merged: dict[str, Any] = _plain(dict(data), where=where)
    last: dict[str, Any] = {"train": {}}
    for assignment in overrides:
        _assign(last if assignment.startswith("train.") else merged, assignment)
    if isinstance(section := merged.get("train") or {}, dict):
        merged["train"] = _complete(_changed(section, {k: v for k, v in (train or {}).items() if v is not None}, last))
    try:
        return Experiment.model_validate(merged)
    except ValidationError as error:
        lines = _explained(error.errors())
        if overrides:
            where += f" with {', '.join(overrides)}"
        raise ConfigError(f"{where}: {len(lines)} problem{'s' * (len(lines) > 1)}\n" + "\n".join(lines)) from error


def _changed(section: Mapping[str, Any], train: Mapping[str, Any], last: Mapping[str, Any]) -> dict[str, Any]:
    """The section `train`, changed as `parse_experiment` says."""
    overriding = dict(last["train"])
    recipe = overriding.pop("recipe", None) or train.get("recipe")
    levels = [{k: v for k, v in train.items() if k != "recipe"}, overriding]
    now = dict(section)
    if recipe is not None and recipe != now.get("recipe", DEFAULT_RECIPE):
        # Unknown keys stay, so that they are reported.
        now = {k: v for k, v in now.items() if k in METHOD_KEYS or k not in TrainConfig.model_fields}
        now["recipe"] = recipe
    for level in levels:
        if any(level.get(key) is not None for key in SCHEDULE_KEYS):
            now = {k: v for k, v in now.items() if k not in SCHEDULE_KEYS}
        now |= level
    return now


def _complete(train: Mapping[str, Any]) -> dict[str, Any]:
    """The section `train` with its recipe's values where it has none of its own."""
    base = dict(RECIPES.get(str(train.get("recipe", DEFAULT_RECIPE)), {}))
    if any(train.get(key) is not None for key in SCHEDULE_KEYS):
        base = {k: v for k, v in base.items() if k not in SCHEDULE_KEYS}
    return {**base, **train}


def _plain(value: Any, *, where: str, at: tuple[str, ...] = ()) -> Any:
    """A copy of `value` in JSON's types.

    Raises:
        ConfigError: YAML has read a date, bytes or a set, or a list holds itself.
    """
    if len(at) > MAX_DEPTH:
        raise ConfigError(f"{where}: {'.'.join(at[:3])} is nested more than {MAX_DEPTH} deep")
    if isinstance(value, Mapping):
        return {str(key): _plain(item, where=where, at=(*at, str(key))) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, where=where, at=(*at, str(n))) for n, item in enumerate(value)]
    if value is None or isinstance(value, (str, int, float)):
        return value
    raise ConfigError(
        f"{where}: {'.'.join(at)} is read as a {type(value).__name__} ({value}), which no key takes; "
        f"put it in quotes if it is meant as text"
    )


def read_yaml(text: str, *, where: str) -> dict[str, Any]:
    """The mapping in a YAML text, read by the safe loader; a duplicate key is a `ConfigError`."""
    try:
        data = yaml.load(text, Loader=_UniqueKeyLoader)  # noqa: S506 (a SafeLoader)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date such as 2024-13-01
        raise ConfigError(f"{where} is not valid YAML: {error}") from error
    except RecursionError as error:
        raise ConfigError(f"{where} is nested too deep") from error
    if data is None:
        raise ConfigError(f"{where} is empty; it should hold a mapping (dataset: ..., views: ...)")
    if not isinstance(data, dict):
        raise ConfigError(f"{where} should hold a mapping (dataset: ..., views: ...), not {type(data).__name__}")
    return data


class _UniqueKeyLoader(yaml.SafeLoader):
    """PyYAML's safe loader, except that a key given twice is an error instead of a silent last-one-wins."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise yaml.constructor.ConstructorError(
                    None, None, f"a key should be a word, not {key!r}", key_node.start_mark
                )
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def _assign(data: dict[str, Any], assignment: str) -> None:
    path, eq, value = assignment.partition("=")
    if not eq or not path:
        raise ConfigError(f"--set {assignment!r} should read key.key=value, e.g. --set train.seed=1")
    try:
        parsed = _plain(yaml.safe_load(value), where=f"--set {path}", at=("the value",))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"--set {assignment!r}: the value is not valid YAML: {error}") from error
    *parents, last = path.split(".")
    here: Any = data
    for depth, key in enumerate(parents):
        if isinstance(here, dict) and here.get(key) is None:
            here[key] = {}  # a section that is not there, or is empty
        here = here[key] if isinstance(here, dict) else here[_index(here, key, path, parents[:depth])]
    here[last if isinstance(here, dict) else _index(here, last, path, parents)] = parsed


def _index(items: Any, key: str, path: str, parents: Sequence[str]) -> int:
    if not isinstance(items, list):
        raise ConfigError(f"--set {path}: {'.'.join(parents)} is a value ({items!r}), not a section")
    if key.isdecimal() and int(key) < len(items):
        return int(key)
    raise ConfigError(f"--set {path}: {key!r} is no position in a list of {len(items)}")


def _explained(problems: Sequence[Any]) -> list[str]:
    """A line for each problem; the branches of a union (`auto` or a number) that all failed share one."""
    shared: dict[str, tuple[list[str], str]] = {}
    for problem in problems:
        where, message, found = _explain(problem)
        shared.setdefault(where, ([], found))[0].append(message)
    return [f"  {where}: {', or '.join(messages)}{found}" for where, (messages, found) in shared.items()]


def _explain(problem: Any) -> tuple[str, str, str]:
    """Where, what (with the nearest key for an unknown one) and ` (found ...)` of one pydantic problem."""
    # Union branches ("int", "literal['auto']") and function markers are pydantic's own, not the user's keys.
    loc = [str(p) for p in problem["loc"]]
    where = ".".join(p for p in loc if re.fullmatch(r"[A-Za-z_0-9-]+", p) and p not in {"int", "str", "float", "bool"})
    message = str(problem["msg"]).removeprefix("Value error, ")
    if problem["type"] in {"extra_forbidden", "unexpected_keyword_argument"}:
        known = _known_keys(loc[:-1])
        near = difflib.get_close_matches(loc[-1], known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"known here: {', '.join(sorted(known))}"
        return where, f"no such key; {hint}", ""
    if problem["type"] == "missing":
        return where, "missing", ""
    found = problem.get("input")
    shown = "" if isinstance(found, (dict, BaseModel)) or dataclasses.is_dataclass(found) else f" (found {found!r})"
    return where or "experiment", message, shown


def _known_keys(loc: Sequence[str]) -> list[str]:
    here: Any = Experiment
    for part in loc:
        if part.isdigit():
            continue
        annotation = here.model_fields[part].annotation if hasattr(here, "model_fields") else None
        args = getattr(annotation, "__args__", ())
        here = next((a for a in args if isinstance(a, type) and issubclass(a, BaseModel)), annotation)
    if dataclasses.is_dataclass(here):
        return [f.name for f in dataclasses.fields(here)]
    return list(getattr(here, "model_fields", {}))
