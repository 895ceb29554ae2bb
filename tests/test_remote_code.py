"""Repositories with the package's code load without an installation."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard, snapshot_download
from transformers import AutoModel

import progressive_vae
from helpers.hub import HUB
from helpers.models import tiny_pipeline
from progressive_vae import ProgressiveVAELevel, ProgressiveVAEPipeline, __version__
from progressive_vae.hub.remote_code import bundle

# Hides the package, whether installed or in a checkout, from imports in a subprocess.
HIDE_PACKAGE = """\
import sys
from importlib.machinery import PathFinder

class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name == "progressive_vae":
            path = [entry for entry in sys.path if "progressive_vae-" in entry]
        return PathFinder.find_spec(name, path, target)

sys.meta_path[-1] = Finder
import importlib.util
assert importlib.util.find_spec("progressive_vae") is None
"""


@pytest.fixture(scope="module")
def with_code():
    tiny_pipeline().push_to_hub("org/with-code", with_code=True)
    return "org/with-code"


def run_without_package(lines: str, tmp_path: Path, **environment) -> str:
    # Bytecode is cached, as for users, whatever the environment of the tests says.
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "PYTHONDONTWRITEBYTECODE": "",
                   **environment}  # fmt: skip
    command = [sys.executable, "-c", HIDE_PACKAGE + lines]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_pipeline_and_parts_load_without_the_package(with_code, images, tmp_path):
    torch.save(images, tmp_path / "images.pt")
    snapshot_download(with_code, local_dir=tmp_path / "folder")
    output = run_without_package(
        f"""
import socket

import torch
from diffusers import DiffusionPipeline
from transformers import AutoConfig, AutoModel

pipe = DiffusionPipeline.from_pretrained({with_code!r}, trust_remote_code=True)
print(pipe.bits_per_dim(torch.load("images.pt"))["total"])
pipe.save_pretrained("saved")
level = AutoModel.from_pretrained({with_code!r}, subfolder="level_1", trust_remote_code=True)
prior = AutoModel.from_pretrained({with_code!r}, subfolder="prior", trust_remote_code=True)
assert torch.equal(level.quantizer.codebook, pipe.level_1.quantizer.codebook)
assert type(level) is type(pipe.level_1) and type(prior) is type(pipe.prior)
config = AutoConfig.from_pretrained({with_code!r}, subfolder="level_2", trust_remote_code=True)
assert type(config) is type(level.config)
level.save_pretrained("level")

# A downloaded folder needs no Hub.
socket.socket.connect = None
pipe = DiffusionPipeline.from_pretrained("folder", trust_remote_code=True)
assert len(pipe(num_images_per_prompt=2).images) == 2
""",
        tmp_path,
    )
    total = tiny_pipeline().bits_per_dim(images)["total"]
    assert float(output.split()[-1]) == pytest.approx(total, rel=1e-5)
    saved = ProgressiveVAEPipeline.from_pretrained(tmp_path / "saved")
    assert saved.bits_per_dim(images)["total"] == pytest.approx(total, rel=1e-5)
    level = ProgressiveVAELevel.from_pretrained(tmp_path / "level")
    assert torch.equal(level.quantizer.codebook, tiny_pipeline().level_1.quantizer.codebook)


@pytest.mark.parametrize("is_installed", [False, True])
def test_a_repository_of_an_earlier_version_gives_the_same_numbers(
    is_installed, tmp_path, monkeypatch, capsys
):
    """`repository_with_code.zip` was pushed by the code of commit d1ba51e."""
    golden = Path(__file__).with_name("golden")
    with zipfile.ZipFile(golden / "repository_with_code.zip") as archive:
        archive.extractall(tmp_path / "folder")
    lines = """
import json
import torch
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("folder", trust_remote_code=True)
image = torch.arange(64, dtype=torch.uint8).reshape(1, 1, 8, 8) * 4
codes = [grid.tolist() for grid in pipe.encode(image)]
bits = pipe.bits_per_dim(image, class_labels=["1"])
print(json.dumps([pipe.encode.__globals__["__file__"], codes, bits]))
"""
    if is_installed:
        monkeypatch.chdir(tmp_path)
        exec(lines, {})
        output = capsys.readouterr().out
    else:
        output = run_without_package(lines, tmp_path, HF_HUB_OFFLINE="1")
    file, codes, bits = json.loads(output.splitlines()[-1])
    assert file.startswith(str(Path(progressive_vae.__file__).parent)) == is_installed
    expected = json.loads((golden / "says.json").read_text())
    assert codes == expected["codes"]
    assert bits == pytest.approx(expected["bits_per_dim"], rel=1e-4)


def test_an_installed_package_has_precedence(with_code, images):
    pipe = ProgressiveVAEPipeline.from_pretrained(with_code, trust_remote_code=True)
    assert type(pipe) is ProgressiveVAEPipeline and type(pipe.level_1) is ProgressiveVAELevel
    assert pipe.bits_per_dim(images) == pytest.approx(
        tiny_pipeline().bits_per_dim(images), rel=1e-5
    )
    auto = AutoModel.from_pretrained(with_code, subfolder="level_1")
    assert type(auto) is ProgressiveVAELevel
    pipe = ProgressiveVAEPipeline.from_pretrained(with_code)  # runs no remote code
    assert type(pipe.level_1) is ProgressiveVAELevel
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        DiffusionPipeline.from_pretrained(with_code)


def test_another_version_is_a_warning(tmp_path):
    path = tmp_path / "pipeline.py"
    path.write_text(
        bundle().replace(f"BUNDLE_VERSION = {__version__!r}", "BUNDLE_VERSION = '0.0.7'")
    )
    with pytest.warns(UserWarning, match=f"code is progressive_vae 0.0.7; {__version__}"):
        exec(compile(path.read_text(), path, "exec"), {"__file__": str(path), "__name__": "x"})


def test_the_card_has_remote_usage_and_a_push_without_code_deletes_it(with_code):
    content = ModelCard.load(with_code).content
    call = f'DiffusionPipeline.from_pretrained("{with_code}", trust_remote_code=True)'
    assert call in content and "from progressive_vae import" not in content.split("```")[1]
    assert "without an installation" in content
    files = HUB.repos[with_code].at("main").files
    assert {"pipeline.py", "level_1/progressive_vae.py", "prior/progressive_vae.py"} <= set(files)
    tiny_pipeline().push_to_hub("org/for-a-while", with_code=True)
    tiny_pipeline().push_to_hub("org/for-a-while")
    tiny_pipeline().push_to_hub("org/never")
    assert HUB.repos["org/for-a-while"].at("main").files.keys() == (
        HUB.repos["org/never"].at("main").files.keys()
    )
    for name in ("model_index.json", "level_1/config.json"):
        assert (
            HUB.repos["org/for-a-while"].at("main").files[name]
            == (HUB.repos["org/never"].at("main").files[name])
        )
