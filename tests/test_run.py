"""A run never overwrites or misreads existing work silently."""

import json
import os
import shlex
import shutil
import time
from pathlib import Path

import pytest
from accelerate import PartialState

from helpers import processes
from helpers.interruptions import FLAGS, start, weights
from helpers.recipes import SMALLER
from progressive_vae import ProgressiveVAEPipeline
from progressive_vae.training import report
from progressive_vae.training.lock import LOCK, MOMENT, OWNER, locked

RESUME = ["--resume_from_checkpoint", "latest"]
REFITTED = [
    *SMALLER,
    *shlex.split("--level_2.refit.fit.max_train_steps 3 --level_2.refit.code_noise 0.1"),
]


@pytest.fixture(scope="module")
def trained(script, tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("trained")
    script.main([*REFITTED, "--output_dir", str(output_dir)])
    return output_dir


@pytest.fixture
def copied(trained, tmp_path):
    output_dir = tmp_path / "run"
    shutil.copytree(trained, output_dir)
    return output_dir


def contents(folder: Path) -> dict[str, bytes]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {
        str(path): path.read_bytes() for path in files if not path.name.startswith((LOCK, MOMENT))
    }


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--seed 1", "level_2 with seed=0, got seed=1"),
        (
            "--level_2.fit.learning_rate 0.001",
            "level_2 with learning_rate=0.002, got learning_rate=0.001",
        ),
        (
            "--level_2.hidden_size 16",
            "level_2 with config.hidden_size=8, got .*=16",
        ),
        (
            "--level_1.hidden_size 16",
            "level_1 with config.hidden_size=8, got .*=16",
        ),
        ("--prior.fit.learning_rate 0.1", "prior with learning_rate=0.001, got learning_rate=0.1"),
        (
            "--level_2.refit.fit.learning_rate 0.1",
            "level_2 with learning_rate=0.002, got",
        ),
        ("--max_train_samples 100", "level_2 with data.dataset="),
        ("--level_1.codebook_size 4", "level_1 with config.codebook_size=8"),
    ],
)
def test_resuming_with_other_settings_is_refused(script, copied, flags, words):
    """For all phases, before any file changes."""
    before = contents(copied)
    with pytest.raises(ValueError, match=f"{words}.*--overwrite_output_dir") as error:
        script.main([*REFITTED, "--output_dir", str(copied), *RESUME, *shlex.split(flags)])
    assert len(str(error.value)) < 1000
    assert contents(copied) == before


def test_resuming_a_finished_run_changes_nothing(script, copied):
    before = {name: (copied / name).read_bytes() for name in ("metrics.json", "samples.png")}
    before |= weights(copied)
    script.main([*REFITTED, "--output_dir", str(copied), *RESUME])
    assert {**before, **weights(copied)} == before


def test_overwrite_output_dir_replaces_other_settings(script, copied):
    before = weights(copied)
    flags = [*REFITTED, "--output_dir", str(copied), "--overwrite_output_dir"]
    script.main([*flags, *RESUME, "--prior.fit.learning_rate", "0.1"])
    after = weights(copied)
    assert after["prior"] != before["prior"]
    assert {**after, "prior": before["prior"]} == before  # the levels were not trained again
    script.main(flags)
    assert weights(copied) == before


def test_a_new_run_in_the_folder_of_another_is_refused(script, copied):
    before = contents(copied)
    with pytest.raises(ValueError, match="with level_1, level_2, prior: .*--resume"):
        script.main([*REFITTED, "--output_dir", str(copied)])
    assert contents(copied) == before


def test_a_pretrained_level_does_not_replace_another(script, copied, trained, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(trained / "level_2", other)
    before = (copied / "level_2" / "model.safetensors").read_bytes()
    flags = [*REFITTED, "--output_dir", str(copied), "--finest_level", str(other)]
    for phase in ("level_1", "all"):
        with pytest.raises(ValueError, match="level_2 with given=None|the work of an|=None"):
            script.main([*flags, "--phase", phase])
    assert (copied / "level_2" / "model.safetensors").read_bytes() == before


def test_parts_without_history_are_refused(script, copied):
    before = weights(copied)
    for path in copied.glob("*/history.json"):
        path.unlink()
    with pytest.raises(ValueError, match="expected history.json in .*level_2"):
        script.main([*REFITTED, "--output_dir", str(copied), *RESUME])
    assert weights(copied) == before


def test_checkpoint_of_another_phase_is_refused(script, copied):
    checkpoint = copied / "checkpoint-level_2-00000002"
    checkpoint.mkdir()
    (checkpoint / "fit.pt").touch()
    flags = [*REFITTED, "--output_dir", str(copied), "--phase", "prior"]
    with pytest.raises(ValueError, match=r"of a phase among \['prior'\], got .*level_2"):
        script.main([*flags, "--resume_from_checkpoint", str(checkpoint)])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--levels.fit.max_grad_norm -1", "level_1.fit: expected max_grad_norm > 0"),
        ("--levels.fit.max_grad_norm 0", "level_1.fit: expected max_grad_norm > 0, or null"),
        ("--levels.fit.max_grad_norm nan", 'level_1.fit.max_grad_norm".*Got value: nan|max_grad_n'),
        ("--gradient_accumulation_steps -1", "expected gradient_accumulation_steps >= 1, got -1"),
        ("--gradient_accumulation_steps 0", "expected gradient_accumulation_steps >= 1, got 0"),
        ("--level_2.fit.ema_decay 2", r"level_2.fit: expected ema_decay in \[0, 1\), got 2.0"),
        ("--prior.fit.learning_rate nan", "prior.fit.learning_rate.*nan"),
        ("--level_1.fit.learning_rate -1", "level_1.fit: expected learning_rate > 0, got -1.0"),
        ("--prior.fit.adam_weight_decay -1", "prior.fit: expected adam_weight_decay >= 0"),
        ("--level_2.refit.fit.learning_rate 0", "level_2.refit.fit: expected learning_rate > 0"),
        ("--prior.fit.train_batch_size 0", "prior.fit: expected train_batch_size >= 1, got 0"),
        ("--levels.hidden_size 8 8 8", "unrecognized arguments: 8 8"),
        ("--levels.hidden_size [8,8]", 'levels.hidden_size".*int.*Got value'),
        ("--levels.hidden_size", "levels.hidden_size: expected one argument"),
        ("--level_2.hidden_size x", 'level_2.hidden_size".*Got value: x'),
        ("--level_2.hiddensize 8", "unrecognized arguments: --level_2.hiddensize 8"),
        ("--level_2.refit.fit.steps 8", "steps"),
        ("--level_3.hidden_size 8 --num_levels 2", "sections of level_1 … level_2, got level_3"),
        ("--level_9.hidden_size 8", "unrecognized arguments: --level_9.hidden_size 8"),
        ("--levels.hidden_size -8", "level_2: .*expected hidden_size >= 1, got -8"),
        ("--num_levels 0", "expected num_levels in 1 … 8, got 0"),
        ("--num_levels 9", "expected num_levels in 1 … 8, got 9"),
        ("--resolution 0", "data: expected resolution >= 1, got 0"),
        ("--max_train_samples 0", "data: expected max_train_samples >= 1, got 0"),
        ("--num_validation_images 0", "run: expected num_validation_images >= 1, got 0"),
        ("--checkpointing_steps -1", "run: expected checkpointing_steps >= 1 or null, got -1"),
        ("--checkpointing_steps 0", "run: expected checkpointing_steps >= 1 or null, got 0"),
        ("--max_train_minutes 0", "run: expected max_train_minutes > 0 or null, got 0"),
        ("--report_to nobody", "run: expected report_to among"),
        ("--mixed_precision int8", "run: expected mixed_precision among"),
        ("--levels.fit.lr_scheduler coseine", "level_1.fit: expected lr_scheduler among"),
        ("--seed -1", "run: expected seed in"),
        ("--prior.backbone_config {", '"prior.backbone_config".*dict'),
        ("--prior.backbone_config 5", '"prior.backbone_config".*dict'),
        ('--prior.backbone_config {"model_type":"t5"}', "backbone_config of a causal language mod"),
        (
            '--prior.backbone_config {"model_type":"bert","hidden_size":16,'
            '"num_attention_heads":2,"intermediate_size":16,"num_hidden_layers":1}',
            "backbone_config of a causal language model",
        ),
        ("--config /nowhere.yaml", "expected the path of a recipe, got /nowhere.yaml"),
        ("--phase level_3", "expected phase among"),
        ("--phase refit_level_1", "got 'refit_level_1'; a refit needs its section"),
        ("--levels.class_dropout 2", r"expected class_dropout in \[0, 1\], got 2"),
        ("--label_column image", "label_column of classes"),
    ],
)
def test_invalid_flags_fail_before_the_first_step(script, tmp_path, flags, words):
    with pytest.raises(ValueError, match=words):
        script.main([*REFITTED, "--output_dir", str(tmp_path), *flags.split()])
    assert not (tmp_path / "cache").exists() and not list(tmp_path.glob("*/*"))


def test_error_of_a_flag_is_one_line(tmp_path):
    process = processes.start(processes.TRAIN, "--num_levels", "0", log=tmp_path / "log")
    process.join()
    assert process.exitcode == 1
    log = (tmp_path / "log").read_text()
    assert log.splitlines()[-1] == "error: expected num_levels in 1 … 8, got 0"
    assert "Traceback" not in log


def test_a_failing_metric_does_not_affect_others(script, copied, monkeypatch):
    (copied / "metrics.json").unlink()
    monkeypatch.setattr(report, "sampling_speed", None)
    with pytest.warns(UserWarning, match="sampled_images_per_second is not measured: TypeError"):
        script.main([*REFITTED, "--output_dir", str(copied), "--phase", "evaluate"])
    metrics = json.loads((copied / "metrics.json").read_text())
    assert "sampled_images_per_second" not in metrics and metrics["bits_per_dim"]["total"] > 0
    assert list(metrics["not_measured"]) == ["sampled_images_per_second"]
    assert "Not measured: sampled_images_per_second (" in (copied / "README.md").read_text()
    assert (copied / "samples.png").is_file()


# ---- damaged files -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "phase", "words"),
    [
        ("cache/pixels/train/manifest.json", "all", "delete its folder"),
        ("cache/level_1/train/manifest.json", "prior", "delete its folder"),
        ("level_1/history.json", "all", "delete the folder"),
        ("phases.json", "prior", "delete it: only"),
        ("recipe.yaml", "prior", "delete it and run the first phase again"),
        ("metrics.json", "prior", "delete it, and evaluate the pipeline again"),
        ("level_1/config.json", "prior", "save the model again, or download it again"),
    ],
)
@pytest.mark.parametrize("damage", [b"{", b"5", b""])
def test_damaged_files_of_a_run(script, copied, name, phase, words, damage):
    assert (copied / name).is_file()
    (copied / name).write_bytes(damage)
    flags = [*REFITTED, "--output_dir", str(copied), *RESUME, "--phase", phase]
    if phase == "prior":
        flags += ["--prior.fit.max_train_steps", "2", "--overwrite_output_dir"]
    with pytest.raises(ValueError, match=f"expected .*{Path(name).name}.*{words}"):
        script.main(flags)


@pytest.mark.parametrize(
    "damage", [b"{", b"[1, 2]", b"5", b'{"level_1": 5}', b'{"level_1": ["a"]}']
)
def test_a_damaged_index(copied, damage):
    (copied / "model_index.json").write_bytes(damage)
    with pytest.raises(ValueError, match="expected .*: save the pipeline again, or download it"):
        ProgressiveVAEPipeline.from_pretrained(copied)


# ---- one run at a time ---------------------------------------------------------------------------


def test_two_runs_in_one_folder_are_refused(script, tmp_path):
    output_dir = tmp_path / "run"
    output_dir.mkdir()
    other = start(output_dir)
    while not (output_dir / "cache").exists():
        assert other.is_alive()
        time.sleep(0.01)
    flags = [*FLAGS, "--output_dir", str(output_dir)]
    with pytest.raises(ValueError, match=f"which process {other.pid} on .*train.py"):
        script.main(flags)
    assert other.is_alive()
    other.kill()
    other.join()
    with pytest.raises(ValueError, match="expected num_levels"):  # the lock is gone
        script.main([*flags, "--num_levels", "0"])
    with locked(output_dir, PartialState()):
        assert json.loads((output_dir / OWNER).read_text())["pid"] == os.getpid()
    assert not (output_dir / OWNER).exists()


def test_parts_have_their_own_locks(tmp_path):
    state = PartialState()
    with locked(tmp_path, state, "level_1"), locked(tmp_path, state, "prior"):
        for part in (None, "prior"):  # the folder, and the same part
            with pytest.raises(ValueError, match=f"which process {os.getpid()} on"):
                with locked(tmp_path, state, part):
                    raise AssertionError("two at once")
    with locked(tmp_path, state):
        with pytest.raises(ValueError, match=f"which process {os.getpid()} on"):
            with locked(tmp_path, state, "level_1"):
                raise AssertionError("two at once")
    assert not list(tmp_path.glob("*.json"))


def test_an_error_releases_the_lock(tmp_path):
    for _ in range(2):
        with pytest.raises(KeyError), locked(tmp_path, PartialState()):
            raise KeyError
    with locked(tmp_path, PartialState()):
        with pytest.raises(ValueError, match=f"which process {os.getpid()} on"):
            with locked(tmp_path, PartialState()):
                raise AssertionError("two at once")
