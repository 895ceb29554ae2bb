"""Steps with few operations compute what transformers' own steps do."""

import copy
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import nn

from helpers.models import generators, tiny_level, tiny_pipeline, tiny_prior
from progressive_vae import ProgressiveVAELevel, ProgressiveVAEPrior
from progressive_vae.evaluation.op_count import count_ops
from progressive_vae.models import causal_lm
from progressive_vae.models.causal_lm import transformers_steps
from progressive_vae.models.fused_steps import FusedSteps, can_fuse

EXAMPLES = Path(__file__).parents[1] / "examples"
GOLDEN = Path(__file__).with_name("golden")
LLAMA = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
OPT = {
    "model_type": "opt",
    "hidden_size": 16,
    "word_embed_proj_dim": 16,
    "ffn_dim": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "dropout": 0.0,
}
FUSED = [
    LLAMA,
    {**LLAMA, "head_dim": 6, "attention_bias": True, "mlp_bias": True, "rms_norm_eps": 1e-3},
    {**LLAMA, "hidden_act": "gelu", "tie_word_embeddings": True},
    OPT,
    {**OPT, "activation_function": "gelu", "enable_bias": False},
    {**OPT, "layer_norm_elementwise_affine": False},
]
NOT_FUSED = [
    {**LLAMA, "num_key_value_heads": 1},
    {**LLAMA, "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
    {**OPT, "do_layer_norm_before": False},
    {**OPT, "word_embed_proj_dim": 8},
    {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2},
]


def samples_and_log_probs(sample, is_own):
    """Samples, and the log-probabilities of all values at each step."""
    log_probs = []

    def step_fn(distribution, step):
        log_probs.append(distribution.log_prob(torch.zeros(4, 1, dtype=torch.long)))
        u = torch.linspace(0.05, 0.95, 4)[:, None]
        return distribution.icdf((u + 0.37 * step.positions[0]) % 1)

    with torch.no_grad(), transformers_steps() if is_own else nullcontext():
        return sample(step_fn), torch.stack(log_probs)


@pytest.mark.parametrize("backbone", FUSED)
@pytest.mark.parametrize("part", ["prior", "decoder"])
def test_samples_are_those_of_transformers_steps(backbone, part):
    if part == "prior":
        prior = tiny_prior(codebook_size=5, grid_size=[3, 4], backbone_config=backbone)
        network = prior.backbone

        def sample(step_fn):
            return prior.walk(4, step_fn)
    else:
        level = tiny_level(num_symbols=5, decoder_type="causal_lm", backbone_config=backbone)
        network = level.decoder.backbone
        codes = torch.arange(4).view(4, 1, 1).expand(4, 2, 2) % 3

        def sample(step_fn):
            return level.walk(codes, step_fn, finer_size=(4, 3))

    with torch.no_grad():
        assert can_fuse(network)
    tokens, log_probs = samples_and_log_probs(sample, is_own=False)
    expected, expected_log_probs = samples_and_log_probs(sample, is_own=True)
    assert torch.equal(tokens, expected) and log_probs.std() > 0.01
    assert torch.allclose(log_probs, expected_log_probs, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("backbone", NOT_FUSED)
@torch.no_grad()
def test_other_structures_run_their_own_steps(backbone):
    prior = tiny_prior(backbone_config=backbone)
    assert not can_fuse(prior.backbone)
    prior.check_causal()
    assert prior.sample(2).shape == (2, 2, 2)


def replace_linear(network):
    class Adapter(nn.Linear):
        pass

    linear = network.model.layers[0].mlp.up_proj
    network.model.layers[0].mlp.up_proj = Adapter(linear.in_features, linear.out_features)


def hook(network):
    network.model.layers[0].register_forward_hook(lambda *arguments: None)


def replace_forward(network):
    norm = network.model.norm
    norm.forward = norm.forward  # as Accelerate's hooks do


CHANGES = {
    "another class": replace_linear,
    "a hook": hook,
    "another forward": replace_forward,
    "training": lambda network: network.train(),
    "eager attention": lambda network: network.set_attn_implementation("eager"),
    "no weights": lambda network: network.model.norm.to("meta"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_network_runs_its_own_steps(name):
    network = tiny_prior(backbone_config=LLAMA).backbone
    assert not can_fuse(network)  # gradients are enabled
    with torch.no_grad():
        assert can_fuse(network)
        CHANGES[name](network)
        assert not can_fuse(network)


@torch.no_grad()
@pytest.mark.parametrize("backbone", [LLAMA, OPT], ids=["llama", "opt"])
def test_half_precision(backbone):
    prior = tiny_prior(codebook_size=5, grid_size=[3, 4], backbone_config=backbone)
    tokens = prior.sample(4).flatten(1)
    half = copy.deepcopy(prior).bfloat16()
    for network, context in ((half, nullcontext()), (prior, torch.autocast("cpu"))):
        outputs = []
        for steps in (nullcontext(), transformers_steps()):
            with steps, context:
                run_step = causal_lm._steps(network.backbone, 12)
                logits = [run_step(input_ids=token).logits for token in tokens.split(1, 1)]
                outputs.append(torch.cat(logits, 1))
        assert outputs[0].dtype == outputs[1].dtype == torch.bfloat16
        difference = (outputs[0] - outputs[1]).abs().max() / outputs[1].abs().max()
        assert difference < 0.03


@torch.no_grad()
@pytest.mark.parametrize("backbone", [LLAMA, OPT], ids=["llama", "opt"])
def test_a_step_has_few_operations(backbone):
    network = tiny_prior(backbone_config=backbone).backbone
    steps = FusedSteps(network, 4)
    token = torch.zeros(2, 1, dtype=torch.long)
    count = count_ops(lambda: steps(input_ids=token))
    if backbone is LLAMA:
        # The root mean square norm of two tensors a layer and at the end: one operation on a GPU,
        # six here.
        assert count.num_ops <= 2 * 15 + 3 + 5 * 5
    else:
        assert count.num_ops <= 2 * 10 + 4
    assert not count.waits


def test_the_codec_runs_the_networks_own_steps(images, monkeypatch):
    """Streams of earlier versions need their rounding."""
    pipe = tiny_pipeline()
    samples = pipe.prior.sample(3, generator=generators(3))

    def fail(*arguments):
        raise AssertionError("fused steps")

    monkeypatch.setattr(causal_lm, "FusedSteps", fail)
    assert torch.equal(pipe.decompress(pipe.compress(images)), images)
    with transformers_steps():
        assert torch.equal(pipe.prior.sample(3, generator=generators(3)), samples)
    with pytest.raises(AssertionError, match="fused steps"):
        pipe.prior.sample(3)


@torch.no_grad()
@pytest.mark.parametrize(
    ("model", "limit"),
    # Llama has 80 root mean square norms in 16 steps, of six operations each on a CPU.
    [("fashion_mnist", 130), ("color_64", 1050)],
)
def test_samples_of_a_prior_take_few_operations(model, limit):
    prior = ProgressiveVAEPrior.from_pretrained(f"{EXAMPLES}/{model}/prior")
    assert sum(count_ops(lambda: prior.sample(2)).ops.values()) <= limit


@torch.no_grad()
def test_samples_of_a_raster_level_take_few_operations():
    level = ProgressiveVAELevel.from_pretrained(GOLDEN / "fashion_mnist" / "level_1")
    codes = torch.zeros(2, 2, 2, dtype=torch.long)
    count = count_ops(lambda: level.sample(codes, finer_size=(7, 7)))
    assert sum(count.ops.values()) <= 2050  # of 49 positions
