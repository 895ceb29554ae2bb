"""Push a Gradio page and its pipeline to a Space of the Hub; imported by app.py."""

import re
from pathlib import Path
from typing import Any

from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    SpaceCard,
    SpaceCardData,
)

from progressive_vae.hub.repository import CARD, METRICS, create_repository, pipeline_files
from progressive_vae.serialization import read_json

APP = "app.py"
REQUIREMENTS = "requirements.txt"
MODEL_FOLDER = "model"
_MODEL_LINE = re.compile(r"^MODEL = .*$", re.MULTILINE)
_REPO_ID = re.compile(r"[\w.-]+/[\w.-]+")


def push_space(
    repo_id: str,
    page: str,
    model: str,
    sdk_version: str,
    package: str,
    private: bool | None = None,
    token: str | None = None,
) -> CommitInfo:
    """Push a page over a pipeline as one commit to a Space, which is created if it does not exist.

    The commit also deletes model files of earlier pushes that are no longer used.

    Args:
        page: the source of a Gradio page with one line `MODEL = …`, which is replaced.
        model: a repository on the Hub, or a folder, whose pipeline is pushed with the page.
        sdk_version: of Gradio.
        package: the line of `requirements.txt`: a name, a version or an address for `pip install`.
        private: as in `push_folder`.

    Raises:
        ValueError: `model` is neither a folder of a complete pipeline nor a repository's name, the
            page has no such line, or the Space exists with another visibility.
    """
    folder = Path(model)
    if not folder.is_dir() and not _REPO_ID.fullmatch(model):
        raise ValueError(f"expected model to be a folder or a repository you/name, got {model!r}")
    num_lines = len(_MODEL_LINE.findall(page))
    if num_lines != 1:
        raise ValueError(f'expected a page with one line "MODEL = …", got {num_lines} lines')

    # The files: either the pipeline itself, or only the name of its repository.
    files: dict[str, Any] = {REQUIREMENTS: f"{package}\n".encode()}
    license = "apache-2.0"
    if folder.is_dir():
        model_repo = None
        model_line = f'MODEL = str(Path(__file__).parent / "{MODEL_FOLDER}")'
        names = pipeline_files(folder)
        files |= {f"{MODEL_FOLDER}/{name}": folder / name for name in names}
        if METRICS in names:
            metrics = read_json(folder / METRICS, "measure the pipeline again")
            license = metrics.get("license", license)
    else:
        model_repo = model
        model_line = f"MODEL = {model!r}"
    files[APP] = _MODEL_LINE.sub(lambda _: model_line, page).encode()

    # One commit of new and deleted files.
    repo_id = create_repository(repo_id, private, token, repo_type="space", space_sdk="gradio")
    files[CARD] = str(space_card(repo_id, model_repo, sdk_version, license)).encode()
    api = HfApi(token=token)
    names = api.list_repo_files(repo_id, repo_type="space")
    old_names = [name for name in names if name.startswith(f"{MODEL_FOLDER}/")]
    operations: list[Any] = [CommitOperationDelete(n) for n in old_names if n not in files]
    operations += [CommitOperationAdd(name, contents) for name, contents in files.items()]
    return api.create_commit(
        repo_id, operations, commit_message="Upload the page", repo_type="space"
    )


def space_card(repo_id: str, model_repo: str | None, sdk_version: str, license: str) -> SpaceCard:
    """Return the card of a Space, whose metadata configure how the Hub runs it.

    Args:
        model_repo: the pipeline's repository on the Hub; `None` if the Space holds its files.
    """
    title = repo_id.split("/")[-1]
    data = SpaceCardData(
        title=title,
        sdk="gradio",
        sdk_version=sdk_version,
        app_file=APP,
        license=license,
        models=[model_repo] if model_repo else None,
        tags=["progressive-vae"],
    )
    link = f"`{MODEL_FOLDER}/`"
    if model_repo:
        link = f"[{model_repo}](https://huggingface.co/{model_repo})"
    return SpaceCard(
        f"---\n{data.to_yaml()}\n---\n\n# {title}\n\nSample images from coarse to fine, and encode "
        f"your own images, with the progressive VAE in {link}.\n"
    )
