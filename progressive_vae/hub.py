"""What a repository on the Hub needs beside weights: fingerprints and the model card."""

import hashlib
from importlib import metadata, resources
from pathlib import Path

import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .level import ProgressiveVAELevel

DISTRIBUTION = "progressive-vae"
_BEGIN, _END = "<!-- figures -->", "<!-- /figures -->"


def fingerprint(levels: list[ProgressiveVAELevel]) -> str:
    """A hash of the encoders and codebooks of these levels: of all that decides the codes.

    Decoders do not count, so a refit leaves it as it is.
    """
    digest = hashlib.sha256()
    for level in levels:
        quantizer = level.quantizer.state_dict().items()
        parts = level.encoder.state_dict() | {
            name: value
            for name, value in quantizer
            if name not in ("ema_counts", "ema_sums", "temperature")  # these matter in training
        }
        for name, value in sorted(parts.items()):
            digest.update(name.encode())
            digest.update(value.detach().to("cpu", torch.float32).numpy().tobytes())
    return digest.hexdigest()[:16]


def card_template() -> str:
    """MODEL_CARD.md: package data of an installed wheel, the repository's own in a checkout."""
    packaged = resources.files("progressive_vae") / "MODEL_CARD.md"
    if packaged.is_file():
        return packaged.read_text(encoding="utf-8")
    return (Path(__file__).parents[1] / "MODEL_CARD.md").read_text(encoding="utf-8")


def figures_table(metrics: dict) -> str:
    """The figures of `metrics.json` as Markdown tables."""
    bits, codes = metrics["bits_per_dim"], metrics["codes"]
    accuracy = metrics.get("label_accuracy", {})
    header = ["factor", "bits/dim", "codes used", "perplexity"]
    header += ["label kept"] if accuracy else []
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for name, value in bits.items():
        use = codes.get(name)
        row = [name, f"{value:.4f}"]
        row += (
            [f"{use['codes_used']} of {use['codebook_size']}", f"{use['codebook_perplexity']:.1f}"]
            if use
            else ["", ""]
        )
        if accuracy:
            row.append(f"{100 * accuracy[name]:.1f} %" if name in accuracy else "")
        lines.append("| " + " | ".join(row) + " |")
    if accuracy:
        lines += ["", f"Label kept by the images themselves: {100 * accuracy['images']:.1f} %."]
    lines += ["", "| phase | seconds | images/s |", "|---|---|---|"]
    for name, phase in metrics["phases"].items():
        lines.append(f"| {name} | {phase['seconds']:.1f} | {phase['images_per_second']:.0f} |")
    lines.append(f"| sample, batch of 250 | | {metrics['sampled_images_per_second']:.0f} |")
    return "\n".join(lines)


def model_card(metrics: dict, license: str = "apache-2.0") -> ModelCard:
    """The card of a trained pipeline: MODEL_CARD.md with the figures of its own run.

    Args:
        metrics: the contents of `metrics.json`.
    """
    data = ModelCardData(
        library_name="diffusers",
        pipeline_tag="unconditional-image-generation",
        license=license,
        tags=["progressive-vae", "vq-vae", "image-generation"],
        model_name="Progressive VAE",
        eval_results=[
            EvalResult(
                task_type="unconditional-image-generation",
                dataset_type=metrics["dataset"],
                dataset_name=metrics["dataset"],
                dataset_split=metrics["split"],
                metric_type="bits_per_dim",
                metric_name="bits per dimension",
                metric_value=round(metrics["bits_per_dim"]["total"], 4),
            )
        ],
    )
    before, rest = card_template().split(_BEGIN)
    after = rest.split(_END)[1].split("## Changes")[0]  # ours, not those of another's model
    figures = (
        f"{_BEGIN}\nMeasured on {metrics['num_images']} held-out images "
        f"(`{metrics['dataset']}`, split `{metrics['split']}`), seed {metrics['seed']}, "
        f"{metrics['machine']}, by `{metrics['command']}`:\n\n{figures_table(metrics)}\n{_END}"
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n{before}{figures}{after}")


def version() -> str:
    return metadata.version(DISTRIBUTION)
