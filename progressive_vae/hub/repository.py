"""A pipeline as a repository: what is saved, what is pushed, and how it is found again."""

import hashlib
import os
import re
import shlex
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import diffusers
from diffusers import DiffusionPipeline
from diffusers.pipelines import pipeline_loading_utils
from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils.sha import sha_fileobj

from ..models.modeling_utils import is_weights, variant_of
from ..paths import replacing
from ..serialization import pop_version, read_json, version_fields
from .model_card import PICTURES, for_repository, is_generated, model_card
from .remote_code import files_with_code, is_code

LOADED_BY = ["save_pretrained", "from_pretrained"]
INDEX, CARD, METRICS = "model_index.json", "README.md", "metrics.json"
_SAVE = "save the pipeline again, or download it anew"  # what helps against a damaged file
_MEASURE = "delete it, and measure the pipeline again (examples/train.py --phase evaluate)"

_SLOT = re.compile(r"prior|level_\d")
_PART = re.compile(rf"({_SLOT.pattern})/(.+)")


def register(pipeline: type[DiffusionPipeline], *parts: type):
    """Make diffusers find a pipeline and its parts by name, in folders and on the Hub.

    Without this diffusers writes module paths into `model_index.json`, which it reads back from a
    folder and refuses on the Hub. As one of diffusers' own modules the package also comes before
    the code of parts that a repository may hold.
    """
    setattr(diffusers, pipeline.__name__, pipeline)
    setattr(diffusers.pipelines, __package__, sys.modules[__package__])
    classes = {part.__name__: LOADED_BY for part in parts}
    pipeline_loading_utils.LOADABLE_CLASSES["progressive_vae"] = classes
    pipeline_loading_utils.ALL_IMPORTABLE_CLASSES.update(classes)


class HubPipeline(DiffusionPipeline):
    """A pipeline that writes a card of its own, and whose pushes are one commit of its files."""

    def register_to_config(self, **kwargs):
        super().register_to_config(**{**kwargs, **version_fields("_")})

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """As diffusers' own.

        Raises:
            ValueError: parts that are damaged, do not belong together, or are none of this package;
                or `subfolder` is not `None`.
        """
        _check_subfolder(kwargs.get("subfolder"))
        for name, part in kwargs.items():
            if _is_slot(name) and part is not None and not hasattr(part, "config"):
                raise ValueError(f"expected {name} to be a model or None, got {part!r}")
        folder = Path(pretrained_model_name_or_path)
        if folder.is_dir() and not (folder / INDEX).is_file():
            is_part = (folder / "config.json").is_file()
            what = "config.json: this is one part, which its own class loads" if is_part else "none"
            raise ValueError(f"expected the folder of a pipeline, with {INDEX}, in {folder}, "
                             f"got {what}")  # fmt: skip
        return super().from_pretrained(os.fspath(pretrained_model_name_or_path), **kwargs)

    @classmethod
    def _dict_from_json_file(cls, json_file):
        contents = read_json(json_file, _SAVE)
        name = contents.get("_class_name")
        if isinstance(name, list) and len(name) == 2:  # [file, class] of a repository with code
            name = contents["_class_name"] = name[1]  # this class needs none of that code
        if not isinstance(name, str):
            raise ValueError(f"expected a _class_name in {json_file}, got {name!r}: {_SAVE}")
        classes = pipeline_loading_utils.LOADABLE_CLASSES["progressive_vae"]
        for name, value in contents.items():
            if not _is_slot(name) or value == [None, None]:
                continue
            if not _is_part(value) or (value[0] == __package__ and value[1] not in classes):
                raise ValueError(
                    f"expected [library, class] as {name} in {json_file}, got {value!r}: {_SAVE}"
                )
        return contents

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs):
        config_dict = dict(config_dict)
        pop_version(config_dict, INDEX, "_")
        return super().extract_init_dict(config_dict, **kwargs)

    def save_pretrained(
        self,
        save_directory,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        with_code: bool = False,
        subfolder: str | None = None,
        revision: str | None = None,
    ):
        """Write the parts, `model_index.json` and a card, unless one written by hand is there.

        Args:
            safe_serialization: only `True`: weights are never pickled.
            variant: `"fp16"` writes `model.fp16.safetensors` beside other weights; cast first.
            push_to_hub: then push the folder, as `push_folder` does with what follows; `repo_id`
                is the folder's name where not given.
        """
        if not safe_serialization:
            raise ValueError("expected safe_serialization=True, got False: nothing is pickled")
        _check_subfolder(subfolder)
        folder = Path(save_directory)
        super().save_pretrained(folder, variant=variant, max_shard_size=max_shard_size)
        write_card(folder)
        if push_to_hub:
            repo_id = repo_id or folder.resolve().name
            push_folder(
                folder, repo_id, commit_message, private, token, create_pr, variant, with_code,
                revision,
            )  # fmt: skip

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        safe_serialization: bool = True,
        variant: str | None = None,
        with_code: bool = False,
        subfolder: str | None = None,
        revision: str | None = None,
    ) -> CommitInfo:
        """Push the pipeline as one commit; see `push_folder`.

        Raises:
            ValueError: `subfolder` is not `None`, as diffusers loads no pipeline from one.
        """
        _check_subfolder(subfolder)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, safe_serialization, variant)
            return push_folder(
                folder, repo_id, commit_message, private, token, create_pr, variant, with_code,
                revision,
            )  # fmt: skip


def _check_subfolder(subfolder: str | None):
    if subfolder:
        raise ValueError(
            f"expected subfolder=None, got {subfolder!r}: diffusers loads no pipeline from a "
            "subfolder of a repository; use a repository or a revision of its own"
        )


def write_card(folder: str | Path):
    """Write the card of the pipeline that a folder holds, with the metrics and pictures of its
    weights; a card written by hand stays."""
    folder = Path(folder)
    card = folder / CARD
    if card.is_file() and not is_generated(card.read_text(encoding="utf-8")):
        return
    found = figures(folder)
    metrics = read_json(folder / METRICS, _MEASURE) if found else None
    pictures = [name for name in found if name != METRICS]
    has_prior = "prior" in pipeline_parts(folder)
    try:
        made = model_card(folder.as_posix(), metrics, pictures, has_prior, _only_variant(folder))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"expected figures in {folder / METRICS}, got {error!r}: {_MEASURE}"
        ) from error
    with replacing(card) as temporary:
        made.save(temporary)


def _only_variant(folder: Path) -> str | None:
    """The variant of the weights in a folder, if there are none without a name."""
    variants = {variant_of(path.name) or "" for path in _safetensors(folder)}
    return min(variants, default="") or None


def weights_digest(folder: Path) -> str:
    """A hash of the weight files of the pipeline in a folder."""
    digest = hashlib.sha256()
    for path in _safetensors(folder):
        if is_weights(path.name, None):
            with path.open("rb") as file:
                digest.update(sha_fileobj(file))
    return digest.hexdigest()


def figures(folder: Path) -> list[str]:
    """Names of the files in a folder that say how good its pipeline is; [] if they are of other
    weights than those that lie there."""
    path = folder / METRICS
    metrics = read_json(path, _MEASURE) if path.is_file() else {}
    if metrics.get("weights") != weights_digest(folder):
        return []
    return [METRICS, *(name for name in PICTURES if (folder / name).is_file())]


def create_repository(
    repo_id: str,
    private: bool | None = None,
    token: str | None = None,
    repo_type: str | None = None,
    space_sdk: str | None = None,
) -> str:
    """Make sure that the repository exists; its full name.

    Raises:
        ValueError: it exists with another visibility than asked for.
    """
    api = HfApi(token=token)
    repo_id = api.create_repo(
        repo_id, private=private, exist_ok=True, repo_type=repo_type, space_sdk=space_sdk
    ).repo_id
    # `private` says nothing about a repository that was there before: nothing may be shown to the
    # public that was meant to be private.
    if private is not None and api.repo_info(repo_id, repo_type=repo_type).private != private:
        words = {True: "private", False: "public"}
        raise ValueError(
            f"expected {repo_id} to be {words[private]}, got a {words[not private]} repository: "
            "change its visibility in its settings, or push to another one"
        )
    return repo_id


def ensure_writable_repository(repo_id: str, private: bool | None = None):
    """Find out before hours of training, not after them, whether the results may be pushed.

    Raises:
        ValueError: a name that is none, a repository of another visibility, or a token that may not
            write to it. A network that is down is a warning, as it may be up then.
    """
    try:
        repo_id = create_repository(repo_id, private)
        HfApi().auth_check(repo_id, write=True)  # one that exists may be another's
    except Exception as error:
        if isinstance(error, HfHubHTTPError):
            if error.response.status_code in (401, 403):
                raise ValueError(
                    f"expected a token that may write to {repo_id}, got {error}: run "
                    "`hf auth login`"
                ) from error
        elif isinstance(error, ValueError):
            raise
        warnings.warn(f"the Hub cannot be reached, training goes on: {error}", stacklevel=2)


def push_or_warn(folder: str | Path, repo_id: str, **how):
    """`push_folder` in the course of a training, which is worth more than any error in here."""
    folder = str(Path(folder).resolve())
    try:
        print(f"pushed {push_folder(folder, repo_id, **how)}")
    except Exception as error:
        words = ", ".join([repr(folder), repr(repo_id), *(f"{k}={v!r}" for k, v in how.items())])
        later = f"from progressive_vae.hub import push_folder; push_folder({words})"
        warnings.warn(
            f"not pushed to {repo_id}: {error}\nNothing is lost, the files are in {folder}. To "
            f"push them later: python -c {shlex.quote(later)}",
            stacklevel=2,
        )


def push_folder(
    folder: str | Path,
    repo_id: str,
    commit_message: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    create_pr: bool = False,
    variant: str | None = None,
    with_code: bool = False,
    revision: str | None = None,
) -> CommitInfo:
    """Push the pipeline in a folder as one commit: all of it or nothing becomes visible.

    Only what `model_index.json` names is pushed, and the card, metrics and pictures beside it; no
    checkpoints, caches or logs. What an earlier push left there and the pipeline no longer has
    goes in the same commit; a card written by hand stays, and so do weights of other variants,
    which have to be pushed again themselves. An interrupted push leaves the repository as it was,
    and can be repeated.

    Args:
        private: visibility of a new repository; one that exists must have it already. `None` is
            what the account or organisation has as its default.
        token: where not given, that of `hf auth login`.
        create_pr: open a pull request instead of writing to `main`.
        variant: only the weights of this variant are new: the card and figures there are kept.
        with_code: the code of this package, too, for those who have not installed it. They load
            the repository with `trust_remote_code=True`.
        revision: the branch to push to, which is created from `main` where it does not exist;
            `main` if not given.

    Raises:
        ValueError: no whole pipeline in the folder, or a repository of another visibility.
    """
    folder = Path(folder)
    names = pipeline_files(folder, variant)
    repo_id = create_repository(repo_id, private, token)
    api = HfApi(token=token)
    if revision is not None:
        _create_branch(api, repo_id, revision, create_pr)
    there = api.list_repo_files(repo_id, revision=revision)
    if CARD in there and CARD in names:
        card = Path(api.hf_hub_download(repo_id, CARD, revision=revision)).read_text(
            encoding="utf-8"
        )
        if variant is not None or not is_generated(card):
            names.remove(CARD)
    files: dict[str, Path | bytes] = {name: folder / name for name in names}
    if with_code:
        configs = {
            n: (folder / n).read_bytes() for n in names if n.endswith(("config.json", INDEX))
        }
        files |= files_with_code(configs)
    if CARD in names:
        card = (folder / CARD).read_text(encoding="utf-8")
        files[CARD] = for_repository(card, repo_id, with_code).encode()
    outdated = [name for name in there if _is_outdated(name, list(files), variant)]
    operations: list[Any] = [CommitOperationDelete(name) for name in outdated]
    operations += [CommitOperationAdd(name, contents) for name, contents in files.items()]
    message = commit_message or "Upload ProgressiveVAEPipeline"
    return api.create_commit(
        repo_id, operations, commit_message=message, create_pr=create_pr, revision=revision
    )


def _create_branch(api: HfApi, repo_id: str, branch: str, create_pr: bool):
    """Create a branch unless it exists."""
    if branch.startswith("refs/"):  # of a pull request
        return
    try:
        api.create_branch(repo_id, branch=branch, exist_ok=True)
    except HfHubHTTPError as error:
        # A pull request to somebody else's branch needs no permission to write.
        if not (create_pr and error.response.status_code == 403):
            raise


def pipeline_files(folder: Path, variant: str | None = None) -> list[str]:
    """Names, relative to the folder, of the files that make up its pipeline.

    Raises:
        ValueError: there is none, or a part of it is missing.
    """
    if not (folder / INDEX).is_file():
        raise ValueError(f"expected a saved pipeline, with {INDEX}, in folder, got {folder}")
    names = [INDEX, *([CARD] if (folder / CARD).is_file() else [])]
    names += figures(folder) if variant is None else []
    for part in pipeline_parts(folder):
        files = sorted(path.relative_to(folder).as_posix() for path in (folder / part).glob("*"))
        weights = [name for name in files if _weights_of(name, variant)]
        if not weights or f"{part}/config.json" not in files:
            raise ValueError(
                f"expected config.json and weights of variant={variant} in {folder / part}, which "
                f"{INDEX} names, got {files}"
            )
        names += [f"{part}/config.json", *weights]
    return names


def pipeline_parts(folder: str | Path) -> list[str]:
    """The names of the parts of the pipeline in a folder, `level_1` and so on, sorted.

    Other parts may lie there, of a pipeline that was saved in the same folder before.

    Raises:
        ValueError: `model_index.json` is missing or damaged.
    """
    index = read_json(Path(folder) / INDEX, _SAVE)
    return sorted(name for name, value in index.items() if _is_slot(name) and _is_part(value))


def _safetensors(folder: Path) -> list[Path]:
    """The weight files of the parts of the pipeline in a folder, of all variants, sorted."""
    parts = pipeline_parts(folder) if (folder / INDEX).is_file() else []
    return [path for part in parts for path in sorted((folder / part).glob("model*.safetensors"))]


def _is_slot(name: str) -> bool:
    return _SLOT.fullmatch(name) is not None


def _is_part(value) -> bool:
    return isinstance(value, list) and [*map(type, value)] == [str, str]


def _weights_of(name: str, variant: str | None) -> bool:
    """Whether `part/file` holds weights of a variant."""
    part = _PART.fullmatch(name)
    return part is not None and is_weights(part[2], variant)


def _is_outdated(name: str, names: list[str], variant: str | None) -> bool:
    """Whether a file of the repository belongs to an earlier state of the pipeline."""
    if name in names:
        return False
    if is_code(name):
        return True
    if part := _PART.fullmatch(name):
        return f"{part[1]}/config.json" not in names or _weights_of(name, variant)
    return variant is None and name in (METRICS, *PICTURES)
