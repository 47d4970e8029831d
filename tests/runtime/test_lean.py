"""The runtime stays lean: no PyTorch, and each other package imported in one file only."""

from __future__ import annotations

import ast
import sys
from collections import defaultdict
from pathlib import Path

import conceptmaster.runtime

ROOT = Path(conceptmaster.runtime.__file__).parent
HOMES = {
    "onnxruntime": {"backends/onnxruntime_backend.py"},
    "av": {"media.py"},
    "tokenizers": {"tokenizer.py"},
    "PIL": {"pictures.py"},
    "tqdm": {"progress.py"},
}
STANDARD = {"numpy", *sys.stdlib_module_names}


def imports(path: Path) -> set[str]:
    """Top-level packages that a file imports when it runs (imports for types alone do not count)."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add((node.module or "").partition(".")[0])
    return found


def test_each_package_is_imported_in_one_file() -> None:
    homes = defaultdict(set)
    for path in ROOT.rglob("*.py"):
        for package in imports(path) - STANDARD:
            homes[package].add(path.relative_to(ROOT).as_posix())
    assert homes == HOMES


def test_the_runtime_imports_nothing_of_the_other_folders() -> None:
    for path in ROOT.rglob("*.py"):
        depth = len(path.relative_to(ROOT).parts)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level > depth:
                names = [alias.name for alias in node.names]
                assert (node.module, names) == (None, ["__version__"]), f"{path}: {ast.unparse(node)}"


def test_no_file_is_named_after_a_package() -> None:
    taken = {"onnx", "onnxruntime", "torch", "av", "PIL", "tokenizers", "tqdm", "numpy", "triton", "tensorrt"}
    assert not [path for path in ROOT.rglob("*.py") if path.stem in taken]
