"""Tokenizers of other libraries: their files are read, their weights named as ours, and written.

A conversion is a table, theirs → ours. Every weight of theirs and every one of ours has its line
(only the widths of the distributions around the tokenizer's picture, `auxiliary.scales`, are our
own), or nothing is written. Nothing of theirs is run, and no pickle that holds more than tensors is
read.
"""

import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import HfArgumentParser

from progressive_vae import ProgressiveVAELevel, ProgressiveVAELevelConfig
from progressive_vae.models.modeling_utils import check_reachable, find_file
from progressive_vae.serialization import check_not_pointer, check_safetensors, read_json

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
OUR_OWN = "auxiliary.scales."  # learned around the tokenizer's picture, and never theirs
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
ADVICE = "download it anew"

# A `VQModel`'s or a `JanusVQVAE`'s parts in a level that holds one.
VQ_SLOTS = {
    "encoder.": "encoder.encoder.",
    "quant_conv.": "encoder.quant_conv.",
    "quantize.": "quantizer.quantize.",
    "post_quant_conv.": "auxiliary.post_quant_conv.",
    "decoder.": "auxiliary.decoder.",
}


@dataclass
class Arguments:
    checkpoint_path: str = field(metadata={"help": "what to convert"})
    output_path: str | None = field(
        default=None, metadata={"help": "a folder to write, which does not hold anything yet"}
    )
    config_file: str | None = field(
        default=None, metadata={"help": "the source's config, where it does not lie beside it"}
    )
    dtype: Literal["float32", "float16", "bfloat16"] | None = field(
        default=None,
        metadata={"help": "of the weights that are written; the source's if not given"},
    )
    push_to_hub: bool = field(default=False, metadata={"help": "push what was written, too"})
    hub_model_id: str | None = field(
        default=None, metadata={"help": "the repository; the name of output_path if not given"}
    )
    dry_run: bool = field(default=False, metadata={"help": "print the table, and write nothing"})

    def __post_init__(self):
        if self.output_path is None:
            if not self.dry_run:
                raise ValueError("expected output_path, or dry_run, got neither")
            return
        target = Path(self.output_path)
        if target.exists() and not (target.is_dir() and not any(target.iterdir())):
            raise ValueError(
                f"expected output_path to be a new or empty folder, got {target}, which holds "
                "something: name another one, or delete it yourself"
            )


def parse(words: list[str], description: str, kind: type[Arguments] = Arguments) -> Any:
    """The arguments in the words of a command; `description` is a script's docstring."""
    parser = HfArgumentParser(kind, description=description.partition("\n")[0])
    return parser.parse_args_into_dataclasses(words, look_for_args_file=False)[0]


class Row(NamedTuple):
    """A line of the table; `weight` is theirs, in the shape of ours."""

    theirs: str
    ours: str
    weight: Tensor


# ---- files ---------------------------------------------------------------------------------------


def find(source: str, file: str, subfolder: str = "") -> Path | None:
    """The path of a file of a folder or of a repository on the Hub; `None` if it is not there.

    Raises:
        ValueError: the source is a file.
        OSError: the Hub cannot be reached, or has no such repository.
    """
    where = Path(source)
    if where.is_file():
        raise ValueError(f"expected checkpoint_path to be a folder or a repository, got {source}")
    found = find_file(source, file, {"subfolder": subfolder})
    return None if found is None else Path(found)


def find_config(arguments: Arguments, subfolder: str = "") -> Path:
    """The path of the source's config.

    Raises:
        ValueError: it is missing.
        OSError: as `find`.
    """
    if arguments.config_file is not None:
        if not Path(arguments.config_file).is_file():
            raise ValueError(f"expected config_file to be a file, got {arguments.config_file}")
        return Path(arguments.config_file)
    source, name = arguments.checkpoint_path, "config.json"
    path = find(source, name, subfolder)
    if path is None:
        check_reachable(source, name, {"subfolder": subfolder})
        raise ValueError(f"expected {name} in {Path(source, subfolder).as_posix()}, got none")
    return path


def read_checkpoint(
    source: str, files: Sequence[str], subfolder: str = "", prefix: str = ""
) -> dict[str, Tensor]:
    """The weights of a folder or repository, from one of `files` or from its shards.

    Args:
        files: names in the order in which they are looked for.
        prefix: of the names of the weights to read.

    Raises:
        ValueError: none of the files is there, or as `read_weights`.
    """
    for file in files:
        if (path := find(source, file, subfolder)) is not None:
            return read_weights(path, prefix)
        if (index := find(source, f"{file}.index.json", subfolder)) is None:
            continue
        shards = read_json(index, ADVICE).get("weight_map")
        if not isinstance(shards, dict) or not all(
            isinstance(name, str) and Path(name).name == name for name in shards.values()
        ):
            raise ValueError(f"expected a weight_map of file names in {index}, got {shards}")
        weights: dict[str, Tensor] = {}
        for name in sorted({shard for key, shard in shards.items() if key.startswith(prefix)}):
            if (path := find(source, name, subfolder)) is None:
                raise ValueError(f"expected {name} in {source}, as {index.name} says, got none")
            weights |= read_weights(path, prefix)
        return weights
    check_reachable(source, files[0], {"subfolder": subfolder})
    where = Path(source, subfolder).as_posix()
    raise ValueError(f"expected {' or '.join(files)} in {where}, got none of them")


def read_weights(path: str | Path, prefix: str = "") -> dict[str, Tensor]:
    """Name → tensor, of a safetensors file or of a pickle that holds nothing but tensors.

    Raises:
        ValueError: a file that is missing, damaged or of another kind, or a pickle of objects.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"expected a file of weights, got {path}, which is not there")
    if path.suffix not in (".safetensors", *PICKLES):
        raise ValueError(f"expected weights in .safetensors or {PICKLES}, got {path}")
    contents = _read_safetensors(path, prefix) if path.suffix == ".safetensors" else _unpickle(path)
    contents = {key: value for key, value in contents.items() if str(key).startswith(prefix)}
    wrong = [
        str(key)
        for key, value in contents.items()
        if not (isinstance(key, str) and _is_weight(value))
    ]
    if wrong or not contents:
        shown = f"others: {shorten(wrong)}" if wrong else "none"
        raise ValueError(f"expected names and tensors of floats in {path}, got {shown}")
    return {key: value.detach() for key, value in contents.items()}


def _is_weight(value: Any) -> bool:
    if not isinstance(value, Tensor) or value.layout != torch.strided:
        return False
    return value.dtype in FLOATS and value.device.type == "cpu"


def _read_safetensors(path: Path, prefix: str) -> dict[str, Tensor]:
    check_safetensors(path, ADVICE)
    with safe_open(path, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys() if key.startswith(prefix)}


def _unpickle(path: Path) -> dict[Any, Any]:
    """A dict of tensors, or the one that is called `state_dict` in a checkpoint of Lightning's."""
    check_not_pointer(path)
    try:
        contents = torch.load(path, weights_only=True, map_location="cpu")
    except OSError:
        raise
    except Exception as error:  # damaged bytes make an unpickler raise anything
        if found := re.search(r"[Uu]nsupported (?:global|class|operand|reduce)[^\n]*", str(error)):
            raise ValueError(
                f"expected nothing but tensors in {path}, got a pickle that holds code or objects, "
                f"which is not loaded ({found[0].strip()}). If you trust where it comes from, make "
                "a clean file of it yourself where its libraries are installed: `contents = "
                "torch.load(path, weights_only=False)`, then `torch.save(contents['state_dict'], "
                "'clean.pt')`, or `contents.state_dict()` if it is a module"
            ) from error
        said = str(error).partition("\n")[0]
        raise ValueError(f"expected a whole file of tensors in {path}, got {said!r}") from error
    if isinstance(contents, dict) and isinstance(contents.get("state_dict"), dict):
        contents = contents["state_dict"]
    if not isinstance(contents, dict):
        raise ValueError(
            f"expected a dict of names and tensors in {path}, got a {type(contents).__name__}"
        )
    return contents


# ---- the table -----------------------------------------------------------------------------------


def replace_prefix(key: str, slots: dict[str, str]) -> str | None:
    """A name of theirs by the prefixes theirs → ours; `None` if it has none of them."""
    for theirs, ours in slots.items():
        if key.startswith(theirs):
            return ours + key.removeprefix(theirs)
    return None


def make_table(weights: dict[str, Tensor], name: Callable[[str], str | None]) -> list[Row]:
    """A line for each of their weights.

    Args:
        name: theirs → ours, or `None` for what has no place.

    Raises:
        ValueError: weights that have no place, or that take the same one.
    """
    named = {key: name(key) for key in weights}
    if nowhere := [key for key, ours in named.items() if ours is None]:
        raise ValueError(
            f"expected the weights of a tokenizer, got {len(nowhere)} left over: {shorten(nowhere)}"
        )
    table = [Row(key, str(ours), weights[key]) for key, ours in named.items()]
    if twice := [ours for ours, count in Counter(row.ours for row in table).items() if count > 1]:
        keys = [row.theirs for row in table if row.ours in twice]
        raise ValueError(f"expected each weight once, got {shorten(keys)}")
    return table


def check_table(table: Iterable[Row], expected: dict[str, Tensor]):
    """Raise a `ValueError` unless the table fills all that is `expected`, in its shapes and with
    finite numbers."""
    theirs = {row.ours: row for row in table}
    found = {
        "missing": [key for key in expected if key not in theirs],
        "left over": [row.theirs for key, row in theirs.items() if key not in expected],
        "of another shape": [
            f"{row.theirs} {tuple(row.weight.shape)} in place of {tuple(expected[key].shape)}"
            for key, row in theirs.items()
            if key in expected and row.weight.shape != expected[key].shape
        ],
    }
    if any(found.values()):
        shown = [f"{len(keys)} {word}: {shorten(keys)}" for word, keys in found.items() if keys]
        raise ValueError(f"expected the weights that the config describes, got {'; '.join(shown)}")
    if wrong := [row.theirs for row in theirs.values() if not row.weight.isfinite().all()]:
        raise ValueError(f"expected finite weights, got others in {shorten(wrong)}")


def shorten(keys: Sequence[str]) -> str:
    return ", ".join(keys[:10]) + (", …" if len(keys) > 10 else "")


def show(table: Sequence[Row]):
    columns = [("theirs", "ours", "shape", "dtype")] + [
        (row.theirs, row.ours, str(tuple(row.weight.shape)), str(row.weight.dtype)[6:])
        for row in table
    ]
    widths = [max(len(line[i]) for line in columns) for i in range(4)]
    for line in columns:
        print("  ".join(word.ljust(n) for word, n in zip(line, widths, strict=True)).rstrip())


# ---- what is written -----------------------------------------------------------------------------


def convert(
    arguments: Arguments,
    tokenizer_config: dict[str, Any],
    table: Sequence[Row],
    left_out: Sequence[str] = (),
):
    """Write the finest level that a tokenizer makes, from its config and the table of its weights.

    Args:
        left_out: what is in the source and not of the tokenizer, in words.

    Raises:
        ValueError: a config that is none, or weights that are not those that it describes; then
            nothing is written.
    """
    config = ProgressiveVAELevelConfig(tokenizer_config=tokenizer_config, decoder_type="auxiliary")
    with torch.device("meta"):  # shapes alone: the config may ask for more than there is
        expected = ProgressiveVAELevel(config).state_dict()
    own = {key for key in expected if key.startswith(OUR_OWN)}
    check_table(table, {key: value for key, value in expected.items() if key not in own})
    dtype = choose_dtype(arguments, table)
    for words in left_out:
        print(f"left out: {words}")
    if arguments.dry_run:
        show(table)
        return
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # of what is our own: the same source makes the same files
        level = ProgressiveVAELevel(config).to(dtype)
    fill(level, table)
    check_runs(level)
    write(arguments, level)


def choose_dtype(arguments: Arguments, table: Sequence[Row]) -> torch.dtype:
    """As asked for, or that of the source.

    Raises:
        ValueError: the source has several, or one that no level has.
    """
    if arguments.dtype is not None:
        return getattr(torch, arguments.dtype)
    dtypes = {row.weight.dtype for row in table}
    if len(dtypes) != 1 or torch.float64 in dtypes:
        raise ValueError(
            f"expected dtype to be given for weights of {sorted(map(str, dtypes))}, got none"
        )
    return dtypes.pop()


def fill(model: torch.nn.Module, table: Sequence[Row]):
    """Copy the weights of a table that was checked into a model of ours, as its dtype."""
    model.load_state_dict({row.ours: row.weight for row in table}, strict=False)
    state = model.state_dict()
    if wrong := [row.theirs for row in table if not state[row.ours].isfinite().all()]:
        raise ValueError(
            f"expected weights that {next(iter(state.values())).dtype} holds, got larger ones in "
            f"{shorten(wrong)}"
        )


def check_runs(level: ProgressiveVAELevel):
    """Reconstruct a small image, as the weights do not tell of all that a config says: an error
    of the networks comes before anything is written."""
    size = 4 * level.config.downsample
    level.eval().expect(level.encode(torch.zeros(1, level.config.num_channels, size, size)))


def write(arguments: Arguments, model: Any):
    """Save a model under a temporary name beside its own, then rename; and push it if asked to."""
    assert arguments.output_path is not None  # the arguments see to it
    target = Path(arguments.output_path).resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        prefix=f"{target.name}.incomplete-", dir=target.parent
    ) as folder:
        model.save_pretrained(Path(folder) / target.name)
        (Path(folder) / target.name).rename(target)
    print(f"wrote {arguments.output_path}")
    if arguments.push_to_hub:
        name = arguments.hub_model_id or target.name
        model.push_to_hub(name)
        print(f"pushed {name}")
