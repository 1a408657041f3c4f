"""The error tree is what its docstring draws, and each class is also the stdlib type it promises."""

from __future__ import annotations

import builtins
import inspect
import re

import pytest

from rsmtdf import errors

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
    import pickle

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
