"""Looking at a store with its teachers: are the stored features still what these make of the images?

Checksums prove that bytes are those that were written. This check proves what they mean: on a keyed sample of views it
makes the pixels again, shows them to the teachers, and compares. Features are compared after standardising their
channels, because a few massive channels would make any two teachers look alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch

from rsmtdf.keyed import Draws
from rsmtdf.signals import StopFlag
from rsmtdf.specs import STREAMS, Teacher
from rsmtdf.store.codecs import STD_FLOOR
from rsmtdf.store.reader import FeatureReader
from rsmtdf.store.status import DONE, crc_of, state_of
from rsmtdf.store.store import FeatureStore
from rsmtdf.store.stored_teacher import StoredTeacher
from rsmtdf.views.maker import UnreadableTile, ViewMaker
from rsmtdf.views.params import PARAM_DTYPE, draw_params, same_params
from rsmtdf.views.view import View, view_crc

MIN_COSINE: Mapping[str, float] = {"fp16": 0.99, "int8": 0.99, "int4": 0.97}
"""Below it, features are not this teacher's. Another device or dtype costs 1e-4, int8 5e-5 and int4 5e-3 (a relative
error e costs e**2 / 2); another layer, model or input size gives less than 0.9."""


@dataclass(kw_only=True)
class LiveCheck:
    """One teacher's features, made again."""

    min_cosine: float
    """What is asked for."""
    compared: int = 0
    cosine: list[float] = field(default_factory=list)
    """Per view, over all its tokens' standardised channels."""
    max_abs_difference: float = 0.0
    """Of any value, in the teacher's own units."""
    relative_error: list[float] = field(default_factory=list)
    """Per view: L2 norm of the difference of standardised features / that of the teacher's."""
    other_pixels: list[str] = field(default_factory=list)
    """Views, in words, whose pixels differ from the recorded checksum; they are not compared."""
    unreadable: dict[str, str] = field(default_factory=dict)
    """Views, in words, that cannot be made now, and why."""
    other_draws: dict[str, list[str]] = field(default_factory=dict)
    """Views, in words, whose stored parameters are not those that would be drawn today, and which."""

    @property
    def is_same_teacher(self) -> bool:
        return all(c >= self.min_cosine for c in self.cosine)

    @property
    def is_sound(self) -> bool:
        """Whether what could be compared is the same, pixels and features."""
        return self.is_same_teacher and not self.other_pixels

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        found = asdict(self)
        del found["cosine"], found["relative_error"]
        return found | {
            "cosine_mean": float(np.mean(self.cosine)) if self.cosine else None,
            "cosine_min": min(self.cosine, default=None),
            "relative_error_mean": float(np.mean(self.relative_error)) if self.relative_error else None,
            "same_teacher": self.is_same_teacher,
            "sound": self.is_sound,
        }


def live_check(
    store: FeatureStore,
    *,
    teachers: Mapping[str, Teacher],
    maker: ViewMaker,
    views: int,
    batch: int,
    stop: StopFlag,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, LiveCheck]:
    """Teacher -> what comes out for `views` keyed-random views that are done; fewer where the store has fewer.

    Args:
        store: whose features.
        teachers: name -> teacher; the store has them all.
        maker: of the store's views.
        views: how many per teacher.
        batch: views shown to a teacher at a time.
        stop: ends the check between batches.
        progress: told views compared, and views in all.

    Raises:
        StoreMismatch: a teacher has another identity than the stored one (each field, expected and found).
        StoreCorrupt: a stored view is damaged.
        Interrupted: a signal came.
    """
    samples = {}
    for name, teacher in teachers.items():
        store.expect_teacher(teacher.spec, store.teacher(name).codec)
        samples[name] = _sample(store, name, views)
    total, before = sum(len(rows) for rows in samples.values()), 0
    checks: dict[str, LiveCheck] = {}
    for name, rows in samples.items():
        stored = store.teacher(name)
        check = checks[name] = LiveCheck(min_cosine=MIN_COSINE.get(stored.codec, min(MIN_COSINE.values())))
        with FeatureReader(store, name) as reader:
            for start in range(0, len(rows), batch):
                stop.check("stopped; nothing was changed")
                part = _comparable(store, maker, rows[start : start + batch], check)
                if part:
                    _compare(teachers[name], stored, reader, part, check)
                before += len(rows[start : start + batch])
                progress(before, total)
    return checks


def _sample(store: FeatureStore, teacher: str, views: int) -> np.ndarray:
    """int64 rows, keyed by store and teacher, ascending."""
    done = np.flatnonzero((state_of(store.status(teacher)) == DONE) & (state_of(store.view_status()) == DONE))
    return np.sort(done[Draws("live check", store.identity, teacher).permutation(len(done))[:views]])


def _comparable(store: FeatureStore, maker: ViewMaker, rows: np.ndarray, check: LiveCheck) -> dict[int, View]:
    """The views of `rows` that have the recorded pixels; the others go to `check`."""
    recorded = crc_of(store.view_status())
    good: dict[int, View] = {}
    for row in rows.tolist():
        view, words = maker.attempted([row])[0], store.describe(row)
        if fields := _other_draws(store, row):
            check.other_draws[words] = fields
        if isinstance(view, UnreadableTile):
            check.unreadable[words] = str(view)
        elif view_crc(view) != recorded[row]:
            check.other_pixels.append(words)
        else:
            good[row] = view
    return good


def _other_draws(store: FeatureStore, row: int) -> list[str]:
    """The fields in which the stored parameters of a view differ from its keyed draw."""
    stored = np.zeros((), PARAM_DTYPE)
    for name in PARAM_DTYPE.names or ():
        stored[name] = store.column(name)[row]
    drawn = draw_params(
        store.recipe,
        tile_id=store.tile_ids[int(store.column("tile")[row])],
        tile_px=store.dataset.tile_px,
        stream=STREAMS[int(store.column("stream")[row])],
        seed=int(store.column("seed")[row]),
    )
    return same_params(stored, drawn)


def _compare(
    teacher: Teacher, stored: StoredTeacher, reader: FeatureReader, views: Mapping[int, View], check: LiveCheck
) -> None:
    device = getattr(teacher, "device", torch.device("cpu"))
    pixels = torch.from_numpy(np.stack([view.pixels for view in views.values()])).to(device)
    live = teacher(pixels).detach().to("cpu", torch.float64)
    encoded = {name: torch.from_numpy(values) for name, values in reader.get_many(list(views)).items()}
    kept = stored.decode(encoded, device=torch.device("cpu")).to(torch.float64)
    mean, std = (torch.from_numpy(x).to(torch.float64) for x in (stored.mean, stored.std.clip(min=STD_FLOOR)))
    a, b = ((x - mean).div(std).flatten(1) for x in (live, kept))
    check.compared += len(views)
    check.cosine += torch.nn.functional.cosine_similarity(a, b, dim=1).tolist()
    check.relative_error += ((a - b).norm(dim=1) / a.norm(dim=1).clamp(min=1e-12)).tolist()
    check.max_abs_difference = max(check.max_abs_difference, float((live - kept).abs().max()))
