"""Stage 1 then stage 2: exact targets, the same bits across a resume, and growth that costs only what is new."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rsmtdf.cli.planning import student_grid, teacher_sources
from rsmtdf.cli.training import TrainOptions, train_run
from rsmtdf.data.dataset import Dataset
from rsmtdf.errors import ConfigError, DatasetError, StoreIncomplete, StoreMismatch
from rsmtdf.learning.run import RunFolder
from rsmtdf.signals import Interrupted, StopFlag
from rsmtdf.stages.cache import view_maker
from rsmtdf.store.cached import CachedFeatures
from rsmtdf.store.store import FeatureStore
from rsmtdf.teachers.registry import build_teacher
from rsmtdf.views.view import view_crc

Say = Callable[[str], None]


def run(tiny: Any, out: Path, say: Say, *, stop: StopFlag | None = None, **options: Any) -> dict[str, Any]:
    given = TrainOptions(cache=tiny.store, out=out, device="cpu", **options)
    return train_run(given, stop=StopFlag() if stop is None else stop, say=say)


def losses(out: Path) -> list[float]:
    return [r["loss"] for r in RunFolder.open(out).records() if r["kind"] == "train"]


def test_the_store_holds_what_the_teacher_says_of_the_same_view(cached_tiny: Any) -> None:
    store = FeatureStore.open(cached_tiny.store)
    dataset = Dataset(store.dataset, Path(store.data_root))
    maker = view_maker(store, reader=dataset, tiles={t.id: t for t in dataset.tiles()})
    experiment = cached_tiny.source().experiment
    rows = np.concatenate([store.rows(stream="strong")[[0, 1, 7, 21]], store.rows(stream="weak")[[0, 29]]])
    views = maker.mixed([int(r) for r in rows])
    pixels = torch.from_numpy(np.stack([v.pixels for v in views]))
    recorded = store.view_status()[rows] & np.uint64(0xFFFFFFFF)
    assert [view_crc(v) for v in views] == recorded.tolist()
    with CachedFeatures(store, ["dense", "coarse"], device="cpu") as cached:
        stored = cached.fetch(rows)
    for name, source in teacher_sources(experiment).items():
        teacher = build_teacher(source, student_grid=student_grid(experiment), device=torch.device("cpu"))
        live = teacher(pixels)
        assert stored[name].shape == live.shape
        # The store's int8 keeps a value to half a step of its token. What batch a view is in may move the last bits of
        # the teacher's float32, and with them a code by one.
        kept = store.teacher(name)
        step = kept.encode(live)["token_scale"].float().unsqueeze(-1) * torch.from_numpy(kept.std).clamp(min=1e-3)
        assert ((stored[name] - live).abs() <= 0.6 * step + 1e-4).all()
        assert (stored[name] == kept.roundtrip(live)).float().mean() > 0.99
        assert not torch.equal(stored[name][0], stored[name][1]), "two views, two features"


def test_training_from_the_store_equals_training_with_live_teachers(tiny: Any, tmp_path: Path, say: Say) -> None:
    steps = {"train": {"budget": "20-steps"}}
    run(tiny, tmp_path / "cached", say, **steps)
    run(tiny, tmp_path / "online", say, teachers="online", through_codec=True, **steps)
    cached, online = losses(tmp_path / "cached"), losses(tmp_path / "online")
    assert len(cached) == 20
    np.testing.assert_allclose(cached, online, rtol=1e-5)


def test_the_run_folder_is_complete_and_the_loss_falls(tiny: Any, tmp_path: Path, say: Say) -> None:
    result = run(
        tiny, tmp_path / "run", say, overrides=["train.steps=120", "train.validate_every=40", "train.backbone_lr=3e-3"]
    )
    folder = RunFolder.open(tmp_path / "run")
    assert result["steps"] == result["total_steps"] == 120
    assert folder.state()["state"] == "finished"
    assert folder.best.is_file()
    assert folder.last.is_file()
    for term, share in (("loss_x", 0.8), ("distill/dense", 0.8), ("distill/coarse", 0.8)):
        values = [r[term] for r in folder.records() if r["kind"] == "train"]
        assert np.mean(values[-6:]) < share * np.mean(values[:6]), f"{term} did not fall: {values}"
    val = [r for r in folder.records() if r["kind"] == "val"]
    assert [r["step"] for r in val] == [40, 80, 120]
    assert result["best_miou"] == max(r["miou"] for r in val)


class StopAt(StopFlag):
    """Raised as if by SIGTERM, once the loop has looked `n` times."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self._left = n

    def __bool__(self) -> bool:
        self._left -= 1
        if self._left <= 0:
            self.signum = 15
        return self.signum is not None


@pytest.mark.parametrize("method", ["rs-mtdf", "fixmatch"])
def test_an_interrupted_and_resumed_run_ends_in_the_same_bits(tiny: Any, tmp_path: Path, say: Say, method: str) -> None:
    run(tiny, tmp_path / "whole", say, train={"method": method})
    with pytest.raises(Interrupted, match="stopped at step 7 of 12") as stopped:
        run(tiny, tmp_path / "cut", say, train={"method": method}, stop=StopAt(7))
    assert stopped.value.exit_code == 143
    assert RunFolder.open(tmp_path / "cut").state()["state"] == "interrupted"
    run(tiny, tmp_path / "cut", say, resume=True)
    for name in ("last", "best"):
        whole = (tmp_path / "whole" / "checkpoints" / f"{name}.safetensors").read_bytes()
        assert whole == (tmp_path / "cut" / "checkpoints" / f"{name}.safetensors").read_bytes()
    assert (tmp_path / "whole" / "metrics.jsonl").read_text() == (tmp_path / "cut" / "metrics.jsonl").read_text()


def test_workers_change_no_bit(tiny: Any, tmp_path: Path, say: Say) -> None:
    for workers in (1, 3):
        threads = [f"train.workers={workers}", f"train.feature_threads={workers}"]
        run(tiny, tmp_path / f"w{workers}", say, overrides=[*threads, "train.steps=4"])
    one, three = ((tmp_path / f"w{w}/checkpoints/last.safetensors").read_bytes() for w in (1, 3))
    assert one == three


def test_a_resume_with_other_settings_names_them(tiny: Any, tmp_path: Path, say: Say) -> None:
    with pytest.raises(Interrupted):
        run(tiny, tmp_path / "run", say, stop=StopAt(3))
    with pytest.raises(ConfigError, match=r"train.seed: the run has 0, now 5"):
        run(tiny, tmp_path / "run", say, resume=True, train={"seed": 5})


def test_running_again_computes_nothing_and_growing_only_what_is_new(tiny: Any) -> None:
    assert tiny.cache()["views"] == 0
    before = {p: p.read_bytes() for p in tiny.store.rglob("c/*") if "teachers" in p.parts}
    assert tiny.cache("cache.seeds=3")["views"] == 20, "one more seed of a pool of 20"
    assert tiny.cache("cache.seeds=3", labels="8")["views"] == 2 * 5, "five weak views of two more labelled tiles"
    assert tiny.cache("cache.seeds=3", "cache.weak_views=6", labels="8")["views"] == 8
    for path, data in before.items():
        if "status" not in path.parts:
            assert path.read_bytes() == data, f"growing rewrote {path}"


def test_another_teacher_is_computed_alone(tiny: Any) -> None:
    vit = "{patch_size: 14, embed_dim: 24, depth: 4, num_heads: 2}"
    extra = f"{{name: third, library: timm, model: vit_tiny_patch16_224, weights: random, seed: 2, overrides: {vit}}}"
    two = tiny.source().experiment.as_dict()["teachers"]
    stamps = {p: p.stat().st_mtime_ns for p in (tiny.store / "teachers" / "dense").rglob("c/*")}
    tiny.cache(f"teachers=[{two[0]}, {two[1]}, {extra}]".replace("None", "null").replace("True", "true"))
    assert FeatureStore.open(tiny.store).info()["teachers"]["third"]["complete"]
    assert all(p.stat().st_mtime_ns == t for p, t in stamps.items())


def test_a_corrected_mask_needs_no_caching(tiny: Any, tmp_path: Path, say: Say) -> None:
    from PIL import Image

    mask = next((tiny.folder / "data" / "Train").rglob("masks_png/*.png"))
    label = np.array(Image.open(mask))
    label[:32] = 3
    Image.fromarray(label).save(mask)
    assert tiny.cache()["views"] == 0
    assert run(tiny, tmp_path / "run", say, train={"budget": "2-steps"})["steps"] == 2


def test_a_changed_image_is_never_trained_on(tiny: Any, tmp_path: Path, say: Say) -> None:
    from PIL import Image

    for path in (tiny.folder / "data" / "Train").rglob("images_png/*.png"):
        pixels = np.array(Image.open(path))
        pixels[::7] ^= 1
        Image.fromarray(pixels).save(path)
    with pytest.raises(StoreMismatch, match=r"has other pixels than the teachers saw.*--set train.pixel_mismatch=warn"):
        run(tiny, tmp_path / "run", say, train={"budget": "2-steps"})
    tolerant = ["train.pixel_mismatch=warn", "train.steps=2"]
    assert run(tiny, tmp_path / "run2", say, overrides=tolerant)["differing_views"] > 0


def test_an_unreadable_tile_is_named_and_the_rest_goes_on(cached_tiny: Any, tmp_path: Path, say: Say) -> None:
    import shutil

    tiny = type(cached_tiny)(tmp_path / "tiny")
    shutil.copytree(cached_tiny.folder, tiny.folder, ignore=shutil.ignore_patterns("feats.zarr"))
    victim = sorted((tiny.folder / "data" / "Train").rglob("images_png/*.png"))[0]
    victim.write_bytes(victim.read_bytes()[:2000])
    result = tiny.cache()
    assert result["failed"], "max_failures is 0"
    assert any(victim.stem in name for name in result["unreadable_tiles"])
    assert FeatureStore.open(tiny.store).info()["complete"]


def test_labels_that_the_store_lacks_say_how_to_get_them(tiny: Any, tmp_path: Path, say: Say) -> None:
    with pytest.raises(StoreIncomplete, match=r"no finished weak views of \d of 12 labelled tiles"):
        run(tiny, tmp_path / "run", say, labels="12")
    assert not (tmp_path / "run").exists() or not any((tmp_path / "run").rglob("*.safetensors"))


def test_a_store_of_another_identity_lists_every_difference(tiny: Any) -> None:
    with pytest.raises(StoreMismatch) as error:
        tiny.cache("views.crop_px=70", "views.hflip_p=0.25")
    assert "crop_px" in str(error.value)
    assert "hflip_p" in str(error.value)
    with pytest.raises(StoreMismatch, match="weights_sha256"):
        tiny.cache("teachers.0.seed=9")


def test_a_store_moved_away_from_its_images_asks_for_the_root(tiny: Any, tmp_path: Path, say: Say) -> None:
    (tiny.folder / "data").rename(tmp_path / "elsewhere")
    with pytest.raises(DatasetError, match=r"is not a folder; give the folder with the images by --root DIR"):
        run(tiny, tmp_path / "run", say)


def test_a_store_without_a_teacher_names_it(tiny: Any, tmp_path: Path, say: Say) -> None:
    with pytest.raises(StoreIncomplete, match="has no features of dinov2_vitb14"):
        run(tiny, tmp_path / "run", say, overrides=["teachers=[{name: dinov2_vitb14}]"])
    assert not (tmp_path / "run").exists()


def test_interrupting_stage_one_loses_nothing_that_was_finished(cached_tiny: Any, tmp_path: Path) -> None:
    import shutil

    tiny = type(cached_tiny)(tmp_path / "tiny")
    shutil.copytree(cached_tiny.folder, tiny.folder, ignore=shutil.ignore_patterns("feats.zarr"))

    class StopLater(StopFlag):
        looks = 0

        def check(self, message: str) -> None:
            self.looks += 1
            if self.looks > 4:
                self.signum = 2
            super().check(message)

    with pytest.raises(Interrupted) as stopped:
        tiny.cache(stop=StopLater())
    assert stopped.value.exit_code == 130
    tiny.cache()
    whole, cut = FeatureStore.open(cached_tiny.store), FeatureStore.open(tiny.store)
    assert np.array_equal(whole.view_status(), cut.view_status())
    for name in ("dense", "coarse"):
        assert np.array_equal(whole.status(name), cut.status(name)), "the same features, bit for bit"


def test_later_settings_are_what_training_starts_from(tiny: Any, tmp_path: Path, say: Say) -> None:
    tiny.cache(labels="8")
    third = "{name: third, library: timm, model: vit_tiny_patch16_224, weights: random, seed: 2, overrides: "
    tiny.cache(f"teachers=[{third}{{patch_size: 14, embed_dim: 24, depth: 4, num_heads: 2}}}}]", labels="8")
    record = FeatureStore.open(tiny.store).experiment
    assert record["config"]["splits"]["labels"] == "8"
    assert [t["name"] for t in record["config"]["teachers"]] == ["dense", "coarse", "third"]
    result = run(tiny, tmp_path / "run", say, train={"budget": "2-steps"})
    assert result["steps"] == 2
