"""Convert tokenizers of other libraries: read their files, rename their weights, write a level.

A conversion is a table of rows (source key, target key, weight). Each weight of the source and each
weight of the target needs a row, except those in `TARGET_ONLY`; otherwise nothing is written. No
code of the source is run: pickles may only contain tensors.
"""

import re
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
from progressive_vae.configuration.tokenizer import read_tokenizer
from progressive_vae.models.modeling_utils import check_reachable, find_file
from progressive_vae.paths import replacing
from progressive_vae.serialization import check_not_pointer, check_safetensors, read_json

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# Tensors that sources do not have: the widths of the distributions around a reconstruction, which
# are learned, and the constant 1 of lookup-free quantizers.
TARGET_ONLY = ("auxiliary.scales.", "quantizer.scale")
# Checkpoints of training contain the weights under one of these names.
WEIGHTS_NAMES = ("state_dict", "model")
RESIDUAL = "quantize.quant_resi."  # weights between the grids of a residual tokenizer
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
ADVICE = "download it again"

# Prefixes of a `VQModel` or a `JanusVQVAE`, and of a level that holds one.
VQ_PREFIXES = {
    "encoder.": "encoder.encoder.",
    "quant_conv.": "encoder.quant_conv.",
    "quantize.": "quantizer.quantize.",
    "post_quant_conv.": "auxiliary.post_quant_conv.",
    "decoder.": "auxiliary.decoder.",
}


@dataclass
class Arguments:
    checkpoint_path: str = field(
        metadata={"help": "a file, a folder or a repository on the Hub; see the script's docstring"}
    )
    output_path: str | None = field(
        default=None, metadata={"help": "a folder to write, which is new or empty"}
    )
    config_file: str | None = field(
        default=None, metadata={"help": "the config, if it is not beside the checkpoint"}
    )
    dtype: Literal["float32", "float16", "bfloat16"] | None = field(
        default=None, metadata={"help": "of the weights to write; default: as in the checkpoint"}
    )
    push_to_hub: bool = field(default=False, metadata={"help": "push the written folder"})
    hub_model_id: str | None = field(
        default=None, metadata={"help": "the repository; default: the name of output_path"}
    )
    dry_run: bool = field(default=False, metadata={"help": "print the table, write nothing"})

    def __post_init__(self):
        if self.output_path is None:
            if not self.dry_run:
                raise ValueError("expected output_path, or dry_run, got neither")
            return
        path = Path(self.output_path)
        if path.exists() and not (path.is_dir() and not any(path.iterdir())):
            raise ValueError(
                f"expected output_path to be a new or empty folder, got {path}, which is neither: "
                "name another one, or delete it yourself"
            )


def parse(words: list[str], docstring: str, arguments_class: type[Arguments] = Arguments) -> Any:
    """Parse a command line; the first line of a script's docstring is the description."""
    parser = HfArgumentParser(arguments_class, description=docstring.partition("\n")[0])
    return parser.parse_args_into_dataclasses(words, look_for_args_file=False)[0]


@dataclass
class ReversibleArguments(Arguments):
    reverse: bool = field(
        default=False, metadata={"help": "convert a level back to the format of the source"}
    )


class Row(NamedTuple):
    """A row of the table; `weight` is the source's, in the shape of the target."""

    source_key: str
    target_key: str
    weight: Tensor


# ---- files ---------------------------------------------------------------------------------------


def find(source: str, file: str, subfolder: str = "") -> Path | None:
    """Return the path of a file of a folder or of a repository on the Hub; `None` if it is missing.

    Raises:
        ValueError: the source is a file.
        OSError: the Hub cannot be reached, or has no such repository.
    """
    if Path(source).is_file():
        raise ValueError(f"expected checkpoint_path to be a folder or a repository, got {source}")
    path = find_file(source, file, {"subfolder": subfolder})
    return None if path is None else Path(path)


def find_config(arguments: Arguments, subfolder: str = "") -> Path:
    """Return the path of the source's config.

    Raises:
        ValueError: it is missing.
        OSError: as `find`.
    """
    if arguments.config_file is not None:
        if not Path(arguments.config_file).is_file():
            raise ValueError(f"expected config_file to be a file, got {arguments.config_file}")
        return Path(arguments.config_file)
    source = arguments.checkpoint_path
    path = find(source, "config.json", subfolder)
    if path is None:
        check_reachable(source, "config.json", {"subfolder": subfolder})
        raise ValueError(f"expected config.json in {Path(source, subfolder).as_posix()}, got none")
    return path


def read_checkpoint(
    source: str, files: Sequence[str], subfolder: str = "", prefix: str = ""
) -> dict[str, Tensor]:
    """Return the weights of a folder or repository, from one of `files` or from its shards.

    Args:
        files: alternative names, in the order of preference.
        prefix: of the names of the weights to read.

    Raises:
        ValueError: none of the files exists, or as `read_weights`.
    """
    for file in files:
        if (path := find(source, file, subfolder)) is not None:
            return read_weights(path, prefix)
        if (index := find(source, f"{file}.index.json", subfolder)) is None:
            continue
        weight_map = read_json(index, ADVICE).get("weight_map")
        if not isinstance(weight_map, dict) or not all(
            isinstance(name, str) and Path(name).name == name for name in weight_map.values()
        ):
            raise ValueError(f"expected a weight_map of file names in {index}, got {weight_map}")
        weights: dict[str, Tensor] = {}
        shards = {shard for key, shard in weight_map.items() if key.startswith(prefix)}
        for shard in sorted(shards):
            if (path := find(source, shard, subfolder)) is None:
                raise ValueError(f"expected {shard} in {source}, as {index.name} says, got none")
            weights |= read_weights(path, prefix)
        return weights
    check_reachable(source, files[0], {"subfolder": subfolder})
    location = Path(source, subfolder).as_posix()
    raise ValueError(f"expected {' or '.join(files)} in {location}, got none of them")


def read_weights(
    path: str | Path, prefix: str = "", ignored: tuple[str, ...] = ()
) -> dict[str, Tensor]:
    """Return name → tensor, from a safetensors file or from a pickle that contains only tensors.

    Args:
        prefix: of the names of the weights to read.
        ignored: prefixes of names to leave out, whose values may be integers.

    Raises:
        ValueError: the file is missing, damaged or of another format, is a pickle of objects, or
            has the weights of a residual tokenizer.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"expected a file of weights, got {path}, which does not exist")
    if path.suffix not in (".safetensors", *PICKLES):
        raise ValueError(f"expected weights in .safetensors or {PICKLES}, got {path}")
    contents = _read_safetensors(path, prefix) if path.suffix == ".safetensors" else _unpickle(path)
    contents = {
        key: value
        for key, value in contents.items()
        if str(key).startswith(prefix) and not str(key).startswith(ignored)
    }
    if any(str(key).startswith(RESIDUAL) for key in contents):
        raise ValueError(
            f"expected a tokenizer with one grid of codes in {path}, got residual grids, as those "
            "of VAR. Each grid encodes what the sum of all coarser grids leaves over: it is no "
            "function of the next finer grid, which the encoder of a level has to be. And the "
            "image is decoded from the sum of all grids: the finest one alone is no tokenizer"
        )
    invalid = [
        str(key)
        for key, value in contents.items()
        if not (isinstance(key, str) and _is_weight(value))
    ]
    if invalid or not contents:
        got = f"others: {shorten(invalid)}" if invalid else "none"
        raise ValueError(f"expected names and tensors of floats in {path}, got {got}")
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
    """Return a dict of tensors, or the one in a checkpoint of training."""
    check_not_pointer(path)
    try:
        contents = torch.load(path, weights_only=True, map_location="cpu")
    except OSError:
        raise
    except Exception as error:  # an unpickler raises errors of any class for damaged bytes
        pattern = r"[Uu]nsupported (?:global|class|operand|reduce)[^\n]*"
        if match := re.search(pattern, str(error)):
            raise ValueError(
                f"expected only tensors in {path}, got a pickle that contains code or objects, "
                f"which is not loaded ({match[0].strip()}). If you trust its source, make a clean "
                "file yourself where its libraries are installed: `contents = torch.load(path, "
                "weights_only=False)`, then `torch.save(contents['state_dict'], 'clean.pt')`, or "
                "`contents.state_dict()` if it is a module"
            ) from error
        message = str(error).partition("\n")[0]
        raise ValueError(
            f"expected a complete file of tensors in {path}, got {message!r}"
        ) from error
    for name in WEIGHTS_NAMES:
        if isinstance(contents, dict) and isinstance(contents.get(name), dict):
            contents = contents[name]
    if not isinstance(contents, dict):
        raise ValueError(
            f"expected a dict of names and tensors in {path}, got a {type(contents).__name__}"
        )
    return contents


def section_of(config: Any, name: str, path: str | Path) -> dict[str, Any]:
    """Return a section of a config.

    Raises:
        ValueError: there is none of this name.
    """
    section = config.get(name) if isinstance(config, dict) else None
    if not isinstance(section, dict):
        raise ValueError(f"expected a section {name} in {path}, got {section!r}")
    return section


# ---- the table -----------------------------------------------------------------------------------


def replace_prefix(key: str, prefixes: dict[str, str]) -> str | None:
    """Replace the prefix of a key by a table source → target; `None` if it has none of them."""
    for source, target in prefixes.items():
        if key.startswith(source):
            return target + key.removeprefix(source)
    return None


def rename(key: str, replacements: Sequence[tuple[str, str]]) -> str:
    """Replace parts of a key by a table of regular expressions, in its order."""
    for pattern, replacement in replacements:
        key = re.sub(pattern, replacement, key)
    return key


def count_from_finest(key: str, num_resolutions: int) -> str:
    """Replace the number of a decoder's resolution, which a level counts from the coarsest."""
    return re.sub(
        r"\.(up|adaptive)\.(\d+)\.",
        lambda match: f".{match[1]}.{num_resolutions - 1 - int(match[2])}.",
        key,
    )


def shape_of(weights: dict[str, Tensor], key: str, ndim: int) -> tuple[int, ...]:
    """Return the shape of a weight, from which a config is inferred.

    Raises:
        ValueError: the weight is missing or has not `ndim` dimensions.
    """
    shape = tuple(weights[key].shape) if key in weights else None
    if shape is None or len(shape) != ndim:
        raise ValueError(
            f"expected a weight {key} of {ndim} dimensions, got {shape} and the weights "
            f"{shorten([*weights])}"
        )
    return shape


def count(weights: dict[str, Tensor], prefix: str) -> int:
    """Return the number of modules in a list of modules, whose names begin with `prefix`."""
    pattern = re.compile(re.escape(prefix) + r"(\d+)\.")
    return len({match[1] for key in weights if (match := pattern.match(key))})


def infer_sizes(weights: dict[str, Tensor], stages: str, blocks: str) -> dict[str, Any]:
    """Infer the sizes of a VQGAN from the weights of its encoder.

    Args:
        stages, blocks: names of the list of resolutions, and in each of the list of its blocks.
    """
    width, channels = shape_of(weights, "encoder.conv_in.weight", 4)[:2]
    stages = f"encoder.{stages}."
    first_blocks = [f"{stages}{i}.{blocks}.0." for i in range(count(weights, stages))]
    widths = [shape_of(weights, f"{block}conv1.weight", 4)[0] for block in first_blocks]
    return {
        "num_channels": channels,
        "base_channels": width,
        "channel_multiplier": [n // width for n in widths],
        "num_res_blocks": count(weights, f"{stages}0.{blocks}."),
        "latent_channels": shape_of(weights, "encoder.conv_out.weight", 4)[0],
    }


def make_table(weights: dict[str, Tensor], convert_key: Callable[[str], str | None]) -> list[Row]:
    """Return a row for each weight of the source.

    Args:
        convert_key: source key → target key, or `None` if there is no target.

    Raises:
        ValueError: weights without a target, or with the same one.
    """
    target_keys = {key: convert_key(key) for key in weights}
    if unexpected := [key for key, target in target_keys.items() if target is None]:
        raise ValueError(
            f"expected the weights of a tokenizer, got {len(unexpected)} unexpected: "
            f"{shorten(unexpected)}"
        )
    table = [Row(key, str(target), weights[key]) for key, target in target_keys.items()]
    counts = Counter(row.target_key for row in table)
    if duplicates := [row.source_key for row in table if counts[row.target_key] > 1]:
        raise ValueError(f"expected each weight once, got {shorten(duplicates)}")
    return table


def check_table(table: Iterable[Row], expected: dict[str, Tensor]):
    """Raise a `ValueError` unless the table has exactly the `expected` weights, by keys and shapes,
    and all are finite."""
    rows = {row.target_key: row for row in table}
    problems = {
        "missing": [key for key in expected if key not in rows],
        "unexpected": [row.source_key for key, row in rows.items() if key not in expected],
        "mismatched": [
            f"{row.source_key} {tuple(row.weight.shape)}, expected {tuple(expected[key].shape)}"
            for key, row in rows.items()
            if key in expected and row.weight.shape != expected[key].shape
        ],
    }
    if any(problems.values()):
        parts = [f"{len(keys)} {kind}: {shorten(keys)}" for kind, keys in problems.items() if keys]
        raise ValueError(f"expected the weights that the config describes, got {'; '.join(parts)}")
    if keys := [row.source_key for row in rows.values() if not row.weight.isfinite().all()]:
        raise ValueError(f"expected finite weights, got NaN or infinity in {shorten(keys)}")


def shorten(keys: Sequence[str]) -> str:
    return ", ".join(keys[:10]) + (", …" if len(keys) > 10 else "")


def print_table(table: Sequence[Row]):
    lines = [("source", "target", "shape", "dtype")] + [
        (row.source_key, row.target_key, str(tuple(row.weight.shape)), str(row.weight.dtype)[6:])
        for row in table
    ]
    widths = [max(len(line[i]) for line in lines) for i in range(4)]
    for line in lines:
        cells = [cell.ljust(width) for cell, width in zip(line, widths, strict=True)]
        print("  ".join(cells).rstrip())


# ---- writing -------------------------------------------------------------------------------------


def level_config(tokenizer_config: dict[str, Any]) -> ProgressiveVAELevelConfig:
    """Return the config of the finest level that a tokenizer makes."""
    return ProgressiveVAELevelConfig(tokenizer_config=tokenizer_config, decoder_type="auxiliary")


def expected_weights(tokenizer_config: dict[str, Any]) -> dict[str, Tensor]:
    """Return name → weight on the meta device, of a level that a tokenizer makes."""
    with torch.device("meta"):  # only shapes: the config may describe more than memory holds
        state = ProgressiveVAELevel(level_config(tokenizer_config)).state_dict()
    return {key: weight for key, weight in state.items() if not key.startswith(TARGET_ONLY)}


def inverse(
    convert_key: Callable[[str], str], tokenizer_config: dict[str, Any]
) -> Callable[[str], str | None]:
    """Return the function source key → key in a level, from that of the other direction."""
    return {convert_key(key): key for key in expected_weights(tokenizer_config)}.get


def convert(
    arguments: Arguments,
    tokenizer_config: dict[str, Any],
    table: Sequence[Row],
    ignored: Sequence[str] = (),
):
    """Write the finest level that a tokenizer makes, from its config and the table of its weights.

    Args:
        ignored: descriptions of weights of the source that are not the tokenizer's, to be printed.

    Raises:
        ValueError: an invalid config, or weights that do not match it; then nothing is written.
    """
    check_table(table, expected_weights(tokenizer_config))
    dtype = choose_dtype(arguments, table)
    for description in ignored:
        print(f"ignored: {description}")
    if arguments.dry_run:
        print_table(table)
        return
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # for TARGET_ONLY: the same source gives the same files
        level = ProgressiveVAELevel(level_config(tokenizer_config)).to(dtype)
    load_table(level, table)
    check_runs(level)
    write(arguments, level)


def choose_dtype(arguments: Arguments, table: Sequence[Row]) -> torch.dtype:
    """Return the requested dtype, or that of the source.

    Raises:
        ValueError: none is requested, and the source has several or float64.
    """
    if arguments.dtype is not None:
        return getattr(torch, arguments.dtype)
    dtypes = {row.weight.dtype for row in table}
    if len(dtypes) != 1 or torch.float64 in dtypes:
        raise ValueError(f"expected dtype for weights of {sorted(map(str, dtypes))}, got none")
    return dtypes.pop()


def load_table(model: torch.nn.Module, table: Sequence[Row]):
    """Copy the weights of a checked table into a model, in the model's dtype."""
    model.load_state_dict({row.target_key: row.weight for row in table}, strict=False)
    state = model.state_dict()
    if keys := [row.source_key for row in table if not state[row.target_key].isfinite().all()]:
        dtype = next(iter(state.values())).dtype
        raise ValueError(f"expected weights in the range of {dtype}, got others in {shorten(keys)}")


def check_runs(level: ProgressiveVAELevel):
    """Reconstruct a small image: shapes do not validate all fields of a config, and errors of the
    networks have to come before files are written."""
    size = level.config.finer_size((4, 4))
    level.eval().expect(level.encode(torch.zeros(1, level.config.num_channels, *size)))


def write(arguments: Arguments, model: Any):
    """Save a model atomically, and push it if requested."""
    assert arguments.output_path is not None  # checked by Arguments
    path = Path(arguments.output_path).resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        model.save_pretrained(temporary)
    print(f"wrote {arguments.output_path}")
    if arguments.push_to_hub:
        repo_id = arguments.hub_model_id or path.name
        model.push_to_hub(repo_id)
        print(f"pushed {repo_id}")


# ---- the way back --------------------------------------------------------------------------------


def read_level(
    arguments: ReversibleArguments, *choices: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the config of a level's tokenizer, without defaults, and its weights.

    Args:
        choices: fields of `tokenizer_config` and their values; the tokenizer has those of one.

    Raises:
        ValueError: the level has no such tokenizer; a `config_file`, which belongs to the other
            direction.
    """
    if arguments.config_file is not None:
        raise ValueError(f"expected no config_file with reverse, got {arguments.config_file}")
    level = ProgressiveVAELevel.from_pretrained(arguments.checkpoint_path)
    config = dict(level.config.tokenizer_config or {})
    fields = {**read_tokenizer(config).fields, **config} if config else {}
    if not any(choice.items() <= fields.items() for choice in choices):
        raise ValueError(
            f"expected a level with a tokenizer_config of {' or '.join(map(str, choices))} in "
            f"{arguments.checkpoint_path}, got {level.config.tokenizer_config}"
        )
    state, keys = level.state_dict(), expected_weights(config)
    if others := [key for key in state if key not in keys]:
        print(f"ignored: {len(others)} weights that are not the tokenizer's: {shorten(others)}")
    return config, {key: state[key] for key in keys}


def write_checkpoint(
    arguments: ReversibleArguments,
    table: Sequence[Row],
    file: str,
    wrap: Callable[[dict[str, Tensor]], dict] = dict,
):
    """Write the weights of a table as a file of the source's library, in a new folder.

    Args:
        wrap: from name → weight to the contents of the file.
    """
    if arguments.push_to_hub:
        raise ValueError("expected no push_to_hub with reverse, got it")
    dtype = choose_dtype(arguments, table)
    if arguments.dry_run:
        print_table(table)
        return
    assert arguments.output_path is not None  # checked by Arguments
    path = Path(arguments.output_path).resolve()
    weights = {row.target_key: row.weight.to(dtype).contiguous() for row in table}
    with replacing(path) as temporary:
        temporary.mkdir(parents=True)
        torch.save(wrap(weights), temporary / file)
    print(f"wrote {path / file}")
