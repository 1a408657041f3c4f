"""Names that people write: paths that must stay inside the data root, and the nearest spelling of a typo."""

from __future__ import annotations

import difflib
import posixpath
from collections.abc import Iterable
from pathlib import Path

from rsmtdf.errors import DatasetError

_NEAR_LIMIT = 20_000


def near(name: str, known: Iterable[str]) -> str:
    """`; did you mean a, b?` for the known names closest to `name`, or nothing where none is close."""
    candidates = list(known)[:_NEAR_LIMIT]
    hits = difflib.get_close_matches(name, candidates, n=3, cutoff=0.6)
    return f"; did you mean {', '.join(hits)}?" if hits else ""


def inside(root: Path, name: str, *, what: str) -> str:
    """`name` as a normal POSIX path relative to `root` ('.' for the root itself).

    Only the text decides: symbolic links below the root are the user's own arrangement and are followed.

    Raises:
        DatasetError: an absolute path elsewhere, or one whose `..` lead out of the root.
    """
    text = name.replace("\\", "/")
    if posixpath.isabs(text):
        base = root.absolute().as_posix().rstrip("/")
        clean = posixpath.normpath(text)
        if clean != base and not clean.startswith(base + "/"):
            raise DatasetError(f"{what}: {name!r} lies outside the data root {root}; use a path relative to it")
        text = clean[len(base) + 1 :] or "."
    clean = posixpath.normpath(text)
    if clean == ".." or clean.startswith("../"):
        raise DatasetError(f"{what}: {name!r} leads out of the data root {root}; use a path inside it")
    return clean


def few(items: Iterable[str], limit: int = 5) -> str:
    """The first items, comma-separated, and how many more there are."""
    listed = list(items)
    more = f" and {len(listed) - limit} more" if len(listed) > limit else ""
    return ", ".join(listed[:limit]) + more
