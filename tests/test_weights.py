"""Weights are read as data from every format the models come in, and hashed by content."""

import io
import pickle
import warnings
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from rsmtdf.errors import TeacherError
from rsmtdf.weights import read_weights, weights_digest


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        "conv.weight": torch.randn(4, 3, 2, 2, generator=generator),
        "ln.bias": torch.randn(4, generator=generator),
        "scale": torch.tensor(2.5),
        "fc.weight": torch.randn(3, 5, generator=generator).half(),
        "steps": torch.arange(3),
    }


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    assert weights_digest(found) == weights_digest(expected)


def save_torchscript(state: dict[str, torch.Tensor], path: Path) -> None:
    """An archive like OpenAI's: a tree of scripted modules that holds `state`."""
    root = nn.Module()
    for name, tensor in state.items():
        *parents, leaf = name.split(".")
        module = root
        for parent in parents:
            if parent not in dict(module.named_children()):
                module.add_module(parent, nn.Module())
            module = module.get_submodule(parent)
        if tensor.is_floating_point():
            module.register_parameter(leaf, nn.Parameter(tensor.clone()))
        else:
            module.register_buffer(leaf, tensor.clone())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated; OpenAI's files are still in it
        torch.jit.save(torch.jit.script(root), str(path))


def test_every_format_gives_the_same_tensors(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    safetensors.torch.save_file(state, tmp_path / "a.safetensors")
    safetensors.torch.save_file(state, tmp_path / "wrong_suffix.pth")
    torch.save(state, tmp_path / "b.pth")
    torch.save(state, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    torch.save({"epoch": 3, "step": torch.tensor(7), "state_dict": state}, tmp_path / "nested.bin")
    torch.save({"model": {"state_dict": {f"module.{k}": v for k, v in state.items()}}}, tmp_path / "ddp.pt")
    torch.save(
        {"teacher": {f"module._orig_mod.{k}": v for k, v in state.items()}, "student": {}}, tmp_path / "dino.pth"
    )
    torch.save({k: nn.Parameter(v) if v.is_floating_point() else v for k, v in state.items()}, tmp_path / "param.pth")
    save_torchscript(state, tmp_path / "scripted.pt")
    files = sorted(tmp_path.iterdir())
    assert len(files) == 9
    for file in files:
        assert_same(read_weights(file), state)


def test_prefix_is_kept_where_not_every_name_has_it(tmp_path: Path) -> None:
    mixed = {"module.a": torch.ones(2), "b": torch.ones(2)}
    torch.save(mixed, tmp_path / "mixed.pth")
    assert set(read_weights(tmp_path / "mixed.pth")) == {"module.a", "b"}


def test_scripted_file_is_read_as_torch_would(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(model[1], torch.zeros(1, 2, 3, 3)), str(tmp_path / "traced.pt"))
    assert_same(read_weights(tmp_path / "traced.pt"), dict(model[1].state_dict()))


def test_scripted_file_is_not_executed(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    """Neither its code (which is broken here) nor a call hidden in its pickle."""
    save_torchscript(state, tmp_path / "good.pt")
    rewrite(tmp_path / "good.pt", tmp_path / "code.pt", {".py": b"this is no program"})
    assert_same(read_weights(tmp_path / "code.pt"), state)

    class Call:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (tmp_path / "touched",)  # type: ignore[return-value]

    rewrite(tmp_path / "good.pt", tmp_path / "evil.pt", {"/data.pkl": pickle.dumps(Call(), protocol=2)})
    with pytest.raises(TeacherError, match="more than tensors"):
        read_weights(tmp_path / "evil.pt")
    assert not (tmp_path / "touched").exists()


def test_scripted_arrays_must_be_as_long_as_declared(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    save_torchscript(state, tmp_path / "good.pt")
    rewrite(tmp_path / "good.pt", tmp_path / "short.pt", {"/data/0": b"\0" * 8})
    rewrite(tmp_path / "good.pt", tmp_path / "packed.pt", {}, compression=zipfile.ZIP_DEFLATED)
    for name in ("short.pt", "packed.pt"):
        with pytest.raises(TeacherError, match="cannot be read"):
            read_weights(tmp_path / name)


def test_pickle_that_calls_is_refused(tmp_path: Path) -> None:
    class Call:
        def __reduce__(self) -> tuple[object, tuple[object, ...]]:
            return Path.touch, (tmp_path / "touched",)

    torch.save({"a": torch.ones(1), "x": Call()}, tmp_path / "evil.pth")
    (tmp_path / "bare.pth").write_bytes(pickle.dumps(Call(), protocol=2))
    for name in ("evil.pth", "bare.pth"):
        with pytest.raises(TeacherError, match=rf"{name} holds more than tensors"):
            read_weights(tmp_path / name)
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "none of safetensors"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
        (b"<!DOCTYPE html><html>", "web page"),
        (b"hello, weights", "none of safetensors"),
        (b"PK\x03\x04 and then nothing", "cut short"),
        (b"\x80\x02}q\x00", "damaged"),
    ],
)
def test_what_is_no_weights_file_is_named(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "w.pth").write_bytes(content)
    with pytest.raises(TeacherError, match=message) as caught:
        read_weights(tmp_path / "w.pth")
    assert str(tmp_path / "w.pth") in str(caught.value)


def test_truncated_files_say_so(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    torch.save(state, tmp_path / "a.pth")
    safetensors.torch.save_file(state, tmp_path / "b.safetensors")
    for name in ("a.pth", "b.safetensors"):
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[:-50])
        with pytest.raises(TeacherError, match="cut short"):
            read_weights(tmp_path / name)


def test_missing_file_folder_and_content_without_tensors(tmp_path: Path) -> None:
    with pytest.raises(TeacherError, match="no weights file at"):
        read_weights(tmp_path / "none.pth")
    with pytest.raises(TeacherError, match="is a folder"):
        read_weights(tmp_path)
    torch.save({"epoch": 3, "net": {"a": 1}}, tmp_path / "empty.pth")
    with pytest.raises(TeacherError, match=r"epoch \(int\), net \(dict\)"):
        read_weights(tmp_path / "empty.pth")
    torch.save([torch.ones(1)], tmp_path / "list.pth")
    with pytest.raises(TeacherError, match="holds a list"):
        read_weights(tmp_path / "list.pth")
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        archive.writestr("cat.png", b"")
    with pytest.raises(TeacherError, match=r"without weights \(it holds cat.png\)"):
        read_weights(tmp_path / "photos.zip")


def test_digest_is_of_names_dtypes_shapes_and_bytes(state: dict[str, torch.Tensor]) -> None:
    digest = weights_digest(state)
    assert weights_digest(dict(reversed(state.items()))) == digest
    strided = {**state, "conv.weight": state["conv.weight"].permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)}
    assert weights_digest({**strided, "ln.bias": nn.Parameter(state["ln.bias"])}) == digest
    changed = state["conv.weight"].clone()
    changed[3, 2, 1, 1] = torch.nextafter(changed[3, 2, 1, 1], torch.tensor(9.0))
    others = [
        {**state, "conv.weight": changed},
        {**state, "conv.weight": state["conv.weight"].reshape(4, 3, 4)},
        {**state, "fc.weight": state["fc.weight"].view(torch.int16)},
        {("ln.bais" if k == "ln.bias" else k): v for k, v in state.items()},
        {k: v for k, v in state.items() if k != "scale"},
    ]
    assert len({digest, *(weights_digest(o) for o in others)}) == 6


def test_digest_is_stable() -> None:
    """Stores keep it: it may not change between versions."""
    state = {"b": torch.tensor([1.0, -2.0]), "a": torch.tensor([[3]], dtype=torch.uint8)}
    assert weights_digest(state) == "8611c9a0e6e707e545e410652168634b1c591d8a3f68c9fc5430aa13ca89487e"


def test_meta_tensors_have_no_digest() -> None:
    with pytest.raises(TeacherError, match="a has no data"):
        weights_digest({"a": torch.ones(1, device="meta")})


def rewrite(source: Path, target: Path, replaced: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> None:
    """A copy of the archive, with the members whose name ends in a key of `replaced` holding its value."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(buffer, "w", compression) as new:
        for name in old.namelist():
            new_bytes = next((v for k, v in replaced.items() if name.endswith(k)), None)
            new.writestr(name, old.read(name) if new_bytes is None else new_bytes)
    target.write_bytes(buffer.getvalue())
