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
conversion/convert_dalle_dvae.py:4 conversion/convert_diffusers_vqmodel.py:15
conversion/convert_janus_vqvae.py:3 conversion/convert_taming_vqgan.py:22 conversion/foreign.py:82
conversion/halve.py:1 examples/benchmark.py:9 examples/compare_decoders.py:1
progressive_vae/codec/bitstream.py:3 progressive_vae/codec/codec.py:38
progressive_vae/codec/fixed_point.py:49 progressive_vae/codec/progressive.py:1
progressive_vae/configuration/base.py:6 progressive_vae/configuration/causal_lm.py:1
progressive_vae/configuration/choices.py:1 progressive_vae/configuration/level.py:30
progressive_vae/configuration/tokenizer.py:15 progressive_vae/configuration/validation.py:3
progressive_vae/evaluation/sliced_wasserstein.py:1 progressive_vae/hub/model_card.py:38
progressive_vae/hub/remote_code.py:8 progressive_vae/hub/repository.py:17
progressive_vae/hub/space.py:3 progressive_vae/inpainting.py:133
progressive_vae/models/auxiliary_decoder.py:42 progressive_vae/models/causal_lm.py:13
progressive_vae/models/dalle_dvae.py:3 progressive_vae/models/decoders.py:20
progressive_vae/models/distributions.py:14 progressive_vae/models/encoder.py:3
progressive_vae/models/heads.py:22 progressive_vae/models/layers.py:1
progressive_vae/models/level.py:45 progressive_vae/models/modeling_utils.py:19
progressive_vae/models/orderings.py:8 progressive_vae/models/pretrained_tokenizers.py:14
progressive_vae/models/preview_decoder.py:4 progressive_vae/models/prior.py:20
progressive_vae/models/quantizers.py:8 progressive_vae/models/sampling.py:18
progressive_vae/models/value_types.py:2 progressive_vae/pipeline.py:61
progressive_vae/pipeline_inputs.py:33 progressive_vae/scripts.py:1
progressive_vae/serialization.py:7 progressive_vae/training/afternoon.py:10
progressive_vae/training/args.py:8 progressive_vae/training/checkpoints.py:66
progressive_vae/training/cli.py:3 progressive_vae/training/fit.py:12
progressive_vae/training/greedy.py:43 progressive_vae/training/lock.py:6
progressive_vae/training/muon.py:3 progressive_vae/training/phases.py:47
progressive_vae/training/recipe.py:35 progressive_vae/training/report.py:20
progressive_vae/training/resume.py:51 progressive_vae/training/run.py:36
progressive_vae/visualization.py:5
"""


if __name__ == "__main__":
    page = Path(__file__)
    entries = " ".join(f"{path}:{count}" for path, count in count_violations().items())
    lines = textwrap.fill(entries, 99, break_on_hyphens=False, break_long_words=False)
    text = page.read_text(encoding="utf-8")
    text = re.sub(r'(?s)(\nTABLE = """\n).*?(\n?""")', lambda m: f'{m[1]}{lines}\n"""', text)
    page.write_text(text, encoding="utf-8")
