"""How stage 1 went, as data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class LedgerRow:
    """One shard that was committed: all that a worker tells of it."""

    shard: int
    views: int
    """Whose features were computed."""
    bytes_written: int


@dataclass
class CacheReport:
    """How stage 1 went. Seconds are busy time: `view` summed over threads, the others over the one that does them."""

    views: int = 0
    """Views whose features were computed."""
    features: dict[str, int] = field(default_factory=dict)
    """Teacher -> views that it has seen."""
    bytes_written: int = 0
    seconds: float = 0.0
    unreadable: dict[str, str] = field(default_factory=dict)
    """Tile id -> why it cannot be read; its views are missing, those that earlier runs skipped included."""
    partners_lost: int = 0
    """Views of tiles that can be read which are missing because their CutMix partner cannot."""
    changed: dict[int, str] = field(default_factory=dict)
    """Row -> how its pixels differ from those recorded; these views are missing."""
    ledger: list[LedgerRow] = field(default_factory=list)
    """In the order of their commits."""
    busy: dict[str, float] = field(default_factory=lambda: {"view": 0.0, "teacher": 0.0, "write": 0.0, "wait": 0.0})

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

    def limited_by(self, workers: int) -> str:
        """The part that took the longest: teachers, views (per worker) or writing."""
        shares = {
            "teachers": self.busy["teacher"],
            "views": self.busy["view"] / max(workers, 1),
            "writing": self.busy["write"],
        }
        return max(shares, key=lambda k: shares[k])

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
            "busy_seconds": {k: round(v, 3) for k, v in self.busy.items()},
        }
