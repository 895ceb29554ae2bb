"""The house: one concept a file, and a file imports only from rows above it."""

import ast
import re
from pathlib import Path

import pytest

import progressive_vae
import progressive_vae.training

PACKAGE = Path(progressive_vae.__file__).parent


def imports(path: Path) -> list[tuple[int, str]]:
    """(level, module) of the relative imports of a file: 1 for a neighbour, 2 for the house."""
    return [
        (node.level, node.module)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and node.level
    ]


def rows(module) -> list[str]:
    return re.findall(r"^\| `(\w+)\.py` \|", module.__doc__, re.M)


@pytest.mark.parametrize("module", [progressive_vae, progressive_vae.training])
def test_files_import_only_from_rows_above(module):
    folder, names = Path(module.__file__).parent, rows(module)
    assert {*names, "__init__"} == {path.stem for path in folder.glob("*.py")}
    for row, name in enumerate(names):
        neighbours = {what for level, what in imports(folder / f"{name}.py") if level == 1}
        assert neighbours <= set(names[:row]), f"{name} imports {neighbours}"


def test_what_is_used_does_not_need_what_makes_it():
    used, wing = rows(progressive_vae), PACKAGE / "training"
    for path in PACKAGE.glob("*.py"):
        assert {level for level, _ in imports(path)} <= {1}, path
    for path in wing.glob("*.py"):
        assert {what for level, what in imports(path) if level == 2} <= set(used), path
