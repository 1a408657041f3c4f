"""How stage 1 went, as data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from rsmtdf.stages.cache.trace import PARTS

IDLE = 0.1
"""The share of the time that a device may stand still before something else is said to limit it."""


@dataclass(frozen=True, kw_only=True)
class LedgerRow:
    """One shard that was committed: all that a worker tells of it."""

    shard: int
    views: int
    """Whose features were computed."""
    bytes_written: int
    """Features, and pixels that were stored along with them."""


@dataclass
class CacheReport:
    """How stage 1 went."""

    views: int = 0
    """Views whose features were computed."""
    features: dict[str, int] = field(default_factory=dict)
    """Teacher -> views that it has seen."""
    bytes_written: int = 0
    seconds: float = 0.0
    """From beginning to end."""
    devices: int = 1
    """That computed at the same time."""
    batch: int = 0
    """Views shown at a time in the end: fewer than asked for where memory ran out."""
    unreadable: dict[str, str] = field(default_factory=dict)
    """Tile id -> why it cannot be read; its views are missing, those that earlier runs skipped included."""
    partners_lost: int = 0
    """Views of tiles that can be read which are missing because their CutMix partner cannot."""
    changed: dict[int, str] = field(default_factory=dict)
    """Row -> how its pixels differ from those recorded; these views are missing."""
    ledger: list[LedgerRow] = field(default_factory=list)
    """In the order of their commits."""
    busy: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    """Part -> seconds; see `PARTS`."""

    def add(self, other: CacheReport) -> None:
        """Takes in what another worker did; `seconds` stay this report's own."""
        self.views += other.views
        self.bytes_written += other.bytes_written
        self.partners_lost += other.partners_lost
        for name, views in other.features.items():
            self.features[name] = self.features.get(name, 0) + views
        for part, seconds in other.busy.items():
            self.busy[part] = self.busy.get(part, 0.0) + seconds
        self.unreadable.update(other.unreadable)
        self.changed.update(other.changed)
        self.ledger += other.ledger

    @property
    def device_share(self) -> float:
        """The part of the time in which the devices computed and encoded, 0 to 1."""
        return min((self.busy["teacher"] + self.busy["encode"]) / max(self.seconds * self.devices, 1e-9), 1.0)

    @property
    def limited_by(self) -> str:
        """What to give more to: the teachers' device, or views or writing, for want of which it stood still."""
        idle = {"views": self.busy["wait"], "writing": self.busy["held"]}
        longest = max(idle, key=lambda k: idle[k])
        return longest if idle[longest] > IDLE * max(self.seconds * self.devices, 1e-9) else "teachers"

    def as_dict(self) -> dict[str, Any]:
        rate = self.views / self.seconds if self.seconds else 0.0
        return {
            "views": self.views,
            "features": self.features,
            "bytes_written": self.bytes_written,
            "seconds": round(self.seconds, 3),
            "views_per_second": round(rate, 3),
            "unreadable_tiles": self.unreadable,
            "partners_lost": self.partners_lost,
            "changed_views": len(self.changed),
            "device_busy": round(self.device_share, 4),
            "busy_seconds": {k: round(v, 3) for k, v in self.busy.items()},
        }
