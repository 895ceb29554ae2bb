"""Saving a pipeline to a folder, pushing it to the Hub, and loading it again."""

import hashlib
import json
import os
import re
import shlex
import sys
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusers
from diffusers.pipelines import pipeline_loading_utils
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils.sha import sha_fileobj

from ..configuration.level import ProgressiveVAELevelConfig
from ..configuration.prior import ProgressiveVAEPriorConfig
from ..models.modeling_utils import is_weights, variant_of
from ..paths import replacing
from ..serialization import pop_version, read_json, version_fields
from .model_card import IMAGES, Configs, is_generated, model_card
from .remote_code import files_with_code, is_code

PACKAGE = __name__.partition(".")[0]
LOADED_BY = ["save_pretrained", "from_pretrained"]
INDEX = "model_index.json"
CARD = "README.md"
METRICS = "metrics.json"
# Advice of error messages about damaged files.
_SAVE_AGAIN = "save the pipeline again, or download it again"
_EVALUATE_AGAIN = "delete it, and evaluate the pipeline again (examples/train.py --phase evaluate)"

_SLOT = re.compile(r"prior|level_\d")
TEXT_ENCODER = "text_encoder"
TOKENIZER = "tokenizer"
TEXT_ENCODER_ID = "text_encoder_id"
_PART_FILE = re.compile(rf"({_SLOT.pattern}|{TEXT_ENCODER}|{TOKENIZER})/(.+)")


def register(pipeline: type[DiffusionPipeline], *parts: type):
    """Register a pipeline and its parts in diffusers, so that it loads them by name.

    Otherwise diffusers writes module paths into `model_index.json`, which it loads from a folder
    but not from the Hub. A registered package also has precedence over code in a repository.
    """
    setattr(diffusers, pipeline.__name__, pipeline)
    setattr(diffusers.pipelines, PACKAGE, sys.modules[PACKAGE])
    classes = {part.__name__: LOADED_BY for part in parts}
    pipeline_loading_utils.LOADABLE_CLASSES[PACKAGE] = classes
    pipeline_loading_utils.ALL_IMPORTABLE_CLASSES.update(classes)


class HubPipeline(DiffusionPipeline):
    """A `DiffusionPipeline` that writes a model card and pushes its files as one commit."""

    if TYPE_CHECKING:
        # By diffusers' annotation any attribute exists, and calls of missing methods would pass.
        def __getattr__(self, name: str) -> object: ...

    def register_to_config(self, **kwargs):
        super().register_to_config(**{**kwargs, **version_fields("_")})

    def to_json_string(self) -> str:
        """The contents of `model_index.json`.

        Without a text encoder they are those of earlier versions, which can load the pipeline.
        """
        contents = json.loads(super().to_json_string())
        for name in (TEXT_ENCODER, TOKENIZER, TEXT_ENCODER_ID):
            if contents.get(name) in (None, [None, None]):
                contents.pop(name, None)
        return json.dumps(contents, indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """Load a pipeline as `DiffusionPipeline.from_pretrained` does.

        Raises:
            ValueError: parts that are damaged, do not fit each other, or are not of this package;
                or `subfolder` is not `None`.
        """
        _check_subfolder(kwargs.get("subfolder"))
        for name, part in kwargs.items():
            if _is_slot(name) and part is not None and not hasattr(part, "config"):
                raise ValueError(f"expected {name} to be a model or None, got {part!r}")
        folder = Path(pretrained_model_name_or_path)
        if folder.is_dir() and not (folder / INDEX).is_file():
            got = "none"
            if (folder / "config.json").is_file():
                got = "config.json: load a single part with its own class"
            raise ValueError(
                f"expected the folder of a pipeline, with {INDEX}, in {folder}, got {got}"
            )
        return super().from_pretrained(os.fspath(pretrained_model_name_or_path), **kwargs)

    @classmethod
    def _dict_from_json_file(cls, json_file):
        contents = read_json(json_file, _SAVE_AGAIN)
        class_name = contents.get("_class_name")
        if isinstance(class_name, list) and len(class_name) == 2:
            class_name = class_name[1]  # [file, class] of a repository with code: not needed here
            contents["_class_name"] = class_name
        if not isinstance(class_name, str):
            raise ValueError(
                f"expected a _class_name in {json_file}, got {class_name!r}: {_SAVE_AGAIN}"
            )
        classes = pipeline_loading_utils.LOADABLE_CLASSES[PACKAGE]
        for name, value in contents.items():
            if not _is_slot(name) or value == [None, None]:
                continue
            if not _is_part(value) or (value[0] == PACKAGE and value[1] not in classes):
                raise ValueError(
                    f"expected [library, class] as {name} in {json_file}, got {value!r}: "
                    f"{_SAVE_AGAIN}"
                )
        return contents

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs):
        config_dict = dict(config_dict)
        pop_version(config_dict, INDEX, "_")
        return super().extract_init_dict(config_dict, **kwargs)

    def save_pretrained(  # type: ignore[override]  # unknown names are errors
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
        """Write the parts, `model_index.json` and a card; a card written by hand is preserved.

        Args:
            safe_serialization: only `True`: weights are never pickled.
            variant: `"fp16"` writes `model.fp16.safetensors` beside other weights; cast first.
            push_to_hub: push the folder by `push_folder` with the following arguments.
            repo_id: default: the folder's name.
        """
        if not safe_serialization:
            raise ValueError(
                "expected safe_serialization=True, got False: weights are never pickled"
            )
        _check_subfolder(subfolder)
        folder = Path(save_directory)
        super().save_pretrained(folder, variant=variant, max_shard_size=max_shard_size)
        write_card(folder)
        if push_to_hub:
            push_folder(
                folder,
                repo_id or folder.resolve().name,
                commit_message,
                private,
                token,
                create_pr,
                variant,
                with_code,
                revision,
            )

    def push_to_hub(  # type: ignore[override]  # returns the commit, not only its address
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
            ValueError: `subfolder` is not `None`: diffusers cannot load a pipeline from one.
        """
        _check_subfolder(subfolder)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, safe_serialization, variant)
            return push_folder(
                folder,
                repo_id,
                commit_message,
                private,
                token,
                create_pr,
                variant,
                with_code,
                revision,
            )


def _check_subfolder(subfolder: str | None):
    if subfolder:
        raise ValueError(
            f"expected subfolder=None, got {subfolder!r}: diffusers loads no pipeline from a "
            "subfolder of a repository; use another repository or revision"
        )


def write_card(folder: str | Path):
    """Write the card of the pipeline in a folder, with the metrics and images of its weights.

    A card written by hand is preserved.

    Raises:
        ValueError: `metrics.json` is damaged or incomplete.
    """
    folder = Path(folder)
    card = folder / CARD
    if card.is_file() and not is_generated(card.read_text(encoding="utf-8")):
        return
    with replacing(card) as temporary:
        make_card(folder, folder.as_posix()).save(temporary)


def make_card(folder: Path, repository: str, with_code: bool = False) -> ModelCard:
    """Return the card of the pipeline in a folder, with the metrics and images of its weights.

    Args:
        repository: the name or folder that the card loads the pipeline from.
        with_code: see `push_folder`.

    Raises:
        ValueError: `metrics.json` is damaged or incomplete.
    """
    names = metric_files(folder)
    metrics = read_json(folder / METRICS, _EVALUATE_AGAIN) if names else None
    images = [name for name in names if name != METRICS]
    configs: Configs = {
        part: _config_class(part).from_pretrained(folder / part) for part in pipeline_parts(folder)
    }
    index = read_json(folder / INDEX, _SAVE_AGAIN)
    variant = _default_variant(folder)
    try:
        return model_card(
            repository,
            configs,
            index["image_size"],
            metrics,
            images,
            variant,
            with_code,
            index.get("sampling"),
            has_texts=bool(index.get(TEXT_ENCODER_ID) or _text_parts(folder)),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"expected metrics in {folder / METRICS}, got {error!r}: {_EVALUATE_AGAIN}"
        ) from error


def _config_class(part: str) -> type[ProgressiveVAEPriorConfig | ProgressiveVAELevelConfig]:
    return ProgressiveVAEPriorConfig if part == "prior" else ProgressiveVAELevelConfig


def _default_variant(folder: Path) -> str | None:
    """Return `None` if there are weights without a variant in a folder, else the first variant."""
    variants = {variant_of(path.name) or "" for path in _safetensors(folder)}
    return min(variants, default="") or None


def weights_digest(folder: Path) -> str:
    """Return a SHA-256 of the weight files, without variants, of the pipeline in a folder."""
    digest = hashlib.sha256()
    for path in _safetensors(folder):
        if is_weights(path.name, None):
            with path.open("rb") as file:
                digest.update(sha_fileobj(file))
    return digest.hexdigest()


def metric_files(folder: Path) -> list[str]:
    """Return the names of `metrics.json` and its images; [] if they belong to other weights than
    those in the folder."""
    path = folder / METRICS
    metrics = read_json(path, _EVALUATE_AGAIN) if path.is_file() else {}
    if metrics.get("weights") != weights_digest(folder):
        return []
    return [METRICS, *(name for name in IMAGES if (folder / name).is_file())]


def create_repository(
    repo_id: str,
    private: bool | None = None,
    token: str | None = None,
    repo_type: str | None = None,
    space_sdk: str | None = None,
) -> str:
    """Create a repository unless it exists, and return its full name.

    Raises:
        ValueError: it exists with another visibility than `private`.
    """
    api = HfApi(token=token)
    repo_id = api.create_repo(
        repo_id, private=private, exist_ok=True, repo_type=repo_type, space_sdk=space_sdk
    ).repo_id
    # `create_repo` ignores `private` if the repository exists, and private files must not become
    # public.
    if private is not None and api.repo_info(repo_id, repo_type=repo_type).private != private:
        visibility = {True: "private", False: "public"}
        raise ValueError(
            f"expected {repo_id} to be {visibility[private]}, got a {visibility[not private]} "
            "repository: "
            "change its visibility in its settings, or push to another one"
        )
    return repo_id


def ensure_writable_repository(repo_id: str, private: bool | None = None):
    """Check before training that its results can be pushed; create the repository.

    Warns if the Hub cannot be reached, as it may be available later.

    Raises:
        ValueError: an invalid name, a repository of another visibility, or a token without write
            permission.
    """
    try:
        repo_id = create_repository(repo_id, private)
        HfApi().auth_check(repo_id, write=True)  # an existing repository may be somebody else's
    except Exception as error:
        if isinstance(error, HfHubHTTPError):
            if error.response.status_code in (401, 403):
                raise ValueError(
                    f"expected a token that may write to {repo_id}, got {error}: run "
                    "`hf auth login`"
                ) from error
        elif isinstance(error, ValueError):
            raise
        warnings.warn(f"the Hub cannot be reached, training continues: {error}", stacklevel=2)


def push_or_warn(folder: str | Path, repo_id: str, **options):
    """Call `push_folder`, and turn errors into a warning, so that training continues."""
    folder = str(Path(folder).resolve())
    try:
        print(f"pushed {push_folder(folder, repo_id, **options)}")
    except Exception as error:
        arguments = [repr(folder), repr(repo_id), *(f"{k}={v!r}" for k, v in options.items())]
        code = "from progressive_vae.hub import push_folder; "
        code += f"push_folder({', '.join(arguments)})"
        warnings.warn(
            f"not pushed to {repo_id}: {error}\nNothing is lost, the files are in {folder}. To "
            f"push them later: python -c {shlex.quote(code)}",
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
    """Push the pipeline in a folder as one commit: all of its files become visible, or none.

    The files are those of the parts in `model_index.json`, the card, metrics and images; not
    checkpoints, caches or logs. The commit also deletes files of earlier pushes that the pipeline
    no longer has. It preserves a card written by hand, and weights of other variants. After an
    interrupted push the repository is unchanged, and the push can be repeated.

    Args:
        private: visibility of a new repository; an existing one must have it already. `None` is
            the default of the account or organization.
        token: default: that of `hf auth login`.
        create_pr: open a pull request instead of writing to `main`.
        variant: push only weights of this variant; the repository's card and metrics do not change.
        with_code: also push the code of this package. Without an installation the repository is
            then loaded with `trust_remote_code=True`.
        revision: the branch to push to, which is created from `main` if it does not exist;
            default: `main`.

    Raises:
        ValueError: the folder has no complete pipeline, or the repository another visibility.
    """
    folder = Path(folder)
    names = pipeline_files(folder, variant)
    repo_id = create_repository(repo_id, private, token)
    api = HfApi(token=token)
    if revision is not None:
        _create_branch(api, repo_id, revision, create_pr)
    repo_files = api.list_repo_files(repo_id, revision=revision)
    if CARD in repo_files and CARD in names:
        path = Path(api.hf_hub_download(repo_id, CARD, revision=revision))
        if variant is not None or not is_generated(path.read_text(encoding="utf-8")):
            names.remove(CARD)

    # The contents to commit: files of the folder, some of which are changed for the repository.
    files: dict[str, Path | bytes] = {name: folder / name for name in names}
    if with_code:
        configs = [name for name in names if name.endswith(("config.json", INDEX))]
        files |= files_with_code({name: (folder / name).read_bytes() for name in configs})
    if CARD in names:
        if is_generated((folder / CARD).read_text(encoding="utf-8")):
            files[CARD] = str(make_card(folder, repo_id, with_code)).encode()
    outdated = [name for name in repo_files if _is_outdated(name, list(files), variant)]
    operations: list[Any] = [CommitOperationDelete(name) for name in outdated]
    operations += [CommitOperationAdd(name, contents) for name, contents in files.items()]
    message = commit_message or "Upload ProgressiveVAEPipeline"
    return api.create_commit(
        repo_id, operations, commit_message=message, create_pr=create_pr, revision=revision
    )


def _create_branch(api: HfApi, repo_id: str, branch: str, create_pr: bool):
    """Create a branch unless it exists."""
    if branch.startswith("refs/"):  # a pull request, which exists
        return
    try:
        api.create_branch(repo_id, branch=branch, exist_ok=True)
    except HfHubHTTPError as error:
        # A pull request to somebody else's branch does not need write permission.
        if not (create_pr and error.response.status_code == 403):
            raise


def pipeline_files(folder: Path, variant: str | None = None) -> list[str]:
    """Return the names, relative to the folder, of the files of its pipeline.

    Raises:
        ValueError: there is no pipeline, or a part of it is missing.
    """
    if not (folder / INDEX).is_file():
        raise ValueError(f"expected a saved pipeline, with {INDEX}, in folder, got {folder}")
    names = [INDEX]
    if (folder / CARD).is_file():
        names.append(CARD)
    if variant is None:
        names += metric_files(folder)
    text_parts = _text_parts(folder)
    for part in [*pipeline_parts(folder), *text_parts]:
        files = sorted(path.relative_to(folder).as_posix() for path in (folder / part).glob("*"))
        if part == TOKENIZER:  # which has no weights
            names += files
            continue
        weights = [name for name in files if _is_weights_of(name, variant)]
        if not weights or f"{part}/config.json" not in files:
            raise ValueError(
                f"expected config.json and weights of variant={variant} in {folder / part}, which "
                f"{INDEX} names, got {files}"
            )
        names += [f"{part}/config.json", *weights]
    return names


def pipeline_parts(folder: str | Path) -> list[str]:
    """Return the sorted names of the parts of the pipeline in a folder: `level_1` and so on.

    Subfolders of an earlier pipeline with more parts are ignored.

    Raises:
        ValueError: `model_index.json` is missing or damaged.
    """
    index = read_json(Path(folder) / INDEX, _SAVE_AGAIN)
    return sorted(name for name, value in index.items() if _is_slot(name) and _is_part(value))


def _text_parts(folder: Path) -> list[str]:
    """Return which of text encoder and tokenizer the pipeline in a folder has."""
    index = read_json(folder / INDEX, _SAVE_AGAIN)
    return [name for name in (TEXT_ENCODER, TOKENIZER) if _is_part(index.get(name))]


def _safetensors(folder: Path) -> list[Path]:
    """Return the sorted weight files of the pipeline in a folder, of all variants."""
    parts = pipeline_parts(folder) if (folder / INDEX).is_file() else []
    return [path for part in parts for path in sorted((folder / part).glob("model*.safetensors"))]


def _is_slot(name: str) -> bool:
    return _SLOT.fullmatch(name) is not None


def _is_part(value) -> bool:
    return isinstance(value, list) and [*map(type, value)] == [str, str]


def _is_weights_of(name: str, variant: str | None) -> bool:
    """Return whether `part/file` is a weight file of a variant."""
    match = _PART_FILE.fullmatch(name)
    return match is not None and is_weights(match[2], variant)


def _is_outdated(name: str, names: list[str], variant: str | None) -> bool:
    """Return whether a file of the repository is of an earlier pipeline, to be deleted."""
    if name in names:
        return False
    if is_code(name):
        return True
    if match := _PART_FILE.fullmatch(name):
        is_in_part = any(other.startswith(f"{match[1]}/") for other in names)
        return not is_in_part or _is_weights_of(name, variant)
    return variant is None and name in (METRICS, *IMAGES)
