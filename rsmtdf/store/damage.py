"""What a check of a store can find, as data: `Damage` is wrong and counts; a remark is worth knowing and does not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from rsmtdf.objects import StorePath

Kind = Literal["manifest", "teacher", "table", "metadata", "seal", "status", "features", "pixels", "note", "twin"]
"""What is damaged, by what can be done about it: the manifest, a teacher's attributes or statistics, and tables
(columns, tile ids) come from their twins; metadata of arrays and groups, sealed copies, notes and twins are written
again or dropped; status words and features are withdrawn and computed again, stored pixels (and their status words)
made again."""


@dataclass(frozen=True, kw_only=True)
class Damage:
    """One thing that is not as it was committed."""

    kind: Kind
    file: StorePath
    what: str
    teacher: str | None = None
    shard: int | None = None
    row: int | None = None
    view: str | None = None
    """The row in words."""

    def text(self) -> str:
        """One line that names everything known about it."""
        parts = [f"teacher {self.teacher!r}" if self.teacher else "", "stored pixels" if self.kind == "pixels" else ""]
        parts.append(f"view {self.view}" if self.view else "")
        where = ", ".join([*(p for p in parts if p), f"file {self.file}"])
        return f"{where}: {self.what}"

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "kind": self.kind,
            "file": str(self.file),
            "teacher": self.teacher,
            "row": self.row,
            "view": self.view,
            "what": self.what,
        }
