"""A training problem of a few thousand parameters in float64, and a program that runs one rank of it.

Run as `python tiny_problem.py RANK WORLD FOLDER`: the ranks meet through a file in FOLDER; rank 0 leaves the results of
a step with either normalisation there. The tests load it as a module for the single-process side.
"""

import sys
from pathlib import Path

import torch

from rsmtdf.learning.batch import MicroBatch, cutmix
from rsmtdf.learning.ema import make_ema
from rsmtdf.learning.methods import METHODS, MethodConfig
from rsmtdf.learning.optim import build_optimiser
from rsmtdf.learning.step import train_step
from rsmtdf.student.model import StudentSpec, TeacherHead, build_student

PX = 56
SPEC = StudentSpec(
    classes=3,
    overrides=(("depth", 4), ("embed_dim", 16), ("num_heads", 2), ("init_values", 1.0)),
    img_px=PX,
    layers=(0, 1, 2, 3),
    dpt_features=8,
    dpt_channels=(4, 4, 8, 8),
    translator_hidden=12,
    teachers=(
        TeacherHead(name="dense.teacher", grid=(4, 4), dim=6, dense=True),
        TeacherHead(name="fixed", grid=(2, 3), dim=5, dense=False),
    ),
)
QUARTERS = 4
CONFIDENT = 0.8


def student():
    model = build_student(SPEC, seed=1).double().train()
    with torch.no_grad():  # so that some pixels are confident and some are not
        model.decoder.predict[2].weight.mul_(20)
    return model


def quarter(k, px=PX):
    """Micro-batch k of four: 1 labelled and 2 unlabelled views, which are each other's CutMix partners.

    The share of ignored and invalid pixels grows with k, so per-rank means differ from the global one.
    """
    g = torch.Generator().manual_seed(100 + k)

    def images(n):
        return torch.randn(n, 3, px, px, generator=g, dtype=torch.float64)

    labels = torch.randint(0, SPEC.classes, (1, px, px), generator=g)
    labels[:, : 10 * k] = 255
    valid = torch.ones(2, px, px, dtype=torch.bool)
    valid[0, :, : 12 * k] = False
    partner = torch.tensor([1, 0])
    box = torch.tensor([[5, 7, 20, 11], [0, 0, 0, 0]])
    labelled, weak = images(1), images(2)
    strong = cutmix(images(2), partner=partner, box=box)
    targets = {
        head.name: torch.randn(3, head.grid[0] * head.grid[1], head.dim, generator=g, dtype=torch.float64)
        for head in SPEC.teachers
    }
    return MicroBatch(
        labelled=labelled,
        labels=labels,
        weak=weak,
        strong=strong,
        valid=valid,
        partner=partner,
        box=box,
        targets=targets,
    )


def joined(batches):
    """Several micro-batches as one."""
    sizes = [b.strong.shape[0] for b in batches]
    offsets = [sum(sizes[:i]) for i in range(len(sizes))]
    ms = [b.labelled.shape[0] for b in batches]

    def cat(field):
        return torch.cat([getattr(b, field) for b in batches])

    return MicroBatch(
        labelled=cat("labelled"),
        labels=cat("labels"),
        weak=cat("weak"),
        strong=cat("strong"),
        valid=cat("valid"),
        partner=torch.cat([b.partner + o for b, o in zip(batches, offsets, strict=True)]),
        box=cat("box"),
        targets={
            name: torch.cat(
                [b.targets[name][:m] for b, m in zip(batches, ms, strict=True)]
                + [b.targets[name][m:] for b, m in zip(batches, ms, strict=True)]
            )
            for name in batches[0].targets
        },
    )


def run_step(micro_batches, *, normalise="global", reduce=None, method="rs-mtdf", model=None):
    """One step from the fixed start: terms, gradients, parameters after it, EMA after it."""
    model = student() if model is None else model
    ema, optimiser = make_ema(model), build_optimiser(model, lr=1e-3)
    terms = train_step(
        student=model,
        ema=ema,
        optimiser=optimiser,
        method=METHODS[method],
        config=MethodConfig(conf_threshold=CONFIDENT, normalise=normalise),
        micro_batches=micro_batches,
        step=0,
        total_steps=10,
        reduce=reduce,
    )
    return {
        "terms": dict(terms),
        "grad": {name: p.grad for name, p in model.named_parameters()},
        "post": {name: p.detach() for name, p in model.named_parameters()},
        "ema": {name: p.detach() for name, p in ema.named_parameters()},
    }


def main(rank, world, folder):
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(str(folder / "store"), world)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=world)
    share = QUARTERS // world
    mine = [quarter(k) for k in range(rank * share, (rank + 1) * share)]
    results = {
        "global": run_step([joined(mine)], reduce=torch.distributed.all_reduce),
        "accumulated": run_step(mine, reduce=torch.distributed.all_reduce),
        "per_rank": run_step([joined(mine)], normalise="per_rank", reduce=torch.distributed.all_reduce),
    }
    if rank == 0:
        torch.save(results, folder / "results.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
