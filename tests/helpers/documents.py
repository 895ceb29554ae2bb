"""The documents, and how tests run their code blocks: at tiny size, in this process.

Pages are README.md and examples/docs/*.md. The blocks of a page run in order, in a folder that has

- `examples`, `conversion`: links to the folders of the repository;
- `photos`, `photo.png`: small color images without classes;
- `runs/digits`, `runs/photos`: pipelines trained at tiny size by the commands in `TRAINING`;
- `zalando-datasets/fashion_mnist`, `uoft-cs/cifar10`, `amused/amused-256`: tiny data sets and a
  tiny `VQModel` in place of those on the Hub.

```python blocks share one namespace. A comment after a statement that prints, on its last line or
on the lines below it, is its output: numbers with a decimal point may differ by one in the last
digit, and … stands for any text. The code may name the Hub's account `you`, and a training's
`max_train_minutes` is replaced by a second.

```bash blocks have one command a line (or continued by a backslash); lines that begin with # are
comments. Scripts run with the flags of `TINY` after their own. Those of `PARSED_SCRIPTS`, and the
pages in `PARSED_PAGES`, are parsed only; so are commands in the text, and launches of several
processes, which tests/test_processes.py runs. Commands of `OTHER_PROGRAMS` are not run.
"""

import ast
import functools
import io
import json
import re
import shlex
import shutil
import sys
import tokenize
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from pathlib import Path
from types import ModuleType

import datasets
import numpy as np
import PIL.Image
import pytest
from accelerate.commands.launch import launch_command_parser
from diffusers import VQModel

from helpers.recipes import BACKBONE
from helpers.scripts import load_script
from progressive_vae import ProgressiveVAEPriorConfig

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "examples" / "docs").glob("*.md"))]
PARSED_PAGES = {"results.md", "experiment_log.md"}  # commands that take hours
PARSED_SCRIPTS = {"app", "plan_scale"}  # a server; minutes
OTHER_PROGRAMS = {"cd", "git", "hf", "pip", "tensorboard", "trackio", "uv"}
TRAINING = {
    "runs/digits": "accelerate launch examples/train.py",
    "runs/photos": "accelerate launch examples/train.py --config examples/configs/color_64.yaml "
    "--train_data_dir photos --resolution 64 --center_crop --output_dir runs/photos "
    "--max_train_minutes 60",
}
TINY = {
    "train": "--levels.hidden_size 8 --levels.encoder_hidden_size 8 --levels.num_layers 1 "
    "--levels.codebook_size 8 --levels.fit.max_train_steps 2 --prior.fit.max_train_steps 2 "
    "--num_validation_images 2 --max_train_minutes 0.01 --report_to none "
    "--max_train_samples 100 --max_eval_samples 20 "
    f"--prior.backbone_config '{json.dumps(BACKBONE)}'",
    "evaluate": "--num_drawn 8 --num_drawn_to_learn_from 20 --classifier_steps 2 "
    "--num_images_of_curve 2 --num_tuning_evaluations 2 --num_tuning_samples 8",
    "benchmark": "--train_minutes 0.01 --num_drawn 8 --num_drawn_to_learn_from 0 "
    "--classifier_steps 2",
    "edit": "--num_images 4 --num_candidates 2",
}
# Flags with which a training changes or resumes what is in its output folder.
CHANGES = {"--phase", "--resume_from_checkpoint", "--overwrite_output_dir"}
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e[+-]?\d+)?")


def blocks(page: Path) -> list[tuple[str, str]]:
    """Return the language and the text of each fenced block of code."""
    return re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)


def commands(page: Path) -> list[str]:
    """Return the commands of the bash blocks of a page."""
    return [line for kind, text in blocks(page) if kind == "bash" for line in command_lines(text)]


def inline_commands(page: Path) -> list[str]:
    """Return the commands of scripts that stand in the text and the tables of a page."""
    return re.findall(r"`((?:python|accelerate launch) \S+\.py[^`]*)`", prose(page))


def command_lines(text: str) -> list[str]:
    lines = [line.strip() for line in text.replace("\\\n", " ").splitlines()]
    return [
        " ".join(command.split())
        for line in lines
        if line and not line.startswith("#")
        for command in re.sub(r"\s+# .*", "", line).split(" && ")
    ]


def prose(page: Path) -> str:
    """Return the text of a page without code blocks."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    return re.sub(r"^    .*", "", text, flags=re.M)


def sentences(page: Path) -> list[str]:
    """Return the sentences of a page, without headings, tables, code, images and addresses."""
    text = re.sub(r"<!--.*?-->", "", prose(page), flags=re.S)
    text = re.sub(r"!\[[^\]]*\]\([^)]*\)", "", text)
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"`[^`]*`", "code", text)
    text = re.sub(r"^(#|\|).*", "", text, flags=re.M)
    paragraphs = re.split(r"\n\s*\n|\n\s*(?:[-*]|\d+\.) ", text)
    by_paragraph = [
        re.split(r"(?<=[.!?;])[*_)\"]*\s+", " ".join(text.split())) for text in paragraphs
    ]
    return [sentence for paragraph in by_paragraph for sentence in paragraph if sentence]


def printed_statements(code: str) -> Iterator[tuple[ast.stmt, str]]:
    """Yield each top-level statement of a snippet and the comment after it, "" if it has none."""
    lines = code.splitlines()
    comments = {
        token.start[0]: token.string.removeprefix("#").strip()
        for token in tokenize.generate_tokens(io.StringIO(code).readline)
        if token.type == tokenize.COMMENT
    }
    for statement in ast.parse(code).body:
        assert statement.end_lineno is not None
        line = statement.end_lineno
        comment = [comments.get(line, "")]
        while line < len(lines) and lines[line].startswith("#"):
            line += 1
            comment.append(comments[line])
        yield statement, "\n".join(comment).strip()


def assert_output(expected: str, actual: str):
    """Compare a printed text with that of a document."""
    expected, actual = (" ".join(text.split()) for text in (expected, actual))
    pattern = ""
    for part in re.split(rf"({NUMBER.pattern}|…)", expected):
        if part == "…":
            pattern += ".*?"
        elif NUMBER.fullmatch(part):
            pattern += f"({NUMBER.pattern})"
        else:
            pattern += re.escape(part)
    match = re.fullmatch(pattern, actual)
    assert match, f"expected {expected!r}, got {actual!r}"
    for number, value in zip(NUMBER.findall(expected), match.groups(), strict=True):
        digits = re.search(r"\.(\d+)", number)
        tolerance = 1.01 * 10.0 ** -len(digits[1]) if digits else 0
        assert abs(float(number) - float(value)) <= tolerance, (
            f"expected {expected!r}, got {actual!r}"
        )


def write_images(folder: Path):
    """Write the images, the data sets and the tokenizer of the pages."""
    generator = np.random.default_rng(0)

    def image(width: int, height: int, mode: str = "RGB") -> PIL.Image.Image:
        pixels = generator.integers(0, 256, (3, 3, 3), dtype=np.uint8)
        return PIL.Image.fromarray(pixels).resize((width, height)).convert(mode)

    (folder / "photos").mkdir()
    for i in range(20):
        width, height = generator.integers(16, 25, 2).tolist()
        image(width, height).save(folder / "photos" / f"{i}.png")
    image(24, 20).save(folder / "photo.png")
    prior = ProgressiveVAEPriorConfig.from_pretrained(ROOT / "examples" / "fashion_mnist" / "prior")
    labels = datasets.ClassLabel(names=list(prior.id2label.values()))
    for name, column, side, mode in (
        ("zalando-datasets/fashion_mnist", "image", 28, "L"),
        ("uoft-cs/cifar10", "img", 32, "RGB"),
    ):
        (folder / name).mkdir(parents=True)
        features = datasets.Features({column: datasets.Image(), "label": labels})
        for split, count in (("train", 40), ("test", 20)):
            rows = {
                column: [image(side, side, mode) for _ in range(count)],
                "label": [i % 10 for i in range(count)],
            }
            table = datasets.Dataset.from_dict(rows, features)
            table.to_parquet(folder / name / f"{split}-00000-of-00001.parquet")
    VQModel(
        block_out_channels=[4, 8],
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        latent_channels=3,
        num_vq_embeddings=12,
        norm_num_groups=2,
    ).save_pretrained(folder / "amused" / "amused-256")


class Parsed(Exception):
    """Raised after a script has parsed its command line."""


class Documents:
    """Runs pages in folders of their own, with data and trained pipelines that they share.

    Args:
        folder: for the data and the pipelines.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.trained: set[str] = set()
        write_images(folder)
        for name in ("examples", "conversion"):
            (folder / name).symlink_to(ROOT / name)

    def train(self):
        """Train the shared pipelines; the working directory must be the shared folder."""
        for command in TRAINING.values():
            self.run_command(command)
            self.trained.add(command)

    def copy_to(self, folder: Path):
        """Copy everything to the folder of a page."""
        shutil.copytree(self.folder, folder, symlinks=True, dirs_exist_ok=True)

    def run_page(self, page: Path):
        """Run the blocks of a page in the working directory."""
        namespace: dict = {"__name__": "__main__"}
        for kind, text in blocks(page):
            if kind == "python":
                self.run_snippet(text, namespace)
            elif kind == "bash":
                for command in command_lines(text):
                    self.run_command(command, page.name in PARSED_PAGES)

    def run_snippet(self, code: str, namespace: dict):
        code = code.replace('"you/', '"org/')
        code = re.sub(r"max_train_minutes=[\d.]+", "max_train_minutes=0.02", code)
        for statement, comment in printed_statements(code):
            output = io.StringIO()
            with redirect_stdout(output):
                module = ast.Module([statement], [])
                exec(compile(module, "<document>", "exec"), namespace)
            if output.getvalue() and comment:
                assert_output(comment, output.getvalue())

    def run_command(self, command: str, parse_only: bool = False):
        words = shlex.split(command.replace("you/", "org/"))
        if words[0] in OTHER_PROGRAMS or command in self.trained:
            return
        if words[:2] == ["python", "-c"]:
            self.run_snippet(words[2], {})
            return
        launch = words[:2] == ["accelerate", "launch"]
        assert launch or words[0] == "python", f"expected a script or a known program: {command}"
        index = next(i for i, word in enumerate(words) if word.endswith(".py"))
        if launch:
            launch_command_parser().parse_args(words[2:])
            parse_only |= "--num_processes" in words
        path, flags = Path(words[index]), words[index + 1 :]
        module = load_script(path.stem, str(path.parent))
        if parse_only or path.stem in PARSED_SCRIPTS:
            parse(module, flags)
            return
        if path.stem == "train" and not CHANGES & set(flags):
            recipe, _ = module.parse(flags)
            shutil.rmtree(recipe.run.output_dir, ignore_errors=True)
        module.main([*flags, *tiny_flags(path.stem, flags)])


def tiny_flags(script: str, flags: list[str]) -> list[str]:
    tiny = shlex.split(TINY.get(script, ""))
    if "--resolution" in flags:
        tiny += ["--resolution", "16"]
    if "--compile" in flags:
        tiny += ["--compile", "false"]  # it takes minutes
    refits = {flag.split(".")[0] for flag in flags if ".refit." in flag}
    for level in sorted(refits):
        tiny += [f"{level}.refit.fit.max_train_steps", "2"]
    return tiny


def parse(module: ModuleType, flags: list[str]):
    """Parse a command line as a script does, and raise its error; run nothing."""

    def stop(*arguments, **options):
        raise Parsed

    def only_parsed(function: Callable) -> Callable:
        return functools.wraps(function)(lambda **options: stop())  # one for each function

    with pytest.MonkeyPatch.context() as patch:
        is_conversion = module.__name__.startswith("convert_") and hasattr(module, "make_table")
        owner = sys.modules["common"] if is_conversion else module
        if hasattr(owner, "Arguments"):
            patch.setattr(owner.Arguments, "__post_init__", stop)
        elif hasattr(module, "auto_cli"):
            auto_cli = module.auto_cli
            patch.setattr(
                module,
                "auto_cli",
                lambda functions, args: auto_cli([only_parsed(f) for f in functions], args=args),
            )
        else:
            module.parse(flags)
            return
        with pytest.raises(Parsed):
            module.main(flags)
