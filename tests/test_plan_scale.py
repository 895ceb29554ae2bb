"""The plan of a large training: counts are those of real models."""

import torch
import yaml

from helpers.models import decoder_fields
from helpers.recipes import BACKBONE
from helpers.scripts import load_script
from progressive_vae import ProgressiveVAELevel, ProgressiveVAELevelConfig


def test_counts_are_those_of_a_real_decoder():
    script = load_script("plan_scale")
    fields = {"num_symbols": 16, "bits_per_block": 2, "num_classes": 3, "hidden_size": 16}
    config = ProgressiveVAELevelConfig(**fields, **decoder_fields("transformer"), num_layers=2)
    step = script.level_step(config, (8, 8), checkpointing=False)
    decoder = ProgressiveVAELevel(config).decoder
    assert step.parameters == sum(p.numel() for p in decoder.parameters()) and step.tokens == 64
    # Each linear weight is in a product of 2 FLOP forward and 4 backward, at each position.
    weights = sum(m.weight.numel() for m in decoder.modules() if isinstance(m, torch.nn.Linear))
    assert 6 * 64 * weights < step.flop < 16 * 64 * weights
    saved = script.level_step(config, (8, 8), checkpointing=True)
    assert saved.saved_bytes < step.saved_bytes and saved.flop > step.flop


def test_a_plan_of_a_recipe(tmp_path, capsys):
    sections = {
        "level_1": {"decoder_type": "transformer", "class_conditional": True},
        "level_2": {"downsample": 4, "hidden_size": 8},
        "prior": {"backbone_config": BACKBONE},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(sections))
    flags = ["--config", str(path), "--resolution", "16", "--num_classes", "2", "--gpus", "[1,4]"]
    load_script("plan_scale").main([*flags, "--sizes", "[small]"])
    header, _, *rows, _, note = capsys.readouterr().out.strip().splitlines()
    assert header.endswith("| GB, hours on 1 | GB, hours on 4 |") and "400 TFLOP/s" in note
    assert [row.split(" | ")[0] for row in rows] == ["| level_1, small", "| level_2", "| prior"]
