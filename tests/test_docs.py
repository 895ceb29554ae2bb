"""The commands and snippets of the README and of examples/docs run, and print what they say."""

import ast
import json

import numpy as np
import PIL.Image
import pytest

from helpers.documents import PAGES, ROOT, Documents, assert_output, inline_commands
from helpers.scripts import load_script
from progressive_vae.evaluation import throughput


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    documents = Documents(tmp_path_factory.mktemp("documents"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(documents.folder)
        documents.train()
    return documents


@pytest.fixture
def page_folder(tmp_path, monkeypatch, documents):
    monkeypatch.setattr(throughput, "TIMED_SECONDS", 0.02)
    documents.copy_to(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_runs(page, documents, page_folder):
    documents.run_page(page)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_in_the_text_parse(page, documents, page_folder):
    for command in inline_commands(page):
        documents.run_command(command, parse_only=True)


def test_outputs_are_compared():
    assert_output("2.88 … [1, 2]", "2.8787   and\n[1, 2]")
    for wrong in ("2.90 [1, 2]", "2.88 [1, 3]", "2.88 [1, 2] more"):
        with pytest.raises(AssertionError, match="expected"):
            assert_output("2.88 [1, 2]", wrong)


def test_a_page_that_fails(documents, page_folder):
    page = page_folder / "page.md"
    for text in (
        "```python\nx = 1\nprint(x)  # 2\n```\n",
        "```bash\npython examples/sample.py --no_such_flag 1\n```\n",
        "```bash\nno_such_program\n```\n",
    ):
        page.write_text(text)
        with pytest.raises((AssertionError, ValueError)):
            documents.run_page(page)


def test_the_tour(page_folder):
    """Cell by cell, in one namespace; the value of a cell's last expression is its output."""
    notebook = json.loads((ROOT / "examples" / "tour.ipynb").read_text())
    cells = ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code"]
    names: dict = {}
    outputs = []
    for code in cells:
        *lines, final = ast.parse(
            code.replace("max_train_minutes=1", "max_train_minutes=0.02")
        ).body
        if isinstance(final, ast.Expr):
            exec(compile(ast.Module(lines, []), "tour.ipynb", "exec"), names)
            outputs.append(eval(compile(ast.Expression(final.value), "tour.ipynb", "eval"), names))
        else:
            exec(compile(ast.Module([*lines, final], []), "tour.ipynb", "exec"), names)
    images = [output for output in outputs if output is not None]  # what print returns
    assert len(images) == 7 and all(isinstance(x, PIL.Image.Image) for x in images)
    errors = [
        np.mean([(np.asarray(a, float) - np.asarray(b, float)) ** 2
                 for a, b in zip(names["images"], names[sampled], strict=True)])
        for sampled in ("from_z_2", "from_z_1")
    ]  # fmt: skip
    assert 0 < errors[0] < errors[1]  # z_2 encodes more of the images than z_1
    assert not any(cell.get("outputs") for cell in notebook["cells"])


def test_the_diagram(tmp_path, monkeypatch):
    script = load_script("plot_architecture", "examples/docs")
    monkeypatch.setattr(script, "OUTPUT", tmp_path / "architecture.png")
    script.main([])
    with PIL.Image.open(ROOT / "examples" / "docs" / "architecture.png") as committed:
        assert PIL.Image.open(script.OUTPUT).size == committed.size
