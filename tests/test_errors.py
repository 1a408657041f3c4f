"""The error tree is what its docstring draws, and each class is also the stdlib type it promises."""

from __future__ import annotations

import builtins
import importlib
import inspect
import pickle
import pkgutil
import re
from collections.abc import Iterator

import pytest

import rsmtdf
from rsmtdf import errors
from rsmtdf.signals import Interrupted

CLASSES = {name: cls for name, cls in vars(errors).items() if inspect.isclass(cls)}
DRAWN = re.compile(r"^(?P<indent>[\s│├└─]*)(?P<name>[A-Z]\w+)(?:\s+\((?P<base>\w+)\))?", re.MULTILINE)


def drawn_tree() -> dict[str, tuple[str | None, str | None]]:
    """Class name -> (parent by indentation, stdlib base) as drawn in the module's docstring."""
    block = errors.__doc__.split("\n\n")[1]
    tree: dict[str, tuple[str | None, str | None]] = {}
    stack: list[tuple[int, str]] = []
    for match in DRAWN.finditer(block):
        depth = len(match["indent"])
        while stack and stack[-1][0] >= depth:
            stack.pop()
        tree[match["name"]] = (stack[-1][1] if stack else None, match["base"])
        stack.append((depth, match["name"]))
    return tree


def test_every_class_is_drawn_and_every_drawn_class_exists():
    assert set(drawn_tree()) == set(CLASSES)


@pytest.mark.parametrize("name", sorted(set(CLASSES) - {"RsmtdfError"}))
def test_class_has_the_parent_and_the_stdlib_base_it_promises(name):
    parent, base = drawn_tree()[name]
    assert CLASSES[name].__bases__[0] is CLASSES[parent]
    assert base is None or issubclass(CLASSES[name], getattr(builtins, base))
    assert base is not None, "every error but the root is also a stdlib type"


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_message_is_printed_as_given_and_survives_a_process_boundary(name):
    error = CLASSES[name]("features cover 3 of 7 views")
    assert str(error) == "features cover 3 of 7 views"
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is CLASSES[name]
    assert str(again) == str(error)
    assert type(CLASSES[name].__new__(CLASSES[name], "as tblib does it")) is CLASSES[name]
    assert str(CLASSES[name]())


def test_public_names():
    assert set(CLASSES) == {
        "RsmtdfError",
        "ConfigError",
        "DatasetError",
        "StoreError",
        "StoreNotFound",
        "StoreIncomplete",
        "StoreMismatch",
        "StoreBusy",
        "StoreCorrupt",
        "TeacherError",
        "CheckpointError",
        "TrainingError",
        "WorkerError",
    }


def descendants(of: type) -> Iterator[type]:
    for cls in of.__subclasses__():
        yield cls
        yield from descendants(cls)


def test_errors_of_every_module_survive_a_process_boundary():
    for module in pkgutil.walk_packages(rsmtdf.__path__, "rsmtdf."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    ours = {cls for cls in descendants(errors.RsmtdfError) if cls.__module__.startswith("rsmtdf.")}
    assert len(ours) > len(CLASSES) - 1, "some module has one of its own"
    for cls in ours:
        given = inspect.signature(cls.__init__).parameters.values()
        more = {p.name: f"the {p.name}" for p in given if p.kind is p.KEYWORD_ONLY}
        error = cls("features cover 3 of 7 views", **more)
        again = pickle.loads(pickle.dumps(error))
        assert (type(again), str(again), vars(again)) == (cls, str(error), vars(error))


def test_an_interruption_survives_a_process_boundary():
    again = pickle.loads(pickle.dumps(Interrupted(15, "stopped at step 3")))
    assert (type(again), str(again), again.exit_code) == (Interrupted, "stopped at step 3", 143)
