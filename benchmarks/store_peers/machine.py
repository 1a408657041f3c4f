"""Where and under which load something was measured."""

from __future__ import annotations

import datetime as dt
import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

_PACKAGES = ("numpy", "torch", "zarr", "tensorstore", "h5py", "safetensors", "webdataset", "google-crc32c")


def facts(folder: Path) -> dict[str, Any]:
    """JSON-ready facts; `folder` is where the files are."""
    return {
        "date": dt.datetime.now(tz=dt.UTC).date().isoformat(),
        "cpu": _field("/proc/cpuinfo", "model name") or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "l3_mb": _l3_bytes() / 2**20,
        "memory_gib": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30,
        "system": f"{platform.system()} {platform.release()}",
        "file_system": _file_system(folder),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "load": load(),
    }


def load() -> float:
    """Processes that wanted a core, over the last minute."""
    return os.getloadavg()[0]


def text(found: dict[str, Any], load_after: float) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    return (
        f"{found['date']}; {found['cores']} cores of an {found['cpu']} (L3 {found['l3_mb']:.0f} MiB), "
        f"{found['memory_gib']:.0f} GiB, no GPU used; {found['file_system']}; Python {found['python']}, {versions}. "
        f"Load average {found['load']:.1f} at the start, {load_after:.1f} at the end."
    )


def _field(file: str, name: str) -> str:
    try:
        lines = Path(file).read_text().splitlines()
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(name)), "")


def _l3_bytes() -> int:
    try:
        text = Path("/sys/devices/system/cpu/cpu0/cache/index3/size").read_text().strip()
    except OSError:
        return 0
    return int(text.rstrip("KM")) * (2**20 if text.endswith("M") else 2**10)


def _file_system(folder: Path) -> str:
    """The type of the file system that holds `folder`."""
    try:
        mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    except OSError:
        return "?"
    inside = [(len(m[1]), m[2]) for m in mounts if folder.resolve().is_relative_to(m[1])]
    return max(inside, default=(0, "?"))[1]
