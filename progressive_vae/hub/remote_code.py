"""Repositories that contain the package's code, so that they load without an installation.

`pipe.push_to_hub(name, with_code=True)` pushes the code, and diffusers loads it with
`trust_remote_code=True`. `ProgressiveVAEPipeline.from_pretrained` ignores it.
"""

import json
from pathlib import Path

from ..serialization import __version__

NAME = "progressive_vae"
FILE_PREFIX = "#: "  # of the name of a file in the bundle; as in remote_code_loader.py
LINE_PREFIX = "#|"  # of a line of that file
TRAINING_FOLDERS = ("data", "evaluation", "training")  # not imported for inference
PIPELINE_CODE = "pipeline.py"  # the module in which diffusers looks for the pipeline's class
PART_CODE = f"{NAME}.py"  # and for the class of a part, by the name of its library
CONFIG = "config.json"
INDEX = "model_index.json"
TOKENIZER_CLASS = "HashedTokenizer"
_AUTO_CLASSES = {
    "progressive_vae_level": {
        "AutoConfig": "ProgressiveVAELevelConfig",
        "AutoModel": "ProgressiveVAELevel",
    },
    "progressive_vae_prior": {
        "AutoConfig": "ProgressiveVAEPriorConfig",
        "AutoModel": "ProgressiveVAEPrior",
    },
    "progressive_vae_hashed_text": {
        "AutoConfig": "HashedTextConfig",
        "AutoModel": "HashedTextEncoder",
    },
}


def bundle() -> str:
    """Return the package in one file: `remote_code_loader.py`, followed by the files for inference.

    Raises:
        ValueError: the loader has no line for the version.
    """
    folder = Path(__file__).parents[1]
    paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*.py"))}
    texts = {
        name: path.read_text(encoding="utf-8")
        for name, path in paths.items()
        if name.split("/")[0] not in TRAINING_FOLDERS
    }
    loader = texts["hub/remote_code_loader.py"]
    version_line = "\nBUNDLE_VERSION = __version__"
    if loader.count(version_line) != 1:
        raise ValueError(f"expected one line {version_line.strip()!r} in the loader, got others")
    lines = [loader.replace(version_line, f"\nBUNDLE_VERSION = {__version__!r}")]
    for name, text in texts.items():
        lines += ["", f"{FILE_PREFIX}{name}"]
        lines += [LINE_PREFIX + line for line in text.splitlines()]
    return "\n".join(lines) + "\n"


def files_with_code(contents: dict[str, bytes]) -> dict[str, bytes]:
    """Return the files that code adds to a repository, and those that it changes.

    Args:
        contents: of `model_index.json` and of each part's `config.json`, by file name.
    """
    index = json.loads(contents[INDEX])
    module = Path(PIPELINE_CODE).stem
    files = {
        PIPELINE_CODE: bundle().encode(),
        INDEX: _json(index | {"_class_name": [module, index["_class_name"]]}),
    }
    # All parts have equal code: diffusers copies each over the previous one, and Python's bytecode
    # cache does not distinguish files of the same size and second.
    model_classes = [classes["AutoModel"] for classes in _AUTO_CLASSES.values()]
    part_code = f"from {NAME} import {', '.join([*model_classes, TOKENIZER_CLASS])}\n"
    own_parts = [name for name, value in index.items() if isinstance(value, list) and NAME in value]
    for part in own_parts:
        files[f"{part}/{PART_CODE}"] = part_code.encode()
        name = f"{part}/{CONFIG}"
        if name in contents:  # a tokenizer has none
            config = json.loads(contents[name])
            classes = _AUTO_CLASSES[config["model_type"]]
            auto_map = {auto: f"{module}.{class_name}" for auto, class_name in classes.items()}
            files[name] = _json(config | {"auto_map": auto_map})
    return files


def is_code(name: str) -> bool:
    """Return whether a file of a repository is added by `files_with_code`."""
    return name == PIPELINE_CODE or name.endswith(f"/{PART_CODE}")


def _json(contents: dict) -> bytes:
    return (json.dumps(contents, indent=2) + "\n").encode()
