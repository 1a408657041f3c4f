import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import rsmtdf
from rsmtdf.errors import ConfigError, TrainingError
from rsmtdf.learning.ema import make_ema
from rsmtdf.learning.methods import METHODS, MethodConfig
from rsmtdf.learning.optim import build_optimiser
from rsmtdf.learning.step import sum_gradients, train_step

PROGRAM = Path(__file__).with_name("tiny_problem.py")
LOSSES = ("loss", "loss_x", "loss_u", "distill", "distill/dense.teacher", "distill/fixed", "mask_ratio")


def worst(found, expected):
    assert found.keys() == expected.keys()
    return max(float((found[k] - expected[k]).abs().max() / expected[k].abs().max().clamp(min=1e-12)) for k in expected)


def assert_same_step(found, expected):
    """To 1e-6; and far closer but for the position table, which is resampled in float32 whatever its dtype."""
    for kind in ("grad", "post", "ema"):
        assert worst(found[kind], expected[kind]) < 1e-6, kind

    def others(result):
        return {name: grad for name, grad in result["grad"].items() if name != "backbone.pos_embed"}

    assert worst(others(found), others(expected)) < 1e-12
    for name in LOSSES:
        torch.testing.assert_close(found["terms"][name], expected["terms"][name], rtol=1e-10, atol=0)
    for name in ("selected", "labelled_pixels", "unlabelled_pixels"):
        assert int(found["terms"][name]) == int(expected["terms"][name])


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """The results of two processes with half of the micro-batches each (one start for all, as it takes seconds)."""
    folder = tmp_path_factory.mktemp("ranks")
    package_root = str(Path(rsmtdf.__file__).parents[1])
    ranks = [
        subprocess.Popen(
            [sys.executable, str(PROGRAM), rank, "2", str(folder)],
            env=dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=package_root),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in ("0", "1")
    ]
    try:
        outputs = [p.communicate(timeout=240)[0] for p in ranks]
    finally:
        for p in ranks:
            p.kill()
    assert [p.returncode for p in ranks] == [0, 0], "\n".join(outputs)
    return torch.load(folder / "results.pt", weights_only=True)


@pytest.fixture(scope="module")
def whole(tiny):
    return tiny.run_step([tiny.joined([tiny.quarter(k) for k in range(4)])])


def test_four_accumulations_equal_one_batch(tiny, whole):
    assert_same_step(tiny.run_step([tiny.quarter(k) for k in range(4)]), whole)


@pytest.mark.parametrize("how", ["global", "accumulated"])
def test_two_ranks_equal_one_batch(whole, two_ranks, how):
    assert_same_step(two_ranks[how], whole)


def test_per_rank_is_the_mean_of_rank_means(tiny, whole, two_ranks):
    per_rank = two_ranks["per_rank"]
    halves = [tiny.run_step([tiny.joined([tiny.quarter(k), tiny.quarter(k + 1)])]) for k in (0, 2)]
    mean = {name: (halves[0]["grad"][name] + halves[1]["grad"][name]) / 2 for name in whole["grad"]}
    assert worst(per_rank["grad"], mean) < 1e-6
    assert worst(per_rank["grad"], whole["grad"]) > 1e-2
    expected = (halves[0]["terms"]["loss_x"] + halves[1]["terms"]["loss_x"]) / 2
    torch.testing.assert_close(per_rank["terms"]["loss_x"], expected)
    assert int(per_rank["terms"]["labelled_pixels"]) == int(whole["terms"]["labelled_pixels"])


def test_every_parameter_gets_a_gradient(whole):
    assert all(grad is not None for grad in whole["grad"].values())
    assert 0.05 < float(whole["terms"]["mask_ratio"]) < 0.95
    zero = [name for name, grad in whole["grad"].items() if not grad.any()]
    assert zero == []


def test_loss_is_the_mean_of_its_active_terms(tiny, whole):
    terms = whole["terms"]
    torch.testing.assert_close(terms["loss"], (terms["loss_x"] + terms["loss_u"] + terms["distill"]) / 3)
    torch.testing.assert_close(terms["distill"], (terms["distill/dense.teacher"] + terms["distill/fixed"]) / 2)
    fixmatch = tiny.run_step([tiny.quarter(1)], method="fixmatch")["terms"]
    torch.testing.assert_close(fixmatch["loss"], (fixmatch["loss_x"] + fixmatch["loss_u"]) / 2)
    supervised = tiny.run_step([tiny.quarter(1)], method="supervised")["terms"]
    torch.testing.assert_close(supervised["loss"], fixmatch["loss_x"])


def test_nothing_labelled_and_nothing_valid_is_a_zero_loss(tiny):
    batch = tiny.quarter(0)
    batch.labels.fill_(255)
    batch.valid.fill_(False)
    result = tiny.run_step([batch], method="fixmatch")
    assert float(result["terms"]["loss"]) == 0.0
    assert int(result["terms"]["labelled_pixels"]) == int(result["terms"]["unlabelled_pixels"]) == 0
    assert all(bool(p.isfinite().all()) for p in result["post"].values())
    assert not any(bool(g.any()) for g in result["grad"].values() if g is not None)


def test_invalid_pixels_never_get_pseudo_labels(tiny):
    batch = tiny.quarter(0)
    batch.valid[:] = False
    batch.valid[1, 5:25, 7:18] = True  # what view 0 receives by its paste, and nothing else of its own
    terms = tiny.run_step([batch], method="fixmatch")["terms"]
    assert int(terms["unlabelled_pixels"]) == 2 * 20 * 11
    assert int(terms["selected"]) <= 2 * 20 * 11


def test_learning_rate_lags_by_one_step(tiny):
    model = tiny.student()
    ema, optimiser = make_ema(model), build_optimiser(model, lr=1e-3)
    used = []
    for step in range(3):
        used.append([group["lr"] for group in optimiser.param_groups])
        train_step(
            student=model,
            ema=ema,
            optimiser=optimiser,
            method=METHODS["supervised"],
            config=MethodConfig(),
            micro_batches=[tiny.quarter(0)],
            step=step,
            total_steps=10,
        )
    assert used == [[1e-3, 0.04], [1e-3, 0.04], pytest.approx([1e-3 * 0.9**0.9, 0.04 * 0.9**0.9])]


def test_bf16_losses_are_float32_and_close(tiny):
    model = tiny.student().float()
    batch = tiny.quarter(0)
    half = copy.copy(batch)
    for field in ("labelled", "weak", "strong"):
        object.__setattr__(half, field, getattr(batch, field).float())
    arguments = {
        "ema": make_ema(model),
        "optimiser": build_optimiser(model, lr=1e-3),
        "method": METHODS["rs-mtdf"],
        "config": MethodConfig(conf_threshold=tiny.CONFIDENT),
        "micro_batches": [half],
        "step": 0,
        "total_steps": 10,
    }
    twin = copy.deepcopy(model)
    exact = train_step(student=twin, **{**arguments, "optimiser": build_optimiser(twin, lr=1e-3)})
    bf16 = train_step(student=model, **arguments, autocast=torch.bfloat16)
    assert bf16["loss"].dtype == torch.float32
    assert float(bf16["loss"]) != float(exact["loss"])
    torch.testing.assert_close(bf16["loss_x"], exact["loss_x"], rtol=2e-2, atol=0)
    torch.testing.assert_close(bf16["distill"], exact["distill"], rtol=2e-2, atol=0)


def test_gradients_are_summed_in_buckets(monkeypatch):
    monkeypatch.setattr("rsmtdf.learning.step.BUCKET_BYTES", 100)
    parameters = [torch.nn.Parameter(torch.zeros(n, dtype=d)) for n, d in ((9, torch.float32), (40, torch.float32))]
    parameters += [torch.nn.Parameter(torch.zeros(2, 3, dtype=torch.float64)), torch.nn.Parameter(torch.zeros(4))]
    for i, p in enumerate(parameters[:3]):
        p.grad = torch.full_like(p, i + 1.0)
    calls = []

    def double(tensor):
        calls.append(tensor.numel())
        tensor.mul_(2)

    sum_gradients(parameters, double)
    assert calls == [9, 40, 6]
    assert [float(p.grad.unique()) for p in parameters[:3]] == [2.0, 4.0, 6.0]
    assert parameters[3].grad is None


def test_bad_input_is_named(tiny):
    with pytest.raises(TrainingError, match="at least one micro-batch"):
        tiny.run_step([])
    batch = tiny.quarter(0)
    object.__setattr__(batch, "targets", {"fixed": batch.targets["fixed"]})
    with pytest.raises(TrainingError, match=r"do not fit the student's translations: expected .*dense\.teacher"):
        tiny.run_step([batch])
    batch = tiny.quarter(0)
    object.__setattr__(batch, "targets", {name: t[:2] for name, t in batch.targets.items()})
    with pytest.raises(TrainingError, match="are for 2 views"):
        tiny.run_step([batch])
    batch = tiny.quarter(0)
    object.__setattr__(batch, "partner", torch.tensor([0]))
    with pytest.raises(TrainingError, match="partner is"):
        tiny.run_step([batch])
    model = tiny.student()
    with pytest.raises(ConfigError, match="loss scaling"):
        train_step(
            student=model,
            ema=model,
            optimiser=build_optimiser(model),
            method=METHODS["supervised"],
            config=MethodConfig(),
            micro_batches=[tiny.quarter(0)],
            step=0,
            total_steps=1,
            autocast=torch.float16,
        )
