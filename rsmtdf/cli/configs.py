"""The configurations that come with rsmtdf: found by name, in an installed wheel or in a checkout."""

from __future__ import annotations

import difflib
from pathlib import Path

from rsmtdf.errors import ConfigError


def configs_dir() -> Path:
    """`rsmtdf/_configs` of an installed wheel if it exists, else the checkout's `configs/`."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "_configs"
    return installed if installed.is_dir() else package.parent / "configs"


def shipped_configs() -> dict[str, Path]:
    """Name -> file of every shipped configuration, sorted."""
    return {p.stem: p for p in sorted(configs_dir().glob("*.yaml"))}


def shipped_config(name: str) -> Path:
    """The file of the shipped configuration `name`.

    Raises:
        ConfigError: there is none of that name; the message lists those there are.
    """
    known = shipped_configs()
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise ConfigError(
        f"no data set called {name!r}; {hint}shipped: {', '.join(known)}. "
        f"For your own images: rsmtdf init DIR, then --config DIR/rsmtdf.yaml"
    )


def summary(path: Path) -> str:
    """The first comment line of a configuration: what it is."""
    first = path.read_text(encoding="utf-8").partition("\n")[0]
    return first.lstrip("# ").strip()
