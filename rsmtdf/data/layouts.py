"""The layouts rsmtdf can read, by the name that `layout:` gives. A new one is one file and one entry here."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from rsmtdf.data.folder import FolderLayout
from rsmtdf.data.loveda import LovedaLayout
from rsmtdf.data.names import near
from rsmtdf.data.scene import Layout
from rsmtdf.errors import DatasetError

LAYOUTS: Mapping[str, Layout] = MappingProxyType({"folder": FolderLayout(), "loveda": LovedaLayout()})


def layout_of(name: str) -> Layout:
    """The layout called `name`.

    Raises:
        DatasetError: there is none; the message lists them.
    """
    if name not in LAYOUTS:
        raise DatasetError(f"no layout {name!r}; there are {', '.join(sorted(LAYOUTS))}{near(name, LAYOUTS)}")
    return LAYOUTS[name]
