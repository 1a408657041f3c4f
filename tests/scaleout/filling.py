"""Filling a store by workers that are killed at keyed moments; a module of its own, as worker processes import it."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

from rsmtdf.cli.worker import Order, TaskReport, fill_task
from rsmtdf.keyed import Draws
from rsmtdf.signals import StopFlag
from tests.scaleout.working import times


def fill_and_die(
    folder: Path, deaths: int, order: Order, units: tuple[int, ...], device: str, stop: StopFlag
) -> TaskReport:
    """`fill_task`; the process is killed in the first `deaths` tasks, a keyed moment after each has begun."""
    n = times(folder, "begun")
    first = n <= deaths
    if first:
        # The first call opens store and teachers; from then on a task of this size takes about as long as this.
        from rsmtdf.cli.worker import open_desk

        open_desk(order, device)
        moment_s = float(Draws("kill", str(n)).uniform(0.0, 0.15))
        timer = threading.Timer(moment_s, os.kill, (os.getpid(), signal.SIGKILL))
        timer.start()
    report = fill_task(order, units, device, stop)
    if first:
        (folder / f"survived.{n}").touch()
        timer.join()
    return report
