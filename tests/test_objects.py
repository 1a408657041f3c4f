"""Names and addresses; what talks to a server is tested in tests/cloud."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from rsmtdf.errors import StoreError
from rsmtdf.objects import GAP_BYTES, REQUEST_BYTES, ObjectPath, _requests, store_path


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("s3://bucket/a/feats.zarr", "s3://bucket/a/feats.zarr"),
        ("s3://bucket/a/feats.zarr/", "s3://bucket/a/feats.zarr"),
        ("s3a://bucket/x", "s3://bucket/x"),
        ("s3://bucket", "s3://bucket"),
        ("s3://bucket/", "s3://bucket"),
        ("gs://bucket/x y/é", "gs://bucket/x y/é"),
        ("az://container/x", "az://container/x"),
        ("abfs://container@account.dfs.core.windows.net/x", "abfs://container@account.dfs.core.windows.net/x"),
        ("https://host:8080/a%20b/x", "https://host:8080/a%20b/x"),
        ("http://127.0.0.1:1/x", "http://127.0.0.1:1/x"),
        (Path("s3://bucket/x"), "s3://bucket/x"),
        (Path("https://host/x/y"), "https://host/x/y"),
    ],
)
def test_addresses(text, found):
    path = store_path(text)
    assert isinstance(path, ObjectPath)
    assert str(path) == found
    assert store_path(found) == path
    assert store_path(path) is path


@pytest.mark.parametrize(
    "text", ["feats.zarr", "/data/s3/feats.zarr", "C:/data/x", "C:\\data", "a:b/c", "data:/x", "."]
)
def test_everything_else_is_a_path_on_a_disk(text):
    assert store_path(text) == Path(text)
    assert store_path(Path(text)) == Path(text)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("s3://", "lacks the bucket"),
        ("https://", "lacks the host"),
        ("ftp://host/x", r"ftp:// is no place for a feature store.*s3://"),
        ("s3://bucket/a//b", r"no name of an object"),
        ("s3://bucket/a/../b", r"no name of an object"),
        ("s3://bucket/a\nb", r"no name of an object"),
    ],
)
def test_addresses_that_are_none(text, why):
    with pytest.raises(StoreError, match=why):
        store_path(text)


@pytest.mark.parametrize(
    "text",
    ["s3://AKIA:hushhush@bucket/x", "https://me:hushhush@host/x", "https://host/x?X-Amz-Signature=hushhush"],
)
def test_credentials_in_an_address_are_refused_and_not_repeated(text):
    with pytest.raises(StoreError, match="must not hold credentials") as caught:
        store_path(text)
    assert "hushhush" not in str(caught.value)


def test_paths_are_joined_and_taken_apart():
    root = store_path("s3://bucket/a")
    array = root / "teachers" / "dino" / "codes"
    assert str(array) == "s3://bucket/a/teachers/dino/codes"
    assert root / "teachers/dino/codes" == array
    assert (array.name, str(array.parent)) == ("codes", "s3://bucket/a/teachers/dino")
    assert array.relative_to(root) == "teachers/dino/codes"
    assert [str(path) for path in (root / "b").parents] == ["s3://bucket/a", "s3://bucket"]
    assert ((root / "zarr.json").stem, (root / "zarr.json").suffix, (root / "c.1.0").stem) == ("zarr", ".json", "c.1")
    assert root.parent == store_path("s3://bucket") == root.parent.parent
    assert store_path("s3://bucket") / "a" == root
    for other in ("s3://bucket/ab", "s3://other/a", "gs://bucket/a"):
        with pytest.raises(ValueError, match="is not below"):
            array.relative_to(store_path(other))


def test_paths_are_values():
    one, same, other = store_path("s3://bucket/a"), store_path("s3://bucket/a"), store_path("s3://bucket/b")
    assert {one: 1}[same] == 1
    assert one != other
    assert pickle.loads(pickle.dumps(one)) == one
    assert "bucket" in repr(one)


def test_web_addresses_keep_their_quoting():
    path = store_path("https://host/my%20data/x")
    assert path.key == "my data/x"
    assert str(path / "50%") == "https://host/my%20data/x/50%25"


def test_near_ranges_are_one_request():
    assert _requests([0, 10, 5], [5, 5, 2]) == [(0, 15, [0, 2, 1])]
    assert _requests([], []) == []
    assert _requests([3], [0]) == []
    assert _requests([0, 5 + GAP_BYTES], [5, 5]) == [(0, 10 + GAP_BYTES, [0, 1])]
    assert _requests([0, 6 + GAP_BYTES], [5, 5]) == [(0, 5, [0]), (6 + GAP_BYTES, 11 + GAP_BYTES, [1])]
    assert _requests([0, 100, 2], [50, 1, 3]) == [(0, 101, [0, 2, 1])]


def test_a_request_does_not_grow_without_end():
    step = REQUEST_BYTES // 4
    requests = _requests([k * step for k in range(9)], [step] * 9)
    assert [(start, stop) for start, stop, _ in requests] == [
        (0, REQUEST_BYTES),
        (REQUEST_BYTES, 2 * REQUEST_BYTES),
        (2 * REQUEST_BYTES, 2 * REQUEST_BYTES + step),
    ]
    assert _requests([0], [3 * REQUEST_BYTES]) == [(0, 3 * REQUEST_BYTES, [0])]


def test_importing_needs_no_obstore_and_using_says_what_to_install(run_python):
    out = run_python(
        """
import sys
sys.modules["obstore"] = None  # as if it were not installed
from rsmtdf.errors import StoreError
from rsmtdf.objects import store_path
path = store_path("s3://bucket/x")
for use in (path.read_bytes, path.names, lambda: path.create(b""), path.walk, path.zarr_store):
    try:
        use()
    except StoreError as error:
        print(error)
"""
    )
    assert (
        out.splitlines()
        == ["s3://bucket is on object storage, which needs one more package: pip install 'rsmtdf[cloud]'"] * 5
    )
