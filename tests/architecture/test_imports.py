"""Imports run one way, a light command stays light, and every import is a declared dependency."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

NOT_IMPORTED = {
    "dask": "the scheduler of scaled-out caching, handed in as an executor",
    "numcodecs": "zarr's compressors, named by a store's metadata",
}
"""Dependencies that are needed without an import statement in rsmtdf; an entry goes when its import comes."""


def imported_roots(path: Path) -> set[str]:
    """The top-level names that a module imports anywhere, type-checking and lazy imports included."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module.split(".")[0])
    return found


def canonical(requirement: str) -> str:
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", requirement)[0]).lower()


@pytest.fixture(scope="module")
def project(repo):
    return tomllib.loads((repo / "pyproject.toml").read_text("utf-8"))["project"]


def test_import_contracts_hold(repo):
    lint = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([lint, "--no-logo", "--no-cache"], cwd=repo, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


def test_imported_packages_are_declared_dependencies(repo, project):
    """A package that only comes along with another one leaves when that one drops it."""
    extras = project["optional-dependencies"]
    declared = {canonical(r) for r in [*project["dependencies"], *extras["cloud"]]}
    distributions = packages_distributions()
    undeclared = {}
    for path in sorted((repo / "rsmtdf").rglob("*.py")):
        for root in imported_roots(path) - set(sys.stdlib_module_names) - {"rsmtdf"}:
            names = {canonical(d) for d in distributions.get(root, [root])}
            # dask[distributed] is how the scheduler is asked for; the contracts in testing/ are for test suites.
            extra = {"distributed", "pytest", "hypothesis"} if "testing" in path.parts else {"distributed"}
            if not names & declared and root not in extra:
                undeclared.setdefault(root, []).append(path.relative_to(repo).as_posix())
    assert not undeclared


def test_declared_dependencies_are_imported(repo, project):
    """One that nothing imports is a burden for everybody who installs rsmtdf."""
    distributions = packages_distributions()
    used: set[str] = set()
    for path in (repo / "rsmtdf").rglob("*.py"):
        for root in imported_roots(path):
            used |= {canonical(d) for d in distributions.get(root, [])}
    assert {canonical(r) for r in project["dependencies"]} - used == set(NOT_IMPORTED)


def test_every_floor_has_a_floor_and_no_ceiling(project):
    for requirement in project["dependencies"]:
        assert re.fullmatch(r"[\w-]+(\[\w+\])?>=\d[\d.]*", requirement), requirement


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["configs", "ls"]])
def test_light_commands_import_no_torch(run_python, arguments):
    """`rsmtdf --help` answers at once: torch alone takes seconds to import."""
    code = """
import json, sys
from rsmtdf.cli.main import main
sys.argv = ["rsmtdf", *sys.argv[1:]]
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
heavy = {"torch", "timm", "open_clip", "rasterio", "zarr", "dask", "distributed"} & set(sys.modules)
print("\\nHEAVY", json.dumps(sorted(heavy)))
"""
    assert run_python(code, *arguments).strip().endswith("HEAVY []")
