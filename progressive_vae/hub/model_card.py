"""The model card of a repository: MODEL_CARD.md with the figures of one's own run."""

import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

PICTURES = {
    "samples.png": "Drawn images, a row for each class where there are classes.",
    "reconstructions.png": "Held-out images drawn again from their own codes: from z₁ alone in the "
    "first row, from one level more in each next row, and the images themselves in the last.",
}
# Passages of MODEL_CARD.md, and what stands in their place elsewhere.
_CALL = re.compile(r'(ProgressiveVAEPipeline\.from_pretrained\()"([^"]*)"')
_NEEDS = "Needs `pip install progressive-vae`; with that, and nothing else, the lines below run."
_NEEDS_NOTHING = """\
This repository holds its code: the lines below run without an installation, if you trust it.
The other way is `pip install progressive-vae`; what is installed is used in its place."""
_IMPORT = "from progressive_vae import ProgressiveVAEPipeline"
_FROM_NOTHING = """\
images = pipe(num_images_per_prompt=4, generator=torch.Generator().manual_seed(0)).images
images[0].save("sample.png")
codes = pipe.encode(images)  # [z_1 … z_N], the coarsest first
print(pipe.bits_per_dim(images))  # one figure for each factor, and their total
"""
_FROM_A_PICTURE = """\
images = [PIL.Image.open("picture.png")]  # of the model's size; it has no prior to draw from
codes = pipe.encode(images)  # [z_1 … z_N], the coarsest first
again = pipe(codes=codes[:1], generator=torch.Generator().manual_seed(0)).images  # z_1 kept
again[0].save("sample.png")
"""
_BEGIN, _END = "<!-- figures -->", "<!-- /figures -->"
_METADATA = re.compile(r"\A---\n.*?\n---\n", re.S)


def card_template() -> str:
    """MODEL_CARD.md without its metadata, which are those of the model that comes with the project:
    package data of an installed wheel, the repository's own in a checkout."""
    packaged = resources.files("progressive_vae") / "MODEL_CARD.md"
    own = Path(__file__).parents[2] / "MODEL_CARD.md"
    text = (packaged if packaged.is_file() else own).read_text(encoding="utf-8")
    return _METADATA.sub("", text)


def model_card(
    repository: str,
    metrics: dict | None = None,
    pictures: Sequence[str] = (),
    has_prior: bool = True,
    variant: str | None = None,
) -> ModelCard:
    """The card of a pipeline.

    Args:
        repository: what its usage passes to `from_pretrained`: a name on the Hub or a folder.
        metrics: the contents of `metrics.json`; without them the card states no figures.
        pictures: names among `PICTURES` of files beside the card.
        has_prior: without one nothing is drawn from nothing, and the usage starts from a picture.
        variant: of the weights, where there are none without a name.
    """
    data = ModelCardData(
        library_name="diffusers",
        pipeline_tag="unconditional-image-generation",
        license=(metrics or {}).get("license", "apache-2.0"),
        tags=["diffusers:ProgressiveVAEPipeline", "progressive-vae", "vq-vae", "image-generation"],
        **(_metadata(metrics) if metrics else {}),
    )
    before, rest = card_template().split(_BEGIN)
    after = rest.split(_END)[1]
    parts = [f"![{name.partition('.')[0]}]({name})\n\n*{PICTURES[name]}*" for name in pictures]
    parts.append(_measured(metrics) if metrics else "No figures were saved with this pipeline; "
                 "`pipe.bits_per_dim(images)` states them, one for each factor.")  # fmt: skip
    figures = "\n\n".join([_BEGIN, *parts, _END])
    if not has_prior:
        before = before.replace("```python\n", "```python\nimport PIL.Image\n", 1)
        before = before.replace(_FROM_NOTHING, _FROM_A_PICTURE)
    if variant is not None:
        dtype = {"fp16": ", dtype=torch.float16", "bf16": ", dtype=torch.bfloat16"}.get(variant, "")
        before = _CALL.sub(rf'\1"\2", variant="{variant}"{dtype}', before, count=1)
    text = f"---\n{data.to_yaml()}\n---\n{before}{figures}{after}".rstrip() + "\n"
    return ModelCard(for_repository(text, repository))


def is_generated(text: str) -> bool:
    """Whether a card was made here, rather than written by hand."""
    return _BEGIN in text and _END in text


def for_repository(text: str, repository: str, with_code: bool = False) -> str:
    """The card with its usage, the first such call in it, changed to another repository: one that
    needs no installation, where it holds the code."""
    text = _CALL.sub(rf'\1"{repository}"', text, count=1)
    if with_code:
        text = text.replace(_NEEDS, _NEEDS_NOTHING).replace(
            _IMPORT, "from diffusers import DiffusionPipeline"
        )
        call = f'DiffusionPipeline.from_pretrained("{repository}", trust_remote_code=True'
        text = _CALL.sub(call, text, count=1)
    return text


def figures_table(metrics: dict) -> str:
    """The figures of `metrics.json` as Markdown tables."""
    bits, codes = metrics["bits_per_dim"], metrics["codes"]
    accuracy = metrics.get("label_accuracy", {})
    views = {"label kept": "", "label kept by the preview": "preview_of_"}
    kept = {word: view for word, view in views.items() if f"{view}level_1" in accuracy}
    header = ["factor", "bits/dim", "codes used", "perplexity"]
    header += kept
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for name, value in bits.items():
        use = codes.get(name)
        row = [name, f"{value:.4f}"]
        row += (
            [f"{use['codes_used']} of {use['codebook_size']}", f"{use['codebook_perplexity']:.1f}"]
            if use
            else ["", ""]
        )
        for view in kept.values():
            row.append(f"{100 * accuracy[view + name]:.1f} %" if view + name in accuracy else "")
        lines.append("| " + " | ".join(row) + " |")
    if accuracy:
        lines += ["", f"Label kept by the images themselves: {100 * accuracy['images']:.1f} %."]
    if "frechet_distance" in metrics:
        lines += ["", f"Fréchet distance of {metrics['num_drawn']} drawn images to as many "
                  f"held-out ones: {metrics['frechet_distance']:.4f}, in the features of a small "
                  "classifier of this data set: not to be compared with distances in other "
                  "features, or of other counts."]  # fmt: skip
    lines += ["", "| phase | seconds | share | waiting for data | images/s |", "|---" * 5 + "|"]
    whole = sum(phase["seconds"] for phase in metrics["phases"].values())
    for name, phase in metrics["phases"].items():
        seconds, waiting = phase["seconds"], phase.get("waiting_share")
        cells = [name, f"{seconds:.1f}", f"{100 * seconds / whole:.1f} %"]
        cells += ["" if waiting is None else f"{100 * waiting:.1f} %"]
        lines.append("| " + " | ".join([*cells, f"{phase['images_per_second']:.0f}"]) + " |")
    if "sampled_images_per_second" in metrics:
        lines.append(f"| sample, batch of 250 | | | | {metrics['sampled_images_per_second']:.0f} |")
    for name, error in metrics.get("not_measured", {}).items():
        lines += ["", f"Not measured: {name} ({error})."]
    return "\n".join(lines)


def _measured(metrics: dict) -> str:
    # Before recipes there were a command and flat settings.
    recipe = metrics.get("recipe") or metrics["settings"]
    text = yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True).strip()
    command = metrics.get("command", "accelerate launch examples/train.py --config recipe.yaml")
    return (
        f"Measured on {metrics['num_images']} held-out images (`{metrics['dataset']}`, split "
        f"`{metrics['split']}`), seed {metrics['seed']}, {metrics['machine']}:\n\n"
        f"{figures_table(metrics)}\n\n"
        f"Trained and measured by `{command}`.\n\n"
        f"<details><summary>The recipe</summary>\n\n```yaml\n{text}\n```\n\n</details>"
    )


def _metadata(metrics: dict) -> dict:
    """What the Hub shows beside the card: the data set and the results."""
    found = {"bits_per_dim": ("bits per dimension", metrics["bits_per_dim"]["total"])}
    if "frechet_distance" in metrics:
        name = "Fréchet distance in features of a classifier of the data set"
        found["frechet_distance"] = (name, metrics["frechet_distance"])
    results = [
        EvalResult(
            task_type="unconditional-image-generation",
            dataset_type=metrics["dataset"],
            dataset_name=metrics["dataset"],
            dataset_split=metrics["split"],
            metric_type=kind,
            metric_name=name,
            metric_value=round(value, 4),
        )
        for kind, (name, value) in found.items()
    ]
    # The Hub links `datasets`, so only what can be one of its names may stand there.
    is_on_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", metrics["dataset"]) is not None
    datasets = {"datasets": [metrics["dataset"]]} if is_on_hub else {}
    return {"model_name": "Progressive VAE", "eval_results": results, **datasets}
