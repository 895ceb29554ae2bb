"""Folders by subject, and imports that go one way, in the package and in the tests."""

import ast
from pathlib import Path

import pytest

import progressive_vae

PACKAGE = Path(progressive_vae.__file__).parent
TESTS = Path(__file__).parent

# What each place may import from, besides itself: the places before it.
ORDER = [
    "arguments",
    "paths",
    "scripts",
    "serialization",
    "configuration",
    "models",
    "image_files",
    "image_processor",
    "stack",
    "pipeline_inputs",
    "codec",
    "inpainting",
    "hub",
    "pipeline",
    "visualization",
    "data",
    "evaluation",
    "training",
]
FILES = sorted(PACKAGE.rglob("*.py"))


def place(parts: tuple[str, ...]) -> str:
    """The folder, or the file at the top, that a module lies in."""
    return parts[0].removesuffix(".py")


def imported_modules(path: Path) -> list[tuple[str, ...]]:
    """The modules of the package that a file imports, as parts of their paths."""
    package = path.relative_to(PACKAGE).parts[:-1]
    modules = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            modules.append((*base, *(node.module or "").split(".")))
    return modules


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_one_way(path):
    own = path.relative_to(PACKAGE).parts
    if own == ("__init__.py",):
        return
    allowed = ORDER[: ORDER.index(place(own)) + 1]
    for module in imported_modules(path):
        assert place(module) in allowed, f"{'/'.join(own)} imports {'.'.join(module)}"


def test_modules_of_a_folder_do_not_import_each_other_in_circles():
    graph = {
        path.relative_to(PACKAGE).with_suffix("").parts: imported_modules(path)
        for path in FILES
        if path.name != "__init__.py"
    }
    done: set = set()

    def visit(module: tuple[str, ...], above: tuple) -> None:
        assert module not in above, f"{'.'.join(module)} imports itself through {above}"
        if module not in done:
            for imported in graph.get(module, []):
                visit(imported, (*above, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_every_place_is_named():
    """In the docstring of the package, and in the order of imports."""
    folders = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()}
    for folder in folders:
        assert f"`{folder}/`" in progressive_vae.__doc__
    files = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}
    assert folders | files == set(ORDER)


def test_no_test_file_imports_another():
    """What several of them share lies in `helpers/`, which holds no tests."""
    test_files = {path.stem for path in TESTS.glob("*.py")}
    for path in TESTS.rglob("*.py"):
        nodes = [*ast.walk(ast.parse(path.read_text(encoding="utf-8")))]
        modules = {
            alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names
        }
        modules |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
        assert not modules & test_files, path.name
    for path in (TESTS / "helpers").rglob("*.py"):
        functions = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        names = [node.name for node in functions if isinstance(node, ast.FunctionDef)]
        assert not [name for name in names if name.startswith("test")], path.name
