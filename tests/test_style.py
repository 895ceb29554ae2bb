"""The house: one concept a file, and a file imports only from rows above it."""

import ast
import re
from pathlib import Path

import progressive_vae

PACKAGE = Path(progressive_vae.__file__).parent


def test_files_import_only_from_rows_above():
    rows = re.findall(r"^\| `(\w+)\.py` \|", progressive_vae.__doc__, re.M)
    assert {*rows, "__init__"} == {path.stem for path in PACKAGE.glob("*.py")}
    for row, name in enumerate(rows):
        tree = ast.parse((PACKAGE / f"{name}.py").read_text())
        imported = [
            node.module
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and node.level
        ]
        assert set(imported) <= set(rows[:row]), f"{name} imports {imported}"
