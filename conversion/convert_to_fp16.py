# /// script
# requires-python = ">=3.10"
# dependencies = ["progressive-vae"]
#
# [tool.uv.sources]
# progressive-vae = { path = "..", editable = true }
# ///
"""Store a pipeline in half the bytes: weights of 16 bits on the disk, of 32 bits once loaded.

    python conversion/convert_to_fp16.py runs/fashion_mnist examples/fashion_mnist

Fingerprints, and so the parts' fit for one another, stay as they are. Figures do not go along: they
are of other weights, if only just. (For weights that are also loaded in 16 bits, as GPUs like them,
`pipe.save_pretrained(folder, variant="fp16")` is the usual way.)
"""

import sys
from pathlib import Path

import torch
from transformers import HfArgumentParser

from progressive_vae import ProgressiveVAEPipeline
from progressive_vae.serialization import read_json, write_json


def convert_to_fp16(source: str, target: str):
    """
    Raises:
        ValueError: a weight that is too large for 16 bits, or `target` is `source`.
    """
    if Path(source).resolve() == Path(target).resolve():
        raise ValueError(f"expected another folder than the source, got {target} for both")
    pipe = ProgressiveVAEPipeline.from_pretrained(source).to(dtype=torch.float16)
    for name in pipe.factor_names:
        for key, value in getattr(pipe, name).state_dict().items():
            if not value.isfinite().all():
                raise ValueError(f"expected weights below 65504, got larger ones in {name}.{key}")
    pipe.save_pretrained(target)
    for name in pipe.factor_names:
        path = Path(target) / name / "config.json"
        write_json(path, {**read_json(path, "save it again"), "dtype": "float32"})


def main(words: list[str]):
    parser = HfArgumentParser((), description=__doc__.partition("\n")[0])
    parser.add_argument("source", help="a pipeline's folder, or its repository on the Hub")
    parser.add_argument("target", help="a folder to write")
    arguments = parser.parse_args(words)
    convert_to_fp16(arguments.source, arguments.target)
    size = sum(path.stat().st_size for path in Path(arguments.target).rglob("*.safetensors"))
    print(f"wrote {size / 1e6:.2f} MB of weights to {arguments.target}")


if __name__ == "__main__":
    main(sys.argv[1:])
