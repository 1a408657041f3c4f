"""Work that the tests hand to crews; a module of its own, as worker processes import it. Imports no torch."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from rsmtdf.errors import TeacherError
from rsmtdf.signals import StopFlag


@dataclass(frozen=True)
class Done:
    units: tuple[int, ...]
    worker: int
    device: str
    seconds: float = 0.001
    refused: str | None = None


def times(folder: Path, name: str) -> int:
    """How often this was called with that name, this time included, over all processes."""
    n = 0
    while True:
        n += 1
        try:
            os.close(os.open(folder / f"{name}.{n}", os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            continue
        return n


def note(folder: Path, units: tuple[int, ...], device: str, stop: StopFlag) -> Done:
    """Leaves a file for each unit."""
    for unit in units:
        (folder / f"unit.{unit}").touch()
    return Done(units, os.getpid(), device)


def die_once(folder: Path, victim: int, units: tuple[int, ...], device: str, stop: StopFlag) -> Done:
    """Kills its process the first time it gets unit `victim`."""
    if victim in units and times(folder, "die") == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return note(folder, units, device, stop)


def die_always(folder: Path, victim: int, units: tuple[int, ...], device: str, stop: StopFlag) -> Done:
    if victim in units:
        os.kill(os.getpid(), signal.SIGKILL)
    return note(folder, units, device, stop)


def fail(folder: Path, units: tuple[int, ...], device: str, stop: StopFlag) -> Done:
    times(folder, "fail")
    time.sleep(0.2)
    raise TeacherError("teacher 'dense': no weights file here")


def linger(folder: Path, units: tuple[int, ...], device: str, stop: StopFlag) -> Done:
    """Goes on until it is told to stop."""
    (folder / f"begun.{units[0]}").touch()
    while True:
        stop.check("told to stop")
        time.sleep(0.01)


def linger_deaf(folder: Path, units: tuple[int, ...], device: str, stop: StopFlag) -> Done:
    """Does not listen."""
    (folder / f"begun.{units[0]}").touch()
    time.sleep(600)
    raise AssertionError("nobody ended it")


class Stubborn(Exception):
    """Not made again from its arguments."""

    def __init__(self, what: str, *, where: str) -> None:
        super().__init__(f"{what} is {where}")


def fail_stubbornly(units: tuple[int, ...], device: str, stop: StopFlag) -> Done:
    raise Stubborn("the disk", where="on fire")
