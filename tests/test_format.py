"""Saved names are a file format: `golden.json` holds them as they were published.

A change here breaks every repository saved before it. Write the file anew, by running this module
as a script, only together with code that still reads the old names.
"""

import json
import tempfile
from pathlib import Path

import torch
from conftest import tiny_level, tiny_pipeline

from progressive_vae.fingerprint import fingerprint

GOLDEN = Path(__file__).with_name("golden.json")


def saved_names() -> dict:
    pipe = tiny_pipeline()
    with tempfile.TemporaryDirectory() as folder:
        pipe.save_pretrained(folder)
        index = json.loads((Path(folder) / "model_index.json").read_text())
        configs = {
            name: sorted(json.loads((Path(folder) / name / "config.json").read_text()))
            for name in ("prior", "level_1", "level_3")
        }
    versions = ("_diffusers_version", "_progressive_vae")
    return {
        "model_index": {k: v for k, v in index.items() if k not in versions},
        "configs": {
            name: [k for k in keys if k != "transformers_version"] for name, keys in configs.items()
        },
        # Saved parts remember fingerprints, so the way to compute them is a format too.
        "fingerprint": fingerprint([level_of_sines()]),
        "level_1": sorted(pipe.level_1.state_dict()),
        "level_3": sorted(pipe.level_3.state_dict()),
        # The names inside the backbone are those of transformers.
        "prior": sorted({name.split(".")[0] for name in pipe.prior.state_dict()}),
    }


def level_of_sines():
    level = tiny_level(num_channels=1)
    with torch.no_grad():
        for value in (*level.encoder.parameters(), level.quantizer.codebook):
            value.copy_(torch.sin(torch.arange(1.0, 1 + value.numel())).view_as(value))
    return level


def test_saved_names_are_the_published_ones():
    published, now = json.loads(GOLDEN.read_text()), saved_names()
    assert now["model_index"] == published["model_index"]
    assert now["fingerprint"] == published["fingerprint"]
    for part in ("prior", "level_1", "level_3"):
        assert now[part] == published[part]
        # A newer transformers may write fields of its own; ours must all be there.
        assert set(published["configs"][part]) <= set(now["configs"][part])


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(saved_names(), indent=1) + "\n")
