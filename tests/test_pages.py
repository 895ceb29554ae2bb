"""What the pages say of files and of each other is so: links, anchors, quoted lines."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [*(ROOT / name for name in ("README.md", "MODEL_CARD.md", "CONTRIBUTING.md")),
         *sorted((ROOT / "examples").glob("docs/*.md"))]  # fmt: skip
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


def test_tables_of_results_follow_a_command_with_its_conditions():
    text = (ROOT / "examples" / "docs" / "results.md").read_text()
    _, *parts = re.split(r"^```bash\n.*?^```", text, flags=re.M | re.S)
    for part in parts:
        if re.search(r"^\|", part, re.M):
            assert re.search(r"\bseeds?\b", part) and re.search(r"\bcommits? [0-9a-f]{7}\b", part)


def test_the_top_of_the_repository_is_short():
    ignored = {name.strip("/") for name in (ROOT / ".gitignore").read_text().split()}
    found = {path.name for path in ROOT.iterdir() if not path.name.startswith(".")}
    assert found - ignored <= TOP | {"shared"}


def has_definition(path: Path, name: str) -> bool:
    """Whether a file defines a function, class or method, by its dotted name."""
    node: ast.AST = ast.parse(path.read_text(encoding="utf-8"))
    for word in name.split("."):
        definitions = {
            child.name: child
            for child in ast.iter_child_nodes(node)
            if isinstance(child, (ast.FunctionDef, ast.ClassDef))
        }
        if word not in definitions:
            return False
        node = definitions[word]
    return True


def test_theory_names_functions_that_are_there():
    text = (ROOT / "examples" / "docs" / "theory.md").read_text()
    links = re.findall(r"\[`([\w/]+\.py)::([\w.]+)`\]\(\.\./\.\./([\w/.]+)\)", text)
    assert len(links) > 30 and len(links) == text.count(".py::")
    for file, name, path in links:
        assert path == f"progressive_vae/{file}"
        assert has_definition(ROOT / path, name), f"{file} has no {name}"
