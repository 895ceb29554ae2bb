"""Scripts that say what they need: `uv run examples/sample.py` in an environment of its own."""

import io
import re
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from progressive_vae.training.command import run_script

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
    found = {Requirement(line) for line in PROJECT["dependencies"]}
    todo = [*extras]
    while todo:
        for requirement in map(Requirement, extra[todo.pop()]):
            todo += requirement.extras if requirement.name == PROJECT["name"] else []
            found.add(requirement)
    return {requirement.name for requirement in found}


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_says_what_it_imports(path):
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
    own = {each.stem for each in path.parent.glob("*.py")}
    assert {name.lower() for name in imported} - own <= names


def test_a_console_shows_what_it_can(monkeypatch):
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="ascii", newline="\n")
    monkeypatch.setattr(sys, "stdout", stdout)
    monkeypatch.setattr(sys, "argv", ["script.py", "Fréchet", "z₁"])
    run_script(lambda words: print(*words))
    stdout.flush()
    assert stdout.buffer.getvalue() == b"Fr?chet z?\n"


def test_what_is_wrong_is_one_line(monkeypatch):
    def main(words: list[str]):
        raise ValueError(f"expected no words, got {words}")

    monkeypatch.setattr(sys, "argv", ["script.py", "a"])
    with pytest.raises(SystemExit, match=r"^error: expected no words, got \['a'\]$"):
        run_script(main)
