"""Which rows of the store make up each training step: a pure function of (seed, step), so a run resumes exactly.

Unlabelled: an epoch walks one strong seed's CutMix pairs in keyed order; seeds cycle without replacement. Labelled:
an endless walk over the labelled tiles, each pass in a new keyed order and with each tile's next weak view. A global
batch is the same list of rows however it is cut into ranks and accumulations; a pair never leaves a micro-batch.

A network disk that reads single views slowly wants them from few files at a time: with a window, an epoch's shards
are put into keyed order and its pairs are shuffled among each `window` of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from rsmtdf.errors import TrainingError
from rsmtdf.keyed import Draws


@dataclass(frozen=True)
class StepRows:
    """The view rows of one global step: `labelled` (weak views) and `strong` (pairs adjacent), int64 [batch] each."""

    labelled: np.ndarray
    strong: np.ndarray

    def micro_batches(self, size: int, *, rank: int = 0, world: int = 1) -> list[StepRows]:
        """The micro-batches of `size` + `size` views that `rank` of `world` works on."""
        cuts = range(0, len(self.strong), size)
        parts = [StepRows(self.labelled[i : i + size], self.strong[i : i + size]) for i in cuts]
        return parts[rank::world]


class Schedule:
    """The rows of every step of a run.

    Args:
        pairs: strong seed -> int64 [n, 2], the rows of its CutMix pairs (over all generations).
        weak: int64 [labelled tiles, weak views], the rows of the labelled tiles' weak views; -1 where a tile has fewer.
        batch: labelled and unlabelled images per global step, each; a multiple of `world * micro_batch`.
        seed: the run's.
        shard_views: rows per shard of the store.
        window: shards that an epoch's pairs come from at a time (two windows meet within one step); None: all.

    Raises:
        TrainingError: no labelled tile, or a seed with fewer views than one batch.
    """

    def __init__(
        self,
        *,
        pairs: Mapping[int, np.ndarray],
        weak: np.ndarray,
        batch: int,
        seed: int,
        shard_views: int = 1,
        window: int | None = None,
    ) -> None:
        if not len(weak):
            raise TrainingError("no labelled tile has weak views in the store: nothing to learn classes from")
        if not pairs:
            raise TrainingError("the store has no strong views: run rsmtdf cache-features first")
        smallest = min(pairs, key=lambda s: len(pairs[s]))
        if 2 * len(pairs[smallest]) < batch:
            raise TrainingError(
                f"a batch needs {batch} unlabelled tiles, but the pool has only {2 * len(pairs[smallest])} in pairs; "
                f"lower train.batch to {2 * len(pairs[smallest])} or less, or add unlabelled images"
            )
        self._pairs = {s: np.asarray(p, dtype=np.int64) for s, p in sorted(pairs.items())}
        self._weak = np.asarray(weak, dtype=np.int64)
        self._views_per_tile = (self._weak >= 0).sum(axis=1)
        self._batch, self._seed = batch, seed
        self._shard_views, self._window = shard_views, window
        self.steps_per_epoch = 2 * len(self._pairs[smallest]) // batch
        self._pass_order = _Memo("labelled-pass", seed, n=len(self._weak))
        self._pair_order: tuple[int, np.ndarray] | None = None

    def digest(self) -> str:
        """The sha256 of everything that decides the rows of a step: a resumed run must have the same."""
        found = hashlib.sha256(f"{self._batch} {self._seed} {self._weak.shape}".encode())
        found.update(self._weak.tobytes())
        for seed, pairs in self._pairs.items():
            found.update(f"{seed} {len(pairs)}".encode())
            found.update(pairs.tobytes())
        if self._window is not None:
            found.update(f"window {self._window} of {self._shard_views}".encode())
        return found.hexdigest()

    def strong_seed(self, epoch: int) -> int:
        """The strong seed that `epoch` (from 0) uses: every seed once per cycle, each cycle in a new keyed order."""
        seeds = list(self._pairs)
        order = Draws("seed-cycle", self._seed, epoch // len(seeds)).permutation(len(seeds))
        return seeds[int(order[epoch % len(seeds)])]

    def rows(self, step: int) -> StepRows:
        """The rows of `step` (from 0)."""
        epoch, position = divmod(step, self.steps_per_epoch)
        half = self._batch // 2
        pairs = self._epoch_pairs(epoch)[position * half : (position + 1) * half]
        first = step * self._batch
        labelled = [self._labelled_row(first + j) for j in range(self._batch)]
        return StepRows(np.array(labelled, dtype=np.int64), pairs.reshape(-1))

    def _epoch_pairs(self, epoch: int) -> np.ndarray:
        if self._pair_order is None or self._pair_order[0] != epoch:
            pairs = self._pairs[self.strong_seed(epoch)]
            pairs = pairs[Draws("pairs", self._seed, epoch).permutation(len(pairs))]
            if self._window is not None:
                pairs = pairs[np.argsort(self._windows(pairs, epoch), kind="stable")]
            self._pair_order = (epoch, pairs)
        return self._pair_order[1]

    def _windows(self, pairs: np.ndarray, epoch: int) -> np.ndarray:
        """int64 [n]: the window of each pair; windows are `window` shards each, in the epoch's keyed order."""
        assert self._window is not None
        shards, which = np.unique(pairs[:, 0] // self._shard_views, return_inverse=True)
        place = np.argsort(Draws("shards", self._seed, epoch).permutation(len(shards)))
        return np.asarray(place[which] // self._window, dtype=np.int64)

    def _labelled_row(self, index: int) -> int:
        """The weak row of the `index`-th labelled image of the run: pass p shows each tile its p-th weak view."""
        n_pass, position = divmod(index, len(self._weak))
        tile = int(self._pass_order(n_pass)[position])
        views = int(self._views_per_tile[tile])
        cycle, turn = divmod(n_pass, views)
        order = Draws("weak-cycle", self._seed, tile, cycle).permutation(views)
        return int(self._weak[tile][self._weak[tile] >= 0][order[turn]])


class _Memo:
    """The last keyed permutation asked for: a step asks for the same pass many times."""

    def __init__(self, purpose: str, seed: int, *, n: int) -> None:
        self._purpose, self._seed, self._n = purpose, seed, n
        self._last: tuple[int, np.ndarray] | None = None

    def __call__(self, index: int) -> np.ndarray:
        if self._last is None or self._last[0] != index:
            self._last = (index, Draws(self._purpose, self._seed, index).permutation(self._n))
        return self._last[1]
