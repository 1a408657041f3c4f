import importlib.util
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny():
    """The module `tiny_problem.py` (pytest's importlib mode does not put test folders on the path)."""
    spec = importlib.util.spec_from_file_location("tiny_problem", Path(__file__).with_name("tiny_problem.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
