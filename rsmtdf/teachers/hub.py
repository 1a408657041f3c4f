"""Weights files from the hub: the cache first, then the network, and a clear word where neither has them."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.error import URLError

import huggingface_hub
import torch
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

from rsmtdf.errors import TeacherError
from rsmtdf.teachers.presets import PRESETS
from rsmtdf.teachers.source import TeacherSource

logger = logging.getLogger(__name__)

Download = Callable[[str, str], str]
"""(repository, file name) -> local path; raises what `huggingface_hub.hf_hub_download` raises."""


@dataclass(frozen=True, kw_only=True)
class HubFile:
    """A published weights file: on the Hugging Face hub under one of several names, or at a plain URL."""

    repo: str = ""
    files: tuple[str, ...] = ()
    url: str = ""

    def __str__(self) -> str:
        return f"{self.repo} ({' or '.join(self.files)}) on huggingface.co" if self.repo else self.url


def cached_file(source: HubFile) -> Path | None:
    """The local copy of `source`, if there is one; never touches the network."""
    if not source.repo:
        path = _url_path(source.url)
        return path if path.is_file() else None
    for file in source.files:
        found = huggingface_hub.try_to_load_from_cache(source.repo, file)
        if isinstance(found, str):
            return Path(found)
    return None


def hub_file(source: HubFile, *, teacher: str, download: Download | None = None) -> Path:
    """The local copy of `source`, downloaded into the library's usual cache where it is missing.

    Args:
        source: what to get; the first of its `files` that exists is taken.
        teacher: whose weights they are, for messages.
        download: how to get a file of a repository; `huggingface_hub.hf_hub_download` where None.

    Raises:
        TeacherError: there is no network, no such file, or its terms are not accepted; says what to do.
    """
    if (cached := cached_file(source)) is not None:
        return cached
    logger.info("downloading the weights of '%s': %s", teacher, source)
    if not source.repo:
        return _download_url(source, teacher)
    return _download_repo(source, teacher, download or huggingface_hub.hf_hub_download, source.files)


def weights_path(source: TeacherSource, published: Callable[[], HubFile]) -> Path:
    """The local weights file of `source`, downloaded where need be; `published` tells the library's own file.

    Raises:
        TeacherError: `source` asks for random weights, for a file that is not there, or what `hub_file` says.
    """
    if source.weights == "random":
        raise TeacherError(f"teacher '{source.name}' has random weights: there is no file of them")
    remote = remote_file(source, published)
    if remote is not None:
        return hub_file(remote, teacher=source.name)
    path = Path(source.weights).expanduser()
    if not path.exists():
        raise TeacherError(
            f"teacher '{source.name}': no weights file at {source.weights}; `weights` is a path, hub, "
            "hf:owner/repo/file, random, or (open_clip) a pretraining tag"
            + (f". Get them from {source.origin}" if source.origin else "")
        )
    return path


def remote_file(source: TeacherSource, published: Callable[[], HubFile]) -> HubFile | None:
    """The published file that `source.weights` stands for; None where it is a path or random.

    Raises:
        TeacherError: a malformed `hf:` name.
    """
    if source.weights == "hub":
        return published()
    if source.weights.startswith("hf:"):
        parts = source.weights.removeprefix("hf:").split("/", 2)
        if len(parts) != 3 or not all(parts):
            raise TeacherError(f"teacher '{source.name}': weights {source.weights!r} should read hf:owner/repo/file")
        return HubFile(repo="/".join(parts[:2]), files=(parts[2],))
    return None


def _download_repo(source: HubFile, teacher: str, download: Download, files: Sequence[str]) -> Path:
    for file in files:
        try:
            return Path(download(source.repo, file))
        except GatedRepoError as error:
            raise TeacherError(
                f"the weights of '{teacher}' are gated: accept their terms at "
                f"https://huggingface.co/{source.repo}, then log in with: hf auth login"
            ) from error
        except RepositoryNotFoundError as error:
            raise TeacherError(
                f"'{teacher}': huggingface.co shows no repository {source.repo} to this account; check the "
                "name, or, where it is private, log in with: hf auth login"
            ) from error
        # LocalEntryNotFoundError (no network) is an EntryNotFoundError too, but also a FileNotFoundError.
        except FileNotFoundError as error:
            raise _offline(source, teacher) from error
        except EntryNotFoundError:
            continue
        except (HfHubHTTPError, OSError) as error:
            raise _offline(source, teacher) from error
    raise TeacherError(f"'{teacher}': {source.repo} on huggingface.co has no file {' or '.join(files)}")


def _download_url(source: HubFile, teacher: str) -> Path:
    path = _url_path(source.url)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(source.url, str(path), progress=False)
    except (URLError, OSError) as error:
        raise _offline(source, teacher) from error
    return path


def _url_path(url: str) -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[-1]


def _offline(source: HubFile, teacher: str) -> TeacherError:
    cache = os.environ.get("HF_HOME", "~/.cache/huggingface") if source.repo else torch.hub.get_dir()
    how = f"rsmtdf teachers fetch {teacher}" if teacher in PRESETS else "this command"
    return TeacherError(
        f"the weights of '{teacher}' are not on this machine and cannot be downloaded: {source}. Where there is a "
        f"network, run {how} once and copy {cache} here, or download the file and give its path as `weights`"
    )
