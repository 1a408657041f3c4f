"""Whether a way notices one flipped bit in a view: tried out, not taken from documentation."""

from __future__ import annotations

import tempfile
from pathlib import Path

from store_peers.formats import FORMATS
from store_peers.views import Views, make_views, same, teacher_spec
from store_peers.ways import Way

ROW = 5
"""The view that is damaged."""


def notices_a_flipped_bit(way: Way) -> bool:
    """Writes a few small views, flips a bit of one, and reads it.

    Raises:
        RuntimeError: the bit was not found on disk, or the view read right although it is damaged.
    """
    views = make_views(8, codec="fp16", spec=teacher_spec(grid=(4, 4), dim=64))
    with tempfile.TemporaryDirectory() as folder:
        FORMATS[way.format].begin(Path(folder), views)()
        _flip(Path(folder), views)
        with way.open(Path(folder), views) as reads:
            slot = {name: values[0] for name, values in views.buffers(1).items()}
            try:
                found = reads.one(ROW, slot)
            except (OSError, ValueError, RuntimeError):
                return True
            if same(found, views.view(ROW)):
                raise RuntimeError(f"{way.name} read a damaged view as if it were not")
            return False


def _flip(folder: Path, views: Views) -> None:
    payload = views.view(ROW)[views.names[0]].tobytes()
    for file in folder.rglob("*"):
        data = bytearray(file.read_bytes()) if file.is_file() else bytearray()
        at = data.find(payload)
        if at >= 0:
            data[at + len(payload) // 2] ^= 1
            file.write_bytes(data)
            return
    raise RuntimeError(f"the bytes of view {ROW} were not found in {folder}")
