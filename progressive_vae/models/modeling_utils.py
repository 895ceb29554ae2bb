"""Weights on the disk: those of their config, whole, unchanged and finite, or an error."""

import inspect
import json
import os
import re
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from ..configuration.level import TRAINING_FIELDS
from ..serialization import check_safetensors, checksum, file_parts, read_json

CONFIG = "config.json"
WEIGHTS_SEAL, CONFIG_SEAL = "weights_crc32", "config_crc32"  # in the header of a weight file

# What a config may say otherwise without a change of what the weights say.
_FREE_FIELDS = {*TRAINING_FIELDS, "id2label", "label2id", "finer_fingerprint", "architectures",
                "dtype", "transformers_version", "progressive_vae",
                "format_version", "auto_map"}  # fmt: skip
_PUSH_OPTIONS = ("commit_message", "private", "token", "create_pr", "max_shard_size",
                 "revision")  # fmt: skip
_SAVE_ARGUMENTS = [*inspect.signature(PreTrainedModel.save_pretrained).parameters][2:]
_WHERE_FROM = ("cache_dir", "proxies", "token", "revision", "local_files_only", "subfolder")
_ADVICE = "save the model again, or download it anew"

# model.safetensors, model.fp16.safetensors, their shards, and the index of shards.
_WEIGHTS = re.compile(
    r"model(?:\.(.+?))?(?:-\d+-of-\d+)?\.safetensors(?:\.index(?:\.(.+))?\.json)?"
)

# What may be built beyond what a weight file holds: tied weights, and a little for small models.
_TIMES, _TENSORS, _NUMBERS = 4, 1_000, 1_000_000


class VerifiedPreTrainedModel(PreTrainedModel):
    """A model that is loaded whole or not at all.

    `save_pretrained` seals weight files: their headers hold the checksums of the weights and of
    what the config says of them. Files without a seal are loaded too, if all else is right.
    """

    @wraps(PreTrainedModel.save_pretrained)  # diffusers reads in the signature what it may ask for
    def save_pretrained(self, save_directory, *args, **kwargs):
        folder = Path(save_directory)
        kwargs |= zip(_SAVE_ARGUMENTS, args, strict=False)
        is_pushed = kwargs.pop("push_to_hub", False)  # sealed, so later
        if is_pushed and kwargs.get("variant") is not None:
            raise ValueError(
                f"expected variant=None with push_to_hub=True, got {kwargs['variant']!r}: push the "
                "variant of a whole pipeline, or save it and upload the folder"
            )
        options = {name: kwargs[name] for name in _PUSH_OPTIONS if name in kwargs}
        repo_id = kwargs.pop("repo_id", folder.resolve().name)
        if kwargs.get("is_main_process", True) and not kwargs.get("distributed_checkpoint"):
            self._replace_saved(folder, **kwargs)
        else:
            super().save_pretrained(save_directory, **kwargs)
        if is_pushed:
            self.push_to_hub(repo_id, **options)

    def _replace_saved(self, folder: Path, **kwargs):
        """Save into a folder, and delete the weights of the same variant that were there.

        transformers deletes the shards of other variants as well. So the files are written into a
        temporary folder first, where it finds none.
        """
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".incomplete-", dir=folder) as temporary:
            super().save_pretrained(temporary, **kwargs)
            seal(temporary)
            new = [path.name for path in Path(temporary).iterdir()]
            for name in new:
                os.replace(Path(temporary, name), folder / name)
        for path in folder.glob("model*") if new else ():  # not every process writes
            if is_weights(path.name, kwargs.get("variant")) and path.name not in new:
                path.unlink()  # a single file would hide shards

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path, *args, output_loading_info: bool = False, **kwargs
    ):
        """As transformers' own, but every part of the model comes from the files.

        Raises:
            ValueError: weights that are missing or left over for this config, that have changed
                since they were saved, or that are not finite; a config that asks for much more
                than the weight files hold, before any of it is built.
            OSError: a repository, revision or file that cannot be reached.
        """
        name = pretrained_model_name_or_path
        if name is None:  # the caller has a state_dict, and answers for it
            return super().from_pretrained(
                name, *args, output_loading_info=output_loading_info, **kwargs
            )
        source = {key: kwargs[key] for key in _WHERE_FROM if kwargs.get(key) is not None}
        headers = check_files(name, kwargs.get("variant"), source)
        kwargs |= {"use_safetensors": True, "ignore_mismatched_sizes": True}
        with _bounded(headers, name):
            model, info = super().from_pretrained(name, *args, output_loading_info=True, **kwargs)
        _check_keys(info, name)
        _check_finite(model, name)
        return (model, info) if output_loading_info else model


def is_weights(name: str, variant: str | None) -> bool:
    """Whether a file holds weights of a variant: all of them, a shard, or the index of shards."""
    return _WEIGHTS.fullmatch(name) is not None and variant_of(name) == variant


def variant_of(name: str) -> str | None:
    """The variant in the name of a weight file."""
    found = _WEIGHTS.fullmatch(name)
    return found and (found[1] or found[2])


def seal(folder: str | Path, again: bool = False):
    """Write the checksums of the weights and of their config into the headers of the weight files
    of a folder that have none; with `again` into all, after a change that was meant.

    Raises:
        ValueError: a file that is damaged.
    """
    path = Path(folder) / CONFIG
    if not path.is_file():
        return
    config = _config_checksum(read_json(path, _ADVICE))
    for path in sorted(Path(folder).glob("model*.safetensors")):
        header, start = _header(path)
        metadata = header.pop("__metadata__", {})
        if WEIGHTS_SEAL in metadata and not again:
            continue
        weights = _weights_checksum(path, header, start)
        metadata |= {WEIGHTS_SEAL: str(weights), CONFIG_SEAL: str(config)}
        text = json.dumps({"__metadata__": metadata, **header}).encode()
        text += b" " * (-len(text) % 8)  # the format aligns what follows
        temporary = path.with_name(path.name + ".incomplete")
        with temporary.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for part in file_parts(path, start):
                file.write(part)
        os.replace(temporary, path)


def check_files(
    name: str | Path, variant: str | None = None, source: dict[str, Any] | None = None
) -> list[dict]:
    """The headers of the weight files of a model, checked against their seals.

    Args:
        name: a folder or a repository on the Hub; `source` are `from_pretrained`'s keywords for it.

    Raises:
        ValueError: a file that is missing, damaged, or not as it was when it was saved.
    """
    source = source or {}
    where = Path(str(name), source.get("subfolder", "")).as_posix()
    config = find_file(name, CONFIG, source)
    if config is None:
        check_reachable(name, CONFIG, source)
        raise ValueError(
            f"expected {CONFIG} in {where}, got none: name the folder of one part, as "
            "`level_1`, not that of a pipeline (or pass `subfolder=`)"
        )
    expected = _config_checksum(read_json(config, _ADVICE))
    headers = []
    for path in _weight_files(name, variant, source, where):
        header, start = _header(path)
        metadata = header.pop("__metadata__", {})
        if WEIGHTS_SEAL in metadata:
            found = str(_weights_checksum(path, header, start))
            if found != metadata[WEIGHTS_SEAL]:
                raise ValueError(
                    f"expected the weights that were saved in {path} (CRC-32 "
                    f"{metadata[WEIGHTS_SEAL]}), got others ({found}), the file is damaged: "
                    f"{_ADVICE}"
                )
            if metadata.get(CONFIG_SEAL, str(expected)) != str(expected):
                raise ValueError(
                    f"expected {config} to say of the weights what it said when they were saved, "
                    f"got another config: {_ADVICE}, or, if the change is meant, call "
                    f"`progressive_vae.weights.seal({where!r}, again=True)`"
                )
        headers.append(header)
    return headers


def find_file(name: str | Path, file: str, source: dict[str, Any]) -> str | None:
    """The path of a file of a folder or of a repository on the Hub; `None` where there is none.

    Without the Hub, `None` can also mean that the file was not downloaded: see `check_reachable`.

    Args:
        source: `from_pretrained`'s keywords for a repository, such as `revision` or `subfolder`.
    """
    return cached_file(name, file, _raise_exceptions_for_missing_entries=False, **source)


def check_reachable(name: str | Path, file: str, source: dict[str, Any]):
    """Raise transformers' own `OSError` if `find_file` had no way to look for the file."""
    try:
        cached_file(name, file, **source)
    except OSError as error:
        if error.__cause__ is not None:  # an error of the Hub; a missing file has no cause
            raise


def _weight_files(
    name: str | Path, variant: str | None, source: dict[str, Any], where: str
) -> list[str]:
    """One file, or its shards."""

    def of_variant(file: str) -> str:
        stem, _, suffix = file.rpartition(".")
        return file if variant is None else f"{stem}.{variant}.{suffix}"

    single, index = of_variant(SAFE_WEIGHTS_NAME), of_variant(SAFE_WEIGHTS_INDEX_NAME)
    if (path := find_file(name, single, source)) is not None:
        return [path]
    if (path := find_file(name, index, source)) is None:
        check_reachable(name, single, source)
        others = sorted(path.name for path in Path(where).glob("*model*"))
        shown = others if Path(where).is_dir() else "neither"
        raise ValueError(
            f"expected {single} or {index} in {where}, got {shown}: pass the `variant=` that is "
            "there; pickled weights are not loaded"
        )
    shards = read_json(path, _ADVICE).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(s, str) for s in shards.values()):
        raise ValueError(f"expected a weight_map of file names in {path}, got {shards}: {_ADVICE}")
    found = {shard: find_file(name, shard, source) for shard in sorted(set(shards.values()))}
    if missing := [shard for shard, path in found.items() if path is None]:
        check_reachable(name, missing[0], source)
        raise ValueError(f"expected {missing} in {where}, as {index} says, got none: {_ADVICE}")
    return [path for path in found.values() if path is not None]


def _header(path: str | Path) -> tuple[dict[str, Any], int]:
    """What a safetensors file says of its tensors, and where their bytes begin."""
    check_safetensors(path, _ADVICE)
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return json.loads(file.read(length)), 8 + length


def _weights_checksum(path: str | Path, table: dict[str, Any], start: int) -> int:
    parts = file_parts(path, start)
    return checksum([json.dumps(table, sort_keys=True).encode(), *parts])


def _config_checksum(config: dict[str, Any]) -> int:
    def what_matters(value):
        if isinstance(value, dict):
            return {k: what_matters(v) for k, v in value.items() if k not in _FREE_FIELDS}
        return value

    return checksum([json.dumps(what_matters(config), sort_keys=True).encode()])


@contextmanager
def _bounded(headers: list[dict], where: str | Path) -> Iterator[None]:
    """While it lasts, building a model of more weights than the files hold is an error."""
    shapes = [tensor["shape"] for header in headers for tensor in header.values()]
    numbers = sum(torch.Size(shape).numel() for shape in shapes)
    most = {"tensors": _TIMES * len(shapes) + _TENSORS, "numbers": _TIMES * numbers + _NUMBERS}
    built, thread = {"tensors": 0, "numbers": 0}, threading.get_ident()

    def count(module: nn.Module, name: str, parameter: nn.Parameter | None):
        # What is built for loading has no memory yet; that of other threads is not ours to count.
        if parameter is None or not parameter.is_meta or threading.get_ident() != thread:
            return
        built["tensors"] += 1
        built["numbers"] += parameter.numel()
        if any(built[kind] > most[kind] for kind in most):
            raise ValueError(
                f"expected a config of about the {len(shapes)} tensors with {numbers} numbers "
                f"that the weight files of {where} hold, got one that asks for more than "
                f"{built['tensors']} with {built['numbers']}: {_ADVICE}"
            )

    handle = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()


def _check_keys(info: dict[str, Any], where: str | Path):
    kinds = {"missing": "missing_keys", "left over": "unexpected_keys",
             "of another shape": "mismatched_keys"}  # fmt: skip
    found = {word: sorted(map(str, info[kind])) for word, kind in kinds.items() if info.get(kind)}
    if found:
        shown = "; ".join(
            f"{len(keys)} {word}: {', '.join(keys[:10])}{', …' if len(keys) > 10 else ''}"
            for word, keys in found.items()
        )
        raise ValueError(
            f"expected the weights in {where} to be those of its config, got {shown}. {_ADVICE}"
        )


def _check_finite(model: PreTrainedModel, where: str | Path):
    wrong = [
        name
        for name, value in model.state_dict().items()
        if value.is_floating_point() and not value.is_meta and not value.isfinite().all()
    ]
    if wrong:
        raise ValueError(
            f"expected finite weights in {where} as {model.dtype}, got others in "
            f"{', '.join(wrong[:10])}{', …' if len(wrong) > 10 else ''}"
        )
