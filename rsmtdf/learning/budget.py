"""How long a run is: epochs, steps, or a budget such as `2h` or `20k-steps`, turned into a fixed number of steps."""

from __future__ import annotations

import re

from rsmtdf.errors import ConfigError

_SECONDS = {"s": 1.0, "min": 60.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def parse_budget(text: str) -> tuple[str, float]:
    """("steps", n) or ("seconds", s) of `20000-steps`, `20k-steps`, `45min`, `2h`, `1.5d`.

    Raises:
        ConfigError: anything else.
    """
    if match := re.fullmatch(r"(\d+(?:\.\d+)?)(k?)[- ]?(?:steps?|it)", text.strip()):
        steps = float(match[1]) * (1000 if match[2] else 1)
        if steps >= 1:
            return "steps", steps
    if match := re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|min|m|h|d)", text.strip()):
        seconds = float(match[1]) * _SECONDS[match[2]]
        if seconds > 0:
            return "seconds", seconds
    raise ConfigError(
        f"budget {text!r} is neither a time (45min, 2h, 1.5d) nor a number of steps (20000-steps, 20k-steps)"
    )


def total_steps(
    *, epochs: int | None, steps: int | None, budget: str | None, steps_per_epoch: int, step_seconds: float | None
) -> int:
    """The length of a run in steps, at least 1.

    Args:
        step_seconds: how long a step takes; needed (and only read) where the budget is a time.

    Raises:
        ConfigError: none of the three is given.
    """
    if budget is not None:
        kind, amount = parse_budget(budget)
        if kind == "steps":
            return int(amount)
        if step_seconds is None:
            raise ConfigError(f"a budget of {budget} needs a measured step time")
        return max(int(amount / step_seconds), 1)
    if steps is not None:
        return steps
    if epochs is not None:
        return epochs * steps_per_epoch
    raise ConfigError("how long shall it train? Set train.epochs, train.steps or train.budget (2h, 20k-steps)")
