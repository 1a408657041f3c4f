"""What a training step costs: one micro-batch of random pixels, forward and backward, with optimiser and EMA."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch

from rsmtdf.cli.students import student_spec
from rsmtdf.config import Experiment
from rsmtdf.errors import ConfigError
from rsmtdf.keyed import key_seed
from rsmtdf.learning.batch import MicroBatch
from rsmtdf.learning.ema import make_ema, update_ema
from rsmtdf.learning.methods import METHODS, Method, MethodConfig
from rsmtdf.learning.optim import build_optimiser
from rsmtdf.learning.step import train_step
from rsmtdf.memory import is_out_of_memory
from rsmtdf.pixels import normalise
from rsmtdf.specs import FeatureSpec
from rsmtdf.stages.plan import TrainingPace
from rsmtdf.stages.train.loop import peak_memory
from rsmtdf.student.model import build_student


def measure_training(
    experiment: Experiment, features: Mapping[str, FeatureSpec], *, device: torch.device
) -> TrainingPace | None:
    """The cost of a step of `experiment` on `device`; None where its memory cannot hold what one micro-batch takes, the
    student, the EMA and the optimiser's state included.

    One micro-batch is timed, after one to warm up, and stands for all of a step; the optimiser and the EMA, which a
    step pays for once, are timed apart. Memory is the peak from the building of the student on.

    Raises:
        ConfigError: no such method, or a student that cannot be built.
    """
    config = experiment.train
    if config.method not in METHODS:
        raise ConfigError(f"no method {config.method!r}; there are: {', '.join(METHODS)}")
    method = METHODS[config.method]
    used = features if method.needs_targets else {}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    try:
        whole, once = _step_seconds(experiment, used, method, device=device)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return None
    n = config.batch // config.micro_batch
    return TrainingPace(
        device=str(device),
        step_seconds=n * max(whole - once, 0.0) + once,
        micro_batches=n,
        peak_bytes=peak_memory(device),
    )


def _step_seconds(
    experiment: Experiment, used: Mapping[str, FeatureSpec], method: Method, *, device: torch.device
) -> tuple[float, float]:
    """Of a step of one micro-batch, and of that, what a step pays for once."""
    config = experiment.train
    student = build_student(student_spec(experiment, used), seed=config.seed).to(device).train()
    ema = make_ema(student)
    optimiser = build_optimiser(student, fused=device.type == "cuda")
    settings = MethodConfig(
        conf_threshold=config.conf_threshold,
        distill_loss=config.distill_loss,
        min_token_valid=config.min_token_valid,
        grids=tuple((name, spec.grid) for name, spec in used.items()),
        normalise=config.normalise,
    )
    batch = _random_batch(experiment, used, device=device)

    def step() -> None:
        terms = train_step(
            student=student,
            ema=ema,
            optimiser=optimiser,
            method=method,
            config=settings,
            micro_batches=[batch],
            step=0,
            total_steps=2,
            autocast=torch.bfloat16 if config.precision == "bfloat16" else None,
        )
        terms["loss"].item()  # waits for the device

    def finish() -> None:
        optimiser.step()
        update_ema(ema, student, ratio=config.ema_ratio)
        next(ema.parameters()).sum().item()

    step()
    return _seconds(step), _seconds(finish)


def _random_batch(experiment: Experiment, features: Mapping[str, FeatureSpec], *, device: torch.device) -> MicroBatch:
    """A micro-batch of noise, of the shapes that training has."""
    side, m = experiment.views.crop_px, experiment.train.micro_batch
    draw = torch.Generator().manual_seed(key_seed("training pace"))

    def images() -> torch.Tensor:
        pixels = torch.randint(0, 256, (m, side, side, 3), generator=draw, dtype=torch.uint8)
        return normalise(pixels.to(device))

    classes = len(experiment.dataset.classes)
    return MicroBatch(
        labelled=images(),
        labels=torch.randint(0, classes, (m, side, side), generator=draw).to(device),
        weak=images(),
        strong=images(),
        valid=torch.ones(m, side, side, dtype=torch.bool, device=device),
        partner=torch.arange(m, device=device) ^ 1,
        box=torch.zeros(m, 4, dtype=torch.int64, device=device),
        targets={
            name: torch.randn(2 * m, spec.tokens, spec.dim, generator=draw).to(device)
            for name, spec in features.items()
        },
    )


def _seconds(work: Callable[[], None]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun
