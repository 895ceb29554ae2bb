"""A pipeline as a repository: what is saved, what is pushed, and how it is found again."""

import json
import tempfile
from pathlib import Path
from typing import Any

import diffusers
from diffusers import DiffusionPipeline
from diffusers.pipelines import pipeline_loading_utils
from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi

from .card import PICTURES, for_repository, model_card
from .saved import stamp, take_stamp

LOADED_BY = ["save_pretrained", "from_pretrained"]
INDEX, CARD, METRICS = "model_index.json", "README.md", "metrics.json"


def register(pipeline: type[DiffusionPipeline], *parts: type):
    """Make diffusers find a pipeline and its parts by name, in folders and on the Hub.

    Without this diffusers writes module paths into `model_index.json`, which it reads back from a
    folder and refuses on the Hub.
    """
    setattr(diffusers, pipeline.__name__, pipeline)
    classes = {part.__name__: LOADED_BY for part in parts}
    pipeline_loading_utils.LOADABLE_CLASSES[__package__] = classes
    pipeline_loading_utils.ALL_IMPORTABLE_CLASSES.update(classes)


class HubPipeline(DiffusionPipeline):
    """A pipeline that writes a card of its own, and whose pushes are one commit of its files."""

    def register_to_config(self, **kwargs):
        super().register_to_config(**{**kwargs, **stamp("_")})

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs):
        config_dict = dict(config_dict)
        take_stamp(config_dict, INDEX, "_")
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
    ):
        """Write the parts, `model_index.json` and, if there is none, a card.

        Args:
            safe_serialization: only `True`: weights are never pickled.
            variant: `"fp16"` writes `model.fp16.safetensors` beside other weights; cast first.
            push_to_hub: then push the folder, as `push_folder` does with what follows; `repo_id`
                is the folder's name where not given.
        """
        if not safe_serialization:
            raise ValueError("expected safe_serialization=True, got False: nothing is pickled")
        folder = Path(save_directory)
        super().save_pretrained(folder, variant=variant, max_shard_size=max_shard_size)
        if not (folder / CARD).is_file():
            write_card(folder)
        if push_to_hub:
            repo_id = repo_id or folder.resolve().name
            push_folder(folder, repo_id, commit_message, private, token, create_pr)

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        safe_serialization: bool = True,
        variant: str | None = None,
    ) -> CommitInfo:
        """Push the pipeline as one commit; see `push_folder`.

        A card that the repository has already is kept.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, safe_serialization, variant)
            return push_folder(folder, repo_id, commit_message, private, token, create_pr, True)


def write_card(folder: str | Path):
    """Write the card of the pipeline that a folder holds, with its metrics and pictures."""
    folder = Path(folder)
    metrics = json.loads((folder / METRICS).read_text()) if (folder / METRICS).is_file() else None
    pictures = [name for name in PICTURES if (folder / name).is_file()]
    model_card(str(folder), metrics, pictures).save(folder / CARD)


def create_repository(repo_id: str, private: bool | None = None, token: str | None = None) -> str:
    """Make sure that the repository exists; its full name.

    Raises:
        ValueError: it exists with another visibility than asked for.
    """
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    # `private` says nothing about a repository that was there before: nothing may be shown to the
    # public that was meant to be private.
    if private is not None and api.repo_info(repo_id).private != private:
        words = {True: "private", False: "public"}
        raise ValueError(
            f"expected {repo_id} to be {words[private]}, got a {words[not private]} repository: "
            "change its visibility in its settings, or push to another one"
        )
    return repo_id


def push_folder(
    folder: str | Path,
    repo_id: str,
    commit_message: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    create_pr: bool = False,
    keep_card: bool = False,
) -> CommitInfo:
    """Push the pipeline in a folder as one commit: all of it or nothing becomes visible.

    Only what `model_index.json` names is pushed, and the card, metrics and pictures beside it; no
    checkpoints, caches or logs. An interrupted push leaves the repository as it was, and can be
    repeated: files that have arrived are not sent again.

    Args:
        private: visibility of a new repository; one that exists must have it already. `None` is
            what the account or organisation has as its default.
        token: where not given, that of `hf auth login`.
        create_pr: open a pull request instead of writing to `main`.
        keep_card: leave the repository's own card, if it has one, as it is.
    """
    folder = Path(folder)
    if not (folder / INDEX).is_file():
        raise ValueError(f"expected a saved pipeline, with {INDEX}, in folder, got {folder}")
    repo_id = create_repository(repo_id, private, token)
    api = HfApi(token=token)
    names = pipeline_files(folder)
    if keep_card and CARD in names and api.file_exists(repo_id, CARD):
        names.remove(CARD)
    operations = [
        CommitOperationAdd(
            name,
            for_repository((folder / name).read_text(encoding="utf-8"), repo_id).encode()
            if name == CARD
            else folder / name,
        )
        for name in names
    ]
    message = commit_message or "Upload ProgressiveVAEPipeline"
    return api.create_commit(repo_id, operations, commit_message=message, create_pr=create_pr)


def pipeline_files(folder: Path) -> list[str]:
    """Names, relative to the folder, of the files that make up its pipeline."""
    index = json.loads((folder / INDEX).read_text())
    parts = [name for name, value in index.items() if _is_part(value)]
    found = [folder / name for name in (INDEX, CARD, METRICS, *PICTURES)]
    for part in parts:
        found += [folder / part / "config.json", *sorted((folder / part).glob("*.safetensors*"))]
    return [path.relative_to(folder).as_posix() for path in found if path.is_file()]


def _is_part(value) -> bool:
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str)
