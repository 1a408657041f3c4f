import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from rsmtdf.errors import CheckpointError
from rsmtdf.learning.checkpoint import FORMAT, load_state, save_state
from rsmtdf.learning.ema import make_ema
from rsmtdf.learning.methods import METHODS, MethodConfig
from rsmtdf.learning.optim import build_optimiser
from rsmtdf.learning.step import train_step

STATE = {"epoch": 3, "step": 2, "best": 0.1 + 0.2, "note": None}


def fresh(tiny, **options):
    model = tiny.student()
    return {"student": model, "ema": make_ema(model), "optimiser": build_optimiser(model, **{"lr": 1e-3, **options})}


def advance(tiny, parts, steps):
    for step in steps:
        train_step(
            **parts,
            method=METHODS["rs-mtdf"],
            config=MethodConfig(conf_threshold=tiny.CONFIDENT),
            micro_batches=[tiny.quarter(step % 4)],
            step=step,
            total_steps=6,
        )
    return parts


def bits(parts):
    """Every number of the three, by name."""
    moments = parts["optimiser"].state_dict()["state"]
    return {
        **{f"s.{k}": v for k, v in parts["student"].state_dict().items()},
        **{f"e.{k}": v for k, v in parts["ema"].state_dict().items()},
        **{f"o.{i}.{k}": v for i, entry in moments.items() for k, v in entry.items()},
    }


def assert_same_bits(a, b):
    a, b = bits(a), bits(b)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tiny, tmp_path):
    path = tmp_path / "last.safetensors"
    uninterrupted = advance(tiny, fresh(tiny), range(2))
    save_state(path, **uninterrupted, state=STATE)
    resumed = fresh(tiny)
    with torch.no_grad():
        for p in [*resumed["student"].parameters(), *resumed["ema"].parameters()]:
            p.zero_()
    assert load_state(path, **resumed) == STATE
    assert_same_bits(resumed, uninterrupted)
    assert [g["lr"] for g in resumed["optimiser"].param_groups] == [
        g["lr"] for g in uninterrupted["optimiser"].param_groups
    ]
    advance(tiny, uninterrupted, range(2, 4))
    advance(tiny, resumed, range(2, 4))
    assert_same_bits(resumed, uninterrupted)


def test_before_the_first_step_there_are_no_moments(tiny, tmp_path):
    path = tmp_path / "start.safetensors"
    parts = fresh(tiny)
    save_state(path, **parts, state={})
    other = advance(tiny, fresh(tiny), range(1))
    assert load_state(path, **other) == {}
    assert other["optimiser"].state_dict()["state"] == {}
    assert_same_bits(other, parts)


def test_a_save_replaces_whole_files_and_equal_states_give_equal_bytes(tiny, tmp_path):
    path = tmp_path / "last.safetensors"
    parts = advance(tiny, fresh(tiny), range(1))
    save_state(path, **parts, state=STATE)
    first = path.read_bytes()
    save_state(path, **parts, state=STATE)
    assert path.read_bytes() == first
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.fixture
def saved(tiny, tmp_path):
    path = tmp_path / "last.safetensors"
    save_state(path, **advance(tiny, fresh(tiny), range(1)), state=STATE)
    return path


def rewrite(path, *, tensors=None, **header):
    old = json.loads(read_header(path))
    save_file(tensors or load_file(path), path, metadata={FORMAT: json.dumps({**old, **header})})


def read_header(path):
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + size])["__metadata__"][FORMAT]


def test_errors_name_what_differs_and_change_nothing(tiny, saved, tmp_path):
    parts = fresh(tiny)
    before = {k: v.clone() for k, v in bits(parts).items()}

    def fails(path, match, **options):
        with pytest.raises(CheckpointError, match=match):
            load_state(path, **(fresh(tiny, **options) if options else parts))

    fails(tmp_path / "none.safetensors", "no such file")
    fails(saved, r"saved with initial_lr 0\.001, now 0\.002", lr=2e-3)
    fails(saved, r"saved with weight_decay 0\.01, now 0\.1", weight_decay=0.1)
    whole = saved.read_bytes()
    saved.write_bytes(whole[: len(whole) // 2])
    fails(saved, "no complete safetensors file")
    saved.write_bytes(b"not a checkpoint at all")
    fails(saved, "no complete safetensors file")
    save_file({"a": torch.zeros(1)}, saved)
    fails(saved, "not a training state")
    saved.write_bytes(whole)
    tensors = load_file(saved)
    rewrite(saved, tensors={**tensors, "ema.decoder.predict.2.bias": torch.zeros(9)})
    fails(saved, r"ema\.decoder\.predict\.2\.bias: expected float64 \[3\], found float32 \[9\]")
    saved.write_bytes(whole)
    rewrite(saved, tensors={k: v for k, v in tensors.items() if k != "student.backbone.cls_token"})
    fails(saved, r"student\.backbone\.cls_token: expected .*, found nothing")
    saved.write_bytes(whole)
    rewrite(saved, version=2)
    fails(saved, "format version 2, this rsmtdf reads version 1")
    rewrite(saved, version=1, groups=[])
    fails(saved, "expected 2 optimiser groups")
    assert all(torch.equal(v, before[k]) for k, v in bits(parts).items())
