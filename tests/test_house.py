"""The rules of the house, held by reading the sources: nothing of the package is imported in this process."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("kernels", "engine", "export", "runtime", "benchmarks", "examples")  # of the package

# Who may import whom, beside itself. A name with a dot allows one module only. "root": files in the root.
ARROWS = {
    "kernels": {"errors"},
    "engine": {"kernels", "atomic_write", "errors", "hashed", "untrusted", "tokenizer_file", "delta_file"},
    "export": {"kernels", "engine", "runtime", "atomic_write", "errors", "hashed", "untrusted"},
    "runtime": {"atomic_write", "errors", "hashed", "untrusted", "tokenizer_file", "delta_file"},
    "benchmarks": {"kernels", "engine", "export", "runtime", "examples", "root"},
    "examples": {"kernels", "engine", "export", "runtime", "benchmarks", "root"},
    "root": {"runtime"},
}
# What only the inside of a function may import: it costs nothing until it is asked for.
LAZY_ARROWS = {"cli.py": {"export"}}
# What single files may import besides. The torch backend runs the engine's modules: it is the one part of the
# runtime that is loaded only when it is asked for.
TORCH_BACKEND = "runtime/backends/pytorch"
TORCH_FILES = ("backend", "leader", "ranks", "shared_step", "stepper", "weights")
FILE_ARROWS = {f"{TORCH_BACKEND}/{name}.py": {"engine"} for name in TORCH_FILES}
# The version is a plain string in the root's __init__.py; it may be read from anywhere.
OPEN_NAMES = {"conceptmaster.__version__"}

# Optional dependencies: in this folder, one file imports it, and no other, except for types alone.
ONE_FILE = {
    "runtime": {"av", "cuda", "ftfy", "onnxruntime", "PIL", "ray", "tensorrt", "tokenizers", "tqdm"},
    "engine": {"diffusers", "huggingface_hub", "safetensors", "tqdm", "transformers"},
}
# (folder, dependency): (how many files, why)
ONE_FILE_EXCEPTIONS: dict[tuple[str, str], tuple[int, str]] = {
    ("runtime", "PIL"): (4, "reading pictures, their colours, drawing sheets, writing animations"),
    ("engine", "transformers"): (2, "this model's encoders, and whole models of others"),
    ("engine", "safetensors"): (3, "a model's file, a folder's shards, and weights that stay on disk"),
}
# Dependencies that a folder never imports, with the files that may all the same.
NEVER = {
    "kernels": {"transformers", "diffusers", "onnxruntime", "tensorrt"},
    "engine": {"onnxruntime", "tensorrt", "triton"},
    # from the runtime's onnxruntime_module.py, which turns its telemetry away
    "export": {"onnxruntime"},
    "benchmarks": {"onnxruntime"},
    "examples": {"onnxruntime"},
    "runtime": {"torch", "triton", "transformers", "diffusers", "onnx", "onnxscript", "safetensors"},
    "root": {"torch", "triton", "transformers", "diffusers", "onnx", "onnxscript", "onnxruntime", "numpy"},
}
NEVER_EXCEPTIONS = {
    ("torch", f"{TORCH_BACKEND}/*.py"),
    ("triton", f"{TORCH_BACKEND}/*.py"),
    # where a delta is handed in beside a bundle, and nowhere else
    ("onnx", "runtime/backends/changed_graph.py"),
    ("safetensors", "delta_file.py"),
    ("numpy", "delta_file.py"),
}

# Distributions of pyproject.toml that are imported under other names.
IMPORT_NAMES = {
    "pillow": {"PIL"},
    "pytest-benchmark": {"pytest_benchmark"},
    "onnxruntime-gpu": {"onnxruntime"},
    "cuda-python": {"cuda"},
    "opencv-python-headless": {"cv2"},
    "scikit-video": {"skvideo"},
    "nvidia-cudnn-frontend": {"cudnn"},
    "scenedetect-headless": {"scenedetect"},
}

# Imported without being declared, with the reason.
UNDECLARED: dict[str, str] = {
    "triton_python_backend_utils": "NVIDIA's inference server puts it on the path of its Python models",
    "flash_attn_interface": "FlashAttention-3 is built from source, and taken where it is there",
}

PICKLING = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}

MAX_LINES = 450
# Longer files, with the reason that they are one idea all the same.
LONG_FILES: dict[str, str] = {}


@dataclass(frozen=True)
class Import:
    """One imported module or name, dotted and absolute, and where it stands."""

    target: str
    line: int
    lazy: bool  # inside a function
    typing: bool = False  # under `if TYPE_CHECKING:`, so never at run time

    def third_party(self) -> str | None:
        """The top-level module, or None if it is ours or Python's."""
        top = self.target.partition(".")[0]
        return None if top == "conceptmaster" or top in sys.stdlib_module_names else top


def imports_of(source: str, path: str) -> list[Import]:
    """Every import of ``source``, which lies at ``path`` (relative to the root), relative ones resolved.

    ``from a import b`` counts as ``a.b``. ``import_module("a.b")`` counts too when written out so.
    """
    package = ["conceptmaster", *Path(path).parent.parts]
    found: list[Import] = []

    def visit(node: ast.AST, lazy: bool, typing: bool) -> None:
        if isinstance(node, ast.Import):
            found.extend(Import(alias.name, node.lineno, lazy, typing) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            assert not node.level or node.level <= len(package), f"{path}:{node.lineno} leaves the package"
            prefix = ".".join([*base, node.module] if node.module else base)
            found.extend(Import(f"{prefix}.{alias.name}", node.lineno, lazy, typing) for alias in node.names)
        elif isinstance(node, ast.Call) and _name(node.func).endswith(("import_module", "__import__")):
            if node.args and isinstance(node.args[0], ast.Constant) and isinstance(node.args[0].value, str):
                name = node.args[0].value
                home = ".".join(package) if name.startswith(".") else ""
                found.append(Import(home + name, node.lineno, lazy))
        inside = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            guarded = isinstance(node, ast.If) and _name(node.test) == "TYPE_CHECKING" and child in node.body
            visit(child, inside, typing or guarded)

    visit(ast.parse(source), False, False)
    return found


def forbidden_arrows(source: str, path: str) -> list[str]:
    """What ``source`` at ``path`` imports of this package against ARROWS, as ``path:line target``."""
    home = folder_of(path)
    lazily = LAZY_ARROWS.get(path, set())
    wrong = []
    for item in imports_of(source, path):
        if item.target.partition(".")[0] != "conceptmaster" or item.target in OPEN_NAMES:
            continue
        inner = item.target.partition(".")[2]
        there = inner.partition(".")[0]
        there = there if there in (*FOLDERS, "tests") else "root"
        allowed = {home} | ARROWS[home] | FILE_ARROWS.get(path, set()) | (lazily if item.lazy else set())
        if not any(there == name or f"{inner}.".startswith(f"{name}.") for name in allowed):
            wrong.append(f"{path}:{item.line} {item.target}")
    return wrong


def unsafe_loading(source: str, path: str) -> list[str]:
    """Ways of loading that run what they load: pickles, and code that came with weights."""
    imports = imports_of(source, path)
    wrong = [f"{path}:{item.line} {item.target}" for item in imports if item.target.split(".")[0] in PICKLING]
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        given = {keyword.arg: keyword.value for keyword in node.keywords if keyword.arg}
        for name in ("trust_remote_code", "allow_pickle"):
            if name in given and not _is(given[name], False):
                wrong.append(f"{path}:{node.lineno} {name}")
        weights_only = "weights_only" in given and _is(given["weights_only"], True)
        if _name(node.func) == "torch.load" and not weights_only:
            wrong.append(f"{path}:{node.lineno} torch.load without weights_only=True")
    return wrong


def undocumented(source: str, path: str) -> list[str]:
    """Public modules, classes, functions and methods without a docstring. Overloads share one."""
    tree = ast.parse(source)
    missing = [] if ast.get_docstring(tree) or not tree.body else [f"{path}:1 module"]

    def visit(body: list[ast.stmt]) -> None:
        for node in body:
            if isinstance(node, ast.If | ast.Try):
                visit([*node.body, *node.orelse])
            if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            decorators = {_name(d).rpartition(".")[2] for d in node.decorator_list}
            if node.name.startswith("_") or decorators & {"overload", "setter"}:
                continue
            if not ast.get_docstring(node):
                missing.append(f"{path}:{node.lineno} {node.name}")
            if isinstance(node, ast.ClassDef):
                visit(node.body)

    visit(tree.body)
    return missing


def _module(path: str) -> str:
    """The dotted name of the file at `path`."""
    parts = Path(path).with_suffix("").parts
    return ".".join(["conceptmaster", *(parts[:-1] if parts[-1] == "__init__" else parts)])


def folder_of(path: str) -> str:
    """The folder of ARROWS that a path relative to the root belongs to."""
    parts = Path(path).parts
    return parts[0] if len(parts) > 1 else "root"


def _name(node: ast.AST) -> str:
    """A dotted name as written, or "" for anything else; of a call, the name of what is called."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        base = _name(node.value)
        return f"{base}.{node.attr}" if base else node.attr
    return _name(node.func) if isinstance(node, ast.Call) else ""


def _is(node: ast.AST, value: object) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


@cache
def sources() -> dict[str, str]:
    """Every file of the package: path relative to the root → text. Without tests and setup.py."""
    files = [path for path in ROOT.glob("*.py") if path.name != "setup.py"]
    for folder in FOLDERS:
        files += (ROOT / folder).rglob("*.py")
    return {path.relative_to(ROOT).as_posix(): path.read_text("utf-8") for path in sorted(files)}


def third_party_imports(*, for_types: bool = True) -> Iterator[tuple[str, str]]:
    """(path, top-level module) of every third-party import of the package, those for types alone too."""
    for path, source in sources().items():
        for item in imports_of(source, path):
            top = item.third_party()
            if top is not None and (for_types or not item.typing):
                yield path, top


def setup_value(name: str) -> object:
    """A constant of setup.py."""
    for node in ast.parse((ROOT / "setup.py").read_text("utf-8")).body:
        if isinstance(node, ast.Assign) and _name(node.targets[0]) == name:
            return ast.literal_eval(node.value)
    raise AssertionError(f"setup.py has no {name}")


def python(code: str, folder: Path) -> str:
    """What ``code`` prints in a fresh interpreter that starts in ``folder``."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# The rules themselves, on sources made up for them.


@pytest.mark.parametrize(
    ("path", "source", "target", "lazy"),
    [
        ("engine/dit.py", "from ..kernels.cross import run", "conceptmaster.kernels.cross.run", False),
        ("engine/dit.py", "from .config import a", "conceptmaster.engine.config.a", False),
        ("engine/__init__.py", "from . import dit", "conceptmaster.engine.dit", False),
        ("runtime/backends/x.py", "def f():\n from ...engine import dit", "conceptmaster.engine.dit", True),
        ("cli.py", "from .runtime import pipeline", "conceptmaster.runtime.pipeline", False),
        ("cli.py", "f = lambda: import_module('.export.build')", "conceptmaster.export.build", True),
        ("cli.py", "import torch.nn as nn", "torch.nn", False),
        ("cli.py", "if TYPE_CHECKING:\n from torch import Tensor", "torch.Tensor", False),
    ],
)
def test_imports_are_resolved(path: str, source: str, target: str, lazy: bool) -> None:
    (found,) = imports_of(source.replace("import_module", "importlib.import_module"), path)
    assert (found.target, found.lazy, found.typing) == (target, lazy, "TYPE_CHECKING" in source)


@pytest.mark.parametrize(
    ("path", "source", "fine"),
    [
        ("kernels/a.py", "from ..engine import dit", False),
        ("engine/a.py", "from ..kernels.cross import run", True),
        ("engine/a.py", "from ..runtime import solver", False),
        ("engine/a.py", "from .. import __version__", True),
        ("export/a.py", "from ..runtime import pipeline", True),
        ("export/a.py", "from ..errors import InputError", True),
        ("export/a.py", "from ..cli import main", False),
        ("runtime/a.py", "def f():\n from ..export import build", False),
        ("runtime/a.py", "from conceptmaster.engine import dit", False),
        ("runtime/a.py", "from ..cli import main", False),
        ("runtime/backends/pytorch/backend.py", "from ....engine import dit", True),
        ("runtime/backends/pytorch/backend.py", "from ....export import graphs", False),
        ("runtime/backends/pytorch/memory_plan.py", "from ....engine import dit", False),
        ("cli.py", "def f():\n from .export import build", True),
        ("cli.py", "from .export import build", False),
        ("cli.py", "def f():\n from .examples.sprites import cli", False),
        ("__init__.py", "def f():\n from .export import build", False),
        ("benchmarks/a.py", "from conceptmaster.export import build", True),
        ("examples/a.py", "from conceptmaster.tests import helper", False),
    ],
)
def test_arrows_are_told_apart(path: str, source: str, fine: bool) -> None:
    assert (not forbidden_arrows(source, path)) == fine


@pytest.mark.parametrize(
    ("source", "fine"),
    [
        ("import pickle", False),
        ("from joblib import load", False),
        ("torch.load(f)", False),
        ("torch.load(f, weights_only=False)", False),
        ("torch.load(f, weights_only=True)", True),
        ("numpy.load(f, allow_pickle=True)", False),
        ("A.from_pretrained(f, trust_remote_code=flag)", False),
        ("A.from_pretrained(f, trust_remote_code=False)", True),
    ],
)
def test_unsafe_loading_is_told_apart(source: str, fine: bool) -> None:
    assert (not unsafe_loading(source, "engine/a.py")) == fine


def test_missing_docstrings_are_found() -> None:
    source = '"""M."""\nclass A:\n  """A."""\n  def f(self): pass\n  def _g(self): pass\ndef h(): pass\n'
    assert undocumented(source, "a.py") == ["a.py:4 f", "a.py:6 h"]


# The package.


def test_arrows_hold() -> None:
    assert [wrong for path, source in sources().items() for wrong in forbidden_arrows(source, path)] == []


def test_no_two_files_import_each_other() -> None:
    """Inside a function counts, too; for types alone does not."""
    modules = {_module(path): path for path in sources()}
    imported: dict[str, set[str]] = {}
    for path, source in sources().items():
        targets = [item.target for item in imports_of(source, path) if not item.typing]
        # `from a import b` may name the module a.b or something inside of the module a
        found = {modules.get(target, modules.get(target.rpartition(".")[0])) for target in targets}
        imported[path] = {other for other in found if other is not None and other != path}
    circles = [(a, b) for a, others in imported.items() for b in others if a < b and a in imported[b]]
    assert circles == []


def test_few_files_lie_flat_in_export() -> None:
    flat = [path for path in sources() if Path(path).parent == Path("export")]
    assert len(flat) <= 12, flat


def test_the_inside_of_the_package_imports_itself_relatively() -> None:
    absolute = re.compile(r"^\s*(from|import) conceptmaster\b", re.MULTILINE)
    inside = {path for path in sources() if folder_of(path) not in ("benchmarks", "examples")}
    assert [path for path in sorted(inside) if absolute.search(sources()[path])] == []


def test_optional_dependencies_are_imported_in_one_file() -> None:
    used: dict[tuple[str, str], set[str]] = {}
    for path, top in third_party_imports(for_types=False):
        if top in ONE_FILE.get(folder_of(path), set()):
            used.setdefault((folder_of(path), top), set()).add(path)
    allowed = {key: count for key, (count, _) in ONE_FILE_EXCEPTIONS.items()}
    assert {key: sorted(files) for key, files in used.items() if len(files) > allowed.get(key, 1)} == {}


def test_folders_stay_clear_of_what_they_never_import() -> None:
    wrong = [
        f"{path} {top}"
        for path, top in third_party_imports()
        if top in NEVER.get(folder_of(path), set())
        and not any(top == name and Path(path).match(pattern) for name, pattern in NEVER_EXCEPTIONS)
    ]
    assert wrong == []


def test_third_party_imports_are_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    declared = set(UNDECLARED)
    for line in sum(project["optional-dependencies"].values(), project["dependencies"]):
        distribution = re.split(r"[^A-Za-z0-9_.-]", line, maxsplit=1)[0].lower()
        declared |= IMPORT_NAMES.get(distribution, {distribution.replace("-", "_")})
    assert sorted({f"{top} ({path})" for path, top in third_party_imports() if top not in declared}) == []


def test_nothing_is_named_like_a_third_party_module() -> None:
    taken = {top.lower() for _, top in third_party_imports()} | {"onnx", "torch", "triton", "tensorrt", "av"}
    named = {path: {Path(path).stem, *Path(path).parent.parts} for path in sources()}
    assert [path for path, names in named.items() if taken & {name.lower() for name in names}] == []


def test_kernels_is_no_regular_package() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()  # it would shadow Hugging Face's `kernels`


def test_other_folders_are_regular_packages() -> None:
    folders = {Path(path).parent for path in sources() if folder_of(path) != "kernels"}
    assert [str(folder) for folder in sorted(folders) if not (ROOT / folder / "__init__.py").exists()] == []


def test_nothing_is_loaded_that_could_run_code() -> None:
    everything = sources() | {
        path.relative_to(ROOT).as_posix(): path.read_text("utf-8")
        for path in (ROOT / "tests").rglob("*.py")
        if path != Path(__file__).resolve()
    }
    assert [wrong for path, source in everything.items() for wrong in unsafe_loading(source, path)] == []


def test_everything_public_has_a_docstring() -> None:
    assert [missing for path, source in sources().items() for missing in undocumented(source, path)] == []


def test_files_stay_readable_in_one_sitting() -> None:
    long = {path for path, source in sources().items() if len(source.splitlines()) > MAX_LINES}
    assert sorted(long - LONG_FILES.keys()) == []
    assert sorted(LONG_FILES.keys() - long) == []  # an entry goes when its file has become short


def test_setup_lists_the_packages_that_exist() -> None:
    folders = {Path(path).parent for path in sources()}
    expected = {".".join(["conceptmaster", *folder.parts]) for folder in folders}
    assert sorted(expected) == setup_value("PACKAGES")


# no wheel carries these: see setup.py
REPOSITORY_ONLY = ("runtime/bundles/sprites-int8/", "runtime/bundles/sprites/")


def test_shipped_data_is_covered_by_setup() -> None:
    patterns = setup_value("PACKAGE_DATA")
    assert isinstance(patterns, dict)
    shipped = [
        ("conceptmaster.runtime", "bundles"),
        ("conceptmaster.examples.sprites", "requests"),
        ("conceptmaster.examples.sprites", "baseline.json"),
        ("conceptmaster.examples.stickers", "requests"),
        ("conceptmaster.examples.data", "taxonomy.txt"),
    ]
    for package, folder in shipped:
        home = ROOT.joinpath(*package.split(".")[1:])
        covered = {path for pattern in patterns[package] for path in home.glob(pattern)}
        tracked = subprocess.run(
            ["git", "ls-files", "-z", "--", str(home / folder)], cwd=ROOT, capture_output=True, text=True
        )
        if tracked.returncode:
            pytest.skip("not a git checkout")
        left_out = [name for name in tracked.stdout.split("\0") if name and ROOT / name not in covered]
        assert [name for name in left_out if not name.startswith(REPOSITORY_ONLY)] == []


def test_package_data_stays_small() -> None:
    bundles = ROOT / "runtime" / "bundles"
    patterns = setup_value("PACKAGE_DATA")["conceptmaster.runtime"]
    files = {path for pattern in patterns for path in bundles.parent.glob(pattern)}
    assert sum(path.stat().st_size for path in files) <= 48e6


HEAVY = ["diffusers", "onnx", "onnxscript", "torch", "transformers", "triton"]
LIGHT = ["PIL", "av", "ftfy", "numpy", "onnxruntime", "tokenizers", "tqdm"]


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("conceptmaster", HEAVY + LIGHT),
        ("conceptmaster.cli", HEAVY),
        ("conceptmaster.runtime", HEAVY),
        ("conceptmaster.runtime.pipeline", HEAVY),
    ],
)
def test_importing_stays_light(module: str, absent: list[str], tmp_path: Path) -> None:
    assert python(f"import sys, {module}; print(*set({absent}) & set(sys.modules))", tmp_path) == ""


def test_public_face(tmp_path: Path) -> None:
    code = (
        "import conceptmaster as c\n"
        "assert set(c.__all__) <= set(dir(c)) and all(getattr(c, name) for name in c.__all__)\n"
        "errors = {name for name in vars(c.errors) if name[0].isupper()} - {'TYPE_CHECKING'}\n"
        "assert errors <= set(c.__all__), errors\n"
        "try: c.nothing\n"
        "except AttributeError as error: print(error)\n"
    )
    assert python(code, tmp_path) == "module 'conceptmaster' has no attribute 'nothing'"


@pytest.mark.slow
def test_wheel_holds_the_package_and_nothing_else(tmp_path: Path) -> None:
    clone = tmp_path / "clone"  # building leaves build/ behind, and must not see what git does not
    subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(tmp_path), str(clone)], check=True
    )
    (wheel,) = tmp_path.glob("conceptmaster-*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert {name for name in names if not name.startswith("conceptmaster/")} == set()
    inner = {name.removeprefix("conceptmaster/") for name in names}
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=clone, capture_output=True, text=True, check=True)
    modules = {
        name
        for name in tracked.stdout.split("\0")
        if name.endswith(".py") and name != "setup.py" and folder_of(name) in (*FOLDERS, "root")
    }
    assert {name for name in inner if name.endswith(".py")} == modules
    assert {Path(name).parts[0] for name in inner - modules} <= {"py.typed", "runtime", "examples"}
    assert "py.typed" in inner
