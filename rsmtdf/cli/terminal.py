"""What a user sees while work is going on: bars with rate and ETA, plain lines where there is no terminal."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from types import TracebackType
from typing import Any

from tqdm import tqdm

from rsmtdf.cli.amounts import size_text, time_text
from rsmtdf.errors import ConfigError

PLAIN_EVERY_S = 15.0


class Bar:
    """A tqdm bar on stderr; off a terminal, one plain line every quarter of a minute instead of a smear."""

    def __init__(self, label: str, *, unit: str, total: int | None = None) -> None:
        self._label, self._unit, self._total = label, unit, total
        self._plain = not sys.stderr.isatty()
        self._bar = tqdm(
            desc=label,
            unit=unit,
            unit_scale=unit == "B",  # bytes are told as MB and GB
            total=total,
            disable=self._plain,
            leave=False,
            dynamic_ncols=True,
        )
        self._done, self._begun, self._said = 0, time.monotonic(), time.monotonic()

    def __enter__(self) -> Bar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def advance(self, n: int, bytes_written: int | None = None) -> None:
        """n more units; `bytes_written` so far is shown beside them."""
        note = "" if bytes_written is None else f"{size_text(bytes_written)} written"
        self._show(self._done + n, note)

    def update_to(self, done: int, total: int) -> None:
        if self._total != total:
            self._total = self._bar.total = total
        self._show(done, "")

    def step(self, done: int, note: str) -> None:
        """`done` units, with a note (losses, mask ratio) beside them."""
        self._show(done, note)

    def _show(self, done: int, note: str) -> None:
        self._bar.update(done - self._done)
        if note:
            self._bar.set_postfix_str(note, refresh=False)
        self._done = done
        now = time.monotonic()
        if self._plain and now - self._said >= PLAIN_EVERY_S:
            self._said = now
            rate = done / max(now - self._begun, 1e-9)
            parts = [self._amount(done, rate)]
            if self._total and rate:
                parts.append(f"{time_text(max(self._total - done, 0) / rate)} left")
            print(f"{self._label}: {', '.join([*parts, note] if note else parts)}", file=sys.stderr, flush=True)

    def _amount(self, done: int, rate: float) -> str:
        """`120/480 views, 9.8 views/s`; bytes in their own units."""
        if self._unit == "B":
            return f"{size_text(done)}{f' of {size_text(self._total)}' if self._total else ''}, {size_text(rate)}/s"
        total = f"{self._total:,}" if self._total else "?"
        return f"{done:,}/{total} {self._unit}s, {rate:.1f} {self._unit}s/s"


def choose_device(name: str) -> Any:
    """The torch device called `name`; `auto` is the first accelerator there is, else the CPU.

    Raises:
        ConfigError: no such device on this machine.
    """
    import torch

    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # `meta` can be made, but not computed on
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(
            f"device {name!r} cannot be used here ({reason}); give cpu, cuda, cuda:1 or mps; --device auto picks one"
        ) from error
    return device


def say(text: str) -> None:
    """A line for the user; results go to stdout only where they were asked for as JSON or are the result."""
    print(text, file=sys.stderr, flush=True)


def confirmed(question: str, *, instead: str) -> bool:
    """What somebody at the terminal says to `question`.

    Raises:
        ConfigError: there is nobody; `instead` is the option that does without.
    """
    if not sys.stdin.isatty():
        raise ConfigError(f"nobody is there to be asked (standard input is no terminal); to go ahead, give {instead}")
    print(f"{question} [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in {"y", "yes"}


def show(result: Any, *, as_json: bool, text: str) -> None:
    """The result of a command on stdout: JSON if asked for, else `text`; the first of several ranks speaks for all."""
    ranks, rank = os.environ.get("WORLD_SIZE", "1"), os.environ.get("RANK", "0")  # as torchrun sets them
    if ranks == "1" or rank == "0":
        print(json.dumps(result, indent=1, ensure_ascii=False) if as_json else text, flush=True)


def log_to_stderr() -> None:
    """Lets the library's log lines through as plain text."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("rsmtdf").setLevel(logging.INFO)
