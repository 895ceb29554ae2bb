import copy
import os

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from helpers.models import tiny_level
from progressive_vae import ProgressiveVAELevel
from progressive_vae.evaluation.op_count import count_ops
from progressive_vae.training import muon
from progressive_vae.training.muon import (
    COEFFICIENTS,
    Muon,
    matrices_and_others,
    orthogonal,
    orthogonal_steps,
)

EXAMPLES = os.path.join(os.path.dirname(__file__), "..", "examples")


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


def plain_orthogonal(matrix):
    """Newton–Schulz iterations of one matrix, as the formula says."""
    is_tall = len(matrix) > matrix.shape[1]
    x = matrix.T if is_tall else matrix
    x = x / x.norm()
    a, b, c = COEFFICIENTS
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if is_tall else x


def assert_close(actual, expected):
    difference = (actual - expected).norm() / expected.norm()
    assert difference < 1e-5, difference


def plain_step(weights, gradients, momenta, lr, weight_decay, scale=0.4, decay=0.95):
    """The steps of `Muon`, one matrix after the other."""
    for weight, gradient, momentum in zip(weights, gradients, momenta, strict=True):
        momentum.lerp_(gradient, 1 - decay)
        update = gradient.lerp(momentum, decay).flatten(1)
        size = lr * scale * max(update.shape) ** 0.5
        weight.mul_(1 - lr * weight_decay)
        weight.sub_(plain_orthogonal(update).view_as(weight), alpha=size)


SHAPES = [(8, 3, 3, 3), (8, 72), (72, 8), (6, 40), (40, 6), (5, 5), (12, 12, 1, 1), (1, 9), (8, 72)]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_stacks_of_padded_matrices_make_the_steps_of_single_ones(memory_format, monkeypatch):
    monkeypatch.setattr(muon, "has_bf16", lambda device: False)
    generator = torch.Generator().manual_seed(0)

    def random(shape):
        x = torch.randn(shape, generator=generator)
        return x.contiguous(memory_format=memory_format) if x.ndim == 4 else x

    parameters = [nn.Parameter(random(shape)) for shape in SHAPES]
    weights = [parameter.detach().clone() for parameter in parameters]
    momenta = [torch.zeros_like(weight) for weight in weights]
    optimizer = Muon(parameters, [], lr=0.1, weight_decay=0.1)
    for _ in range(3):
        starts = [weight.clone() for weight in weights]
        for parameter, weight in zip(parameters, weights, strict=True):
            parameter.data.copy_(weight)
            parameter.grad = random(weight.shape)
        gradients = [parameter.grad.clone() for parameter in parameters]
        plain_step(weights, gradients, momenta, 0.1, 0.1)
        optimizer.step()
        for parameter, weight, start in zip(parameters, weights, starts, strict=True):
            assert_close(parameter.detach() - start, weight - start)
    assert all(optimizer.state[parameter]["step"] == 3 for parameter in parameters)


def test_bf16_steps_have_the_dtype_and_layout_of_the_updates(monkeypatch):
    monkeypatch.setattr(muon, "has_bf16", lambda device: True)
    updates = [matrix(8, 3, 3, 3).to(memory_format=torch.channels_last), matrix(30, 8)]
    for step, update in zip(orthogonal_steps(updates), updates, strict=True):
        assert (step.dtype, step.stride()) == (torch.float32, update.stride())
        expected = plain_orthogonal(update.flatten(1)).view_as(update)
        assert (step - expected).norm() < 0.05 * expected.norm()


def test_padding_costs_a_bounded_share_of_the_work():
    counts = {(512, 576): 1, (48, 432): 8, (48, 48): 12, (64, 8): 3, (8, 64): 1}
    parts = muon._parts(tuple(counts.items()))
    assert sorted(sum((part.counts for part in parts), ())) == sorted(counts.items())
    separate = sum(muon._Part((count,)).work for count in counts.items())
    assert separate < sum(part.work for part in parts) <= muon.MAX_PADDED_WORK * separate
    assert len(parts) == 2  # the large matrix is alone


@pytest.mark.parametrize(
    ("folder", "limit"), [("color_64/level_3", 105), ("fashion_mnist/level_2", 105)]
)
def test_a_step_has_few_operations(folder, limit):
    level = ProgressiveVAELevel.from_pretrained(f"{EXAMPLES}/{folder}")
    level.to(memory_format=torch.channels_last)
    matrices, others = matrices_and_others(level)
    optimizer = Muon(matrices, others, lr=1e-3, foreach=True)

    def set_gradients():
        for parameter in matrices + others:
            parameter.grad = torch.ones_like(parameter)

    set_gradients()
    optimizer.step()
    set_gradients()
    count = count_ops(optimizer.step, num_warmups=0)
    assert sum(count.ops.values()) <= limit
    set_gradients()
    updates = [parameter.grad for parameter in matrices]
    assert not count_ops(lambda: orthogonal_steps(updates)).waits


@pytest.fixture
def process_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_steps_of_a_sharded_model(process_group):
    """Of one process; `test_processes.py` has two."""
    model = nn.Sequential(nn.Linear(6, 10), nn.Linear(10, 4, bias=False), nn.Linear(4, 10))
    plain = copy.deepcopy(model)
    fully_shard(model, mesh=dist.device_mesh.init_device_mesh("cpu", (1,)))
    for module in (model, plain):
        optimizer = Muon(*matrices_and_others(module), lr=0.1)
        for step in range(2):
            module(torch.ones(2, 6) + step).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    for sharded, parameter in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(sharded.full_tensor(), parameter)
