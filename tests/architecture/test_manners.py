"""What no module of the library does: device literals, unpickling, global randomness, prints, machine paths."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

LIBRARY = Path(__file__).parents[2] / "rsmtdf"

UNPICKLING = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
YAML_UNSAFE = {"load_all", "unsafe_load", "unsafe_load_all", "full_load", "full_load_all"}


def dotted(node: ast.AST) -> str:
    """`a.b.c` of a name or attribute; '' of anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        base = dotted(node.value)
        return f"{base}.{node.attr}" if base else f"?.{node.attr}"
    return ""


def keyword(call: ast.Call, name: str) -> ast.expr | None:
    return next((k.value for k in call.keywords if k.arg == name), None)


def is_constant(node: ast.expr | None, value: object) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


def docstrings(tree: ast.Module) -> set[int]:
    """The ids of constants that are documentation: bare strings used as statements."""
    return {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant)}


def safe_loaders(tree: ast.Module) -> set[str]:
    """`yaml.SafeLoader` and the module's own subclasses of it."""
    safe = {"yaml.SafeLoader", "yaml.CSafeLoader"}
    return safe | {
        n.name for n in ast.walk(tree) if isinstance(n, ast.ClassDef) and {dotted(b) for b in n.bases} & safe
    }


def has_inert_unpickler(tree: ast.Module) -> bool:
    """Whether `pickle` is there for an unpickler that decides itself which classes exist (`find_class`)."""
    return any(
        isinstance(n, ast.ClassDef)
        and "pickle.Unpickler" in {dotted(b) for b in n.bases}
        and "find_class" in {f.name for f in n.body if isinstance(f, ast.FunctionDef)}
        for n in ast.walk(tree)
    )


def faults(source: str, *, device_names: bool = False, prints: bool = False) -> Iterator[tuple[int, str]]:
    """(line, what is wrong) of one module; `device_names` and `prints` say what it may have."""
    tree = ast.parse(source)
    documentation, loaders = docstrings(tree), safe_loaders(tree)
    forked: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.With) and any("fork_rng" in ast.dump(i.context_expr) for i in node.items):
            forked |= {id(n) for n in ast.walk(node)}
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documentation:
            if not device_names and re.fullmatch(r"cuda(:\d+)?", node.value):
                yield line, "a device literal: devices are passed in"
        elif isinstance(node, ast.ExceptHandler) and node.type is None:
            yield line, "a bare except"
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names = {a.name.split(".")[0] for a in node.names} if isinstance(node, ast.Import) else {node.module or ""}
            if names & UNPICKLING and not has_inert_unpickler(tree):
                yield line, "unpickling: whoever writes the file runs code here"
            if "random" in names:
                yield line, "the global generator: draws are keyed (rsmtdf.keyed)"
        elif isinstance(node, ast.Call):
            name = dotted(node.func)
            last = name.rsplit(".", 1)[-1]
            if last == "cuda" and "." in name and not device_names:
                yield line, ".cuda(): devices are passed in"
            if is_constant(keyword(node, "weights_only"), False):
                yield line, "weights_only=False"
            if name == "torch.load" and not is_constant(keyword(node, "weights_only"), True):
                yield line, "torch.load without weights_only=True"
            if is_constant(keyword(node, "allow_pickle"), True):
                yield line, "allow_pickle=True"
            if name.startswith("yaml.") and last in YAML_UNSAFE:
                yield line, f"{name}: use yaml.safe_load"
            if name == "yaml.load" and dotted(keyword(node, "Loader") or ast.Constant(None)) not in loaders:
                yield line, "yaml.load without a subclass of yaml.SafeLoader"
            if re.match(r"(np|numpy)\.random\.", name) and last not in {"Philox", "Generator"}:
                yield line, f"{name}: draws are keyed (rsmtdf.keyed)"
            if name in {"torch.manual_seed", "torch.seed", "torch.cuda.manual_seed_all"} and id(node) not in forked:
                yield line, f"{name} outside torch.random.fork_rng"
            if name == "print" and not prints:
                yield line, "print: the library logs"
            if re.fullmatch(r"(c|cloud)?[pP]ickle\.(load|loads|Unpickler)", name):
                yield line, f"{name}: whoever writes the file runs code here"
            if name in {"eval", "exec"}:
                yield line, f"{name}()"


def modules() -> list[Path]:
    return sorted(LIBRARY.rglob("*.py"))


@pytest.mark.parametrize("path", modules(), ids=lambda p: p.relative_to(LIBRARY).as_posix())
def test_module_keeps_the_manners(path):
    part = path.relative_to(LIBRARY).parts[0]
    found = list(faults(path.read_text("utf-8"), device_names=part in {"cli", "stages"}, prints=part == "cli"))
    assert not found, f"{path.relative_to(LIBRARY)}: {found}"


@pytest.mark.parametrize(
    "source",
    [
        "model.cuda()",
        "self.net.layer.cuda(0)",
        "get().cuda()",
        "x.to('cuda')",
        "device = 'cuda:1'",
        "try:\n    f()\nexcept:\n    pass",
        "import pickle",
        "from pickle import loads",
        "import pickle\nclass U(pickle.Unpickler):\n    pass",
        "import pickle\nclass U(pickle.Unpickler):\n    def find_class(self, m, n): ...\npickle.loads(x)",
        "import random",
        "torch.load(f)",
        "torch.load(f, weights_only=flag)",
        "reader(f, weights_only=False)",
        "np.load(f, allow_pickle=True)",
        "yaml.load(text)",
        "yaml.load(text, Loader=yaml.Loader)",
        "class L(yaml.Loader): pass\nyaml.load(text, Loader=L)",
        "yaml.unsafe_load(text)",
        "np.random.seed(0)",
        "rng = np.random.default_rng(0)",
        "torch.manual_seed(0)",
        "print('x')",
        "eval('1')",
    ],
)
def test_the_check_sees(source):
    assert list(faults(source))


@pytest.mark.parametrize(
    "source",
    [
        "'''Runs on \"cuda\" and elsewhere.'''",
        "torch.cuda.synchronize()",
        "torch.load(f, map_location=d, weights_only=True)",
        "class L(yaml.SafeLoader): pass\nyaml.load(text, Loader=L)",
        "np.random.Philox(key=k)",
        "import pickle\nclass U(pickle.Unpickler):\n    def find_class(self, m, n): ...",
        "with torch.random.fork_rng(devices=[]):\n    torch.manual_seed(1)",
        "try:\n    f()\nexcept OSError:\n    raise",
        "model.eval()",
    ],
)
def test_the_check_lets_pass(source):
    assert not list(faults(source))


# --- the repository -----------------------------------------------------------------------------------------------


def tracked(repo: Path) -> list[Path]:
    """The files of the repository: git's, or all of them in a source archive."""
    done = subprocess.run(["git", "ls-files", "-z"], cwd=repo, capture_output=True, text=True)
    if done.returncode == 0 and done.stdout:
        return [p for n in done.stdout.split("\0") if n and (p := repo / n).is_file()]
    return [p for p in repo.rglob("*") if p.is_file() and not {".venv", ".git"} & set(p.relative_to(repo).parts)]


# Built from parts, so that this file does not hold what it looks for.
MACHINE_PATH = re.compile(
    r"(?<![\w.}>~*-])/(?:" + "|".join(["wo" + "rk", "ro" + "ot", "ho" + "me", "Us" + "ers"]) + r")/[\w.]"
)


def test_no_file_names_a_path_of_one_machine(repo):
    found = []
    for path in tracked(repo):
        try:
            text = path.read_text("utf-8")
        except UnicodeDecodeError:
            continue
        found += [f"{path.relative_to(repo)}: {m[0]}..." for m in MACHINE_PATH.finditer(text)]
    assert not found


def test_the_machine_path_check_sees():
    for path in ("/ho" + "me/me/data", "see /wo" + "rk/x", '"/ro' + 'ot/.cache"'):
        assert MACHINE_PATH.search(path)
    for path in ("https://example.org/ho" + "me/x", "data/ro" + "ot/x", "{base}/wo" + "rk/x"):
        assert not MACHINE_PATH.search(path)


def test_no_large_or_generated_file_is_tracked(repo):
    paths = tracked(repo)
    assert not [p for p in paths if p.suffix in {".pyc", ".so", ".pth", ".pt", ".safetensors", ".whl"}]
    assert not [p for p in paths if p.stat().st_size > 500_000]


def test_every_test_file_has_its_own_name(repo):
    names = [p.name for p in (repo / "tests").rglob("test_*.py")]
    assert len(names) == len(set(names))
