"""Weights from the hub: which file is asked for, and what each kind of failure tells the user to do."""

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from rsmtdf.errors import TeacherError
from rsmtdf.teachers.hub import HubFile, hub_file

FILE = HubFile(repo="owner/nothing-of-this-name", files=("a.safetensors", "b.bin"))


def error(kind: type[Exception]) -> Exception:
    """An error of this kind without the server's answer that its constructor asks for."""
    made = kind.__new__(kind)
    made.args = ("no",)
    return made


def failing(kind: type[Exception]) -> Any:
    def download(repo: str, file: str) -> str:
        raise error(kind)

    return download


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (GatedRepoError, r"gated: accept their terms at https://huggingface.co/owner/nothing.*hf auth login"),
        (RepositoryNotFoundError, r"shows no repository owner/nothing"),
        (LocalEntryNotFoundError, r"not on this machine.*a\.safetensors or b\.bin.*run this command once"),
        (HfHubHTTPError, r"cannot be downloaded"),
        (ConnectionError, r"cannot be downloaded"),
        (EntryNotFoundError, r"has no file a\.safetensors or b\.bin"),
    ],
)
def test_each_failure_says_what_to_do(kind: type[Exception], message: str) -> None:
    with pytest.raises(TeacherError, match=message) as caught:
        hub_file(FILE, teacher="dino", download=failing(kind))
    assert "'dino'" in str(caught.value)


def test_the_next_name_is_tried_where_a_file_does_not_exist(tmp_path: Path) -> None:
    asked = []

    def download(repo: str, file: str) -> str:
        asked.append((repo, file))
        if file == "a.safetensors":
            raise error(EntryNotFoundError)
        return str(tmp_path / file)

    assert hub_file(FILE, teacher="dino", download=download) == tmp_path / "b.bin"
    assert asked == [(FILE.repo, "a.safetensors"), (FILE.repo, "b.bin")]
