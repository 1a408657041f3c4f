"""What every teacher must do, as a test class: inherit it, override `make_teacher`, and pytest runs it."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from typing import Any

import pytest
import torch

from rsmtdf.errors import TeacherError
from rsmtdf.keyed import key_seed
from rsmtdf.specs import FeatureSpec, Teacher, digest, from_dict, to_dict

_OTHER: dict[str, Any] = {
    "resize": "nearest",
    "align_corners": False,
    "antialias": True,
    "pos_embed": "another",
    "compute_dtype": "another",
    "attention_dtype": "another",
}
"""Another value of the fields for which `_another` finds none by type."""


class TeacherContract(ABC):
    """The promises of the `Teacher` protocol that caching and training rely on."""

    tolerance = 2e-5
    """Of features, relative to their largest: a batch may be computed in another order than single images."""
    view_px = (56, 56)
    """(height, width) of the views it is tried on."""

    @abstractmethod
    def make_teacher(self) -> Teacher:
        """A fresh teacher, small enough to be built by every test; always the same one."""

    def make_pixels(self, b: int) -> torch.Tensor:
        """Views uint8 [b, h, w, 3], always the same, on the teacher's device."""
        generator = torch.Generator().manual_seed(key_seed("teacher contract", b))
        pixels = torch.randint(0, 256, (b, *self.view_px, 3), generator=generator, dtype=torch.uint8)
        return pixels.to(self.device)

    @property
    def device(self) -> torch.device:
        """Where `make_teacher` puts it."""
        return torch.device("cpu")

    def test_tokens_are_what_the_spec_says(self) -> None:
        teacher = self.make_teacher()
        tokens = teacher(self.make_pixels(2))
        assert tokens.shape == (2, teacher.spec.grid[0] * teacher.spec.grid[1], teacher.spec.dim)
        assert tokens.dtype == torch.float32
        assert tokens.device.type == self.device.type
        assert bool(torch.isfinite(tokens).all())
        assert float(tokens.std()) > 0

    def test_grid_is_input_over_patch(self) -> None:
        spec = self.make_teacher().spec
        assert spec.grid == (spec.input_px[0] // spec.patch_px, spec.input_px[1] // spec.patch_px)
        assert spec.layer >= 0

    def test_an_image_does_not_depend_on_its_batch(self) -> None:
        teacher, pixels = self.make_teacher(), self.make_pixels(3)
        together = teacher(pixels)
        alone = torch.cat([teacher(pixels[i : i + 1]) for i in range(3)])
        assert float((together - alone).abs().max()) <= self.tolerance * float(together.abs().max())
        assert float((together[0] - together[1]).abs().max()) > 10 * self.tolerance * float(together.abs().max())

    def test_same_pixels_give_the_same_bits(self) -> None:
        teacher, pixels = self.make_teacher(), self.make_pixels(2)
        assert torch.equal(teacher(pixels), teacher(pixels))

    def test_two_builds_are_the_same_teacher(self) -> None:
        first, second, pixels = self.make_teacher(), self.make_teacher(), self.make_pixels(1)
        assert first.spec == second.spec
        assert torch.equal(first(pixels), second(pixels))

    def test_pixels_and_global_state_are_left_alone(self) -> None:
        teacher, pixels = self.make_teacher(), self.make_pixels(2)
        before, rng = pixels.clone(), torch.get_rng_state()
        teacher(pixels)
        assert torch.equal(pixels, before)
        assert torch.equal(torch.get_rng_state(), rng)
        assert torch.is_grad_enabled()

    def test_tokens_are_patches_in_row_major_order(self) -> None:
        """Changing the pixels of one patch moves that patch's token most: no prefix token is left, no axis swapped."""
        teacher, pixels = self.make_teacher(), self.make_pixels(1)
        (rows, columns), (h, w) = teacher.spec.grid, self.view_px
        before = teacher(pixels)
        for row, column in ((0, 0), (0, columns - 1), (rows - 1, 0), (rows - 1, columns - 1)):
            changed = pixels.clone()
            y, x = (
                slice(row * h // rows, (row + 1) * h // rows),
                slice(column * w // columns, (column + 1) * w // columns),
            )
            changed[:, y, x] = 255 - changed[:, y, x]
            moved = (teacher(changed) - before)[0].norm(dim=1)
            assert int(moved.argmax()) == row * columns + column

    def test_every_field_of_the_spec_but_the_name_is_identity(self) -> None:
        spec = self.make_teacher().spec
        assert from_dict(FeatureSpec, to_dict(spec)) == spec
        for field in dataclasses.fields(spec):
            other = dataclasses.replace(spec, **{field.name: _another(field.name, getattr(spec, field.name))})
            same = digest(other.identity()) == digest(spec.identity())
            assert same == (field.name == "name"), field.name

    def test_weights_are_hashed(self) -> None:
        assert len(bytes.fromhex(self.make_teacher().spec.weights_sha256)) == 32

    def test_it_is_frozen(self) -> None:
        teacher = self.make_teacher()
        for module in self.modules(teacher):
            assert not any(m.training for m in module.modules())
            assert not any(p.requires_grad for p in module.parameters())
            assert {p.device.type for p in module.parameters()} == {self.device.type}
        assert not teacher(self.make_pixels(1)).requires_grad

    def test_other_input_than_uint8_views_is_refused(self) -> None:
        teacher, pixels = self.make_teacher(), self.make_pixels(1)
        with pytest.raises(TeacherError, match="uint8"):
            teacher(pixels.float())
        with pytest.raises(TeacherError, match="uint8"):
            teacher(pixels.permute(0, 3, 1, 2))

    def modules(self, teacher: Teacher) -> list[torch.nn.Module]:
        """The modules of the teacher."""
        module = getattr(teacher, "module", None)
        return [module] if isinstance(module, torch.nn.Module) else []


def _another(name: str, value: Any) -> Any:
    """A value other than `value`, of its type."""
    if name in _OTHER and _OTHER[name] != value:
        return _OTHER[name]
    if isinstance(value, bool):
        return not value
    if isinstance(value, str):
        return f"{value} and more"
    if isinstance(value, tuple):
        return (*value[:-1], value[-1] + 1)
    return value + 1
