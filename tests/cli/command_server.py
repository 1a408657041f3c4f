"""Runs `rsmtdf` commands as processes that the tests may kill, without paying for their imports each time.

Importing torch and timm costs ten seconds of a core. Run as a script this imports them once and then forks a process
per line of standard input, a JSON object {"n": number, "args": [...], "cwd": folder, "log": file}: the fork runs the
command line's own `main` and leaves through the interpreter's ordinary exit. Answers are lines "<n> started <process
id>" and "<n> ended <exit code, negative for a signal>".
"""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import Any

import rsmtdf.cli.caching
import rsmtdf.cli.training  # with main below, all that the commands import when called
from rsmtdf.cli.main import main as rsmtdf


def command(job: dict[str, Any]) -> None:
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.chdir(job["cwd"])
    sys.argv = ["rsmtdf", *job["args"]]
    rsmtdf()
    sys.exit(0)


def supervise(job: dict[str, Any]) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if (pid := os.fork()) == 0:
        command(job)
    answer(job["n"], f"started {pid}")
    _, status = os.waitpid(pid, 0)
    answer(job["n"], f"ended {os.waitstatus_to_exitcode(status)}")


def answer(n: int, text: str) -> None:
    os.write(1, f"{n} {text}\n".encode())  # one write: lines of several processes do not mix


def main() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the supervisors need no wait()
    for line in sys.stdin:
        if os.fork() == 0:
            supervise(json.loads(line))
            os._exit(0)


if __name__ == "__main__":
    main()
