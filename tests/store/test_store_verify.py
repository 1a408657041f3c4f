"""Verify: one flipped bit anywhere is found and named, writers at work are no damage, and nothing is written."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import zarr

from rsmtdf.errors import StoreCorrupt, StoreError, StoreNotFound
from rsmtdf.keyed import Draws
from rsmtdf.signals import Interrupted, StopFlag
from rsmtdf.store.cached import CachedFeatures
from rsmtdf.store.remove import remove
from rsmtdf.store.repair import repair
from rsmtdf.store.store import FeatureStore
from rsmtdf.store.twins import TWINS
from rsmtdf.store.verify import verify

POSITIONS = 6
"""Flipped bits per file."""


@pytest.fixture(scope="module", params=["fp16", "int8"])
def original(request, kit, tmp_path_factory):
    """Sealed, with every kind of file."""
    path = tmp_path_factory.mktemp("verify") / "feats.zarr"
    kit.full(path, codec=request.param).seal()
    return path


@pytest.fixture
def copy(original, tmp_path):
    return shutil.copytree(original, tmp_path / "feats.zarr")


def check(path, **options):
    return verify(path, stop=StopFlag(), **options)


def files_of(path: Path) -> list[Path]:
    """All but the lock file, whose content means nothing."""
    return sorted(f for f in path.rglob("*") if f.is_file() and f.name != "locks")


def flip(file: Path, bit: int) -> None:
    data = bytearray(file.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    file.write_bytes(data)


def named(report, file: Path) -> bool:
    """Whether a finding is about `file`, or about the array whose values it holds."""
    return any(d.file in (file, file.parent) for d in report.damage)


def read_everything(path, kit, truth) -> None:
    """What training reads; fails on features other than `truth`."""
    store = FeatureStore.open(path)
    for name in store.column_names:
        store.column(name)
    list(store.tile_ids)
    store.view_status()
    with CachedFeatures(store, ["t"], device="cpu") as source:
        found = source.fetch(kit.rows(store))["t"].numpy()
    assert np.array_equal(found, truth)


def truth_of(path, kit) -> np.ndarray:
    store = FeatureStore.open(path)
    with CachedFeatures(store, ["t"], device="cpu") as source:
        return source.fetch(kit.rows(store))["t"].numpy()


def test_a_sound_store(copy):
    report = check(copy)
    assert (report.damage, report.remarks) == ([], [])
    assert report.is_sound
    assert report.is_complete
    assert report.teachers["t"].checked == report.teachers["t"].done == 18
    assert report.bytes_read == sum(f.stat().st_size for a in report_arrays(copy) for f in (copy / a).glob("c.*"))


def report_arrays(path):
    return [f"teachers/t/{a.name}" for a in FeatureStore.open(path).teacher("t").arrays]


def test_one_flipped_bit_in_any_file(copy, kit):
    truth = truth_of(copy, kit)
    files = files_of(copy)
    assert len(files) > 45
    for file in files:
        good = file.read_bytes()
        draws = Draws("flip", file.relative_to(copy).as_posix())
        for bit in {0, 8 * len(good) - 1} | {draws.integer(0, 8 * len(good) - 1) for _ in range(POSITIONS)}:
            flip(file, bit)
            report = check(copy)
            assert not report.is_sound, f"bit {bit} of {file}"
            assert named(report, file), f"bit {bit} of {file}: {report.damage}"
            try:
                read_everything(copy, kit, truth)
            except StoreCorrupt as error:
                assert str(copy) in str(error)  # noqa: PT017 - raising is one of two good outcomes
            file.write_bytes(good)
    assert check(copy).is_sound


@pytest.mark.parametrize(
    "name", ["views/status/c.3", "teachers/t/status/sealed", "views/flip/zarr.json", "teachers/t/status/zarr.json"]
)
def test_bits_all_over_a_small_file(copy, name):
    file = copy / name
    good = file.read_bytes()
    for bit in range(0, 8 * len(good), 1 if len(good) < 64 else 41):
        flip(file, bit)
        assert named(check(copy), file), f"bit {bit}"
        file.write_bytes(good)


def test_features_name_teacher_view_and_file(copy, kit):
    array = report_arrays(copy)[0]
    file = next((copy / array).glob("c.3.*"))
    flip(file, 8 * 20)
    (damage,) = check(copy).damage
    assert (damage.kind, damage.teacher, damage.shard, damage.row, damage.file) == ("features", "t", 3, 12, file)
    assert damage.view == "12 (tile scène/4_0, strong, seed 0)"
    assert "payload checksum is" in damage.text()


DAMAGES = {
    "removed": lambda file: file.unlink(),
    "emptied": lambda file: file.write_bytes(b""),
    "cut by a byte": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "cut in half": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "longer": lambda file: file.write_bytes(file.read_bytes() + b"\0" * 7),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_file_whole_or_named(copy, damage):
    """Notes, sealed copies and twins may be missing: nothing needs them."""
    optional = {"sealed", *(f"{k}.json" for k in range(9))}
    for file in files_of(copy):
        good = file.read_bytes()
        DAMAGES[damage](file)
        report = check(copy)
        if damage != "removed" or (file.name not in optional and copy / TWINS not in file.parents):
            assert named(report, file), f"{file}: {report.damage}"
        file.write_bytes(good)


def test_a_swapped_shard_is_told_by_the_status_words(copy):
    for array in report_arrays(copy):
        shutil.copy(*(next((copy / array).glob(f"c.{k}.*")) for k in (0, 3)))
    assert {d.shard for d in check(copy).damage} == {3}


def test_an_unsealed_chunk_of_the_views_that_is_gone(kit, path):
    kit.full(path)
    (path / "views/status/c.1").unlink()
    (damage,) = check(path).damage
    assert (damage.kind, damage.shard, damage.file) == ("status", 1, path / "views/status/c.1")


def test_what_is_not_there_yet_is_no_damage(kit, path):
    store = kit.create(path)
    report = check(path)
    assert report.is_sound
    assert not report.is_complete
    store.extend([kit.weak(), kit.strong()])
    kit.add_teacher(store)
    kit.write(store, 1, skipped=[5])
    (path / "teachers/t/status/c.2").unlink(missing_ok=True)
    shutil.copy(path / "teachers/t/features/c.1.0.0", path / "teachers/t/features/c.2.0.0")  # killed before its status
    (path / "teachers/t/features/c.0.0.0.abc.partial").write_bytes(b"x")
    (path / "views/why").write_text("?")
    report = check(path)
    assert report.is_sound, report.damage
    assert not report.is_complete
    assert (report.teachers["t"].done, report.teachers["t"].skipped, report.teachers["t"].total) == (3, 1, 15)
    assert report.remarks == [
        f"{path / 'views/why'} belongs to nothing in this store",
        "1 shard file(s) of teacher 't' are there, but their status says to do: they are written anew",
        "1 temporary file(s), of writers at work or ended early; the next writer removes the latter",
    ]


STEPS = ["tiles", "column tile", "column seed", "view status", "teacher t"]


@pytest.mark.parametrize("last", STEPS)
def test_a_growth_that_was_cut_short_is_no_damage(kit, path, last):
    class Cut(Exception):
        pass

    def on_step(step):
        if step == last:
            raise Cut

    store = kit.full(path)
    with pytest.raises(Cut):
        store.extend([kit.strong(4, generation=2, first_tile=20)], on_step=on_step)
    report = check(path)
    assert report.is_sound, report.damage
    assert "somebody is extending the store, or was cut short" in report.remarks[0]
    # A length that no growth explains still is damage.
    meta = path / "teachers/t/features/zarr.json"
    meta.write_text(meta.read_text().replace(f" {store.n_rows + (4 if last == 'teacher t' else 0)},", " 64,", 1))
    assert named(check(path), meta)


def test_views_committed_meanwhile_are_no_damage(kit, path):
    """A shard whose status was read as done is replaced before its file is."""
    store = kit.full(path)
    done = []

    def replace(checked, total):
        if not done:
            done.append(1)
            kit.write(store, 5, features={"t": np.ones((3, 6, 8), np.float32)})

    assert check(path, progress=replace, threads=1).is_sound
    assert done


def test_a_bad_sector_costs_one_view(copy, monkeypatch):
    preadv = os.preadv
    file = next((copy / report_arrays(copy)[0]).glob("c.0.*"))

    def failing(fd, buffers, offset):
        # Views 0..3 lie one after another; the second cannot be read.
        entry = os.fstat(fd).st_size - 4 * 16 - 4
        size = entry // 4
        is_it = Path(f"/proc/self/fd/{fd}").samefile(file)
        if is_it and offset < 2 * size and offset + sum(map(len, buffers)) > size:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return preadv(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", failing)
    (damage,) = check(copy).damage
    assert (damage.row, damage.file) == (1, file)
    assert damage.what == "reading failed (Input/output error)"


def test_it_changes_nothing(copy):
    os.utime(copy / "zarr.json", (0, 0))
    os.utime(copy / "views/status/c.0", (2**33, 2**33))  # a clock that runs ahead
    for folder in [copy, *(f for f in copy.rglob("*") if f.is_dir())]:
        folder.chmod(0o555)
    before = {f: (f.stat().st_mtime_ns, f.stat().st_ctime_ns, f.stat().st_size) for f in [copy, *copy.rglob("*")]}
    assert check(copy).is_sound
    assert {
        f: (f.stat().st_mtime_ns, f.stat().st_ctime_ns, f.stat().st_size) for f in [copy, *copy.rglob("*")]
    } == before
    for folder in before:
        folder.chmod(0o755)


def test_progress_and_signals(copy):
    stop, seen = StopFlag(), []

    def progress(done, total):
        seen.append((done, total))
        stop.signum = 15

    with pytest.raises(Interrupted, match="rsmtdf cache verify"):
        verify(copy, stop=stop, progress=progress, threads=1)
    assert 0 < seen[0][0] < seen[0][1]


def test_the_manifest(copy):
    (copy / "zarr.json").write_text("{}")
    (damage,) = check(copy).damage
    assert (damage.kind, damage.file) == ("manifest", copy / "zarr.json")


def test_there_is_no_store(tmp_path):
    with pytest.raises(StoreNotFound):
        check(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["features/c.0.0.0", "zarr.json", "status/c.0"])
def test_what_cannot_be_reached_is_no_damage(kit, path, monkeypatch, name):
    """A share that is gone for a minute must not have a store withdrawn."""
    kit.full(path)
    opened, file = os.open, str(path / "teachers/t" / name)
    before = {f: f.read_bytes() for f in path.rglob("*") if f.is_file() and f.name != "locks"}

    def gone(name, *arguments, **options):
        if str(name) == file:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), file)
        return opened(name, *arguments, **options)

    real_io_open = io.open

    def gone_io(name, *arguments, **options):
        if str(name) == file:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), file)
        return real_io_open(name, *arguments, **options)

    monkeypatch.setattr(os, "open", gone)
    monkeypatch.setattr(io, "open", gone_io)
    with pytest.raises(StoreError, match="Nothing is known to be wrong") as caught:
        check(path)
    assert not isinstance(caught.value, StoreCorrupt)
    with pytest.raises(StoreError, match="Nothing is known to be wrong"):
        repair(path, stop=StopFlag())
    monkeypatch.undo()
    assert {f: f.read_bytes() for f in before} == before


@pytest.mark.parametrize("last", ["manifest", None])
def test_a_removal_is_no_damage_also_where_it_was_cut_short(kit, path, last):
    class Cut(Exception):
        pass

    def on_step(step):
        if step == last:
            raise Cut

    kit.full(path).seal()
    with contextlib.suppress(Cut):
        remove(path, seed=0, stream="weak", stop=StopFlag(), on_step=on_step)
    assert check(path).damage == []
    assert repair(path, stop=StopFlag()).withdrawn == {}


@pytest.mark.parametrize("sealed", [True, False])
@pytest.mark.parametrize(
    "what", [{"seed": 0, "stream": "weak"}, {"seed": 0, "stream": "strong"}, {"teacher": "t"}], ids=str
)
def test_a_removal_meanwhile_is_no_damage(kit, path, what, sealed):
    """The views and their status chunks go while the check, which began before, is about to read them."""
    store = kit.create(path)
    store.extend([kit.weak(40), kit.strong(40)])
    kit.add_teacher(store)
    kit.fill(store)
    if sealed:
        store.seal()
    done = []

    def take_away(checked, total):
        if not done:
            done.append(checked)
            remove(path, stop=StopFlag(), **what)

    assert check(path, progress=take_away, threads=1).damage == []
    assert done
    assert check(path).damage == []


def test_damage_is_found_beside_a_removal(kit, path):
    store = kit.create(path)
    store.extend([kit.weak(40), kit.strong(40)])
    kit.add_teacher(store)
    kit.fill(store)
    file = path / "teachers/t/features/c.29.0.0"  # of the strong views, which stay
    flip(file, 8 * 5)
    done = []

    def take_away(checked, total):
        if not done:
            done.append(remove(path, seed=0, stream="weak", stop=StopFlag()))

    (damage,) = check(path, progress=take_away, threads=1).damage
    assert (damage.file, damage.row) == (file, 29 * 4)


@pytest.fixture
def archive(kit, path):
    """Features in chunks that are compressed, as an archive may have them."""
    kit.full(path)
    node = path / "teachers/t/features"
    values = zarr.open_array(node, mode="r")[:]
    array = zarr.create_array(
        node, shape=values.shape, dtype=values.dtype, chunks=(2, 6, 8), overwrite=True, fill_value=float("nan")
    )
    array[:] = values
    return path


def test_an_archive_is_checked_through_zarr(archive):
    report = check(archive)
    assert report.damage == []
    assert report.teachers["t"].checked == 18
    assert f"{archive / 'teachers/t/features'} is in another layout" in report.remarks[0]
    before = {f: f.read_bytes() for f in archive.rglob("*") if f.is_file() and f.name != "locks"}
    repair(archive, stop=StopFlag())
    assert {f: f.read_bytes() for f in before} == before


def test_a_damaged_archive_is_named_and_nothing_is_withdrawn(archive):
    chunk = archive / "teachers/t/features/c/6/0/0"
    chunk.write_bytes(chunk.read_bytes()[:-9])
    assert [d.row for d in check(archive).damage] == [12, 13]
    report = repair(archive, stop=StopFlag())
    assert [d.row for d in report.not_repaired] == [12, 13]
    assert report.withdrawn == {}
