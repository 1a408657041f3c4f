"""Pixels to a device and encoded features back, beside its computing: pinned memory and side streams where it is CUDA.

Elsewhere the same calls copy plainly. The host only ever holds encoded features, a quarter of float32 or less.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from rsmtdf.memory import is_out_of_memory
from rsmtdf.specs import Teacher
from rsmtdf.views.view import View


@dataclass(frozen=True)
class Sent:
    """Pixels uint8 [b, c, c, 3] on their way to a device, or still on the host where they found no room there."""

    pixels: torch.Tensor
    arrival: torch.cuda.Event | None
    """When they are there; None: nothing is under way."""


class Lane:
    """The way to one device and back. Sending and fetching may go on in different threads."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.is_cuda = device.type == "cuda"
        self._up = _stream(device) if self.is_cuda else None
        self._down = _stream(device) if self.is_cuda else None

    def send(self, views: Sequence[View]) -> Sent:
        """Starts to copy the pixels of `views`; where memory is short they stay, for `arrived` to copy in parts."""
        try:
            return self._begun(views)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        return Sent(pixels_of(views, torch.device("cpu")), None)

    def _begun(self, views: Sequence[View]) -> Sent:
        if self._up is None:
            return Sent(pixels_of(views, self.device), None)
        side = views[0].pixels.shape
        pinned = torch.empty((len(views), *side), dtype=torch.uint8, pin_memory=True)
        np.stack([v.pixels for v in views], out=pinned.numpy())
        with torch.cuda.stream(self._up):
            pixels = pinned.to(self.device, non_blocking=True)
            arrival = _moment(self._up)
        return Sent(pixels, arrival)

    def arrived(self, sent: Sent, part: slice) -> torch.Tensor:
        """The pixels of the views in `part`, for what is computed from now on in the calling thread."""
        if sent.arrival is None:
            return sent.pixels[part].to(self.device)  # which copies nothing that is there
        now = torch.cuda.current_stream(self.device)
        now.wait_event(sent.arrival)
        sent.pixels.record_stream(now)  # or their memory could be given away while it is read
        return sent.pixels[part]

    def computed(self) -> torch.cuda.Event | None:
        """The moment when all that the calling thread has asked of the device so far is done."""
        if not self.is_cuda:
            return None
        return _moment(torch.cuda.current_stream(self.device))

    def fetch(
        self, source: torch.Tensor, target: torch.Tensor, *, after: torch.cuda.Event | None
    ) -> torch.cuda.Event | None:
        """Starts to copy into `target` on the host (`host_memory`); what it returns says when that is done."""
        if self._down is None or after is None:
            target.copy_(source)
            return None
        with torch.cuda.stream(self._down):
            self._down.wait_event(after)
            target.copy_(source, non_blocking=True)
            source.record_stream(self._down)
            return _moment(self._down)

    def host_memory(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Memory that the device copies into while it computes; where no more can be pinned, after it."""
        try:
            return self._pinned(shape, dtype)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        return torch.empty(tuple(shape), dtype=dtype)

    def _pinned(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(tuple(shape), dtype=dtype, pin_memory=self.is_cuda)


def lanes(teachers: Mapping[str, Teacher]) -> dict[torch.device, Lane]:
    """One lane for each device that a teacher computes on."""
    return {device: Lane(device) for device in {device_of(t) for t in teachers.values()}}


def pixels_of(views: Sequence[View], device: torch.device) -> torch.Tensor:
    """uint8 [b, c, c, 3] on `device`."""
    return torch.from_numpy(np.stack([v.pixels for v in views])).to(device)


def device_of(teacher: Teacher) -> torch.device:
    """Where a teacher wants its pixels."""
    return getattr(teacher, "device", torch.device("cpu"))


def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _moment(stream: torch.cuda.Stream) -> torch.cuda.Event:
    """When all that `stream` has been asked so far is done."""
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(stream)
    return event
