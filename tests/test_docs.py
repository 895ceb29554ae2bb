"""The commands of the guide and the cells of the notebook run."""

import ast
import json
import re
import shlex
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from helpers.hub import HUB
from helpers.recipes import SHORT, SMALL
from helpers.scripts import load_script, readme_commands
from progressive_vae.evaluation import throughput as speed

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "examples" / "YOUR_PICTURES.md").read_text()
TINY = {
    "train": [
        *SMALL,
        *SHORT,
        *shlex.split("--resolution 16 --max_train_minutes 0.01 --report_to none"),
    ],
    "evaluate": shlex.split("--resolution 16 --num_drawn 8 --num_images_of_curve 2"),
    "sample": ["--num_images_per_prompt", "2"],
    "compress": [],
}


def commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", PAGE, re.S)
    return [line for block in blocks for line in block.replace("\\\n", " ").strip().splitlines()]


def write_images(folder: Path, count: int = 20):
    """Smooth images of several sizes, and one broken file."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(count):
        width, height = rng.integers(16, 25, 2).tolist()
        small = PIL.Image.fromarray(rng.integers(0, 256, (3, 3, 3), dtype=np.uint8))
        small.resize((width, height)).save(folder / f"{i}.png")
    (folder / "broken.jpg").write_bytes(b"not an image")


@pytest.fixture
def runs_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(speed, "TIMED_SECONDS", 0.02)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    return tmp_path


def run(command: str):
    """Run a line of the guide: a script at tiny size in this process, or Python code."""
    words = shlex.split(command)
    if words[:2] == ["python", "-c"]:
        exec(words[2].replace("you/", "org/"), {})
        return
    index = words.index(next(word for word in words if word.endswith(".py")))
    assert words[:index] in (["accelerate", "launch"], ["python"])
    name, flags = Path(words[index]).stem, words[index + 1 :]
    load_script(name).main([*flags, *TINY[name]])


def test_the_guide_to_your_own_images(runs_here):
    install, *lines = commands()
    assert install in readme_commands() and len(lines) == 10
    assert len(PAGE.split()) <= 900
    write_images(runs_here / "pictures")
    training, resumed, *lines, refit = lines
    with pytest.warns(UserWarning, match="left out 1 images: .*broken.jpg"):
        run(training)
    folder = Path("runs/mine")
    assert {path.name for path in (folder / "validation").iterdir()} == {
        *(f"{kind}_{i}" for kind in ("encoder", "decoder") for i in (1, 2, 3)), "prior",
    }  # fmt: skip
    weights = (folder / "level_3" / "model.safetensors").read_bytes()
    for command in [resumed, *lines]:
        run(command)
    assert (folder / "level_3" / "model.safetensors").read_bytes() == weights
    assert {path.name for path in Path("runs/mine_measured").iterdir()} >= {"evaluation.md"}
    assert all(Path(f"{name}.png").is_file() for name in ("drawn", "drafts", "calmer"))
    assert len(list(Path("again").iterdir())) == 20
    assert {"README.md", "samples.png", "metrics.json"} <= set(HUB.files("org/mine"))
    assert HUB.repos["org/mine"].private
    flags = shlex.split(re.search(r"with `(--level_1.*?)`", PAGE)[1])  # parsed only
    load_script("train").parse(flags)
    for code in re.findall(r"```python\n(.*?)```", PAGE, re.S):
        exec(code.replace("you/", "org/"), {})
    assert PIL.Image.open("one.png").size == (16, 16)
    run(refit)
    run(re.sub("--phase refit_level_3", "--phase evaluate", refit))
    assert "refit_level_3" in json.loads((folder / "metrics.json").read_text())["phases"]


def test_the_tour(runs_here):
    """Cell by cell, in one namespace; the value of a cell's last expression is its output."""
    notebook = json.loads((ROOT / "examples" / "tour.ipynb").read_text())
    cells = ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code"]
    names: dict = {}
    outputs = []
    for code in cells:
        *lines, final = ast.parse(
            code.replace("max_train_minutes=1", "max_train_minutes=0.05")
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
