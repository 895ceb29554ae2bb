"""`Conditioning`: labels are checked once; afterwards nothing reads values on the device."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.models import generators, tiny_level, tiny_prior
from progressive_vae import ProgressiveVAEPriorConfig
from progressive_vae.models.conditioning import Conditioning
from progressive_vae.models.sampling import Sampler

CONFIG = ProgressiveVAEPriorConfig(num_classes=2, id2label={0: "cat", 1: "dog"})
UNCONDITIONAL = ProgressiveVAEPriorConfig()
READS = ("_local_scalar_dense", "equal.default", "is_nonzero")


class ValueReads(TorchDispatchMode):
    """Counts the operations by which Python reads values of tensors."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += any(name in str(function) for name in READS)
        return function(*args, **(kwargs or {}))


def conditioning_of(*class_ids, is_null=False):
    return Conditioning(torch.tensor(class_ids), 2, is_null)


def unreadable(size):
    """A conditioning whose values cannot be read, as on the meta device there are none."""
    return Conditioning(torch.zeros(size, dtype=torch.long, device="meta"), 2)


@pytest.mark.parametrize(
    "class_labels",
    [[0, 1, 2], ("cat", "dog", 2), np.array([0, 1, 2]), torch.tensor([0, 1, 2]),
     torch.tensor([0, 1, 2], dtype=torch.int32), np.array(["cat", "dog", "cat"])],
)  # fmt: skip
def test_labels_of_all_kinds(class_labels):
    conditioning = Conditioning.from_labels(class_labels, CONFIG, 3)
    last = 2 if class_labels[2] == 2 else 0
    assert conditioning.class_ids.tolist() == [0, 1, last]
    assert conditioning.class_ids.dtype == torch.int64
    assert len(conditioning) == 3 and conditioning.num_classes == 2 and not conditioning.is_null


@pytest.mark.parametrize("class_labels", [1, "dog", np.int64(1), torch.tensor(1), np.array(1)])
def test_one_label_is_a_batch_of_one(class_labels):
    assert Conditioning.from_labels(class_labels, CONFIG).class_ids.tolist() == [1]


def test_labels_of_the_null_class():
    for class_labels in (None, [2, 2], torch.tensor([2, 2])):
        conditioning = Conditioning.from_labels(class_labels, CONFIG, 2)
        assert conditioning.class_ids.tolist() == [2, 2] and conditioning.is_null
    assert len(Conditioning.from_labels(None, CONFIG)) == 1
    assert len(Conditioning.from_labels(None, CONFIG, 0)) == 0
    conditioning = Conditioning.from_labels(None, UNCONDITIONAL, 2)
    assert conditioning.class_ids.tolist() == [0, 0] and conditioning.is_null


@pytest.mark.parametrize(
    ("class_labels", "message"),
    [
        ([3], r"class_labels in 0 … 1, or 2 for the null class, got \[3\]"),
        (torch.tensor([-1]), r"class_labels in 0 … 1, or 2 for the null class, got \[-1\]"),
        ([], "class_labels in 0 … 1"),
        (["cow"], r"class_labels among \['cat', 'dog'\], got \['cow'\]"),
        ([0, 1], "expected 3 class_labels, got 2"),
        (Conditioning(torch.zeros(2).long(), 2), "expected 3 class_labels, got 2"),
        (Conditioning(torch.zeros(3).long(), 5), "of 2 classes, got a Conditioning of 5"),
        (torch.tensor([0.0, 1.0, 1.0]), "class_labels to be integers of shape .*float32"),
        (torch.zeros(3, 1).long(), r"class_labels to be integers .*shape \(3, 1\)"),
        ([0, True, 1], "numbers or names of classes, one or a list, got True"),
    ],
)
def test_invalid_labels(class_labels, message):
    with pytest.raises(ValueError, match=message):
        Conditioning.from_labels(class_labels, CONFIG, 3)


def test_labels_of_an_unconditional_factor():
    with pytest.raises(ValueError, match="expected class_labels=None, as there are no classes"):
        Conditioning.from_labels([0], UNCONDITIONAL)
    conditioning = Conditioning.from_labels(conditioning_of(0, 1), UNCONDITIONAL, 2)
    assert conditioning.class_ids.tolist() == [0, 0]
    assert conditioning.num_classes == 0 and conditioning.is_null


def test_repeated_and_indexed_examples():
    conditioning = conditioning_of(0, 1, 2)
    assert conditioning.repeat(2).class_ids.tolist() == [0, 0, 1, 1, 2, 2]
    assert conditioning[1:].class_ids.tolist() == [1, 2]
    assert conditioning[torch.tensor([2, 0, 0])].class_ids.tolist() == [2, 0, 0]
    assert conditioning[2:].is_null and not conditioning[1:].is_null
    null = conditioning.null()
    assert null.class_ids.tolist() == [2, 2, 2]
    assert null.is_null and null[1:].is_null and null.repeat(2).is_null and null.to("cpu").is_null


def test_dropped_examples_are_null():
    conditioning = conditioning_of(0, 1, 1, 0)
    assert conditioning.drop(0.0).class_ids.tolist() == [0, 1, 1, 0]
    assert conditioning.drop(1.0).class_ids.tolist() == [2, 2, 2, 2]
    noise = torch.rand(4, generator=torch.Generator().manual_seed(0))
    dropped = conditioning.drop(0.5, torch.Generator().manual_seed(0))
    assert torch.equal(dropped.class_ids == 2, noise < 0.5)
    # With a generator each, an example does not depend on its batch.
    by_row = conditioning.drop(0.5, generators(4))
    part = conditioning[2:].drop(0.5, generators(4)[2:])
    assert torch.equal(by_row.class_ids[2:], part.class_ids)


def test_guidance_has_class_rows_then_null_rows():
    sampler = Sampler(2, guidance_scale=2.0)
    rows = conditioning_of(0, 2).for_guidance(sampler)
    assert rows.class_ids.tolist() == [0, 2, 2, 2] and sampler.is_guided
    sampler = Sampler(2, guidance_scale=2.0)
    null = conditioning_of(2, 2, is_null=True)
    assert null.for_guidance(sampler) is null and not sampler.is_guided
    conditioning = conditioning_of(0, 1)
    assert conditioning.for_guidance(Sampler(2)) is conditioning


def test_no_method_reads_values():
    conditioning = Conditioning.from_labels(unreadable(3), CONFIG, 3, "meta")
    conditioning = conditioning.repeat(2)[1:4].drop(0.5).for_factor(CONFIG)
    assert len(conditioning.for_guidance(Sampler(3, guidance_scale=2.0))) == 6
    assert conditioning.null().is_null and conditioning.for_factor(UNCONDITIONAL).is_null


def test_sampling_and_training_do_not_read_labels():
    level = tiny_level(num_symbols=5, num_classes=2)
    prior = tiny_prior(num_classes=2)
    codes = torch.randint(3, (2, 2, 2))
    finer = torch.randint(5, (2, 4, 4))
    labels = conditioning_of(0, 1)
    level.sample(codes)  # computes the positions of the ordering
    with ValueReads() as reads:
        prior.sample(2, labels, guidance_scale=2.0)
    assert reads.count == 0
    # A level reads what it does without labels: its codes, to check them.
    pairs = [
        (
            lambda: level.eval().sample(codes, labels, guidance_scale=2.0),
            lambda: level.eval().sample(codes),
        ),
        (lambda: level.train()(finer, codes, labels), lambda: level.train()(finer, codes)),
    ]
    for conditional, unconditional in pairs:
        with ValueReads() as reads:
            conditional()
        with ValueReads() as expected:
            unconditional()
        assert reads.count == expected.count


def test_one_conditioning_is_for_all_factors():
    conditioning = conditioning_of(0, 1)
    codes = torch.randint(3, (2, 2, 2))
    kwargs = {"guidance_scale": 3.0, "generator": generators(2)}
    unconditional = tiny_level(num_symbols=5)
    samples = unconditional.sample(codes, conditioning, **kwargs)
    assert torch.equal(samples, unconditional.sample(codes, generator=generators(2)))
    prior = tiny_prior(num_classes=2)
    expected = prior.log_prob(codes, [0, 1])
    assert torch.equal(prior.log_prob(codes, conditioning), expected)
    assert torch.equal(prior.log_prob(codes, torch.tensor([0, 1])), expected)


def test_compiles_without_graph_breaks():
    def prompt(conditioning):
        return prior._prompt(prior._conditioning(conditioning, 2, torch.device("cpu")).drop(0.0))

    prior = tiny_prior(num_classes=2)
    compiled = torch.compile(prompt, backend="eager", fullgraph=True)
    for conditioning in (conditioning_of(0, 1), None):
        assert torch.equal(compiled(conditioning), prompt(conditioning))
