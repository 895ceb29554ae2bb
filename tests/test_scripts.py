"""Scripts that say what they need: `uv run examples/sample.py` in an environment of its own."""

import errno
import io
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import huggingface_hub.errors
import numpy as np
import PIL.Image
import pytest
import safetensors
import torch
from packaging.requirements import Requirement

from progressive_vae.scripts import check_image_path, run_script, save_image

tomllib = pytest.importorskip("tomllib", reason="Python 3.11")

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SCRIPTS = [
    path for folder in ("examples", "conversion") for path in sorted((ROOT / folder).glob("*.py"))
    if "__main__" in path.read_text()
]  # fmt: skip
HEADER = re.compile(r"\A# /// script\n((?:#(?: .*)?\n)+)# ///\n")  # of PEP 723


def needed(extras: set[str]) -> set[str]:
    """Names of packages, with those of extras that extras name."""
    extra = PROJECT["optional-dependencies"]
    requirements = {Requirement(line) for line in PROJECT["dependencies"]}
    names = [*extras]
    while names:
        for requirement in map(Requirement, extra[names.pop()]):
            names += requirement.extras if requirement.name == PROJECT["name"] else []
            requirements.add(requirement)
    return {requirement.name for requirement in requirements}


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_the_header_of_a_script_lists_its_imports(path):
    text = path.read_text()
    header = tomllib.loads(
        "".join(line[2:] or "\n" for line in HEADER.match(text)[1].splitlines(True))
    )
    (requirement,) = map(Requirement, header["dependencies"])
    assert requirement.name == PROJECT["name"]
    assert header["requires-python"] == PROJECT["requires-python"]
    source = header["tool"]["uv"]["sources"][PROJECT["name"]]
    assert source == {"path": "..", "editable": True} and path.parents[1] == ROOT
    names = {name.replace("-", "_").lower() for name in needed(requirement.extras)}
    names |= set(sys.stdlib_module_names) | {"pil", "yaml", "progressive_vae", "pyarrow", "tqdm"}
    imported = re.findall(r"^\s*(?:from|import) (\w+)", text.split('"""')[2], re.M)
    own = {entry.stem for entry in path.parent.iterdir()}  # scripts, and folders of modules
    assert {name.lower() for name in imported} - own <= names


def test_characters_outside_the_console_encoding(monkeypatch):
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="ascii", newline="\n")
    monkeypatch.setattr(sys, "stdout", stdout)
    monkeypatch.setattr(sys, "argv", ["script.py", "Fréchet", "z₁"])
    run_script(lambda words: print(*words))
    stdout.flush()
    assert stdout.buffer.getvalue() == b"Fr?chet z?\n"


def test_an_invalid_argument_is_one_line(monkeypatch):
    def main(words: list[str]):
        raise ValueError(f"expected no words, got {words}")

    monkeypatch.setattr(sys, "argv", ["script.py", "a"])
    with pytest.raises(SystemExit, match=r"^error: expected no words, got \['a'\]$"):
        run_script(main)


def failing(error: BaseException):
    def main(words: list[str]):
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (
            OSError(errno.ENOSPC, "No space left", "x.png"),
            "error: [Errno 28] No space left: 'x.png'",
        ),
        (ConnectionError("a\n  b"), "error: a b"),
        (FloatingPointError("the loss"), "error: the loss"),
        (huggingface_hub.errors.HTTPError("refused"), "error: refused"),
        (safetensors.SafetensorError("disk full"), "error: disk full"),
        (ModuleNotFoundError("No module named 'x'", name="x"), "error: No module named 'x'"),
        (TimeoutError(), "error: TimeoutError"),
    ],
)
def test_an_error_of_the_input_or_the_machine_is_one_line(error, expected):
    with pytest.raises(SystemExit) as ended:
        run_script(failing(error))
    assert ended.value.code == expected


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA: 9 GiB"), MemoryError()])
def test_out_of_memory_suggests_smaller_batches(error):
    with pytest.raises(SystemExit, match="^error: out of memory, use smaller batches"):
        run_script(failing(error))


@pytest.mark.parametrize(
    "error",
    [
        *(kind("x") for kind in (TypeError, AttributeError, KeyError, RuntimeError)),
        ImportError("cannot import name 'x'", name="progressive_vae.level"),
    ],
)
def test_a_bug_keeps_its_traceback(error):
    with pytest.raises(type(error)):
        run_script(failing(error))


def test_an_interrupt_is_one_line(capsys):
    with pytest.raises(SystemExit) as ended:
        run_script(failing(KeyboardInterrupt()))
    assert ended.value.code == 128 + signal.SIGINT
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_sampling_scripts_need_no_extra():
    """They start where jsonargparse, which reads the flags of the others, is not installed."""
    code = """
import runpy, sys
sys.modules["jsonargparse"] = None
_, *scripts = sys.argv
for script in scripts:
    sys.argv = [script, "--output", "/dev/null/x.png"]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        print(end)
"""
    scripts = [str(ROOT / "examples" / f"{name}.py") for name in ("sample", "edit")]
    command = [sys.executable, "-c", code, *scripts]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.startswith("error: expected output in a folder") for line in lines] == [True] * 2


@pytest.mark.parametrize("name", ["nowhere/x.png", "file/x.png", "x.xyz", "x", "", "folder.png"])
def test_an_unwritable_output_is_an_error_before_sampling(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(ValueError, match="expected output .*, got "):
        check_image_path(name, "output")
    check_image_path("x.PNG", "output")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.png"]


def test_saving_an_image_is_atomic(tmp_path, monkeypatch):
    path = tmp_path / "x.png"
    save_image(PIL.Image.new("L", (2, 2)), path)
    before = path.read_bytes()

    def full(image, file, image_format):
        Path(file).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left")

    monkeypatch.setattr(PIL.Image.Image, "save", full)
    with pytest.raises(OSError, match="No space left"):
        save_image(PIL.Image.fromarray(np.ones((2, 2), np.uint8)), path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
