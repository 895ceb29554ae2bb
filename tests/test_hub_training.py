"""Training that pushes, over a Hub of our own on the loopback."""

import os
import re
import shlex
import shutil
import sqlite3
import subprocess
import sys
import warnings
from pathlib import Path

import diffusers
import pytest
from huggingface_hub import HfApi, ModelCard, snapshot_download

from helpers.hub import HUB
from helpers.loopback_hub import Repo
from helpers.models import assert_same
from helpers.processes import TRAIN, start
from helpers.recipes import SMALL
from progressive_vae import ProgressiveVAEPipeline


@pytest.fixture(scope="module")
def trained(script, tmp_path_factory):
    """A run that pushes, into a private repository."""
    output_dir = tmp_path_factory.mktemp("runs") / "digits"
    flags = f"--output_dir {output_dir} --push_to_hub --hub_model_id org/trained --hub_private_repo"
    flags += " --level_2.refit.fit.max_train_steps 2 --max_train_samples 100 --max_eval_samples 40"
    script.main([*SMALL, *flags.split()])
    return output_dir


def test_training_pushes_what_is_whole(trained):
    repository = HUB.repos["org/trained"]
    assert repository.private
    pushed = [commit for commit in repository.commits if "level_1/config.json" in commit.files]
    # After the prior, after the refit of level 2, and with the figures.
    assert len(pushed) == 3 and [*("metrics.json" in c.files for c in pushed)] == [
        False,
        False,
        True,
    ]
    assert sorted(HUB.files("org/trained")) == sorted(
        ["README.md", "metrics.json", "model_index.json", "reconstructions.png", "samples.png"]
        + [f"{p}/{f}" for p in ("level_1", "level_2", "prior")
           for f in ("config.json", "model.safetensors")]
    )  # fmt: skip
    card = HUB.files("org/trained")["README.md"].decode()
    assert 'from_pretrained("org/trained")' in card and "](samples.png)" in card
    assert ModelCard(card).data.eval_results[0].metric_type == "bits_per_dim"
    assert_same(
        ProgressiveVAEPipeline.from_pretrained(trained),
        diffusers.DiffusionPipeline.from_pretrained("org/trained"),
    )


def test_training_goes_on_without_a_network(script, tmp_path, trained):
    output_dir = tmp_path / "digits"
    shutil.copytree(trained, output_dir)
    flags = f"--output_dir {output_dir} --push_to_hub --hub_model_id org/later --hub_with_code"
    flags += " --max_train_samples 100 --max_eval_samples 40 --phase"
    HUB.fail_on = ".*"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        script.main([*SMALL, *flags.split(), "prior"])
        script.main([*SMALL, *flags.split(), "evaluate"])
    said = "\n".join(str(warning.message) for warning in caught)
    assert "training continues" in said and f"the files are in {output_dir}" in said
    HUB.fail_on = None
    later = re.findall(r"python -c (.*)", said)[-1]
    exec(shlex.split(later)[0])
    assert "pipeline.py" in HUB.files("org/later")
    assert_same(
        ProgressiveVAEPipeline.from_pretrained(output_dir),
        ProgressiveVAEPipeline.from_pretrained("org/later", trust_remote_code=True),
    )
    assert "metrics.json" in HUB.files("org/later")


def test_a_wrong_token_or_visibility_is_said_before_training(script, tmp_path, monkeypatch):
    flags = [*SMALL, "--output_dir", str(tmp_path), "--push_to_hub", "--hub_model_id"]
    HfApi().create_repo("org/seen-by-all", private=False, exist_ok=True)
    with pytest.raises(ValueError, match="expected org/seen-by-all to be private"):
        script.main([*flags, "org/seen-by-all", "--hub_private_repo"])
    others = HUB.repos["others/read-only"] = Repo(private=False)
    others.refs["main"] = others.add("initial commit", {}).oid
    with pytest.raises(ValueError, match="(?s)token that may write to others/read-only"):
        script.main([*flags, "others/read-only"])
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(ValueError, match="(?s)expected a token that may write to.*hf auth login"):
        script.main([*flags, "org/mine"])
    assert not (tmp_path / "level_2").exists()


def test_the_hf_command_carries_the_folder(trained, tmp_path):
    hf = [str(Path(sys.executable).with_name("hf"))]
    environment = {**os.environ, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    run = lambda *words: subprocess.run(  # noqa: E731
        [*hf, *words], check=True, env=environment, capture_output=True, text=True
    )
    run("upload", "org/by-hand", str(trained), ".", "--private")
    names = HUB.files("org/by-hand")
    assert "model_index.json" in names and "samples.png" in names
    assert not [name for name in names if name.startswith(("cache", "logs", "validation"))]
    run("download", "org/by-hand", "--local-dir", str(tmp_path / "again"))
    assert_same(
        ProgressiveVAEPipeline.from_pretrained(trained),
        ProgressiveVAEPipeline.from_pretrained(tmp_path / "again"),
    )
    folder = snapshot_download("org/by-hand")
    assert_same(
        ProgressiveVAEPipeline.from_pretrained(trained),
        ProgressiveVAEPipeline.from_pretrained(folder),
    )


def test_figures_go_to_trackio(tmp_path):
    """In another process, as trackio reads where it writes when it is imported."""
    pytest.importorskip("trackio", reason="pip install trackio")
    flags = [*SMALL, "--output_dir", str(tmp_path / "run"), "--report_to", "trackio"]
    flags += ["--max_train_samples", "100", "--phase", "level_2"]
    process = start(TRAIN, *flags, log=tmp_path / "log", TRACKIO_DIR=str(tmp_path / "trackio"))
    process.join()
    assert process.exitcode == 0, (tmp_path / "log").read_text()
    with sqlite3.connect(tmp_path / "trackio" / "progressive_vae.db") as database:
        rows = database.execute("select step, metrics from metrics order by step").fetchall()
    assert [step for step, _ in rows if step in (2, 4, 6)] and "level_2/loss" in str(rows)
