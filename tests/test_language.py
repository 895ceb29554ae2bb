"""Code and documents use the terms of the field: no private words, no participles as names."""

import ast
import re
from pathlib import Path

import pytest

from helpers.documents import PAGES, prose

ROOT = Path(__file__).parents[1]
# Anywhere in a file, also as a part of an identifier.
BANNED_WORDS = """
    draws? drawn drew drawing redraw redrawn pictures? symbols? symbolic told yardsticks? figures?
    afternoon forms candidates painter growing anew kept lest likewise theirs ours colours? grey
    whole.numbers wrong.codes laboratory.book as.a.rule by.heart of.before drawn.again
""".split()
# As the name of a variable or an argument.
BANNED_NAMES = set("found told said known shown drawn given asked ours theirs whole each".split())
# Saved names (configuration, state dicts, metrics, recipes, flags) and those of other libraries.
ALLOWED = """
    random_colours colours num_symbols picture_weight num_candidates num_drawn
    symbol_logit_rank whole.numbers,.\{dtype\} Progressive.growing.of.GANs
    Picture.coding identity\["forms"\] _EARLIER_MARK.=."<!--.figures
    num_drawn_to_learn_from bits_per_dim_of_drawn_codes
    figure,.axes figure\\.savefig close\\(figure figsize ImageDraw\\.Draw encoded_symbols symbols=
""".split()
WORDS = re.compile(rf"(?<![a-z])(?:{'|'.join(BANNED_WORDS)})(?![a-z])", re.IGNORECASE)
EXCEPTIONS = re.compile("|".join(rf"(?<![A-Za-z_]){name}(?![A-Za-z_])" for name in ALLOWED))


def violations(source: str) -> int:
    """Return the number of banned words and names in a Python file."""
    nodes = [*ast.walk(ast.parse(source))]
    names = [node.id for node in nodes if isinstance(node, ast.Name)]
    names += [node.arg for node in nodes if isinstance(node, ast.arg)]
    num_words = len(WORDS.findall(EXCEPTIONS.sub("", source)))
    return num_words + sum(name in BANNED_NAMES for name in names)


def count_violations() -> dict[str, int]:
    """Return the number of violations of each file that has any, by its path."""
    paths = [*(ROOT / "progressive_vae").rglob("*.py"), *(ROOT / "conversion").glob("*.py")]
    paths += (ROOT / "examples").rglob("*.py")
    paths += (ROOT / "tests" / "helpers").glob("*.py")
    counts = {
        path.relative_to(ROOT).as_posix(): violations(path.read_text(encoding="utf-8"))
        for path in sorted(paths)
    }
    return {path: count for path, count in counts.items() if count}


def test_code_uses_the_terms_of_the_field():
    assert count_violations() == {}


TEXTS = [*PAGES, ROOT / "MODEL_CARD.md", ROOT / "CONTRIBUTING.md"]


@pytest.mark.parametrize("page", TEXTS, ids=lambda page: page.name)
def test_documents_use_the_terms_of_the_field(page):
    text = re.sub(r"`[^`]*`|\]\([^)]*\)|<!--.*?-->", "", prose(page), flags=re.S)
    assert WORDS.findall(EXCEPTIONS.sub("", text)) == []
