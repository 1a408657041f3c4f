"""From a state dict to a frozen module: every name and shape is checked, and random weights must be asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import nn

from rsmtdf.errors import TeacherError
from rsmtdf.keyed import key_seed

M = TypeVar("M", bound=nn.Module)

_SHOWN = 4


def build_random(build: Callable[[], M], *, model: str, seed: int) -> M:
    """`build()` with weights that depend on (model, seed) alone; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key_seed("random weights", model, seed))
        return build()


def build_loaded(
    build: Callable[[], M], convert: Callable[[M], Mapping[str, torch.Tensor]], *, what: str, hint: str = ""
) -> M:
    """`build()` in float32 with the weights that `convert` makes for it, copied.

    Args:
        build: makes the module.
        convert: the state dict, by the module's own names; it sees a module on the meta device.
        what: names teacher, model and file in messages.
        hint: ends the message where the weights do not fit (the model that they look like).

    Raises:
        TeacherError: missing or unexpected names, or other shapes.
    """
    with torch.device("meta"):
        module = build()
    state = convert(module)
    check_fit(state, module, what=what, hint=hint)
    # On the meta device nothing is initialised, which is most of the time of building a large ViT. Buffers outside
    # the state dict (rotary frequencies) would stay empty there, so such models are built in full.
    assign = {n for n, _ in module.named_buffers()} <= set(state)
    if not assign:
        module = build()
    copies = {
        name: tensor.to(torch.float32 if tensor.is_floating_point() else tensor.dtype, copy=True).contiguous()
        for name, tensor in state.items()
    }
    module.load_state_dict(copies, assign=assign)
    return module


def freeze(module: M, device: torch.device) -> M:
    """`module` on `device`, in eval mode, without gradients."""
    return module.eval().requires_grad_(False).to(device)


def check_fit(state: Mapping[str, torch.Tensor], module: nn.Module, *, what: str, hint: str = "") -> None:
    """Nothing, where `state` has exactly the names and shapes of `module`.

    Raises:
        TeacherError: else, naming the first few of each kind.
    """
    wanted = module.state_dict()
    problems = []
    if missing := [n for n in wanted if n not in state]:
        problems.append(f"{len(missing)} missing ({_some(missing)})")
    if unexpected := [n for n in state if n not in wanted]:
        problems.append(f"{len(unexpected)} unexpected ({_some(unexpected)})")
    shapes = [
        f"{n} {list(state[n].shape)}, expected {list(wanted[n].shape)}"
        for n in wanted
        if n in state and state[n].shape != wanted[n].shape
    ]
    if shapes:
        problems.append(f"{len(shapes)} of another shape ({_some(shapes)})")
    if problems:
        raise TeacherError(f"the weights do not fit {what}: " + "; ".join(problems) + (f". {hint}" if hint else ""))


def activation_name(module: nn.Module) -> str:
    """`gelu`, `gelu_tanh`, `quick_gelu`, `silu`, ... of the first activation inside `module` (an MLP)."""
    for part in module.modules():
        kind = type(part).__name__
        if kind == "QuickGELU":
            return "quick_gelu"
        if kind == "GELU":
            return "gelu_tanh" if getattr(part, "approximate", "none") == "tanh" else "gelu"
        if kind in ("GELUTanh", "GELUTanhFp32"):
            return "gelu_tanh"
        if kind in ("SiLU", "ReLU", "Mish"):
            return kind.lower()
    raise TeacherError(f"no known activation inside {type(module).__name__}")


def _some(items: Sequence[str]) -> str:
    return ", ".join(items[:_SHOWN]) + (", ..." if len(items) > _SHOWN else "")
