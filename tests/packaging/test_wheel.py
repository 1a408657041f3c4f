"""The archives users install: the wheel is built from the sdist, installed in an empty venv and run elsewhere.

The venv is empty but for the wheel. Its dependencies are those of the running interpreter, shown to it by one .pth
file: installing gigabytes of torch again would prove nothing about this package. A .pth file is not read
recursively, so the checkout itself (an editable install is a .pth file too) stays out of sight.
"""

from __future__ import annotations

import email
import importlib
import importlib.util
import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import rsmtdf


def run(*command: str | Path, cwd: Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if k not in {"PYTHONPATH", "VIRTUAL_ENV"}}
    done = subprocess.run(command, cwd=cwd, env=env, text=True, capture_output=True, timeout=300)
    if check:
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture(scope="module")
def sources(repo) -> set[str]:
    """The files that belong into the archives, listed before these are built."""
    kept = {".py", ".yaml", ".json", ".csv", ".md"}
    return {
        p.relative_to(repo).as_posix()
        for folder in ("rsmtdf", "configs", "tests")
        for p in (repo / folder).rglob("*")
        if p.suffix in kept and p.is_file()
    }


@pytest.fixture(scope="module")
def archives(repo, sources, tmp_path_factory) -> tuple[Path, Path]:
    """(sdist, wheel); the wheel is built from the unpacked sdist, with the backend that is installed."""
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, repo, cwd=out)
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="module")
def installed(archives, tmp_path_factory) -> Path:
    """The scripts folder of a venv that holds the wheel."""
    home = tmp_path_factory.mktemp("empty")
    scripts = home / "venv" / "bin"
    if importlib.util.find_spec("ensurepip"):
        venv.create(home / "venv", with_pip=True)
        run(scripts / "python", "-m", "pip", "install", "--no-deps", "--no-index", archives[1], cwd=home)
    else:  # Debian's python3 without python3-venv: then `make` found uv, or there would be no .venv
        run("uv", "venv", "--python", sys.executable, home / "venv", cwd=home)
        run("uv", "pip", "install", "--python", scripts / "python", "--no-deps", "--offline", archives[1], cwd=home)
    paths = sysconfig.get_paths(vars={"base": str(home / "venv"), "platbase": str(home / "venv")})
    Path(paths["purelib"], "dependencies.pth").write_text(
        "\n".join({sysconfig.get_paths()["purelib"], sysconfig.get_paths()["platlib"]})
    )
    return scripts


def wheel_files(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


# --- what is in them ----------------------------------------------------------------------------------------------


def test_wheel_holds_every_module_the_types_and_the_configs(sources, archives):
    files = wheel_files(archives[1])
    assert {f for f in sources if f.startswith("rsmtdf/")} <= files
    assert "rsmtdf/py.typed" in files
    configs = {f for f in sources if f.startswith("configs/")}
    assert "configs/synthetic.yaml" in configs
    assert {f.replace("configs/", "rsmtdf/_configs/", 1) for f in configs} <= files


def test_wheel_holds_nothing_else(archives):
    files = wheel_files(archives[1])
    info = f"rsmtdf-{rsmtdf.__version__}.dist-info/"
    assert {f for f in files if not f.startswith(("rsmtdf/", info))} == set()
    assert not [f for f in files if "__pycache__" in f or f.endswith(".pyc")]


def test_sdist_holds_what_a_build_and_a_test_run_need(sources, archives):
    with tarfile.open(archives[0]) as archive:
        names = {n.split("/", 1)[1] for n in archive.getnames() if "/" in n}
    assert sources <= names
    assert {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "Makefile"} <= names
    assert not [n for n in names if n.startswith((".venv", "out/", "runs/"))]


def test_metadata(archives):
    with zipfile.ZipFile(archives[1]) as archive:
        text = archive.read(f"rsmtdf-{rsmtdf.__version__}.dist-info/METADATA").decode()
        licence = archive.read(f"rsmtdf-{rsmtdf.__version__}.dist-info/licenses/LICENSE").decode()
    metadata = email.message_from_string(text)
    assert metadata["Name"] == "rsmtdf"
    assert metadata["Version"] == rsmtdf.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"
    assert "Apache License" in licence
    assert "rsmtdf" in metadata.get_payload(), "the README is the description"


# --- installed, outside the checkout ------------------------------------------------------------------------------


def test_installed_package_is_the_wheels_and_finds_its_configs(installed, tmp_path):
    code = (
        "import rsmtdf, pathlib; p = pathlib.Path(rsmtdf.__file__).parent; print(p); print((p / '_configs').is_dir())"
    )
    folder, has_configs = run(installed / "python", "-c", code, cwd=tmp_path).stdout.split("\n")[:2]
    assert Path(folder).is_relative_to(installed.parent)
    assert has_configs == "True"


def test_installed_modules_all_import(sources, installed, tmp_path):
    """A module that the wheel lacks, or that only works from the checkout, shows here."""
    names = sorted(
        f[:-3].replace("/", ".").removesuffix(".__init__")
        for f in sources
        if f.startswith("rsmtdf/") and f.endswith(".py")
        # __main__ runs; testing needs pytest, which users of the wheel need not have
        if not f.startswith("rsmtdf/testing/") and not f.endswith("__main__.py")
    )
    code = "import importlib, sys\nfor name in sys.argv[1:]: importlib.import_module(name)"
    run(installed / "python", "-c", code, *names, cwd=tmp_path)


@pytest.mark.parametrize("command", [["rsmtdf"], ["python", "-m", "rsmtdf"]])
def test_installed_command_answers(installed, tmp_path, command):
    done = run(installed / command[0], *command[1:], "--help", cwd=tmp_path)
    assert "cache-features" in done.stdout
    assert "train" in done.stdout


def test_installed_command_knows_the_shipped_configs(repo, installed, tmp_path):
    done = run(installed / "rsmtdf", "configs", "ls", cwd=tmp_path)
    for path in (repo / "configs").glob("*.yaml"):
        assert path.stem in done.stdout
    shown = run(installed / "rsmtdf", "configs", "show", "synthetic", cwd=tmp_path)
    assert shown.stdout.strip() == (repo / "configs" / "synthetic.yaml").read_text("utf-8").strip()


def test_installed_command_reports_a_users_mistake_in_one_sentence(installed, tmp_path):
    done = run(installed / "rsmtdf", "configs", "show", "nonsense", cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert "nonsense" in done.stderr
    assert "Traceback" not in done.stderr


def test_console_script_points_at_a_function(repo):
    module, name = "rsmtdf.cli.main", "main"
    assert f'rsmtdf = "{module}:{name}"' in (repo / "pyproject.toml").read_text("utf-8")
    assert callable(getattr(importlib.import_module(module), name))
