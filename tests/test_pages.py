"""What the pages say of files and of each other is so: links, anchors, quoted lines."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [*(ROOT / name for name in ("README.md", "MODEL_CARD.md", "CONTRIBUTING.md")),
         *sorted((ROOT / "examples").glob("*.md"))]  # fmt: skip
TOP = {"progressive_vae", "conversion", "examples", "tests", "pyproject.toml", "MODEL_CARD.md",
       "README.md", "LICENSE", "CONTRIBUTING.md"}  # fmt: skip


def prose(page: Path) -> str:
    """Without code, in which brackets are not links and # is no heading."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    return re.sub(r"^    .*", "", text, flags=re.M)


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    found = set()
    for heading in re.findall(r"^#+ (.*)", prose(page), re.M):
        plain = re.sub(r"\[(.*?)\]\(.*?\)", r"\1", heading).lower()
        anchor = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        assert anchor not in found, f"{page.name} has {heading} twice"
        found.add(anchor)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists() and target.is_relative_to(ROOT), f"{page.name}: {link}"
        assert not anchor or anchor in anchors(target), f"{page.name}: {link}"


def test_every_page_is_found_from_the_readme():
    linked = re.findall(r"\]\(([^)#\s]+)", (ROOT / "README.md").read_text())
    for page in [*PAGES[1:], *(ROOT / "examples").glob("*.ipynb")]:
        assert str(page.relative_to(ROOT)) in linked


def test_the_top_of_the_repository_is_short():
    ignored = {name.strip("/") for name in (ROOT / ".gitignore").read_text().split()}
    found = {path.name for path in ROOT.iterdir() if not path.name.startswith(".")}
    assert found - ignored <= TOP | {"shared"}


def source_of(path: Path, name: str) -> list[str]:
    """The lines of a function, class or method, by its dotted name."""
    text = path.read_text(encoding="utf-8")
    node: ast.AST = ast.parse(text)
    for word in name.split("."):
        inside = {each.name: each for each in ast.iter_child_nodes(node)
                  if isinstance(each, (ast.FunctionDef, ast.ClassDef))}  # fmt: skip
        assert word in inside, f"{path} has no {name}"
        node = inside[word]
    segment = ast.get_source_segment(text, node)
    assert segment is not None
    return [line.strip() for line in segment.splitlines()]


def test_theory_names_functions_and_quotes_their_lines():
    text = (ROOT / "examples" / "THEORY.md").read_text()
    parts = re.findall(
        r"\[`([\w/]+\.py)::([\w.]+)`\]\(\.\./([\w/.]+)\)|```python\n(.*?)```", text, re.S
    )
    lines, where, count = [], "", 0
    for file, name, path, quoted in parts:
        if name:
            assert path == f"progressive_vae/{file}"
            lines, where = source_of(ROOT / path, name), f"{file}::{name}"
            continue
        for line in quoted.strip().splitlines():
            assert line.strip() in lines, f"{where} has no line {line.strip()!r}"
            lines = lines[lines.index(line.strip()) + 1 :]  # quoted in their order
            count += 1
    assert count > 40
    # Nothing that looks like such a name is left out, and each quotation has its link.
    assert text.count(".py::") == sum(bool(name) for _, name, _, _ in parts)
