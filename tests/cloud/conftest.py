"""An S3 endpoint on loopback: moto in a process of its own, behind a proxy that can fail on command.

moto keeps If-None-Match and If-Match of puts, but looks and writes in two steps, so two threads could both succeed. The
proxy lets one change of an object pass at a time, which is what makes them conditional as they are on S3 itself.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import http.client
import importlib.util
import os
import random
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from rsmtdf.objects import ObjectPath, store_path

MOTO = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""


@dataclasses.dataclass
class Fault:
    kind: str
    left: int
    method: str
    part: str
    value: float


class Faults:
    """What goes wrong with the next requests. `requests` counts those that matched nothing and were served too."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.clear()

    def clear(self) -> None:
        with self._lock:
            self._planned: list[Fault] = []
            self._share = 0.0
            self._random = random.Random(0)
            self.met: collections.Counter[str] = collections.Counter()
            self.requests: list[tuple[str, str]] = []

    def answer(self, status: int, *, times: int = 1, method: str = "", part: str = "") -> None:
        """Answers with `status` instead of serving."""
        self._plan(Fault("answer", times, method, part, status))

    def cut(self, *, times: int = 1, method: str = "", part: str = "", share: float = 0.5) -> None:
        """Ends the connection after a share of the answer's body; of an answer without one, before all of it."""
        self._plan(Fault("cut", times, method, part, share))

    def lose(self, *, times: int = 1, method: str = "", part: str = "") -> None:
        """Does what is asked, but ends the connection instead of answering."""
        self._plan(Fault("lose", times, method, part, 0))

    def stall(self, seconds: float, *, times: int = 1, method: str = "", part: str = "") -> None:
        """Is silent for `seconds`, then ends the connection."""
        self._plan(Fault("stall", times, method, part, seconds))

    def at_random(self, *, share: float, seed: int) -> None:
        """From now on a share of all requests meets a 500, a 503, a cut or a lost answer."""
        with self._lock:
            self._share, self._random = share, random.Random(seed)

    def _plan(self, fault: Fault) -> None:
        with self._lock:
            self._planned.append(fault)

    def draw(self, method: str, path: str) -> Fault | None:
        with self._lock:
            self.requests.append((method, path))
            found = next((f for f in self._planned if f.left and f.method in ("", method) and f.part in path), None)
            if found is not None:
                found.left -= 1
            elif self._random.random() < self._share:
                kind, value = self._random.choice([("answer", 500), ("answer", 503), ("cut", 0.5), ("lose", 0)])
                found = Fault(kind, 0, method, path, value)
            if found is not None:
                self.met[found.kind] += 1
            return found


class Proxy(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, behind: int) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.behind = behind
        self.faults = Faults()
        self.changes: collections.defaultdict[str, threading.Lock] = collections.defaultdict(threading.Lock)

    def handle_error(self, request, client_address) -> None:
        pass  # the other end may cut connections too


class Handler(BaseHTTPRequestHandler):
    server: Proxy
    protocol_version = "HTTP/1.1"
    timeout = 60
    disable_nagle_algorithm = True

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = self.server.faults.draw(self.command, self.path)
        if fault is not None and fault.kind == "answer":
            self._send(int(fault.value), {}, b"<Error><Code>InternalError</Code></Error>")
            return
        if fault is not None and fault.kind == "stall":
            time.sleep(fault.value)
            self._end()
            return
        status, headers, data = self._forward(body)
        if fault is None:
            self._send(status, headers, data)
        elif fault.kind == "lose":
            self._end()
        else:
            self._send(status, headers, data, upto=int(fault.value * len(data)))

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _serve  # noqa: N815 - the names http.server looks for

    def _forward(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        changes = self.command in ("PUT", "POST", "DELETE")
        with self.server.changes[self.path.split("?")[0]] if changes else contextlib.nullcontext():
            connection = http.client.HTTPConnection("127.0.0.1", self.server.behind, timeout=60)
            with contextlib.closing(connection):
                headers = {k: v for k, v in self.headers.items() if k.lower() != "connection"}
                connection.request(self.command, self.path, body, headers)
                answer = connection.getresponse()
                return answer.status, dict(answer.getheaders()), answer.read()

    def _send(self, status: int, headers: dict[str, str], data: bytes, upto: int | None = None) -> None:
        if upto == 0:
            self._end()
            return
        self.send_response_only(status)
        for name, value in headers.items():
            if name.lower() not in ("connection", "transfer-encoding", "content-length"):
                self.send_header(name, value)
        length = headers.get("Content-Length", len(data)) if self.command == "HEAD" else len(data)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(data if upto is None else data[:upto])
        if upto is not None:
            self._end()

    def _end(self) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, format: str, *args: object) -> None:
        pass


def fixtures_of(name: str) -> ModuleType:
    """Another folder's conftest.py, for its makers of stores and worlds."""
    file = Path(__file__).parents[1] / name / "conftest.py"
    spec = importlib.util.spec_from_file_location(f"conftest_of_{name}", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def kit() -> Any:
    """Small stores with known contents."""
    return fixtures_of("store").Kit()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tiny world and experiment, with a store of its features on the disk. Read-only."""
    cli = fixtures_of("cli")
    tiny = cli.Tiny(tmp_path_factory.mktemp("tiny"))
    cli.write_world(tiny.folder / "data", tile_px=64, train=5, val=2, test=2, seed=0, scene_px=160)
    tiny.config.write_text(cli.yaml.safe_dump(cli.TINY))
    tiny.cache()
    return tiny


@pytest.fixture(scope="session")
def proxy() -> Iterator[Proxy]:
    for package in ("moto", "flask", "obstore"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package}: pip install 'rsmtdf[dev]'")
    process = subprocess.Popen(
        [sys.executable, "-c", MOTO],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    with process:
        server = Proxy(int(process.stdout.readline()))
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        server.server_close()
        process.kill()


@pytest.fixture
def faults(proxy) -> Iterator[Faults]:
    """What goes wrong in this test; nothing at first."""
    proxy.faults.clear()
    yield proxy.faults
    proxy.faults.clear()


@pytest.fixture
def bucket(proxy, faults, monkeypatch) -> str:
    """The URL of an empty bucket; the environment says how to reach it."""
    settings = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{proxy.server_port}",
        "AWS_ALLOW_HTTP": "true",
        "AWS_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": "AKIATESTTESTTEST",
        "AWS_SECRET_ACCESS_KEY": "not-a-secret-but-never-shown",
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3", "HTTP_PROXY", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    name = f"test-{uuid.uuid4().hex}"
    connection = http.client.HTTPConnection("127.0.0.1", proxy.server_port, timeout=60)
    with contextlib.closing(connection):
        connection.request("PUT", f"/{name}", b"")
        assert connection.getresponse().status == 200
    faults.clear()
    return f"s3://{name}"


@pytest.fixture
def place(bucket) -> ObjectPath:
    """A path in the bucket whose requests give up after six seconds, and after three of silence."""
    path = store_path(f"{bucket}/folder/feats.zarr", retry_s=6)
    assert isinstance(path, ObjectPath)
    return path


class RangeHandler(SimpleHTTPRequestHandler):
    """A plain web server with byte ranges, as most have."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = self.translate_path(self.path)
        if not os.path.isfile(path):  # noqa: PTH113
            self.send_error(404)
            return
        with open(path, "rb") as file:  # noqa: PTH123
            data = file.read()
        wanted = self.headers.get("Range", "").removeprefix("bytes=")
        start, stop = 0, len(data)
        if wanted:
            first, _, last = wanted.partition("-")
            start = int(first) if first else max(0, len(data) - int(last))
            stop = min(len(data), int(last) + 1) if first and last else len(data)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(data)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(stop - start))
        self.send_header("Last-Modified", self.date_time_string(0))
        self.end_headers()
        self.wfile.write(data[start:stop])

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def serve(proxy) -> Iterator[Callable[[Path], ObjectPath]]:
    """Serves a folder as a plain web server does; its address."""
    with contextlib.ExitStack() as stack:

        def start(folder: Path) -> ObjectPath:
            server = ThreadingHTTPServer(("127.0.0.1", 0), partial(RangeHandler, directory=str(folder)))
            stack.callback(server.server_close)
            stack.callback(server.shutdown)
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
            path = store_path(f"http://127.0.0.1:{server.server_port}", retry_s=2)
            assert isinstance(path, ObjectPath)
            return path

        yield start
