"""Code that a repository holds, for those who have not installed the package.

`pipe.push_to_hub(name, with_code=True)` makes such a repository. diffusers loads it with
`trust_remote_code=True`. `ProgressiveVAEPipeline` itself needs none of that code, and leaves it
aside.
"""

import json
from pathlib import Path

from ..serialization import __version__
from .model_card import card_template

NAME, FILE, LINE = "progressive_vae", "#: ", "#|"  # as remote_code_loader.py reads them
FOLDERS_LEFT_OUT = ("data", "evaluation", "training")  # which no inference imports
CODE = "pipeline.py"  # where diffusers looks for a class of a repository's own
PART_CODE = f"{NAME}.py"  # and for one of a part: named as its library
CONFIG, INDEX = "config.json", "model_index.json"
_AUTO_CLASSES = {
    "progressive_vae_level": {"AutoConfig": "ProgressiveVAELevelConfig",
                              "AutoModel": "ProgressiveVAELevel"},
    "progressive_vae_prior": {"AutoConfig": "ProgressiveVAEPriorConfig",
                              "AutoModel": "ProgressiveVAEPrior"},
}  # fmt: skip


def bundle() -> str:
    """The package in one file: `remote_code_loader.py`, with the files that inference takes and
    the template of the model card below it."""
    folder = Path(__file__).parents[1]
    paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*.py"))}
    texts = {
        name: path.read_text(encoding="utf-8")
        for name, path in paths.items()
        if name.split("/")[0] not in FOLDERS_LEFT_OUT
    }
    loader = texts["hub/remote_code_loader.py"]
    first = loader.replace("VERSION = __version__", f"VERSION = {__version__!r}")
    texts["MODEL_CARD.md"] = card_template()
    lines = [first]
    for name, text in texts.items():
        lines += ["", f"{FILE}{name}", *(LINE + line for line in text.splitlines())]
    return "\n".join(lines) + "\n"


def files_with_code(contents: dict[str, bytes]) -> dict[str, bytes]:
    """The files that a repository has then: the changed ones and those that are new.

    Args:
        contents: of `model_index.json` and of each part's `config.json`, by their names.
    """
    index = json.loads(contents[INDEX])
    own_class = [Path(CODE).stem, index["_class_name"]]
    found = {CODE: bundle().encode(), INDEX: _json(index | {"_class_name": own_class})}
    # The same for all parts: diffusers puts each in the place of the last one, and Python takes two
    # files of one size and second for one.
    models = (classes["AutoModel"] for classes in _AUTO_CLASSES.values())
    part_code = f"from {NAME} import {', '.join(models)}\n"
    for name in contents:
        part, _, file = name.rpartition("/")
        if file == CONFIG:
            config = json.loads(contents[name])
            classes = _AUTO_CLASSES[config["model_type"]]
            own = {auto: f"{Path(CODE).stem}.{ours}" for auto, ours in classes.items()}
            found[name] = _json(config | {"auto_map": own})
            found[f"{part}/{PART_CODE}"] = part_code.encode()
    return found


def is_code(name: str) -> bool:
    """Whether a file of a repository is one of these."""
    return name == CODE or name.endswith(f"/{PART_CODE}")


def _json(contents: dict) -> bytes:
    return (json.dumps(contents, indent=2) + "\n").encode()
