"""Code and docstrings use the terms of the field: no private words, no participles as names.

`python tests/test_language.py` updates the table of the files that are not done yet, which is at
the end. A change may lower its numbers, never raise them.
"""

import ast
import re
import textwrap
from pathlib import Path

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
    random_colours colours colour_64 num_symbols picture_weight num_candidates num_drawn
    num_drawn_to_learn_from bits_per_dim_of_drawn_codes max_pictures pictures_per_part
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
    counts = {
        path.relative_to(ROOT).as_posix(): violations(path.read_text(encoding="utf-8"))
        for path in sorted(paths)
    }
    return {path: count for path, count in counts.items() if count}


def test_no_file_has_more_private_words_than_the_table_allows():
    allowed = dict(entry.split(":") for entry in TABLE.split())
    worse = {
        path: f"{count} instead of {allowed.get(path, 0)}"
        for path, count in count_violations().items()
        if count > int(allowed.get(path, 0))
    }
    assert not worse, "use the terms of the field"


TABLE = """
examples/compare_decoders.py:1 progressive_vae/codec/codec.py:1
progressive_vae/configuration/causal_lm.py:1 progressive_vae/configuration/level.py:8
progressive_vae/configuration/tokenizer.py:15 progressive_vae/configuration/validation.py:3
progressive_vae/evaluation/sliced_wasserstein.py:1 progressive_vae/hub/model_card.py:4
progressive_vae/models/auxiliary_decoder.py:1 progressive_vae/models/dalle_dvae.py:3
progressive_vae/models/distributions.py:7 progressive_vae/models/heads.py:2
progressive_vae/models/layers.py:1 progressive_vae/models/quantizers.py:6
progressive_vae/pipeline.py:4 progressive_vae/training/phases.py:5
progressive_vae/training/resume.py:7
"""


if __name__ == "__main__":
    page = Path(__file__)
    entries = " ".join(f"{path}:{count}" for path, count in count_violations().items())
    lines = textwrap.fill(entries, 99, break_on_hyphens=False, break_long_words=False)
    text = page.read_text(encoding="utf-8")
    text = re.sub(r'(?s)(\nTABLE = """\n).*?(\n?""")', lambda m: f'{m[1]}{lines}\n"""', text)
    page.write_text(text, encoding="utf-8")
