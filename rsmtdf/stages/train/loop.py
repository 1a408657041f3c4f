"""The one training loop: whatever the method, teachers or device.

Everything random is keyed by (seed, step), so a run that was killed and resumed ends in the same bits on the CPU.
The EMA student is validated, selected and kept; `last` holds all that going on needs.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import logging
import math
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError

from rsmtdf.errors import CheckpointError, RsmtdfError, TrainingError
from rsmtdf.learning.batch import MicroBatch
from rsmtdf.learning.budget import parse_budget, total_steps
from rsmtdf.learning.checkpoint import load_state, save_state
from rsmtdf.learning.ema import make_ema
from rsmtdf.learning.methods import METHODS, MethodConfig
from rsmtdf.learning.optim import build_optimiser
from rsmtdf.learning.step import train_step
from rsmtdf.pixels import normalise
from rsmtdf.signals import Interrupted, StopFlag
from rsmtdf.stages.train.job import TrainJob
from rsmtdf.store.status import crc_of
from rsmtdf.student.artifact import save_student
from rsmtdf.student.model import Student, build_student, load_backbone
from rsmtdf.views.batches import BatchMaker, PixelCheck, ViewBatch

log = logging.getLogger(__name__)

CALIBRATION_STEPS = 3
Progress = Callable[[int, int, str], None]
"""Called with (steps done, steps in all, a note) after each step."""
Targets = Mapping[str, torch.Tensor]


@dataclass
class _Progression:
    """What a resume needs besides weights."""

    step: int = 0
    best: float | None = None
    best_step: int | None = None
    stale: int = 0
    """Validations since the best one."""
    due: bool = False
    """This step's validation is still to come: a resumed run begins with it."""


def train(job: TrainJob, *, resume: bool, stop: StopFlag, progress: Progress | None = None) -> dict[str, Any]:
    """Trains to the end of the schedule (or of patience) and returns the summary.

    Raises:
        StoreIncomplete: a labelled tile has no weak views in the store.
        TrainingError: too few tiles, the loss is not finite, or no memory is left; the last good state is kept.
        CheckpointError: the state to resume from does not fit, or a file of the run cannot be written.
        Interrupted: a signal came; the state is saved and `--resume` goes on from it.
    """
    try:
        return _train(job, resume=resume, stop=stop, progress=progress)
    except Interrupted:
        raise
    except BaseException as error:
        _note_failure(job, error)
        raise


def _note_failure(job: TrainJob, error: BaseException) -> None:
    """Leaves the reason in run.json, unless a run that had ended or stopped well could not be taken up again."""
    reason = str(error) if isinstance(error, RsmtdfError) else f"{type(error).__name__}: {error}"
    # Where not even this can be written, the error itself matters more.
    with contextlib.suppress(OSError, CheckpointError):
        if job.run.state().get("state", "running") == "running":
            job.run.write_state("failed", reason=reason)


def _train(job: TrainJob, *, resume: bool, stop: StopFlag, progress: Progress | None) -> dict[str, Any]:
    config = job.experiment.train
    student = build_student(job.student_spec, seed=config.seed)
    if job.backbone is not None:
        load_backbone(student, job.backbone)
    student.to(job.device).train()
    ema = make_ema(student)
    optimiser = build_optimiser(
        student,
        lr=config.backbone_lr,
        head_multiple=config.head_lr_factor,
        weight_decay=config.weight_decay,
        fused=job.device.type == "cuda",
    )
    at = _Progression()
    frozen = job.run.state().get("total_steps")
    if resume and job.run.last.exists():
        at = _Progression(**load_state(job.run.last, student=student, ema=ema, optimiser=optimiser))
    if resume and job.ranks.rank == 0:
        with _writing(job, "metrics.jsonl"):
            job.run.rewind(at.step)
    loop = _Loop(job, student, ema, optimiser, at)
    total = int(frozen) if resume and frozen else loop.length()
    if job.ranks.rank == 0:
        facts: dict[str, Any] = {"total_steps": total, "steps_per_epoch": job.schedule.steps_per_epoch}
        if "reason" in job.run.state():
            facts["reason"] = None  # of a failure before
        with _writing(job, "run.json"):
            job.run.write_state("running", **facts)
    return loop.run(total, stop=stop, progress=progress)


class _Loop:
    """One run's loop; its parts share too much for free functions."""

    def __init__(
        self,
        job: TrainJob,
        student: Student,
        ema: Student,
        optimiser: torch.optim.Optimizer,
        at: _Progression,
    ) -> None:
        config = job.experiment.train
        self._job, self._schedule, self._at = job, job.schedule, at
        self._student, self._ema, self._optimiser = student, ema, optimiser
        self._method = METHODS[config.method]
        self._settings = MethodConfig(
            conf_threshold=config.conf_threshold,
            distill_loss=config.distill_loss,
            min_token_valid=config.min_token_valid,
            grids=tuple((name, spec.grid) for name, spec in (job.source.specs if job.source else {}).items()),
            normalise=config.normalise,
        )
        check = None
        if job.source is not None:
            check = PixelCheck(
                crc_of(job.store.view_status()), strict=config.pixel_mismatch == "error", where=str(job.store.path)
            )
        self._check = check
        self._per_step = config.batch // (config.micro_batch * job.ranks.world)
        # A step takes all of its micro-batches at once: the next step's are made while it computes.
        ahead = max(2, self._per_step)
        self._maker = BatchMaker(maker=job.maker, check=check, workers=config.workers, ahead=ahead, kept=job.kept)
        self._ahead = ahead
        self._feature_wait = 0.0
        self._reading = contextlib.ExitStack()
        """Closes what reads features ahead."""

    def length(self) -> int:
        """The number of steps; a budget in time is measured on copies, so that the run itself is unaffected."""
        config, schedule = self._job.experiment.train, self._schedule
        seconds = None
        if config.budget and parse_budget(config.budget)[0] == "seconds":
            student, ema = copy.deepcopy(self._student), copy.deepcopy(self._ema)
            trial = _Loop(self._job, student, ema, build_optimiser(student), _Progression())
            # Ranks must agree on the length: their mean.
            seconds = self._job.ranks.sum(trial.step_seconds(), device=self._job.device) / self._job.ranks.world
        return total_steps(
            epochs=config.epochs,
            steps=config.steps,
            budget=config.budget,
            steps_per_epoch=schedule.steps_per_epoch,
            step_seconds=seconds,
        )

    def step_seconds(self) -> float:
        """The median duration of a few steps after a warm-up; changes this loop's student."""
        durations = []
        begun = time.perf_counter()
        try:
            for step, batches in zip(
                range(1 + CALIBRATION_STEPS), self._micro_batches(0, 1 + CALIBRATION_STEPS), strict=True
            ):
                float(self._one_step(step, CALIBRATION_STEPS + 1, batches)["loss"])
                durations.append(time.perf_counter() - begun)
                begun = time.perf_counter()
        finally:
            self.close()
        return sorted(durations[1:])[CALIBRATION_STEPS // 2]

    def run(self, total: int, *, stop: StopFlag, progress: Progress | None) -> dict[str, Any]:
        job, config, at = self._job, self._job.experiment.train, self._at
        every = config.validate_every or self._schedule.steps_per_epoch
        begun, first = time.perf_counter(), at.step
        try:
            if at.due:
                self._validate()
            # A run that had ended for want of patience has no steps left, whatever its schedule says.
            patience_out = self._any_rank(self._is_out_of_patience())
            end = at.step if patience_out else total
            for step, batches in zip(range(at.step, end), self._micro_batches(at.step, end), strict=True):
                terms = self._one_step(step, total, batches)
                at.step = step + 1
                last = at.step == total
                if at.step % config.log_every == 0 or at.step == 1 or last:
                    self._record(terms)
                if progress is not None:
                    progress(at.step, total, self._note(terms, begun) if at.step % config.log_every == 0 else "")
                if at.step % every == 0 or last:
                    self._check_finite(terms)
                    at.due = job.validate is not None
                    if last and not at.due:
                        self._save_student()
                    self._save_state()
                    if at.due:
                        self._validate()
                    patience_out = self._any_rank(self._is_out_of_patience())
                if self._any_rank(bool(stop)):
                    self._check_finite(terms)
                    self._save_state()
                    command = f"rsmtdf train --cache {job.store.path} --out {job.run.path} --resume"
                    message = f"stopped at step {at.step} of {total}; go on with: {command}"
                    if job.ranks.rank == 0:
                        with _writing(job, "run.json"):
                            job.run.write_state("interrupted", step=at.step)
                    raise Interrupted(stop.signum or 15, message)
                if patience_out:
                    log.info("no better mIoU for %d validations: ending at step %d", config.patience, at.step)
                    break
        finally:
            self.close()
        return self._summary(total, time.perf_counter() - begun, first)

    def close(self) -> None:
        """Ends what is made and read ahead."""
        self._reading.close()
        self._maker.close()

    def _is_out_of_patience(self) -> bool:
        patience = self._job.experiment.train.patience
        return patience is not None and self._at.stale >= patience

    def _micro_batches(self, start: int, stop: int) -> Iterator[list[tuple[ViewBatch, Targets | None]]]:
        """Per step its micro-batches, with targets; None where `_to_device` is to fetch them, or none are needed."""
        size, ranks = self._job.experiment.train.micro_batch, self._job.ranks
        source = self._job.source if self._method.needs_targets else None

        def rows() -> Iterator[tuple[np.ndarray, np.ndarray]]:
            for step in range(start, stop):
                for part in self._schedule.rows(step).micro_batches(size, rank=ranks.rank, world=ranks.world):
                    yield part.labelled, part.strong

        for_views, for_features = itertools.tee(rows())
        made = self._maker.batches(for_views)
        targets: Iterator[Targets | None] = itertools.repeat(None)
        if source is not None and not source.needs_pixels:
            targets = source.stream((np.concatenate(pair) for pair in for_features), ahead=self._ahead)
            self._reading.callback(getattr(targets, "close", lambda: None))
        for _ in range(start, stop):
            yield [(next(made), self._awaited(targets)) for _ in range(self._per_step)]

    def _awaited(self, targets: Iterator[Targets | None]) -> Targets | None:
        begun = time.perf_counter()
        found = next(targets)
        self._feature_wait += time.perf_counter() - begun
        return found

    def _one_step(
        self, step: int, total: int, batches: Sequence[tuple[ViewBatch, Targets | None]]
    ) -> dict[str, torch.Tensor]:
        config = self._job.experiment.train
        try:
            return train_step(
                student=self._student,
                ema=self._ema,
                optimiser=self._optimiser,
                method=self._method,
                config=self._settings,
                micro_batches=[self._to_device(b, targets) for b, targets in batches],
                step=step,
                total_steps=total,
                poly_power=config.poly_power,
                ema_decay=config.ema_ratio,
                reduce=self._job.ranks.reduce,
                autocast=torch.bfloat16 if config.precision == "bfloat16" else None,
            )
        except torch.OutOfMemoryError as error:
            size = config.micro_batch
            raise TrainingError(
                f"{self._job.device} ran out of memory at step {step + 1}, with micro-batches of {size}+{size} images. "
                f"Lower train.micro_batch (it changes memory and speed, not the batch; at least 2), or set "
                f"train.precision=bfloat16, in a new run. {_kept(self._job)}"
            ) from error

    def _to_device(self, batch: ViewBatch, targets: Targets | None) -> MicroBatch:
        device, source = self._job.device, self._job.source
        labelled = torch.from_numpy(batch.labelled).to(device, non_blocking=True)
        strong = torch.from_numpy(batch.strong).to(device, non_blocking=True)
        if targets is None and source is not None and self._method.needs_targets:
            rows = np.concatenate([batch.labelled_rows, batch.strong_rows])
            begun = time.perf_counter()
            targets = source.fetch(rows, torch.cat([labelled, strong]))
            self._feature_wait += time.perf_counter() - begun
        return MicroBatch(
            labelled=normalise(labelled),
            labels=torch.from_numpy(batch.labels).to(device).long(),
            labelled_valid=torch.from_numpy(batch.labelled_valid).to(device),
            weak=normalise(torch.from_numpy(batch.weak).to(device, non_blocking=True)),
            strong=normalise(strong),
            valid=torch.from_numpy(batch.valid).to(device),
            partner=torch.from_numpy(batch.partner).to(device),
            box=torch.from_numpy(batch.box).to(device),
            targets=targets or {},
        )

    def _any_rank(self, flag: bool) -> bool:
        """Whether it holds on any rank: all of them must leave the loop at the same step."""
        return self._job.ranks.sum(float(flag), device=self._job.device) > 0

    def _record(self, terms: Mapping[str, torch.Tensor]) -> None:
        self._check_finite(terms)
        if self._job.ranks.rank == 0:
            lr = [group["lr"] for group in self._optimiser.param_groups]
            values = {name: float(v) for name, v in terms.items()}
            with _writing(self._job, "metrics.jsonl"):
                self._job.run.record("train", self._at.step, lr=lr, **values)

    def _check_finite(self, terms: Mapping[str, torch.Tensor]) -> None:
        """Before anything of this step is kept."""
        if not math.isfinite(loss := float(terms["loss"])):
            raise TrainingError(
                f"the loss at step {self._at.step} is {loss}. Lower train.backbone_lr or train.head_lr_factor, or "
                f"train in float32. {_kept(self._job)}"
            )

    def _note(self, terms: Mapping[str, torch.Tensor], begun: float) -> str:
        wait = (self._maker.wait_seconds + self._feature_wait) / max(time.perf_counter() - begun, 1e-9)
        shown = [f"loss {float(terms['loss']):.3f}"]
        if "mask_ratio" in terms:
            shown.append(f"mask {float(terms['mask_ratio']):.2f}")
        if self._at.best is not None:
            shown.append(f"best mIoU {100 * self._at.best:.1f}")
        return ", ".join([*shown, f"data-wait {wait:.0%}"])

    def _validate(self) -> None:
        """Scores the EMA student; commits `best` if it is, then the `last` that names it."""
        job, at = self._job, self._at
        at.due = False
        if job.validate is None or job.ranks.rank != 0:
            return
        result = job.validate(self._ema)
        # A kill between this line and `last` leaves the line, and the validation to be done again.
        if not any(r["kind"] == "val" and r["step"] == at.step for r in job.run.records()):
            with _writing(job, "metrics.jsonl"):
                job.run.record("val", at.step, miou=result["miou"], per_class=result["per_class"])
        miou = result["miou"] or 0.0
        if at.best is None or miou > at.best:
            at.best, at.best_step, at.stale = miou, at.step, 0
            self._save_student()
        else:
            at.stale += 1
        self._save_state()

    def _save_state(self) -> None:
        """Commits `last`: the state after this step."""
        job, at = self._job, self._at
        if job.ranks.rank != 0:
            return
        with _writing(job, "checkpoints/last.safetensors"):
            save_state(job.run.last, student=self._student, ema=self._ema, optimiser=self._optimiser, state=vars(at))
        with _writing(job, "run.json"):
            job.run.write_state("running", step=at.step, best_miou=at.best, best_step=at.best_step)

    def _save_student(self) -> None:
        if self._job.ranks.rank != 0:
            return
        facts = {"step": self._at.step, "val_miou": self._at.best, "weights": "ema"}
        with _writing(self._job, "checkpoints/best.safetensors"):
            save_student(self._job.run.best, self._ema, meta={**self._job.meta, "run": facts})

    def _summary(self, total: int, seconds: float, first: int) -> dict[str, Any]:
        job, at, config = self._job, self._at, self._job.experiment.train
        steps = at.step - first
        wait = self._maker.wait_seconds
        store = self._feature_wait
        compute = max(seconds - wait - store, 0.0)
        shares = {"compute": compute, "views": wait, "store": store}
        result = {
            "run": str(job.run.path),
            "method": config.method,
            "steps": at.step,
            "steps_now": steps,
            "total_steps": total,
            "best_miou": at.best,
            "best_step": at.best_step,
            "selected_on": "val"
            if job.validate is not None
            else "nothing: no validation labels, the last weights are kept",
            "seconds": round(seconds, 2),
            "images_per_second": round(steps * 2 * config.batch / seconds, 2) if seconds else None,
            "shares": {name: round(v / seconds, 4) if seconds else 0.0 for name, v in shares.items()},
            "limited_by": max(shares, key=lambda k: shares[k]),
            "peak_memory_bytes": peak_memory(job.device),
            "differing_views": len(self._check.differing) if self._check else 0,
        }
        if job.ranks.rank == 0:
            with _writing(job, "run.json"):
                job.run.write_state("finished", step=at.step, best_miou=at.best, best_step=at.best_step, summary=result)
        return result


@contextlib.contextmanager
def _writing(job: TrainJob, name: str) -> Iterator[None]:
    """Around the writing of a file of the run: what the system refuses becomes a `CheckpointError`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(
            f"cannot write {job.run.path / name}: {reason}. Make room there, or the folder writable. {_kept(job)}"
        ) from error


def _kept(job: TrainJob) -> str:
    """What is left of the run after a failure."""
    if not job.run.last.exists():
        return "No state had been kept yet: start the run again with another --out"
    return f"The last good state is kept in {job.run.last}: --resume goes on from it"


def peak_memory(device: torch.device) -> int:
    """Peak bytes on the device, or of this process where the device is the CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
