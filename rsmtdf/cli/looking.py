"""Behind the commands that look: init, data check, teachers, configs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from rsmtdf.cli.configs import shipped_config
from rsmtdf.cli.terminal import Bar
from rsmtdf.cli.workspace import data_root, load_source
from rsmtdf.data.check import check_dataset
from rsmtdf.data.dataset import Dataset
from rsmtdf.data.discover import Proposal, propose
from rsmtdf.errors import ConfigError, DatasetError
from rsmtdf.files import write_whole
from rsmtdf.specs import DatasetSpec, SplitSpec, to_dict
from rsmtdf.store.codecs import CODECS, bytes_per_view
from rsmtdf.teachers.presets import PRESETS
from rsmtdf.teachers.registry import describe, fetch

PAPER_GRID = (37, 37)
"""The student's patches in a 518 px view: what dense teachers match in the paper."""


def init_folder(folder: Path, *, overwrite: bool) -> str:
    """Writes `folder/rsmtdf.yaml` from what is found there; what was seen, and the next three commands.

    Raises:
        DatasetError: there is no such folder, or no image in it.
        ConfigError: the file exists and `overwrite` is false.
    """
    if not folder.is_dir():
        raise DatasetError(f"{folder} is not a folder; give the one that holds your images")
    path = folder / "rsmtdf.yaml"
    if path.exists() and not overwrite:
        raise ConfigError(f"{path} exists already; edit it, or replace it with --overwrite")
    proposal = propose(folder)
    _write(path, _yaml(proposal).encode())
    notes = "\n".join(f"- {note}" for note in proposal.notes)
    return (
        f"wrote {path}; please read it. What was seen:\n{notes}\n\nNext:\n"
        f"  rsmtdf data check --config {path}\n"
        f"  rsmtdf cache-features --config {path} --out {folder / 'feats.zarr'}\n"
        f"  rsmtdf train --cache {folder / 'feats.zarr'}"
    )


def check(
    *, dataset: str | None, config: Path | None, root: Path | None, overrides: Sequence[str]
) -> tuple[dict[str, Any], str]:
    """Everything that is wrong with a data set, as data and as text."""
    source = load_source(dataset=dataset, config=config, overrides=overrides)
    opened = Dataset(source.experiment.dataset, data_root(source, root=root))
    with Bar("checking", unit="file") as bar:
        report = check_dataset(opened, workers=source.experiment.cache.workers, progress=bar.update_to)
    return report.to_dict(), report.text()


def list_teachers() -> tuple[dict[str, Any], str]:
    """The presets with model, licence and size for the paper's 37 x 37 grid."""
    found: dict[str, Any] = {}
    lines = [f"{'name':<20} {'tokens':>7} {'dim':>5} {'int8 MB':>8} {'fp16 MB':>8}  {'licence':<22} model"]
    for name, source in PRESETS.items():
        spec = describe(source, student_grid=PAPER_GRID)
        size = {codec: bytes_per_view(codec, spec.tokens, spec.dim) for codec in CODECS}
        found[name] = {
            "library": source.library,
            "model": source.model,
            "weights": source.weights,
            "licence": source.licence,
            "origin": source.origin,
            "grid": list(spec.grid),
            "dim": spec.dim,
            "bytes_per_view": size,
        }
        lines.append(
            f"{name:<20} {spec.tokens:>7,} {spec.dim:>5} {size['int8'] / 1e6:>8.2f} {size['fp16'] / 1e6:>8.2f}  "
            f"{source.licence:<22} {source.library} {source.model}"
        )
    lines.append("Any other timm or open_clip model: name it in the configuration (library, model, weights).")
    return found, "\n".join(lines)


def fetch_teachers(names: Sequence[str]) -> str:
    """Downloads the weights of presets; where they are now."""
    if unknown := [n for n in names if n not in PRESETS]:
        raise ConfigError(f"no teacher preset called {', '.join(unknown)}; there are: {', '.join(PRESETS)}")
    return "\n".join(f"{name}: {fetch(PRESETS[name])}" for name in names)


def copy_config(name: str, dst: Path) -> str:
    """Copies a shipped configuration to `dst` (a file or a folder), never over an existing file."""
    source = shipped_config(name)
    target = dst / source.name if dst.is_dir() else dst
    if target.exists():
        raise ConfigError(f"{target} exists already; give another name")
    if not target.parent.is_dir():
        raise ConfigError(f"the folder {target.parent} does not exist")
    _write(target, source.read_bytes())
    return f"wrote {target}"


def _write(path: Path, data: bytes) -> None:
    try:
        write_whole(path, data)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from error


def _yaml(proposal: Proposal) -> str:
    """The configuration as a person would write it: only what differs from the defaults, notes as comments."""
    spec = _changed(to_dict(proposal.spec), DatasetSpec)
    splits = _changed(to_dict(proposal.splits), SplitSpec)
    sections: dict[str, Any] = {
        "root": ".",
        "dataset": {"tile_px": proposal.spec.tile_px, **spec},
        "splits": {"labels": proposal.splits.labels, **splits},
        "teachers": [{"name": "dinov2_vitb14"}, {"name": "clip_vitl14"}],
        "student": {"backbone": "vit_small_patch14_dinov2.lvd142m", "weights": "hub"},
        "train": {"recipe": "practical", "budget": "2h"},
    }
    head = [f"# {proposal.spec.name}: written by `rsmtdf init`; read it and correct what is wrong."]
    head += [f"# - {note}" for text in proposal.notes for note in text.splitlines()]
    body = yaml.safe_dump(sections, sort_keys=False, allow_unicode=True, default_flow_style=None, width=110)
    return "\n".join(head) + "\n" + body


def _changed(values: dict[str, Any], spec: Any) -> dict[str, Any]:
    """The entries whose value is not the field's default."""
    defaults = {f.name: f.default for f in dataclasses.fields(spec)}
    plain = {k: list(v) if isinstance(v, tuple) else v for k, v in defaults.items()}
    return {k: v for k, v in values.items() if plain[k] is dataclasses.MISSING or v != plain[k]}
