"""Version fields of saved files."""

import json

import pytest

import progressive_vae
from helpers.models import tiny_level
from progressive_vae import (
    ProgressiveVAELevel,
    ProgressiveVAELevelConfig,
    ProgressiveVAEPipeline,
    ProgressiveVAEPriorConfig,
)
from progressive_vae.serialization import FORMAT_VERSION


def change(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_saved_configs_have_version_fields(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    for name, prefix in (("model_index", "_"), ("prior/config", ""), ("level_2/config", "")):
        saved = json.loads((tmp_path / f"{name}.json").read_text())
        assert saved[f"{prefix}format_version"] == FORMAT_VERSION
        assert saved[f"{prefix}progressive_vae"] == progressive_vae.__version__


def test_another_version_of_the_same_format_is_loaded(tmp_path):
    tiny_level(num_channels=1).save_pretrained(tmp_path)
    change(tmp_path / "config.json", progressive_vae="0.0.1")
    level = ProgressiveVAELevel.from_pretrained(tmp_path)
    assert level.config.to_dict()["progressive_vae"] == progressive_vae.__version__


@pytest.mark.parametrize("config", [ProgressiveVAELevelConfig, ProgressiveVAEPriorConfig])
def test_a_newer_format_is_an_error_before_its_fields_are_read(config):
    newer = FORMAT_VERSION + 1
    message = rf"format_version <= {FORMAT_VERSION}.*got {newer}, saved by 9.9: run `pip install"
    with pytest.raises(ValueError, match=message):
        config(
            format_version=newer, progressive_vae="9.9", unknown_field=1, codebook_size="new type"
        )


def test_a_newer_pipeline_is_an_error(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    change(tmp_path / "model_index.json", _format_version=FORMAT_VERSION + 1)
    with pytest.raises(ValueError, match=r"model_index.json with format_version.*pip install"):
        ProgressiveVAEPipeline.from_pretrained(tmp_path)
