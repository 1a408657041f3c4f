"""Every error a user of rsmtdf can meet, in one tree.

    RsmtdfError
    ├── ConfigError      (ValueError)         a configuration, an option or a value in it
    ├── DatasetError     (ValueError)         images, masks, lists, labels on disk
    ├── StoreError       (RuntimeError)       the feature store
    │   ├── StoreNotFound    (FileNotFoundError)  there is none at this path
    │   ├── StoreIncomplete  (LookupError)        views or teachers are missing
    │   ├── StoreMismatch    (ValueError)         another identity than the one asked for
    │   ├── StoreBusy        (BlockingIOError)    another process owns what is to be written
    │   └── StoreCorrupt     (OSError)            bytes differ from what was committed
    ├── TeacherError     (RuntimeError)       a teacher's model, weights or output
    ├── WorkerError      (RuntimeError)       processes or machines that work was spread over
    ├── CheckpointError  (ValueError)         a run folder or a checkpoint
    └── TrainingError    (RuntimeError)       training cannot go on (NaN loss, nothing labelled)

Each is also the standard library's type that a caller would expect. A message says what failed and where,
what was expected and found, and what to do next. The command line prints it and exits with 2; any other
exception is a bug and shows its traceback.
"""

from __future__ import annotations

from typing import Self


class RsmtdfError(Exception):
    """The root of the tree: catch it to catch every error that has an explanation."""

    def __str__(self) -> str:
        # OSError (through the FileNotFoundError branch) would otherwise print errno-style tuples.
        return str(self.args[0]) if self.args else self.__class__.__name__


class ConfigError(RsmtdfError, ValueError):
    """A configuration file, an option or a value in one is wrong."""


class DatasetError(RsmtdfError, ValueError):
    """Images, masks, lists or labels on disk are not what the dataset spec says."""


class StoreError(RsmtdfError, RuntimeError):
    """Something about the feature store."""


class StoreNotFound(StoreError, FileNotFoundError):
    """There is no feature store at this path."""

    def __new__(cls, *args: object) -> Self:
        # Of the two bases the one that fits: whoever rebuilds an error in another process (tblib, dask) calls this.
        return OSError.__new__(cls, *args)


class StoreIncomplete(StoreError, LookupError):
    """The store lacks views, streams or teachers that are needed now."""


class StoreMismatch(StoreError, ValueError):
    """The store has another identity (recipe, pixels, teacher, tile list) than the one asked for."""


class StoreBusy(StoreError, BlockingIOError):
    """Another process owns shards that are to be written; it may have finished with them later."""

    def __new__(cls, *args: object) -> Self:
        return OSError.__new__(cls, *args)  # as for StoreNotFound


class StoreCorrupt(StoreError, OSError):
    """Bytes in the store differ from what was committed."""

    def __new__(cls, *args: object) -> Self:
        return OSError.__new__(cls, *args)  # as for StoreNotFound


class TeacherError(RsmtdfError, RuntimeError):
    """A teacher's model name, weights or output is wrong."""


class WorkerError(RsmtdfError, RuntimeError):
    """Work that was spread over processes or machines cannot go on: they die, or cannot be reached."""


class CheckpointError(RsmtdfError, ValueError):
    """A run folder or checkpoint cannot be used."""


class TrainingError(RsmtdfError, RuntimeError):
    """Training cannot start or go on."""
