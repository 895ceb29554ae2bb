import copy

import pytest
import torch
from torch import nn

from helpers.models import tiny_level
from progressive_vae.training import muon
from progressive_vae.training.muon import Muon, matrices_and_others, orthogonal


def matrix(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("in_bf16", [True, False])
@pytest.mark.parametrize("shape", [(8, 72), (72, 8), (16, 16), (1, 9)])
def test_singular_values_become_alike(shape, in_bf16, monkeypatch):
    monkeypatch.setattr(muon, "has_bf16", lambda device: in_bf16)
    left, _, right = torch.linalg.svd(matrix(*shape), full_matrices=False)
    wide = left * torch.logspace(0, -2, min(shape)) @ right
    assert (orthogonal(wide).dtype == torch.bfloat16) == in_bf16
    update = orthogonal(wide).float()
    assert update.shape == shape
    values = torch.linalg.svdvals(update)
    assert 0.6 < values.min() and values.max() < 1.25
    # The directions stay: what comes out has the same singular vectors.
    alike = (left.T @ update @ right.T).diagonal()
    assert torch.allclose(alike, values[: len(alike)], atol=0.6) and alike.min() > 0.6


def test_hidden_maps_are_matrices_and_all_else_is_not():
    level = tiny_level(num_channels=1)
    matrices, others = matrices_and_others(level)
    names = {id(p): name for name, p in level.named_parameters()}
    assert len(matrices) + len(others) == len(names)
    assert all(p.ndim in (2, 4) for p in matrices)
    adamw_names = [names[id(p)] for p in others]
    assert any("logits" in name and "project.weight" in name for name in adamw_names)
    assert any("embedding" in name for name in adamw_names) and any(
        ".bias" in name for name in adamw_names
    )
    level.encoder.requires_grad_(False)
    frozen = {id(p) for p in level.encoder.parameters()}
    assert not frozen & {id(p) for group in matrices_and_others(level) for p in group}


def test_a_step_has_the_size_of_the_learning_rate():
    weight, bias = nn.Parameter(matrix(32, 3, 3, 3)), nn.Parameter(torch.zeros(32))
    before = weight.detach().clone()
    optimizer = Muon([weight], [bias], lr=0.1, scale=0.4, weight_decay=0.0)
    weight.grad, bias.grad = matrix(32, 3, 3, 3) ** 3, torch.ones(32)
    optimizer.step()
    change = weight.detach() - before
    assert change.square().mean().sqrt() == pytest.approx(0.04, rel=0.2)
    assert torch.allclose(bias.detach(), torch.full((32,), -0.1), atol=1e-4)  # Adam's first


def test_it_goes_on_from_its_state():
    def steps(optimizer, weights, count):
        for i in range(count):
            for weight in weights:
                weight.grad = torch.cos(weight.detach() * (i + 1))
            optimizer.step()

    def fresh():
        weights = [nn.Parameter(matrix(4, 6)), nn.Parameter(torch.ones(4))]
        return weights, Muon(weights[:1], weights[1:], lr=0.1)

    undisturbed, optimizer = fresh()
    steps(optimizer, undisturbed, 3)
    state = [w.detach().clone() for w in undisturbed], copy.deepcopy(optimizer.state_dict())
    steps(optimizer, undisturbed, 2)
    resumed, other = fresh()
    for weight, value in zip(resumed, state[0], strict=True):
        weight.data.copy_(value)
    other.load_state_dict(state[1])
    steps(other, resumed, 2)
    for one, another in zip(undisturbed, resumed, strict=True):
        assert torch.equal(one, another)


def test_it_finds_a_minimum_that_is_hard_to_see():
    """A quadratic whose directions differ a thousandfold in curvature."""
    target, scales = matrix(8, 8), torch.logspace(0, -1.5, 8)
    weight = nn.Parameter(torch.zeros(8, 8))
    optimizer = Muon([weight], [], lr=0.05, weight_decay=0.0)
    for step in range(200):
        optimizer.param_groups[0]["lr"] = 0.2 * (1 - step / 200)
        optimizer.zero_grad()
        ((weight - target) * scales).square().sum().backward()
        optimizer.step()
    assert (weight - target).abs().max() < 0.1
