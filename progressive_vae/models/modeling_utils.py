"""Loading and saving of models: complete and finite weights, and saves that are all or nothing."""

import inspect
import os
import re
import tempfile
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from diffusers.hooks import apply_layerwise_casting
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from ..serialization import check_safetensors, read_json

CONFIG = "config.json"
_PUSH_ARGUMENTS = (
    "commit_message",
    "private",
    "token",
    "create_pr",
    "max_shard_size",
    "revision",
)
_SAVE_ARGUMENTS = [*inspect.signature(PreTrainedModel.save_pretrained).parameters][2:]
_COMPILE_ARGUMENTS = inspect.signature(torch.compile).parameters  # more in new versions of torch
_HUB_ARGUMENTS = ("cache_dir", "proxies", "token", "revision", "local_files_only", "subfolder")
# The parts of a pipeline share their code; dynamo limits the graphs of each function.
PART_GRAPHS = {"isolate_recompiles": True} if "isolate_recompiles" in _COMPILE_ARGUMENTS else {}
# Blocks share their code, which has a graph for each kind of them, with gradients and without.
BLOCK_GRAPHS = {"recompile_limit": 64} if "recompile_limit" in _COMPILE_ARGUMENTS else {}
_ADVICE = "save the model again, or download it again"

# model.safetensors, model.fp16.safetensors, their shards, and the index of shards.
_WEIGHTS = re.compile(
    r"model(?:\.(.+?))?(?:-\d+-of-\d+)?\.safetensors(?:\.index(?:\.(.+))?\.json)?"
)


class ProgressiveVAEPreTrainedModel(PreTrainedModel):
    """Base class of levels and priors.

    `from_pretrained` raises an error instead of initializing missing weights; `save_pretrained`
    replaces the files of a folder only after all new ones are written.
    """

    config_class: type[PreTrainedConfig]
    walk: Callable[..., Tensor]
    _compiled_walk: Callable[..., Tensor] | None = None
    _repeated_blocks: list[str] = []  # class names
    _skip_layerwise_casting_patterns: list[str] = []  # regular expressions of module names

    def compile(self, *args, **kwargs):
        """Compile what training and sampling run: `forward`, and `walk` where `sample` calls it.

        Calls of `walk` with other step functions stay as they are, so that a stream does not depend
        on whether the model is compiled.

        Args:
            args, kwargs: as of `torch.compile`.
        """
        kwargs = {**PART_GRAPHS, **kwargs}
        super().compile(*args, **kwargs)
        self._compile_walk(*args, **kwargs)

    def enable_cuda_graph(self):
        """Run `sample` as one CUDA graph for each batch size, of the same operations as without.

        Noise is generated outside of the graph. Other sampling arguments and replaced weights need
        another graph. What torch cannot record runs as without, with a warning.

        Raises:
            ValueError: the model is on another device.
        """
        if self.device.type != "cuda":
            raise ValueError(
                f"expected a {type(self).__name__} on a CUDA device for CUDA graphs, got one on "
                f"{self.device}"
            )
        self._compile_walk(backend="cudagraphs", **PART_GRAPHS)

    def _compile_walk(self, *args, **kwargs):
        compiled = torch.compile(self.walk, *args, **kwargs)

        def walk(*arguments):
            # A CUDA graph writes its results into the same memory at each call.
            torch.compiler.cudagraph_mark_step_begin()
            return compiled(*arguments).clone()

        self._compiled_walk = walk

    def compile_repeated_blocks(self, *args, **kwargs):
        """Compile the modules of `_repeated_blocks` only, as diffusers' models do: a quick start.

        Args:
            args, kwargs: as of `torch.compile`.

        Raises:
            ValueError: a model without such modules.
        """
        names = self._repeated_blocks
        blocks = [module for module in self.modules() if type(module).__name__ in names]
        if not blocks:
            raise ValueError(f"expected a model with blocks of {names}, got {type(self).__name__}")
        kwargs = {"dynamic": True, **BLOCK_GRAPHS, **kwargs}
        for block in blocks:
            block.compile(*args, **kwargs)

    def enable_layerwise_casting(
        self,
        storage_dtype: torch.dtype = torch.float8_e4m3fn,
        compute_dtype: torch.dtype | None = None,
        non_blocking: bool = False,
    ):
        """Store weights in fewer bits, and cast those of a layer before it runs, as diffusers'
        models do.

        Weights that are read outside of their layer's forward keep their dtype.

        Args:
            compute_dtype: that of the layers; `None`: the model's.
            non_blocking: copy weights asynchronously.
        """
        apply_layerwise_casting(
            self,
            storage_dtype,
            self.dtype if compute_dtype is None else compute_dtype,
            tuple(self._skip_layerwise_casting_patterns),
            non_blocking=non_blocking,
        )

    def __getstate__(self):
        state = super().__getstate__()
        state.pop("_compiled_walk", None)  # a copy compiles again
        return state

    @wraps(PreTrainedModel.save_pretrained)  # diffusers reads the arguments from the signature
    def save_pretrained(self, save_directory, *args, **kwargs):
        folder = Path(save_directory)
        kwargs |= zip(_SAVE_ARGUMENTS, args, strict=False)
        is_pushed = kwargs.pop("push_to_hub", False)  # transformers would push the temporary folder
        if is_pushed and kwargs.get("variant") is not None:
            raise ValueError(
                f"expected variant=None with push_to_hub=True, got {kwargs['variant']!r}: push the "
                "variant of a pipeline, or save it and upload the folder"
            )
        push_arguments = {name: kwargs[name] for name in _PUSH_ARGUMENTS if name in kwargs}
        repo_id = kwargs.pop("repo_id", folder.resolve().name)
        if kwargs.get("is_main_process", True) and not kwargs.get("distributed_checkpoint"):
            self._save_and_replace(folder, **kwargs)
        else:
            super().save_pretrained(save_directory, **kwargs)
        if is_pushed:
            self.push_to_hub(repo_id, **push_arguments)

    def _save_and_replace(self, folder: Path, **kwargs):
        """Save into a temporary folder, move its files to `folder`, and delete older weights of the
        same variant there.

        A direct save would also delete the shards of other variants, as transformers does.
        """
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".incomplete-", dir=folder) as temporary:
            super().save_pretrained(temporary, **kwargs)
            names = [path.name for path in Path(temporary).iterdir()]
            for name in names:
                os.replace(Path(temporary, name), folder / name)
        for path in folder.glob("model*") if names else ():  # not every process writes files
            if is_weights(path.name, kwargs.get("variant")) and path.name not in names:
                path.unlink()  # transformers would load an older single file instead of new shards

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path, *args, output_loading_info: bool = False, **kwargs
    ):
        """Load a model as `PreTrainedModel.from_pretrained` does, and check that it is complete.

        Args:
            output_loading_info: return (model, info) as transformers does. Missing, unexpected and
                mismatched weights are then reported in `info` and not raised.

        Raises:
            ValueError: weights that are missing, unexpected, of another shape than the config's or
                not finite; a file that is missing or damaged; a config of a model that is much
                larger than its weight files.
            OSError: a repository, revision or file that cannot be reached.
        """
        name = pretrained_model_name_or_path
        if name is None:  # the caller passes a state_dict
            return super().from_pretrained(
                name, *args, output_loading_info=output_loading_info, **kwargs
            )
        hub_arguments = {key: kwargs[key] for key in _HUB_ARGUMENTS if kwargs.get(key) is not None}
        paths = find_weights(name, kwargs.get("variant"), hub_arguments)
        config = kwargs.get("config")
        if not isinstance(config, PreTrainedConfig):
            config = cls.config_class.from_pretrained(config or name, **hub_arguments)
        _check_size(cls, config, paths)
        kwargs |= {"use_safetensors": True, "ignore_mismatched_sizes": True}
        loaded: Any = super().from_pretrained(name, *args, output_loading_info=True, **kwargs)
        model, info = loaded
        if not output_loading_info:
            _check_keys(info, name)
        _check_finite(model, name)
        _convert_to_channels_last(model)
        return (model, info) if output_loading_info else model


def is_weights(name: str, variant: str | None) -> bool:
    """Return whether a file name is one of a variant's weights: a single file, a shard, or the
    index of shards."""
    return _WEIGHTS.fullmatch(name) is not None and variant_of(name) == variant


def variant_of(name: str) -> str | None:
    """Return the variant in the name of a weight file."""
    match = _WEIGHTS.fullmatch(name)
    return match and (match[1] or match[2])


def find_weights(
    name: str | Path, variant: str | None = None, hub_arguments: dict[str, Any] | None = None
) -> list[str]:
    """Return the paths of a model's weight files: a single one, or its shards.

    Args:
        name: a folder or a repository on the Hub.
        hub_arguments: `from_pretrained`'s arguments for a repository, such as `revision`.

    Raises:
        ValueError: the config or a weight file is missing, truncated or of another format.
    """
    hub_arguments = hub_arguments or {}
    location = Path(str(name), hub_arguments.get("subfolder", "")).as_posix()
    config = find_file(name, CONFIG, hub_arguments)
    if config is None:
        check_reachable(name, CONFIG, hub_arguments)
        raise ValueError(
            f"expected {CONFIG} in {location}, got none: name the folder of one model, as "
            "`level_1`, not that of a pipeline (or pass `subfolder=`)"
        )
    read_json(config, _ADVICE)
    paths = _weight_files(name, variant, hub_arguments, location)
    for path in paths:
        check_safetensors(path, _ADVICE)
    return paths


def find_file(name: str | Path, file: str, hub_arguments: dict[str, Any]) -> str | None:
    """Return the path of a file of a folder or of a repository on the Hub; `None` if there is none.

    Without the Hub, `None` can also mean that the file was not downloaded: see `check_reachable`.

    Args:
        hub_arguments: `from_pretrained`'s arguments for a repository, such as `revision`.
    """
    return cached_file(name, file, _raise_exceptions_for_missing_entries=False, **hub_arguments)


def check_reachable(name: str | Path, file: str, hub_arguments: dict[str, Any]):
    """Raise transformers' own `OSError` if `find_file` could not look for the file."""
    try:
        cached_file(name, file, **hub_arguments)
    except OSError as error:
        if error.__cause__ is not None:  # an error of the Hub; a missing file has no cause
            raise


def _weight_files(
    name: str | Path, variant: str | None, hub_arguments: dict[str, Any], location: str
) -> list[str]:
    def add_variant(file: str) -> str:
        stem, _, suffix = file.rpartition(".")
        return file if variant is None else f"{stem}.{variant}.{suffix}"

    single = add_variant(SAFE_WEIGHTS_NAME)
    index = add_variant(SAFE_WEIGHTS_INDEX_NAME)
    if (path := find_file(name, single, hub_arguments)) is not None:
        return [path]
    if (path := find_file(name, index, hub_arguments)) is None:
        check_reachable(name, single, hub_arguments)
        others: Any = "neither"
        if Path(location).is_dir():
            others = sorted(path.name for path in Path(location).glob("*model*"))
        raise ValueError(
            f"expected {single} or {index} in {location}, got {others}: pass the `variant=` that "
            "is there; pickled weights are not loaded"
        )
    weight_map = read_json(path, _ADVICE).get("weight_map")
    is_map = isinstance(weight_map, dict)
    if not is_map or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise ValueError(
            f"expected a weight_map of file names in {path}, got {weight_map}: {_ADVICE}"
        )
    shards = sorted(set(weight_map.values()))
    paths = {shard: find_file(name, shard, hub_arguments) for shard in shards}
    if missing := [shard for shard, path in paths.items() if path is None]:
        check_reachable(name, missing[0], hub_arguments)
        raise ValueError(f"expected {missing} in {location}, as {index} says, got none: {_ADVICE}")
    return [path for path in paths.values() if path is not None]


def _check_size(model_class: type[PreTrainedModel], config: PreTrainedConfig, paths: list[str]):
    """Raise a `ValueError` if the config's model is much larger than the weight files.

    transformers would allocate and initialize the difference before it reports missing weights.
    """
    num_parameters = _count_parameters(model_class, config)
    num_bytes = sum(Path(path).stat().st_size for path in paths)
    if num_parameters > 4 * num_bytes + 1_000_000:  # allows for tied weights and small models
        raise ValueError(
            f"expected a config that describes the weights in {paths}, got one of a model with "
            f"{num_parameters} parameters, more than {num_bytes} bytes can hold: {_ADVICE}"
        )


_COUNTS: dict[tuple[type, str], int] = {}


def _count_parameters(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> int:
    """The number of parameters of a config's model, which takes as long as half of a load."""
    key = model_class, config.to_json_string(use_diff=False)
    if key not in _COUNTS:
        with torch.device("meta"):
            _COUNTS[key] = model_class(config).num_parameters()
    return _COUNTS[key]


def _check_keys(info: dict[str, Any], name: str | Path):
    problems = []
    for kind in ("missing", "unexpected", "mismatched"):
        if keys := sorted(map(str, info[f"{kind}_keys"])):
            problems.append(f"{len(keys)} {kind}: {_shorten(keys)}")
    if problems:
        raise ValueError(
            f"expected the weights in {name} to be those of its config, got "
            f"{'; '.join(problems)}. {_ADVICE}"
        )


def _check_finite(model: PreTrainedModel, name: str | Path):
    keys = [
        key
        for key, value in model.state_dict().items()
        if value.is_floating_point() and not value.is_meta and not value.isfinite().all()
    ]
    if keys:
        raise ValueError(
            f"expected finite weights in {name} as {model.dtype}, got NaN or infinity in "
            f"{_shorten(keys)}"
        )


def _convert_to_channels_last(model: PreTrainedModel):
    """Lay out the weights of convolutions as their inputs: else each call does it again."""
    for weight in model.parameters():
        if weight.ndim == 4 and not weight.is_meta:
            weight.data = weight.data.contiguous(memory_format=torch.channels_last)


def _shorten(keys: list[str]) -> str:
    return ", ".join(keys[:10]) + (", …" if len(keys) > 10 else "")
