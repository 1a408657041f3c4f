"""The arithmetic of time: what each part of stage 1 costs per view, and how long they take together.

The parts overlap, so a run takes as long as its slowest part, not as their sum. But they share the processor: on a
machine whose cores are all busy, as when teachers run on the CPU, it takes the CPU-seconds of all parts divided by
the cores. Both bounds are computed and the larger is the estimate.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Seconds per view (or per scene, or per byte)."""

    wall: float
    """Elapsed while nothing else runs."""
    cpu: float
    """Of all cores together."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """How long stage 1 will take."""

    seconds: float
    busy: Mapping[str, float]
    """Part -> seconds it is at work: views, teachers, writing, and processor (the CPU time of all, per core)."""
    limited_by: str
    """A key of `busy`."""
    cpu_seconds: float
    """Of all cores together, building the teachers not counted."""
    start_seconds: float
    """Of `seconds`: building the teachers and measuring channel statistics, before the first shard."""


@dataclass(frozen=True, kw_only=True)
class Pace:
    """What a calibration found on this machine."""

    device: str
    cores: int
    workers: int
    batch: int
    """Views per teacher batch that was timed; less than the run's where that would take too long."""
    view: Cost
    """Making a view of decoded scenes; `wall` with `workers` threads at it."""
    decode: Cost
    """Decoding a scene (or a window of a large one) that is not at hand; `wall` as above."""
    teachers: Mapping[str, Cost]
    """A forward pass, per view."""
    encode: Mapping[str, Cost]
    """Encoding a teacher's features and bringing them to the host, per view."""
    write: Cost | None
    """Per byte, to the disk and synced; None: not measured (object stores)."""
    read_bytes_per_second: float | None
    """Of one file that is not in memory; None: not measured."""
    build_seconds: float

    def estimate(
        self,
        *,
        views: int,
        features: Mapping[str, int],
        bytes_per_view: Mapping[str, int],
        statistics: Mapping[str, int],
        decodes: float,
        in_flight: int,
    ) -> Estimate:
        """How long it takes to make `views` and `features`.

        Args:
            views: to make.
            features: teacher -> views it shall see.
            bytes_per_view: of each teacher's features as stored.
            statistics: teachers new to the store -> views that their channel statistics are measured on, by one
                thread, before the first shard.
            decodes: scenes (or windows) that are decoded on the way.
            in_flight: views that move from part to part together; the first and the last of them overlap nothing.
        """
        seen = {name: n for name, n in features.items() if n}
        size = sum(n * bytes_per_view[name] for name, n in seen.items())
        write = self.write or Cost(wall=0.0, cpu=0.0)
        busy = {
            "views": views * self.view.wall + decodes * self.decode.wall,
            "teachers": sum(n * (self.teachers[name].wall + self.encode[name].wall) for name, n in seen.items()),
            "writing": size * write.wall,
        }
        cpu = views * self.view.cpu + decodes * self.decode.cpu + size * write.cpu
        cpu += sum(n * (self.teachers[name].cpu + self.encode[name].cpu) for name, n in seen.items())
        slowest = max(busy.values())
        alone = (sum(busy.values()) - slowest) * min(in_flight / views, 1.0) if views else 0.0
        busy["processor"] = cpu / self.cores
        start = sum(n * (self.view.cpu + self.teachers[name].wall) for name, n in statistics.items())
        start += self.build_seconds
        start_cpu = sum(n * (self.view.cpu + self.teachers[name].cpu) for name, n in statistics.items())
        return Estimate(
            seconds=start + max(slowest + alone, busy["processor"]),
            busy=busy,
            limited_by=max(busy, key=lambda part: busy[part]),
            cpu_seconds=start_cpu + cpu,
            start_seconds=start,
        )

    def online_seconds(self, names: Mapping[str, int]) -> float:
        """What the teachers of `names` would add to training, per view."""
        return sum(self.teachers[name].wall for name in names)


@dataclass(frozen=True, kw_only=True)
class TrainingPace:
    """What one training step of the chosen recipe costs, as measured on random pixels."""

    device: str
    step_seconds: float
    """Of a whole batch; from a single micro-batch."""
    micro_batches: int
    """That a step has; one of them was timed."""
    peak_bytes: int
    """Of the device's memory; on the CPU, of the process."""
