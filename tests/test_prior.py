import pytest
import torch
from transformers import GPT2Config

from helpers.models import tiny_prior
from helpers.probabilities import all_grids, total_variation
from progressive_vae import ProgressiveVAEPrior


@pytest.mark.parametrize("size", [(2, 2), (1, 3)])
def test_sums_to_one_and_samples_follow(size):
    prior, grids = tiny_prior(grid_size=list(size), num_classes=2), all_grids(3, *size)
    with torch.no_grad():
        log_prob = prior.log_prob(grids, torch.ones(len(grids), dtype=torch.long))
        null = prior.log_prob(grids)
    for nats in (log_prob, null):
        assert nats.exp().sum().item() == pytest.approx(1, abs=1e-4)
    assert (log_prob - null).abs().max() > 0.01  # the class matters
    labels = torch.ones(40_000, dtype=torch.long)
    samples = prior.sample(40_000, labels, generator=torch.Generator().manual_seed(0))
    assert total_variation(log_prob, grids, samples) < 0.03


def test_an_image_does_not_depend_on_its_batch():
    prior = tiny_prior(codebook_size=20)
    generators = [torch.Generator().manual_seed(i) for i in range(4)]
    together = prior.sample(4, generator=generators)
    alone = prior.sample(1, generator=[torch.Generator().manual_seed(2)])
    assert torch.equal(together[2:3], alone)


def test_the_backbone_has_the_attention_and_dtype(tmp_path):
    tiny_prior().save_pretrained(tmp_path)
    for attention in ("eager", "sdpa"):
        loaded = ProgressiveVAEPrior.from_pretrained(
            tmp_path, attn_implementation=attention, dtype="bfloat16"
        )
        backbone = loaded.backbone.config
        assert (backbone._attn_implementation, backbone.dtype) == (attention, torch.bfloat16)


def test_guidance_sharpens_towards_the_class():
    prior = tiny_prior(num_classes=2, codebook_size=5)
    labels = torch.zeros(4000, dtype=torch.long)

    def likelihood(scale):
        samples = prior.sample(4000, labels, scale, torch.Generator().manual_seed(0))
        with torch.no_grad():
            return (prior.log_prob(samples, labels) - prior.log_prob(samples)).mean()

    assert likelihood(0.0) < likelihood(1.0) < likelihood(3.0)


def test_dropout_of_labels_only_in_training():
    prior, codes = tiny_prior(num_classes=2, class_dropout=1.0), torch.zeros(2, 2, 2).long()
    labels = torch.tensor([0, 1])
    assert not torch.allclose(prior.log_prob(codes, labels), prior.log_prob(codes))
    prior.train()
    assert torch.allclose(prior(codes, labels).log_prob, prior.log_prob(codes))
    assert not torch.allclose(prior.log_prob(codes, labels), prior.log_prob(codes))


def test_any_causal_language_model(tmp_path):
    config = GPT2Config(n_embd=8, n_layer=1, n_head=2, n_positions=2)
    prior, codes = tiny_prior(backbone_config=config), torch.zeros(1, 2, 2).long()
    prior.save_pretrained(tmp_path)
    loaded = ProgressiveVAEPrior.from_pretrained(tmp_path)
    assert loaded.config.backbone_config.n_positions == 4
    assert torch.equal(prior.log_prob(codes), loaded.log_prob(codes))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: p(torch.zeros(1, 3, 3).long()), r"codes of shape \(B, 2, 2\), got \(1, 3, 3\)"),
        (lambda p: p(torch.zeros(1, 2, 2)), "codes of dtype torch.int64, got torch.float32"),
        (lambda p: p(torch.full((1, 2, 2), 3)), "codes in 0 … 2"),
        (
            lambda p: p.sample(1, torch.tensor([7])),
            "class_labels in 0 … 1, or 2 for the null",
        ),
        (lambda p: p.sample(-1), "batch_size >= 1, got -1"),
        (lambda p: p.sample(0), "batch_size >= 1, got 0"),
        (lambda p: p.sample(2, torch.tensor([0])), "expected 2 class_labels, got 1"),
        (lambda p: p.sample(1, torch.tensor([0.0])), "class_labels to be integers"),
        (lambda p: p.sample(1, ["cow"]), r"class_labels among \['0', '1'\], got \['cow'\]"),
        (lambda p: p.sample(1, temperature=-1), "temperature >= 0, got -1"),
        (lambda p: p.sample(1, top_k=0), "top_k >= 1, got 0"),
        (lambda p: p.sample(1, top_p=1.5), r"top_p in \(0, 1\], got 1.5"),
        (lambda p: p.sample(1, guidance_scale=-1), "guidance_scale >= 0"),
        (lambda p: p.sample(2, generator=[torch.Generator()]), "a list of 2, got 1"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call(tiny_prior(num_classes=2))
