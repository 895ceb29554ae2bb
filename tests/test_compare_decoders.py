"""The comparison of decoders through its own script, at tiny size."""

import json
from pathlib import Path

import pytest
import yaml

from helpers.scripts import load_script
from progressive_vae import ProgressiveVAELevel
from progressive_vae.models.fingerprint import fingerprint

SCRIPT = Path(__file__).parents[1] / "examples" / "compare_decoders.py"


def test_rows_refits_and_distances(tmp_path, capsys):
    script = load_script("compare_decoders")
    recipe = yaml.safe_load(SCRIPT.with_suffix(".yaml").read_text())
    for name in ("level_2", "level_1"):
        recipe["parts"][name] |= {"hidden_size": 8, "num_layers": 1, "encoder_hidden_size": 8}
    recipe["parts"]["prior"]["backbone_config"] = {
        "model_type": "llama", "hidden_size": 16, "intermediate_size": 16,
        "num_hidden_layers": 1, "num_attention_heads": 2,
    }  # fmt: skip
    for settings in recipe["settings"].values():
        settings["train_batch_size"] = 16
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    rows = ["vq, pixels", "vq, codes", "prior", *recipe["distances"], "raster, codes"]
    flags = ["--dataset_name", "digits", "--output_dir", str(tmp_path / "run")]
    flags += ["--config", str(path), "--cpu_minutes", "0.003"]
    script.main([*flags, "--distances", "--trials", json.dumps(rows)])
    results = {p.stem: json.loads(p.read_text()) for p in (tmp_path / "run/results").iterdir()}
    assert results.keys() == set(rows)
    assert results["vq, pixels"]["passes"] == 7 and results["raster, codes"]["passes"] == 4
    assert 0 < results["prior"]["bits_per_dim"] < results["vq, pixels"]["bits_per_dim"] < 8.01
    levels = [
        ProgressiveVAELevel.from_pretrained(tmp_path / "run/trained" / name / "level_2")
        for name in rows
    ]
    assert len({fingerprint([level]) for level in levels}) == 1  # all rows have the same codes
    output = capsys.readouterr().out
    assert "| raster, codes |" in output
    assert output.count("| refit of vq, pixels, code_noise 0.2 | 0.2 |") == 2
    script.main([*flags, "--trials", '["vq, pixels"]'])  # results exist: skipped
    with pytest.raises(ValueError, match="dataset_name"):
        script.main(["--cpu_minutes", "1"])
    with pytest.raises(ValueError, match=r"trials among .*got \['nonsense'\]"):
        script.main([*flags, "--trials", '["nonsense"]'])
