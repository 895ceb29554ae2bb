"""Writes examples/API.md: the public classes and functions, from their docstrings.

    python tests/api.py

It reads the sources alone, as what stands there is what a reader of them sees: decorators of other
libraries take signatures and docstrings away. A test compares the page with what this makes.
"""

import ast
import re
import textwrap
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE, PAGE = ROOT / "progressive_vae", ROOT / "examples" / "API.md"

INTRODUCTION = """# The public classes and functions

Made from the docstrings by `python tests/api.py`, which is to be run again when they change. What
pipelines and models inherit from diffusers (`to`, `enable_model_cpu_offload`,
`set_progress_bar_config`, …) and from transformers is in the documentation of those. Wrong
arguments are a `ValueError` that says what was expected and what came. The snippets are run by a
test, one after the other, from the top of the repository.
"""

# (heading, [(file, name), …], a snippet)
SECTIONS: list[tuple[str, list[tuple[str, str]], str]] = [
    (
        "The pipeline",
        [
            ("pipeline.py", "ProgressiveVAEPipeline"),
            ("calls.py", "ProgressiveVAEPipelineOutput"),
        ],
        """
import torch
from progressive_vae import ProgressiveVAEPipeline

pipe = ProgressiveVAEPipeline.from_pretrained("examples/fashion_mnist")
output = pipe(["Sandal", "Bag"], guidance_scale=1.5, generator=torch.Generator().manual_seed(0))
codes = pipe.encode(output.images)
assert [tuple(z.shape) for z in codes] == [(2, 2, 2), (2, 7, 7)]
again = pipe.reconstruct(output.images, level=1, temperature=[1.0, 0.8, 0.8])
bits = pipe.bits_per_dim(output.images, class_labels=["Sandal", "Bag"])
assert list(bits) == ["prior", "level_1", "level_2", "total"]
streams = pipe.compress(output.images)  # with the extra "codec"
assert pipe.decompress(streams).shape == (2, 1, 28, 28)
""",
    ),
    (
        "A level",
        [
            ("level.py", "ProgressiveVAELevel"),
            ("level.py", "ProgressiveVAELevelOutput"),
            ("configuration.py", "ProgressiveVAELevelConfig"),
        ],
        """
from progressive_vae import ProgressiveVAELevel, ProgressiveVAELevelConfig

config = ProgressiveVAELevelConfig(num_channels=1, codebook_size=8, hidden_size=16, num_layers=1)
level = ProgressiveVAELevel(config)  # of pixels, untrained
pixel_values = torch.zeros(4, 1, 6, 6).add(100).div(127.5).sub(1)  # on the 256 values
z = level.encode(pixel_values)  # int64 (4, 3, 3)
loss = level(pixel_values).loss  # nats per entry, to be minimised
nats = level.log_prob(pixel_values, z)  # (4,)
drawn = level.sample(z, generator=torch.Generator().manual_seed(0))
assert drawn.shape == pixel_values.shape and nats.shape == (4,)
""",
    ),
    (
        "The prior",
        [
            ("prior.py", "ProgressiveVAEPrior"),
            ("prior.py", "ProgressiveVAEPriorOutput"),
            ("prior_configuration.py", "ProgressiveVAEPriorConfig"),
        ],
        """
from progressive_vae import ProgressiveVAEPrior, ProgressiveVAEPriorConfig

prior = ProgressiveVAEPrior(ProgressiveVAEPriorConfig(codebook_size=8, grid_size=[3, 3]))
whole = ProgressiveVAEPipeline(prior.eval(), level.eval(), image_size=[6, 6])
assert len(whole(num_images_per_prompt=3).images) == 3
assert prior.log_prob(prior.sample(2)).shape == (2,)
""",
    ),
    (
        "What walks over a grid",
        [("groups.py", "Place"), ("groups.py", "Teacher")],
        """
from progressive_vae.models.orderings import Teacher

z_1, z_2 = (z[:1] for z in codes)
teacher = Teacher(z_2[:, None])  # follows a known grid
labels = torch.tensor([pipe.labels["Sandal"]])
pipe.level_1.walk(z_1, teacher, labels, finer_size=(7, 7))
nats = pipe.level_1.log_prob(z_2, z_1, labels)
assert torch.allclose(sum(teacher.terms), nats, atol=1e-3)
""",
    ),
    (
        "Training",
        [
            ("training/greedy.py", "train"),
            ("training/settings.py", "DataSettings"),
            ("training/settings.py", "FitSettings"),
            ("training/settings.py", "PriorFitSettings"),
            ("training/settings.py", "RunSettings"),
        ],
        """
from progressive_vae.training import train
from progressive_vae.training.args import FitSettings

assert FitSettings(max_train_steps=10).num_warmup_steps <= 10
""",
    ),
    (
        "On the Hub",
        [
            ("hub.py", "push_folder"),
            ("hub.py", "write_card"),
            ("hub.py", "figures"),
            ("card.py", "model_card"),
        ],
        """
from pathlib import Path
from progressive_vae.hub.repository import figures

assert "metrics.json" in figures(Path("examples/fashion_mnist"))  # they are of the weights there
""",
    ),
    (
        "Pictures side by side",
        [
            ("pictures.py", "picture_grid"),
            ("pictures.py", "sample_grid"),
            ("pictures.py", "reconstruction_grid"),
        ],
        """
from progressive_vae.visualization import picture_grid

row = picture_grid(output.images, columns=2)  # a PIL image
""",
    ),
]


def module(file: str) -> ast.Module:
    return ast.parse((PACKAGE / file).read_text())


def definition(file: str, name: str) -> ast.ClassDef | ast.FunctionDef:
    for node in module(file).body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and node.name == name:
            return node
    raise ValueError(f"expected {name} in {file}, got none")


def bases(file: str, node: ast.ClassDef) -> list[ast.ClassDef]:
    """The class, and those of the package that it inherits from, nearest first."""
    found, homes = [node], {}
    for each in module(file).body:
        if isinstance(each, ast.ImportFrom) and each.level == 1:
            homes |= {alias.name: f"{each.module}.py" for alias in each.names}
    for base in map(ast.unparse, node.bases):
        if base in homes:
            parent = definition(homes[base], base)
            assert isinstance(parent, ast.ClassDef)
            found += bases(homes[base], parent)
    return found


def signature(node: ast.FunctionDef, name: str) -> str:
    """As it is written, without `self`; of a property the name alone."""
    decorators = [ast.unparse(each) for each in node.decorator_list]
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    if "property" in decorators:
        return f"{name}{returns}"
    arguments = re.sub(r"^(self|cls)(, |$)", "", ast.unparse(node.args))
    return f"{name}({arguments}){returns}"


def of_fields(node: ast.ClassDef) -> str:
    fields = [ast.unparse(each) for each in node.body if isinstance(each, ast.AnnAssign)
              and "ClassVar" not in ast.unparse(each.annotation)]  # fmt: skip
    return f"{node.name}({', '.join(fields)})"


def block(text: str) -> str:
    """Broken after commas alone."""
    text = re.sub(r"(?<!,) ", "\xa0", re.sub(" *= *", " = ", text))
    lines = textwrap.wrap(text, 100, subsequent_indent="    ", break_on_hyphens=False)
    return "```\n" + "\n".join(lines).replace("\xa0", " ") + "\n```"


def described(node: ast.ClassDef | ast.FunctionDef) -> str:
    """The docstring, with its lists of arguments and errors as lists."""
    lines: list[str] = []
    is_list = False
    for line in (ast.get_docstring(node) or "").splitlines():
        if line in ("Args:", "Returns:", "Raises:"):
            is_list = line != "Returns:"
            lines += [f"*{line}*", ""]
        elif line.startswith("    ") and lines and not line.startswith("     ") and is_list:
            lines.append(re.sub(r"^([\w, …]+): ", r"- `\1`: ", line[4:]))
        elif line.startswith("        ") and is_list:
            lines.append("  " + line.strip())
        else:
            is_list = is_list and not line
            lines.append(line.strip() if lines and "*Returns:*" in lines else line)
    return "\n".join(lines).strip()


def entry(file: str, name: str) -> list[str]:
    node = definition(file, name)
    where = f"[`{file}`](../progressive_vae/{file})"
    parts = [f"### `{name}`", where]
    if isinstance(node, ast.FunctionDef):
        return [*parts, block(signature(node, name)), described(node)]
    chain = bases(file, node)
    functions = {
        each.name: each
        for kind in reversed(chain)  # the nearest wins
        for each in kind.body
        if isinstance(each, ast.FunctionDef)
    }
    if "__init__" in functions:
        parts.append(block(signature(functions.pop("__init__"), name)))
    else:
        parts.append(block(of_fields(node)))
    parts.append(described(node))
    names = [each.name for kind in chain for each in kind.body if isinstance(each, ast.FunctionDef)]
    for method in dict.fromkeys(names):
        found = functions.get(method)
        is_public = method == "__call__" or not method.startswith(("_", "validate_"))
        if found is None or not is_public or not ast.get_docstring(found):
            continue
        shown = name if method == "__call__" else method
        parts += [f"#### `{name}.{method}`", block(signature(found, shown)), described(found)]
    return parts


def page() -> str:
    parts = [INTRODUCTION.strip()]
    for heading, names, snippet in SECTIONS:
        parts += [f"## {heading}", f"```python\n{snippet.strip()}\n```"]
        for file, name in names:
            parts += entry(file, name)
    return "\n\n".join(part for part in parts if part) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
    print(f"wrote {PAGE}")
