from __future__ import annotations

import contextlib
import json
import logging
import os
import subprocess
import sys
import threading
import time

import pytest

from rsmtdf.errors import StoreError
from rsmtdf.objects import ObjectPath
from rsmtdf.store.leases import ObjectLocks
from rsmtdf.store.renewal import Lease, Watch

LEASE_S = 3.0

OWNER = """
import sys
from rsmtdf.objects import store_path
from rsmtdf.store.leases import ObjectLocks
store = store_path(sys.argv[1], retry_s=3)
locks = ObjectLocks(store=store, folder=store / "provenance", lease_s=float(sys.argv[2]))
with locks.claim(range(3, 6)), locks.mutex(timeout_s=0):
    print("ready", flush=True)
    sys.stdin.readline()
"""


class FakeClock:
    """Goes on by itself and can be set forward."""

    def __init__(self, start: float) -> None:
        self.offset = start - time.monotonic()

    def __call__(self) -> float:
        return time.monotonic() + self.offset


def make(place: ObjectPath, clock: FakeClock | None = None) -> ObjectLocks:
    clock = clock or FakeClock(0)
    return ObjectLocks(store=place, folder=place / "provenance", lease_s=LEASE_S, clock=clock)


@pytest.fixture
def locks(place) -> ObjectLocks:
    return make(place)


@pytest.fixture
def start_owner(place, repo):
    """Starts processes that hold shards 3, 4, 5 and the mutex."""
    with contextlib.ExitStack() as stack:

        def start() -> subprocess.Popen:
            process = subprocess.Popen(
                [sys.executable, "-c", OWNER, str(place), str(LEASE_S)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, "PYTHONPATH": str(repo)},
            )
            stack.callback(process.communicate)
            stack.callback(process.kill)
            assert process.stdout.readline() == "ready\n"
            return process

        yield start


def claims(place: ObjectPath) -> list[str]:
    return (place / "provenance" / "claims").names()


def test_another_processs_claim_is_refused_with_its_name(locks, start_owner):
    owner = start_owner()
    start = time.monotonic()
    with (
        pytest.raises(StoreError, match=f"shards 0 to 4 of .* already claimed by process {owner.pid} on "),
        locks.claim(range(5)),
    ):
        pass
    assert time.monotonic() - start < LEASE_S, "an owner that renews is believed at once, not after a lease"
    with locks.claim([0, 1, 2, 6, 9]):
        pass
    with (
        pytest.raises(StoreError, match=f"cannot extend .* while process {owner.pid} on .* is writing"),
        locks.all_shards(purpose="extend"),
    ):
        pass
    with pytest.raises(StoreError, match=f"changed by process {owner.pid}"), locks.mutex(timeout_s=0.1):
        pass


def test_what_a_process_held_is_free_when_it_ends(locks, start_owner, place):
    owner = start_owner()
    owner.communicate("\n")
    assert claims(place) == []
    start = time.monotonic()
    with locks.mutex(timeout_s=0), locks.all_shards(purpose="extend"):
        assert time.monotonic() - start < LEASE_S / 2


def test_kill_9_is_taken_over_after_a_lease_and_not_before(locks, start_owner, place):
    owner = start_owner()
    owner.kill()
    owner.wait()
    start = time.monotonic()
    with locks.claim([4]):
        waited = time.monotonic() - start
        assert LEASE_S < waited < 4 * LEASE_S
        with locks.mutex(timeout_s=10 * LEASE_S):
            pass
        assert len(claims(place)) == 1, "the dead process's claim is gone"
    with locks.all_shards(purpose="extend"):
        assert time.monotonic() - start < 8 * LEASE_S


def test_of_two_that_take_over_from_the_dead_one_wins(place, start_owner):
    owner = start_owner()
    owner.kill()
    owner.wait()
    won, refused = [], []
    ready = threading.Barrier(4)

    def contend() -> None:
        locks = make(place)
        ready.wait()
        try:
            with locks.claim([5]):
                won.append(1)
                ended.wait()
        except StoreError as error:
            refused.append(str(error))

    ended = threading.Event()
    threads = [threading.Thread(target=contend) for _ in range(4)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 20 * LEASE_S
    while len(won) + len(refused) < 4 and time.monotonic() < deadline:
        time.sleep(0.05)
    ended.set()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert len(refused) == 3
    assert all("shard 5 of" in text for text in refused)


def test_the_mutex_is_held_by_one_at_a_time(place):
    inside, most, entered = 0, 0, 0
    guard = threading.Lock()

    def work() -> None:
        nonlocal inside, most, entered
        locks = make(place)
        for _ in range(5):
            with locks.mutex(timeout_s=60):
                with guard:
                    inside, entered = inside + 1, entered + 1
                    most = max(most, inside)
                time.sleep(0.01)
                with guard:
                    inside -= 1

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (entered, most, inside) == (15, 1, 0)


def test_a_process_excludes_itself_at_once(locks):
    start = time.monotonic()
    with locks.claim([1, 2, 7]):
        with pytest.raises(StoreError, match="shard 7 of"), locks.claim([0, 7]):
            pass
        with locks.claim([0]):
            pass
        with pytest.raises(StoreError, match="while process"), locks.all_shards(purpose="extend"):
            pass
    with locks.all_shards(purpose="extend"):
        with pytest.raises(StoreError, match="shard 7 of"), locks.claim([7]):
            pass
        with locks.claim([]):
            pass
    with locks.claim([7]):
        pass
    assert time.monotonic() - start < LEASE_S


def test_a_claim_needs_no_mutex(locks, start_owner):
    """Another process may keep the mutex for an hour, while it measures statistics."""
    start_owner()
    start = time.monotonic()
    with locks.claim([9]):
        assert time.monotonic() - start < LEASE_S


def test_held_for_many_leases_by_renewing(locks, place):
    other = make(place)
    with locks.claim([1]), locks.mutex(timeout_s=0):
        for _ in range(4):
            time.sleep(LEASE_S / 2)
            locks.still_held()
            with pytest.raises(StoreError), other.mutex(timeout_s=0):
                pass
        with pytest.raises(StoreError, match="claimed by"), other.claim([1]):
            pass


def test_clocks_of_other_machines_and_of_the_wall_do_not_matter(place, monkeypatch, caplog):
    """Nobody looks at the time of day, and nobody at a time that another has written."""
    caplog.set_level(logging.WARNING, logger="rsmtdf")  # a line of a log carries the time of day

    def no_time(*_: object) -> float:
        raise AssertionError("the wall clock is another one on every machine")

    monkeypatch.setattr(time, "time", no_time)
    monkeypatch.setattr(time, "time_ns", no_time)
    past, future = make(place, FakeClock(-1e9)), make(place, FakeClock(1e9))
    for one, other in ((past, future), (future, past)):
        with one.claim([3]), one.mutex(timeout_s=0):
            with pytest.raises(StoreError, match="claimed by"), other.claim([3]):
                pass
            with pytest.raises(StoreError, match="being changed by"), other.mutex(timeout_s=0.1):
                pass
            one.still_held()
    for name in (place / "provenance").names():
        with contextlib.suppress(FileNotFoundError):
            assert "time" not in json.loads((place / "provenance" / name).read_bytes())


def steal(place: ObjectPath, name: str) -> None:
    (place / "provenance" / name).write_bytes(b'{"owner": "somebody else"}')


def test_an_owner_that_stood_still_goes_on_if_nobody_has_taken_over(place):
    """A stopped process, or a machine that slept."""
    clock = FakeClock(0)
    locks = make(place, clock)
    with locks.claim([1]), locks.mutex(timeout_s=0):
        clock.offset += 3 * LEASE_S
        locks.still_held()
        clock.offset += 3 * LEASE_S


def test_an_owner_that_was_taken_over_has_lost_at_its_next_question(place, locks):
    """Even if its own clock has told it nothing, as in a virtual machine that was frozen."""
    lost = rf"could not renew its locks on feature store {place} for 3 s .* Run the same command again"
    with pytest.raises(StoreError, match=lost), locks.claim([1]):
        steal(place, f"claims/{claims(place)[0]}")
        locks.still_held()
    with pytest.raises(StoreError, match=lost), locks.mutex(timeout_s=0):
        steal(place, "mutex")
        locks.still_held()
    found = json.loads((place / "provenance" / "mutex").read_bytes())
    assert found == {"owner": "somebody else"}, "what is not ours is not released"


def test_leaving_tells_of_a_lost_lease_too_but_not_instead_of_an_error(place):
    clock = FakeClock(0)
    locks = make(place, clock)
    with pytest.raises(StoreError, match="could not renew"), locks.claim([1]):
        steal(place, f"claims/{claims(place)[0]}")
        clock.offset += 2 * LEASE_S
    with pytest.raises(ZeroDivisionError), locks.mutex(timeout_s=0):
        steal(place, "mutex")
        clock.offset += 2 * LEASE_S
        raise ZeroDivisionError


def test_a_cut_network_loses_the_lease_after_its_time(locks, faults):
    with pytest.raises(StoreError, match="could not renew"), locks.claim([1]):
        faults.answer(503, times=10_000)
        deadline = time.monotonic() + 4 * LEASE_S
        with contextlib.suppress(StoreError):
            while time.monotonic() < deadline:
                time.sleep(0.1)
                locks.still_held()
        assert time.monotonic() < deadline, "it must notice by itself"
        faults.clear()


@pytest.mark.parametrize(
    ("method", "part"), [("PUT", "provenance"), ("GET", "provenance"), ("GET", "list-type"), ("POST", "delete")]
)
def test_lost_answers_and_errors_in_between_harm_nothing(place, faults, method, part):
    """A put whose answer is lost has happened: the owner finds its own writing and goes on."""
    locks = make(place)
    for kind in (faults.lose, faults.cut, lambda **k: faults.answer(503, **k)):
        kind(times=1, method=method, part=part)
        with locks.mutex(timeout_s=10), locks.claim([1]):
            kind(times=1, method="PUT", part="provenance")
            locks.still_held()
            with pytest.raises(StoreError, match="shard 1 of"), locks.claim([1]):
                pass
    assert faults.met == {"lose": 2, "cut": 2, "answer": 2}
    faults.clear()
    other = make(place)
    with other.mutex(timeout_s=3 * LEASE_S), other.all_shards(purpose="extend"):
        pass


def test_the_server_must_know_conditions(place, monkeypatch):
    """What an object store that ignores If-None-Match would do to two writers: both would be owners."""

    def create(self: ObjectPath, data: bytes):
        self.write_bytes(data)
        return self.read_tagged()[1]

    monkeypatch.setattr(ObjectPath, "create", create)
    with pytest.raises(StoreError, match="ignores the conditions"), make(place).mutex(timeout_s=0):
        pass


def test_a_bucket_that_cannot_be_written_is_an_error(locks, faults):
    faults.answer(403, times=1000)
    start = time.monotonic()
    with pytest.raises(StoreError, match=r"cannot lock feature store s3://.*rights to write"), locks.claim([0]):
        pass
    assert time.monotonic() - start < LEASE_S


def test_a_server_that_stays_away_is_an_error_within_bounds(locks, faults):
    faults.answer(503, times=10_000)
    start = time.monotonic()
    with pytest.raises(StoreError, match="cannot lock feature store"), locks.mutex(timeout_s=3600):
        pass
    assert time.monotonic() - start < 15


def test_watching(place):
    clock = FakeClock(0)
    watch = Watch(lease_s=10, clock=clock)
    lease = Lease(place / "x", lease_s=10, clock=clock, facts={})
    assert lease.take(None)
    _, first = (place / "x").read_tagged()
    assert watch.is_alive("x", first) is None
    clock.offset += 12
    assert watch.is_alive("x", first) is None, "not before a lease and a quarter"
    clock.offset += 1
    assert watch.is_alive("x", first) is False
    clock.offset -= 13
    assert lease.renew()
    _, second = (place / "x").read_tagged()
    assert watch.is_alive("x", second) is True
    clock.offset += 11
    assert watch.is_alive("x", second) is None
    clock.offset -= 11
    lease.release()
    assert not (place / "x").exists()
