"""The stop flag: raised once by a signal, forceful the second time, gone afterwards."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from rsmtdf.signals import Interrupted, stop_flag


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_raises_the_flag_and_check_carries_the_exit_code(signum: signal.Signals, code: int) -> None:
    before = signal.getsignal(signum)
    with stop_flag() as flag:
        flag.check("not yet")
        assert not flag
        os.kill(os.getpid(), signum)
        assert flag
        with pytest.raises(Interrupted, match="saved at step 3") as stopped:
            flag.check("saved at step 3")
    assert stopped.value.exit_code == code
    assert signal.getsignal(signum) is before


def test_interrupted_is_no_error_that_a_handler_swallows() -> None:
    assert not issubclass(Interrupted, Exception)


def test_outside_the_main_thread_nothing_is_installed() -> None:
    found: list[object] = []

    def work() -> None:
        with stop_flag() as flag:
            found.append(flag.signum)

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [None]
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_second_signal_ends_the_process(run_python) -> None:
    code = """
import os, signal
from rsmtdf.signals import stop_flag
pid = os.fork()
if pid == 0:
    with stop_flag():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
    os._exit(0)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""
    assert run_python(code).strip() == str(-signal.SIGTERM)
