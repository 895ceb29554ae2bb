"""Texts of the documents: links, lengths, terms, and numbers that other files have too."""

import ast
import json
import re
from pathlib import Path

import pytest
import yaml

import progressive_vae
from helpers.documents import PAGES, README, ROOT, commands, prose, sentences

TEXTS = [*PAGES, ROOT / "MODEL_CARD.md", ROOT / "CONTRIBUTING.md"]
TOP = {"progressive_vae", "conversion", "examples", "tests", "pyproject.toml", "MODEL_CARD.md",
       "README.md", "LICENSE", "CONTRIBUTING.md", "CITATION.cff"}  # fmt: skip
MAX_WORDS = {"README.md": 1400, "results.md": 2500, "experiment_log.md": 2000}
MAX_WORDS_OF_A_PAGE = 900
MAX_WORDS_OF_A_SENTENCE = 30
# What people search for.
TERMS = [
    "hierarchical", "discrete", "VQ-VAE", "VQ-VAE-2", "autoregressive", "likelihood",
    "bits per dimension", "class-conditional", "classifier-free guidance", "lossless compression",
    "tokenizer", "Fréchet distance", "FID", "posterior collapse",
]  # fmt: skip
PAGE = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
TEXT = pytest.mark.parametrize("page", TEXTS, ids=lambda page: page.name)


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    names: set[str] = set()
    for heading in re.findall(r"^#+ (.*)", prose(page), re.M):
        plain = re.sub(r"\[(.*?)\]\(.*?\)", r"\1", heading).lower()
        anchor = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        assert anchor not in names, f"{page.name} has {heading} twice"
        names.add(anchor)
    return names


@TEXT
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists() and target.is_relative_to(ROOT), f"{page.name}: {link}"
        assert not anchor or anchor in anchors(target), f"{page.name}: {link}"


def test_the_readme_links_to_every_page():
    links = re.findall(r"\]\(([^)#\s]+)", README.read_text(encoding="utf-8"))
    for page in [*TEXTS[1:], *(ROOT / "examples").glob("*.ipynb")]:
        assert str(page.relative_to(ROOT)) in links


@PAGE
def test_pages_are_short(page):
    text = page.read_text(encoding="utf-8")
    assert len(text.split()) <= MAX_WORDS.get(page.name, MAX_WORDS_OF_A_PAGE)
    assert len(re.findall("^```", text, re.M)) % 2 == 0
    for sentence in sentences(page):
        num_words = len(re.findall(r"[^\W\d][\w'’.-]*", sentence))
        assert num_words <= MAX_WORDS_OF_A_SENTENCE, f"{num_words} words: {sentence}"


@PAGE
def test_pages_describe_what_is_in_the_repository(page):
    assert not re.search(r"not here|not in the repository", page.read_text(encoding="utf-8"))


def test_the_readme_has_the_terms_of_the_field():
    text = " ".join(README.read_text(encoding="utf-8").split()).lower()
    assert [term for term in TERMS if term.lower() not in text] == []
    lines = README.read_text(encoding="utf-8").splitlines()
    first = lines.index("```python")
    assert first < 30 and lines.index("```", first) - first <= 13


def test_the_table_of_models_has_their_metrics():
    rows = re.findall(r"^\| \[(\w+)\]\(examples/\w+\) \|(.*)\|$", README.read_text("utf-8"), re.M)
    assert {name for name, _ in rows} == {
        path.parent.name for path in (ROOT / "examples").glob("*/model_index.json")
    }
    for name, row in rows:
        folder = ROOT / "examples" / name
        metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
        cells = [cell.strip() for cell in row.split("|")]
        num_bytes = sum(path.stat().st_size for path in folder.glob("*/model.safetensors"))
        assert cells[1:4] == [
            f"{sum(metrics['parameters'].values()) / 1e6:.1f} M",
            f"{num_bytes / 1e6:.1f} MB",
            f"{metrics['bits_per_dim']['total']:.3f}",
        ]


def test_ci_installs_as_the_readme():
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    for command in commands(README):
        assert not command.startswith("pip install") or command in ci


def test_versions_are_the_same():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == progressive_vae.__version__


def test_tables_of_results_follow_a_command_with_its_conditions():
    text = (ROOT / "examples" / "docs" / "results.md").read_text()
    _, *parts = re.split(r"^```bash\n.*?^```", text, flags=re.M | re.S)
    for part in parts:
        if re.search(r"^\|", part, re.M):
            assert re.search(r"\bseeds?\b", part, re.I)
            assert re.search(r"\bcommits? [0-9a-f]{7}\b", part)


def test_the_top_of_the_repository_is_short():
    ignored = {name.strip("/") for name in (ROOT / ".gitignore").read_text().split()}
    names = {path.name for path in ROOT.iterdir() if not path.name.startswith(".")}
    assert names - ignored <= TOP | {"shared"}


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
