# /// script
# requires-python = ">=3.10"
# dependencies = ["progressive-vae"]
#
# [tool.uv.sources]
# progressive-vae = { path = "..", editable = true }
# ///
"""Store a pipeline in half the bytes: fp16 weights on the disk, which load as fp32.

    python conversion/convert_to_fp16.py runs/fashion_mnist examples/fashion_mnist

Fingerprints do not change, so converted parts still fit each other. Metrics are not copied: they
belong to the fp32 weights. For weights that are also loaded as fp16, use
`pipe.save_pretrained(folder, variant="fp16")`.
"""

from pathlib import Path

import torch
from transformers import HfArgumentParser

from progressive_vae import ProgressiveVAEPipeline
from progressive_vae.scripts import run_script
from progressive_vae.serialization import read_json, write_json


def convert_to_fp16(source: str, target: str):
    """Save the pipeline in `source` to the folder `target`.

    Raises:
        ValueError: a weight is too large for fp16, or `target` is `source`.
    """
    if Path(source).resolve() == Path(target).resolve():
        raise ValueError(f"expected target to be another folder than source, got {target} for both")
    pipe = ProgressiveVAEPipeline.from_pretrained(source).to(dtype=torch.float16)
    for name in pipe.factor_names:
        for key, value in getattr(pipe, name).state_dict().items():
            if not value.isfinite().all():
                raise ValueError(f"expected weights below 65504, got larger ones in {name}.{key}")
    pipe.save_pretrained(target)
    for name in pipe.factor_names:
        path = Path(target) / name / "config.json"
        config = read_json(path, "save it again")
        write_json(path, {**config, "dtype": "float32"})  # the dtype to load as


def main(words: list[str]):
    parser = HfArgumentParser((), description=__doc__.partition("\n")[0])
    parser.add_argument("source", help="a pipeline's folder, or its repository on the Hub")
    parser.add_argument("target", help="a folder to write")
    arguments = parser.parse_args(words)
    convert_to_fp16(arguments.source, arguments.target)
    size = sum(path.stat().st_size for path in Path(arguments.target).rglob("*.safetensors"))
    print(f"wrote {size / 1e6:.2f} MB of weights to {arguments.target}")


if __name__ == "__main__":
    run_script(main)
