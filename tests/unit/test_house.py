"""The rules of the house: who imports whom, what the learning core needs, and what no module may hold."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAY_IMPORT = {
    "common": {"common"},
    "server": {"server", "common"},
    "client": {"client", "common"},
    "fedloge": {"fedloge", "server", "client", "common"},
}
EDGE = {  # the only modules that may import these libraries; nothing that learns does
    ("flwr", "grpc", "google"): (
        "server/app.py", "server/strategy.py", "server/flower*.py",
        "client/app.py", "client/node.py", "client/membership.py", "client/fleet_api.py", "client/probe.py",
        "common/objects.py", "common/wire.py",
    ),
    ("cryptography",): ("common/keys.py", "common/kit.py", "common/pki.py"),
}  # fmt: skip
MODULES = sorted(path for package in MAY_IMPORT for path in (ROOT / package).rglob("*.py"))
LONGEST = 330
PICKLES = ("pickle", "dill", "cloudpickle", "shelve", "marshal", "joblib")
BLOCKED = (  # everything but torch, torchvision, numpy, safetensors, Pillow and what torch itself needs
    "flwr grpc google cryptography ray iterators pathspec sqlalchemy alembic tomli tomli_w requests click typer rich "
    "sklearn scipy joblib pyarrow pandas matplotlib seaborn wandb tensorboard tqdm yaml pydantic pytest hypothesis"
)
CORE = '''
import importlib, sys

class Without:
    """A finder of modules that knows nothing of the blocked ones, as if they were not installed."""
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in blocked else self.finder.find_spec(name, path, target)
    def __getattr__(self, name):
        return getattr(self.finder, name)

blocked = set(sys.argv[1].split())
sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
for name in sys.argv[2:]:
    try:
        importlib.import_module(name)
    except ImportError as error:
        print(f"{name}: {error}")
'''


def place(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def allowed(path: Path) -> set[str]:
    """The libraries of the edge this module may import."""
    return {
        library
        for libraries, patterns in EDGE.items()
        for library in libraries
        if any(fnmatch(place(path), pattern) for pattern in patterns)
    }


def of_edge(path: Path) -> set[str]:
    """The libraries of the edge it does import."""
    libraries = {name for names in EDGE for name in names}
    return {top(name) for name in imported(path.read_text(encoding="utf-8"))} & libraries


def imported(source: str) -> Iterator[str]:
    """Names of all modules a source imports, wherever in it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield node.module or ""
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__"):
                yield str(node.args[0].value)


def top(name: str) -> str:
    return name.partition(".")[0]


def dangers(source: str) -> Iterator[str]:
    """What could execute code that came as data."""
    yield from (name for name in imported(source) if top(name) in PICKLES)
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        if called in ("eval", "exec", "torch.load", "yaml.load"):
            yield called
        for keyword in node.keywords:
            if keyword.arg == "allow_pickle" and ast.unparse(keyword.value) != "False":
                yield f"{called}(allow_pickle={ast.unparse(keyword.value)})"


def test_imports_run_one_way() -> None:
    wrong = [
        f"{place(path)} imports {name}"
        for path in MODULES
        for name in imported(path.read_text(encoding="utf-8"))
        if top(name) in {*MAY_IMPORT, "tests", "benchmarks"} - MAY_IMPORT[place(path).partition("/")[0]]
    ]
    assert wrong == []


def test_flower_and_cryptography_are_imported_only_at_the_edge() -> None:
    wrong = [f"{place(path)} imports {name}" for path in MODULES for name in sorted(of_edge(path) - allowed(path))]
    assert wrong == []


def test_no_module_is_at_the_edge_without_need() -> None:
    """What is listed there is not tested without those libraries: it uses them, or a module that does."""
    edge = {place(path).removesuffix(".py").replace("/", ".") for path in MODULES if of_edge(path)}
    sources = {path: set(imported(path.read_text(encoding="utf-8"))) for path in MODULES if allowed(path)}
    assert [place(path) for path, names in sources.items() if not of_edge(path) and not names & edge] == []


def test_the_learning_core_imports_with_nothing_but_torch() -> None:
    """Every module of both sides but the edge, and the command, with every other library out of reach."""
    core = [path for path in MODULES if not allowed(path) and not place(path).startswith("fedloge/")]
    names = [place(path).removesuffix(".py").removesuffix("/__init__").replace("/", ".") for path in core]
    done = subprocess.run(
        [sys.executable, "-c", CORE, BLOCKED, *names, "fedloge.main", "fedloge.provision"],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=100,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


def test_the_blocker_blocks() -> None:
    done = subprocess.run(
        [sys.executable, "-c", CORE, "wave", "wave", "colorsys"], capture_output=True, text=True, check=True
    )
    assert done.stdout == "wave: No module named 'wave'\n"


def test_no_module_is_too_long_or_called_utils() -> None:
    long = {place(path): n for path in MODULES if (n := len(path.read_text(encoding="utf-8").splitlines())) > LONGEST}
    assert long == {}
    assert [place(path) for path in MODULES if path.stem in ("utils", "util", "helpers", "misc")] == []


def test_nothing_that_is_read_can_execute_code() -> None:
    wrong = [f"{place(path)}: {what}" for path in MODULES for what in dangers(path.read_text(encoding="utf-8"))]
    assert wrong == []


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("def f():\n    import pickle", ["pickle"]),
        ("from cloudpickle import loads", ["cloudpickle"]),
        ("importlib.import_module('pickle')", ["pickle"]),
        ("torch.load('x')", ["torch.load"]),
        ("eval('1')", ["eval"]),
        ("np.load(p, allow_pickle=True)", ["np.load(allow_pickle=True)"]),
        ("np.load(p, allow_pickle=False); net.eval()", []),
    ],
)
def test_dangers_are_noticed(source: str, found: list[str]) -> None:
    assert list(dangers(source)) == found
