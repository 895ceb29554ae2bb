"""A page over a pipeline as a Space of the Hub."""

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

from ..serialization import read_json
from .repository import CARD, METRICS, create_repository, pipeline_files

APP, REQUIREMENTS, MODEL = "app.py", "requirements.txt", "model"
PACKAGE = "progressive-vae[demo]"
_MODEL = re.compile(r"^MODEL = .*$", re.MULTILINE)
_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def push_space(
    repo_id: str,
    page: str,
    model: str,
    sdk_version: str,
    package: str = PACKAGE,
    private: bool | None = None,
    token: str | None = None,
) -> CommitInfo:
    """Push a page over a pipeline as one commit to a Space, which is made where there is none.

    What an earlier push left there of a model goes in the same commit.

    Args:
        page: the source of a Gradio page, with a line `MODEL = …` that names the pipeline.
        model: a repository on the Hub, or a folder, whose pipeline is pushed along.
        sdk_version: of Gradio.
        package: what `pip install` gets the page's packages by: a name, a version, an address.
        private: as in `push_folder`.

    Raises:
        ValueError: no whole pipeline in the folder, a name that is none, a page without that line,
            or a Space of another visibility.
    """
    folder = Path(model)
    if not folder.is_dir() and not _NAME.fullmatch(model):
        raise ValueError(f"expected model to be a folder or a repository you/name, got {model!r}")
    if len(_MODEL.findall(page)) != 1:
        raise ValueError('expected a page with one line "MODEL = …", got another one')
    files: dict[str, Any] = {REQUIREMENTS: f"{package}\n".encode()}
    named, license = model, "apache-2.0"
    if folder.is_dir():
        named = ""
        names = pipeline_files(folder)
        files |= {f"{MODEL}/{name}": folder / name for name in names}
        if METRICS in names:
            license = read_json(folder / METRICS, "measure the pipeline again").get(
                "license", license
            )
    where = repr(named) if named else f'str(Path(__file__).parent / "{MODEL}")'
    files[APP] = _MODEL.sub(lambda _: f"MODEL = {where}", page).encode()
    repo_id = create_repository(repo_id, private, token, repo_type="space", space_sdk="gradio")
    files[CARD] = str(space_card(repo_id, named, sdk_version, license)).encode()
    api = HfApi(token=token)
    there = api.list_repo_files(repo_id, repo_type="space")
    outdated = [n for n in there if n.startswith(f"{MODEL}/") and n not in files]
    operations: list[Any] = [CommitOperationDelete(name) for name in outdated]
    operations += [CommitOperationAdd(name, contents) for name, contents in files.items()]
    return api.create_commit(
        repo_id, operations, commit_message="Upload the page", repo_type="space"
    )


def space_card(repo_id: str, model: str, sdk_version: str, license: str) -> SpaceCard:
    """The card of a Space, which tells the Hub how it is run.

    Args:
        model: its repository on the Hub; empty where it lies in the Space.
    """
    title = repo_id.split("/")[-1]
    data = SpaceCardData(
        title=title,
        sdk="gradio",
        sdk_version=sdk_version,
        app_file=APP,
        license=license,
        models=[model] if model else None,
        tags=["progressive-vae"],
    )
    shown = f"[{model}](https://huggingface.co/{model})" if model else f"`{MODEL}/`"
    return SpaceCard(
        f"---\n{data.to_yaml()}\n---\n\n# {title}\n\nDraw images coarse to fine, and look into "
        f"pictures of your own, with the progressive VAE in {shown}.\n"
    )
