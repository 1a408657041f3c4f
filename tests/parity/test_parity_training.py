"""Three recorded training steps of the published code (266 px, fp64) through the step that training really runs.

fp64 removes rounding noise; what stays is that both sides resample the position table in float32 (about 1e-7), and
that Adam's first step is nearly the gradient's sign, which magnifies it where a gradient is itself almost zero.
"""

import copy
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from rsmtdf.learning.batch import MicroBatch, count_step, cutmix
from rsmtdf.learning.ema import make_ema, update_ema
from rsmtdf.learning.losses import pseudo_labels
from rsmtdf.learning.methods import METHODS, MethodConfig
from rsmtdf.learning.optim import build_optimiser
from rsmtdf.learning.step import train_step
from rsmtdf.student.model import build_student

pytestmark = pytest.mark.slow

PX, TOTAL_STEPS = 266, 1000
CONFIG = MethodConfig(conf_threshold=0.75)


def build_batch(recipe, targets_of):
    boxes = torch.tensor(
        [(PX // 5, PX // 4, PX // 2, PX // 3), (PX // 2, PX // 10, PX // 3, PX // 2)], dtype=torch.int64
    )
    partner = torch.tensor([1, 0])
    strong = torch.from_numpy(recipe.strong_batch([2, 3], PX, PX)).double()
    strong = cutmix(strong, partner=partner, box=boxes)
    labelled = torch.from_numpy(recipe.batch([0, 1], PX, PX)).double()
    return MicroBatch(
        labelled=labelled,
        labels=torch.from_numpy(np.stack([recipe.labels(b, PX, PX) for b in (0, 1)])),
        weak=torch.from_numpy(recipe.batch([2, 3], PX, PX)).double(),
        strong=strong,
        valid=torch.from_numpy(np.stack([recipe.ignore_mask(k, PX, PX) for k in (0, 1)])) != 255,
        partner=partner,
        box=boxes,
        targets=targets_of(torch.cat([labelled, strong])),
    )


@dataclass
class Recorded:
    """What our three steps did, gathered once for all tests of this file."""

    batch: MicroBatch
    predictions: dict
    steps: list
    ema_at_099: dict
    final: dict
    groups: list


@pytest.fixture(scope="module")
def run(parity, paper_spec, formula_teachers):
    spec = copy.copy(paper_spec)
    student = parity.fill_student(build_student(spec, seed=0)).double().train()
    initial = {name: p.detach().clone() for name, p in student.named_parameters()}
    batch = build_batch(parity.recipe, formula_teachers)
    ema, optimiser = make_ema(student), build_optimiser(student)

    with torch.no_grad():
        weak = ema(batch.weak).logits
        confidence, label = pseudo_labels(weak)
        predictions = {
            "pred_u_w": weak,
            "conf_cutmixed": cutmix(confidence, partner=batch.partner, box=batch.box),
            "label": cutmix(label, partner=batch.partner, box=batch.box),
            "pred": student(torch.cat([batch.labelled, batch.strong])).logits,
        }
    watched = {parity.ours(key.split("/", 2)[2]) for key in parity.json("train_266_fp64")["tensors"] if "/grad/" in key}
    steps, ema_at_099 = [], {}
    for step in range(3):
        before = {name: p.detach().clone() for name, p in student.named_parameters() if name in watched}
        lr_used = [group["lr"] for group in optimiser.param_groups]
        terms = train_step(
            student=student,
            ema=ema,
            optimiser=optimiser,
            method=METHODS["rs-mtdf"],
            config=CONFIG,
            micro_batches=[batch],
            step=step,
            total_steps=TOTAL_STEPS,
        )
        named = dict(student.named_parameters())
        steps.append(
            {
                "terms": {name: float(term) for name, term in terms.items()},
                "lr_used": lr_used,
                "lr_next": [group["lr"] for group in optimiser.param_groups],
                "grad_l2": {name: float(p.grad.norm()) for name, p in named.items()},
                "grad": {name: named[name].grad.clone() for name in watched},
                "post": {name: named[name].detach().clone() for name in watched},
                "delta": {name: named[name].detach() - before[name] for name in watched},
                "ema": {name: p.clone() for name, p in ema.named_parameters() if name in watched},
            }
        )
        if step == 0:
            slow = copy.deepcopy(student)
            slow.load_state_dict(initial)
            update_ema(slow, student, ratio=0.99)
            ema_at_099 = {name: p.detach().clone() for name, p in slow.named_parameters() if name in watched}
    with torch.no_grad():
        final = {
            "final_logits_img_x_student_eval": student.eval()(batch.labelled).logits,
            "final_logits_img_x_ema": ema(batch.labelled).logits,
        }
    groups = [len(group["params"]) for group in optimiser.param_groups]
    return Recorded(batch, predictions, steps, ema_at_099, final, groups)


@pytest.fixture(scope="module")
def ref(parity):
    return parity.json("train_266_fp64"), parity.arrays("train_266_fp64")


def test_inputs_and_counts(parity, ref, run):
    meta, probes = ref
    for key, tensor in {
        "input/img_x": run.batch.labelled,
        "input/img_u_w": run.batch.weak,
        "img_u_s_after_cutmix": run.batch.strong,
    }.items():
        assert parity.error(tensor, probes[key], meta["tensors"][key]) == 0.0, key
    assert int((~run.batch.valid).sum()) == meta["input_ints"]["ignore255"]
    counts, _ = count_step([run.batch], normalise="global", reduce=None)
    histogram = meta["input_ints"]["label_hist"]
    assert int(counts.labelled_pixels) == sum(histogram.values()) - histogram["255"]
    assert int(counts.unlabelled_pixels) == meta["steps"][0]["valid_pixels_cutmixed"]


def test_predictions_before_the_first_step(parity, ref, run):
    meta, probes = ref
    errors = {
        key: parity.error(run.predictions[key], probes[key], meta["tensors"][key])
        for key in ("pred_u_w", "conf_cutmixed", "pred")
    }
    assert max(errors.values()) < 1e-11, errors
    histogram = torch.bincount(run.predictions["label"].reshape(-1), minlength=7)
    assert histogram.tolist() == meta["steps"][0]["pseudo_label_hist"]


@pytest.mark.parametrize("step", [0, 1, 2])
def test_loss_terms_counts_and_rates(ref, run, step):
    want, got = ref[0]["steps"][step], run.steps[step]
    terms = got["terms"]
    # Steps 1 and 2 follow Adam steps, which turn the last digits of tiny gradients into weights.
    rel = (1e-11, 1e-8, 1e-8)[step]
    for ours, theirs in {
        "loss": "loss",
        "loss_x": "loss_x",
        "distill": "dis_loss",
        "distill/dino": "mse_dino",
        "distill/clip": "mse_clip",
        "loss_u": "loss_u_s",
    }.items():
        assert terms[ours] == pytest.approx(want[theirs], rel=rel), ours
    assert terms["unlabelled_pixels"] == want["valid_pixels_cutmixed"]
    assert terms["selected"] == want["selected_pixels_cutmixed"]
    assert terms["mask_ratio"] == pytest.approx(want["selected_pixels_cutmixed"] / want["valid_pixels_cutmixed"])
    assert got["lr_used"] == pytest.approx(want["lr_used"], rel=1e-15)
    assert got["lr_next"] == pytest.approx(want["lr_next"], rel=1e-15)
    total = np.sqrt(sum(n * n for n in got["grad_l2"].values()))
    assert total == pytest.approx(want["grad_l2_total"], rel=rel)


def test_gradients_of_the_first_step(parity, ref, run):
    want = {parity.ours(k): v for k, v in ref[0]["steps"][0]["grad_l2_by_param"].items()}
    got = run.steps[0]["grad_l2"]
    assert got.keys() == want.keys()
    assert len(got) == ref[0]["optimizer_state_entries"] == 244
    assert run.groups == [174, 70]
    off = {name: abs(got[name] / want[name] - 1) for name in got}
    assert off.pop("backbone.pos_embed") < 1e-6  # its gradient passes through the float32 resampling
    assert max(off.values()) < 1e-8, max(off.items(), key=lambda item: item[1])


@pytest.mark.parametrize("step", [0, 1, 2])
@pytest.mark.parametrize("kind", ["grad", "delta", "post", "ema"])
def test_watched_parameters(parity, ref, run, step, kind):
    meta, probes = ref
    prefix = f"step{step}/{kind}/"
    keys = [key for key in meta["tensors"] if key.startswith(prefix)]
    assert len(keys) == len(run.steps[step][kind]) == 20
    errors = {}
    for key in keys:
        name = parity.ours(key.removeprefix(prefix))
        errors[name] = parity.error(run.steps[step][kind][name], probes[key], meta["tensors"][key])
    limit = {"grad": 1e-6, "delta": 1e-5, "post": 1e-9, "ema": 1e-9}[kind]
    assert max(errors.values()) < limit, max(errors.items(), key=lambda item: item[1])


def test_ema_at_another_ratio(parity, ref, run):
    meta, probes = ref
    keys = [key for key in meta["tensors"] if key.startswith("ema_at_ratio_0.99/")]
    assert keys
    for key in keys:
        name = parity.ours(key.split("/", 1)[1])
        assert parity.error(run.ema_at_099[name], probes[key], meta["tensors"][key]) < 1e-9, name


@pytest.mark.parametrize("key", ["final_logits_img_x_student_eval", "final_logits_img_x_ema"])
def test_logits_after_three_steps(parity, ref, run, key):
    meta, probes = ref
    assert parity.error(run.final[key], probes[key], meta["tensors"][key]) < 1e-8
