"""Conditions that are embeddings: attention to them, their likelihood, and their null condition."""

import copy
from dataclasses import replace

import pytest
import torch

from helpers.models import generators, randomize, tiny_level, tiny_prior
from helpers.probabilities import all_grids
from progressive_vae import ProgressiveVAEPrior, ProgressiveVAEPriorConfig
from progressive_vae.models.condition_attention import ConditionAttention
from progressive_vae.models.conditioning import Conditioning
from progressive_vae.models.decoders import Condition
from progressive_vae.models.sampling import Sampler
from progressive_vae.models.walk import TeacherForcing

D = 6
CONFIG = ProgressiveVAEPriorConfig(num_classes=2, condition_dim=D)
FACTORS = {
    "prior": tiny_prior(condition_dim=D),
    "prior with classes": tiny_prior(condition_dim=D, num_classes=2),
    "prior of absolute positions": tiny_prior(
        condition_dim=D, backbone_config={"model_type": "gpt2", "n_embd": 8, "n_layer": 1,
                                          "n_head": 2}
    ),
    "conv": tiny_level(num_symbols=3, condition_dim=D),
    "conv with classes": tiny_level(num_symbols=3, condition_dim=D, num_classes=2),
    "transformer": tiny_level(num_symbols=3, condition_dim=D, decoder_type="transformer"),
    "causal_lm": tiny_level(num_symbols=3, condition_dim=D, decoder_type="causal_lm"),
}  # fmt: skip
FACTOR = pytest.mark.parametrize("factor", FACTORS.values(), ids=FACTORS.keys())


def conditioning_of(factor, count=2, lengths=(3, 1), labels=None, length=3):
    """Embeddings of `lengths` tokens; padding is NaN, which nothing may read."""
    conditioning = Conditioning.from_labels(labels, factor.config, count)
    embeddings = torch.randn(count, length, D, generator=torch.Generator().manual_seed(0))
    mask = torch.arange(length) < torch.tensor(lengths)[:, None]
    return conditioning.with_embeddings(embeddings.masked_fill(~mask[..., None], torch.nan), mask)


def log_prob(factor, grids, condition):
    if isinstance(factor, ProgressiveVAEPrior):
        return factor.log_prob(grids, condition)
    return factor.log_prob(grids, torch.zeros(len(grids), 1, 1, dtype=torch.long), condition)


def walk(factor, step_fn, condition, count=2):
    if isinstance(factor, ProgressiveVAEPrior):
        return factor.walk(count, step_fn, condition)
    return factor.walk(torch.zeros(count, 1, 1, dtype=torch.long), step_fn, condition)


def sample(factor, condition, count=2, **kwargs):
    kwargs |= {"class_labels": condition, "generator": generators(count)}
    if isinstance(factor, ProgressiveVAEPrior):
        return factor.sample(count, **kwargs)
    return factor.sample(torch.zeros(count, 1, 1, dtype=torch.long), **kwargs)


@FACTOR
def test_probabilities_sum_to_one_and_depend_on_the_embeddings(factor):
    grids = all_grids(3, 2, 2)
    condition = conditioning_of(factor)
    totals = []
    for i in range(2):
        rows = condition[torch.full((len(grids),), i)]
        totals.append(log_prob(factor, grids, rows))
        assert totals[-1].exp().sum().item() == pytest.approx(1, abs=1e-4)
    assert (totals[0] - totals[1]).abs().max() > 1e-3
    assert (totals[0] - log_prob(factor, grids, None)).abs().max() > 1e-3


@FACTOR
def test_a_walk_is_one_pass(factor):
    factor.check_causal()
    grids = all_grids(3, 2, 2)[torch.tensor([5, 70])]
    condition = conditioning_of(factor)
    expected = log_prob(factor, grids, condition)
    for context in (torch.no_grad(), torch.enable_grad()):  # fused steps, and the backbone's own
        with context:
            teacher = TeacherForcing(grids[:, None])
            walk(factor, teacher, condition)
            assert torch.allclose(teacher.log_prob(), expected, atol=1e-4)


@FACTOR
def test_an_empty_mask_is_the_null_condition_to_the_bit(factor):
    grids = all_grids(3, 2, 2)[torch.tensor([5, 70])]
    null = log_prob(factor, grids, None)
    empty = conditioning_of(factor, lengths=(0, 0))
    assert torch.equal(log_prob(factor, grids, empty), null)
    half = log_prob(factor, grids, conditioning_of(factor, lengths=(2, 0)))
    assert torch.equal(half[1], null[1]) and half[0] != null[0]
    assert torch.equal(sample(factor, empty), sample(factor, None))
    assert torch.equal(sample(factor, empty[:], guidance_scale=3.0), sample(factor, None))


@FACTOR
def test_gradients_are_finite_where_masks_are_empty(factor):
    condition = conditioning_of(factor, lengths=(2, 0))
    grids = all_grids(3, 2, 2)[torch.tensor([5, 70])]
    log_prob(factor, grids, condition).sum().backward()
    module = factor if isinstance(factor, ProgressiveVAEPrior) else factor.decoder
    weight = module.condition_attention.keys_and_values.weight
    assert weight.grad.isfinite().all() and weight.grad.any()
    factor.zero_grad()


@FACTOR
def test_guidance(factor):
    condition = conditioning_of(factor, 2)
    unguided = sample(factor, condition)
    assert torch.equal(sample(factor, condition, guidance_scale=1.0), unguided)
    # Away from the condition itself, whatever the scale.
    same = sample(factor, replace(condition, negative=condition),
                  guidance_scale=9.0)  # fmt: skip
    assert torch.equal(same, unguided)
    many = conditioning_of(factor, 2)[torch.zeros(200, dtype=torch.long)]
    guided = sample(factor, many, 200, guidance_scale=4.0)
    # Samples are more likely under the condition, relative to the null condition.
    ratios = [(log_prob(factor, x, many) - log_prob(factor, x, None)).mean()
              for x in (guided, sample(factor, many, 200))]  # fmt: skip
    assert ratios[0] > ratios[1]


def test_a_new_decoder_is_the_old_one_until_it_is_trained():
    level = tiny_level(num_symbols=3)
    grown = level.with_decoder(condition_dim=D).eval()
    grids = all_grids(3, 2, 2)[:5]
    condition = conditioning_of(grown, 5, (1, 2, 3, 0, 3))
    expected = log_prob(level, grids, None)
    assert torch.equal(log_prob(grown, grids, condition), expected)
    randomize(grown.decoder.condition_attention)
    back = grown.with_decoder(condition_dim=None).eval()
    assert torch.equal(log_prob(back, grids, None), expected)
    other = grown.with_decoder(condition_dim=D + 1)  # another text encoder: from scratch
    assert not torch.equal(other.decoder.stem.weight, level.decoder.stem.weight)


def test_a_prior_and_a_level_are_saved_with_their_attention(tmp_path):
    for i, factor in enumerate((FACTORS["prior"], FACTORS["conv"])):
        factor.save_pretrained(tmp_path / str(i))
        loaded = type(factor).from_pretrained(tmp_path / str(i))
        grids = all_grids(3, 2, 2)[:2]
        condition = conditioning_of(factor)
        expected = log_prob(factor, grids, condition)
        assert torch.allclose(log_prob(loaded, grids, condition), expected, atol=1e-5)
        # New weights do not change what a part predicts.
        new = type(factor)(copy.deepcopy(factor.config)).eval()
        expected = log_prob(new, grids, None)
        assert torch.equal(log_prob(new, grids, condition), expected)


def test_training_drops_class_and_embeddings_together_and_each_alone():
    prior = tiny_prior(condition_dim=D, num_classes=2)
    condition = conditioning_of(prior, labels=[0, 1])
    many = condition.repeat(5000).drop(0.2, torch.Generator().manual_seed(0))
    has_class, has_text = many.class_ids != 2, many.mask.any(1)
    for share, rows in ((0.2, ~has_class & ~has_text), (0.2, ~has_class & has_text),
                        (0.2, has_class & ~has_text), (0.4, has_class & has_text)):  # fmt: skip
        assert rows.float().mean().item() == pytest.approx(share, abs=0.02)
    only_text = conditioning_of(tiny_prior(condition_dim=D)).repeat(5000)
    dropped = ~only_text.drop(0.2, torch.Generator().manual_seed(0)).mask.any(1)
    assert dropped.float().mean().item() == pytest.approx(0.2, abs=0.02)
    prior.config.class_dropout = 1.0
    grids = all_grids(3, 2, 2)[:2]
    assert torch.equal(prior.train()(grids, condition).log_prob, prior.eval().log_prob(grids))


def test_rows_of_a_conditioning():
    condition = conditioning_of(tiny_prior(condition_dim=D, num_classes=2), lengths=(0, 2))
    assert condition.is_null and not condition.is_unconditional
    assert condition[:1].is_unconditional and not condition[1:].is_unconditional
    assert condition.repeat(2).mask.sum(1).tolist() == [0, 0, 2, 2]
    assert condition.null().embeddings is None and condition.to("cpu").mask is not None
    unconditional = ProgressiveVAEPriorConfig()
    assert condition.for_factor(unconditional).is_unconditional
    with_classes = Conditioning.from_labels([0, 1], CONFIG).with_embeddings(torch.ones(2, D))
    only_embeddings = with_classes.for_factor(ProgressiveVAEPriorConfig(condition_dim=D))
    assert only_embeddings.is_null and only_embeddings.mask.all()
    only_classes = with_classes.for_factor(ProgressiveVAEPriorConfig(num_classes=2))
    assert only_classes.embeddings is None and not only_classes.is_null
    # Sequences of different lengths are padded for guidance.
    negative = conditioning_of(tiny_prior(condition_dim=D, num_classes=2), length=5)
    rows = replace(condition, negative=negative)
    rows = rows.repeat(2)[2:].for_guidance(Sampler(2, guidance_scale=2.0))
    assert rows.embeddings.shape == (4, 5, D) and rows.mask.sum(1).tolist() == [2, 2, 1, 1]


@pytest.mark.parametrize(
    ("embeddings", "mask", "message"),
    [
        (torch.zeros(2, 3, D).long(), None, r"floats of shape \(2, T, D\).* got torch.int64"),
        (torch.zeros(3, 3, D), None, r"\(2, T, D\) .*got torch.float32 of shape \(3, 3, 6\)"),
        (torch.zeros(2), None, r"got torch.float32 of shape \(2,\)"),
        ([0.0], None, "got list"),
        (torch.zeros(2, 3, D), torch.ones(2, 3), r"mask of bool or integers .*torch.float32"),
        (torch.zeros(2, 3, D), torch.ones(2, 4).bool(), r"of shape \(2, 3\), got .*\(2, 4\)"),
    ],
)
def test_invalid_embeddings(embeddings, mask, message):
    conditioning = Conditioning.from_labels(None, CONFIG, 2)
    with pytest.raises(ValueError, match=message):
        conditioning.with_embeddings(embeddings, mask)


def test_embeddings_of_another_length():
    conditioning = Conditioning.from_labels(None, CONFIG, 2).with_embeddings(torch.zeros(2, 1, 3))
    with pytest.raises(ValueError, match=f"condition_dim={D}, got 3"):
        FACTORS["prior"].log_prob(torch.zeros(2, 2, 2).long(), conditioning)


def test_conditions_compile_without_graph_breaks():
    prior, decoder = FACTORS["prior"], FACTORS["conv"].decoder
    condition = conditioning_of(prior, lengths=(2, 0))
    quantized = torch.randn(2, 4, 1, 1)
    for function in (
        lambda condition: prior._prompt(condition.drop(0.0)),
        lambda condition: decoder.embed_condition(Condition(quantized, condition)),
    ):
        compiled = torch.compile(function, backend="eager", fullgraph=True)
        assert torch.allclose(compiled(condition), function(condition), atol=1e-6)


def test_attention_to_embeddings_in_float16():
    attention = ConditionAttention(8, D)
    torch.nn.init.normal_(attention.output.weight)
    condition = conditioning_of(FACTORS["conv"])
    half = replace(condition, embeddings=condition.embeddings.half())
    state = torch.randn(2, 4, 8)
    assert torch.allclose(attention(state, half), attention(state, condition), atol=1e-2)
