"""One call of a pipeline: its controls, its callback, its thread."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from helpers.models import generators, tiny_level, tiny_prior
from progressive_vae import ProgressiveVAEPipeline


def test_a_preview_takes_the_most_probable_finer_values(pipe):
    preview = pipe(num_images_per_prompt=4, num_levels=1, output_type="pt", generator=generators(4))
    greedy = pipe(codes=preview.codes[:1], temperature=0.0, output_type="pt")
    assert torch.equal(preview.images, greedy.images)
    drawn = pipe(num_images_per_prompt=4, output_type="pt", generator=generators(4))
    assert torch.equal(drawn.codes[0], preview.codes[0])


def test_levels_are_conditioned_on_the_noise_level():
    level = tiny_level(num_channels=1, code_noise=0.2)
    pipe = ProgressiveVAEPipeline(tiny_prior(), level, image_size=[4, 4])
    pipe.set_progress_bar_config(disable=True)

    def draw(strength):
        return pipe(generator=generators(1), code_noise=strength, output_type="pt").images

    assert not torch.equal(draw(0.0), draw(0.2))
    assert torch.equal(draw(0.2), draw([0.0, 0.2])) and torch.equal(draw(0.2), draw(0.9))


def test_sampling_arguments_per_factor(pipe):
    same = pipe(temperature=[1.0, 1.0, 1.0, 1.0], generator=generators(1), output_type="pt").images
    assert torch.equal(same, pipe(generator=generators(1), output_type="pt").images)
    greedy = pipe(temperature=0, output_type="pt").images
    assert torch.equal(greedy, pipe(top_k=1, output_type="pt").images)
    assert torch.equal(greedy, pipe(top_p=1e-6, output_type="pt").images)


def test_a_callback_reads_and_replaces_codes(pipe):
    seen = []

    def callback(_, step, __, tensors):
        seen.append((step, len(tensors["codes"])))
        if step == 1:
            return {"codes": [*tensors["codes"][:1], torch.zeros(1, 2, 2, dtype=torch.long)]}

    output = pipe(callback_on_step_end=callback, output_type="pt")
    assert seen == [(0, 1), (1, 2), (2, 3)] and pipe.num_timesteps == 4
    assert not output.codes[1].any()


def test_a_callback_sets_the_guidance_scale_of_later_factors():
    levels = [
        tiny_level(num_symbols=4, num_classes=2, seed=1),
        tiny_level(num_channels=3, codebook_size=4, num_classes=2, seed=2),
    ]
    pipe = ProgressiveVAEPipeline.from_levels(tiny_prior(num_classes=2), levels)

    def callback(pipe, step, _, tensors):
        pipe._guidance_scale = 5.0

    def draw(**given):
        return pipe([0, 1] * 4, generator=generators(8), output_type="pt", **given).images

    expected = draw(guidance_scale=[1.0, 5.0, 5.0])
    assert not torch.equal(draw(), expected)
    for batch_size in (3, 256):  # each batch starts with the scale that was asked for
        changed = draw(callback_on_step_end=callback, batch_size=batch_size)
        assert torch.equal(changed, expected) and pipe.guidance_scale == 5.0


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ({"codes": None}, "return codes .z_1 … z_1. of 1 images, got None"),
        ({"codes": []}, "of 1 images, got ..$"),
        ({"codes": [torch.zeros(2, 1, 1).long()]}, r"of 1 images, got \[\(2, 1, 1\)\]"),
        ({"codes": [torch.zeros(1, 2, 2).long()]}, r"codes of level 1 of shape \(1, 1, 1\)"),
        ({"codes": [torch.full((1, 1, 1), 9)]}, "codes of level 1 in 0 … 2"),
        ({"latents": 0}, "to return a dict with some of .'codes'., or None"),
        ([1], "to return a dict with some of"),
    ],
)
def test_a_callback_that_returns_no_grids(pipe, returned, message):
    with pytest.raises(ValueError, match=message):
        pipe(callback_on_step_end=lambda *_: returned)


def test_threads_have_separate_call_states():
    """Each call has a scale of its own, and a callback that changes it, in mid-call."""
    level = tiny_level(num_symbols=4, num_classes=2, seed=1)
    finest = tiny_level(num_channels=3, codebook_size=4, num_classes=2, seed=2)
    pipe = ProgressiveVAEPipeline.from_levels(tiny_prior(num_classes=2), [level, finest])
    pipe.set_progress_bar_config(disable=True)
    barrier = threading.Barrier(8)

    def draw(scale, together):
        def callback(pipe, step, _, tensors):
            if together:
                barrier.wait(timeout=60)  # all are at this step
            assert pipe.guidance_scale == (scale if step == 0 else 2 * scale)
            pipe._guidance_scale = 2 * scale

        drawn = pipe([0, 1] * 4, guidance_scale=scale, generator=generators(8), output_type="pt",
                     callback_on_step_end=callback)  # fmt: skip
        assert pipe.guidance_scale == 2 * scale and pipe.num_timesteps == 3
        return drawn.images

    scales = [1.0 + i for i in range(8)]
    alone = [draw(scale, together=False) for scale in scales]
    with ThreadPoolExecutor(8) as threads:
        for _ in range(3):
            found = threads.map(draw, scales, [True] * 8)
            assert all(torch.equal(a, b) for a, b in zip(alone, found, strict=True))
    assert not torch.equal(alone[0], alone[7])


def test_a_nested_call_restores_the_state_of_the_outer_call():
    level = tiny_level(num_channels=3, num_classes=2)
    pipe = ProgressiveVAEPipeline(tiny_prior(num_classes=2), level)
    pipe.set_progress_bar_config(disable=True)

    def callback(pipe, step, _, tensors):
        pipe.decode(tensors["codes"], "pt", class_labels=[0] * 8, guidance_scale=3.0)
        assert pipe.guidance_scale == 1.0
        pipe._guidance_scale = 5.0

    def draw(**given):
        return pipe([0, 1] * 4, generator=generators(8), output_type="pt", **given).images

    changed = draw(callback_on_step_end=callback)
    assert torch.equal(changed, draw(guidance_scale=[1.0, 5.0]))
    assert not torch.equal(changed, draw())


def test_a_tiny_temperature_is_zero(pipe):
    cold = pipe(temperature=0.0, output_type="pt").images
    for temperature in (1e-38, 1e-300, 1e-9):
        assert torch.equal(pipe(temperature=temperature, output_type="pt").images, cold)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(class_labels=[12]), "class_labels in 0 … 1, or 2 for the null class, got .12."),
        (dict(class_labels=[5]), "class_labels in 0 … 1, or 2 for the null class"),
        (dict(code_noise=0.1), "code_noise=0, .*got 0.1"),
        (
            dict(class_labels=[0], guidance_scale=[1.0, 2.0]),
            r"guidance_scale to be one or a list for",
        ),
        (dict(temperature=-1.0), "temperature >= 0, got -1.0"),
        (dict(temperature=[1.0]), "temperature to be one or a list for"),
        (dict(num_levels=4), "num_levels in 1 … 3, got 4"),
        (dict(num_images_per_prompt=0), "num_images_per_prompt >= 1"),
        (dict(batch_size=0), "batch_size >= 1, got 0"),
        (dict(output_type="jpeg"), "output_type in .*got 'jpeg'"),
        (dict(generator=[torch.Generator()] * 2), "a list of 1, got 2"),
        (dict(codes=[]), "codes of 1 … 3 levels, got 0"),
        (dict(codes=[torch.zeros(1, 2, 2).long()]), r"codes of level 1 of shape \(1, 1, 1\)"),
        (dict(codes=[torch.full((1, 1, 1), 3)]), "codes of level 1 in 0 … 2"),
        (
            dict(codes=[torch.zeros(1, 1, 1).long()], class_labels=[0]),
            "class_labels=None, as no sampled factor .*got .0.",
        ),
        (
            dict(codes=[torch.zeros(1, 1, 1).long()], guidance_scale=2.0),
            "guidance_scale=1 without class_labels or a prompt, got 2.0",
        ),
        (dict(codes=torch.zeros(1, 1, 1).long()), "codes to be a list"),
        (
            dict(codes=[torch.zeros(1, 1, 1).long(), torch.zeros(1, 2, 2).long()], num_levels=1),
            "codes of at most num_levels=1 levels, got 2",
        ),
        (dict(callback_on_step_end_tensor_inputs=["latents"]), r"got \['latents'\]"),
    ],
)
def test_bad_arguments(pipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipe(**arguments)


def test_arguments_of_numpy(pipe, images):
    codes = pipe.encode(images[:2])

    def draw(**given):
        generator = given.pop("generator", generators(4))
        return pipe(generator=generator, output_type="pt", **given).images

    plain = draw(class_labels=[0, 1], num_images_per_prompt=2, guidance_scale=2.0,
                 temperature=[0.5, 1.0, 1.0, 1.0], top_k=2, num_levels=2)  # fmt: skip
    for labels in (np.array([0, 1]), ["0", np.int64(1)], np.array(["0", "1"]), range(2),
                   (np.str_("0"), "1"), torch.tensor([0, 1], dtype=torch.int32)):  # fmt: skip
        of_numpy = draw(
            class_labels=labels, num_images_per_prompt=np.int64(2), guidance_scale=np.float32(2),
            temperature=np.array([0.5, 1, 1, 1]), top_k=np.int64(2), num_levels=np.uint8(2),
            batch_size=np.int32(3), generator=tuple(generators(4)),
        )  # fmt: skip
        assert torch.equal(of_numpy, plain)
    given = draw(codes=codes[:2], generator=generators(2))
    arrays = tuple(z.numpy() for z in codes[:2])
    assert torch.equal(draw(codes=arrays, generator=generators(2)), given)
    assert torch.equal(draw(class_labels=np.int64(1), generator=generators(1)),
                       draw(class_labels=torch.tensor(1), generator=generators(1)))  # fmt: skip


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("generator", [42, np.random.default_rng(0), [0], "cuda"]),
        ("class_labels", [["0", None], {"0", "1"}, {"0": 1}, [0.5], [True], [[0], [1]], b"0",
                          [10**30], iter([0]), np.array([0.5])]),
        ("num_images_per_prompt", [True, 1.5, "2", None, [1]]),
        ("batch_size", [True, "all", None, 0.5]),
        ("num_levels", [True, "1", 0, 2.5]),
        ("temperature", ["1.0", True, [None] * 4, np.ones(3), [1.0, 1.0, 1.0, "1.0"]]),
        ("top_k", ["5", True, [1, 2, 3, -4]]),
        ("top_p", ["0.5", 2, np.zeros(4)]),
        ("code_noise", ["0.1", None, True, -0.5]),
        ("codes", ["codes", {"codes": 1}, [[0]], [None], 5]),
        ("callback_on_step_end_tensor_inputs", ["codes"]),
        ("output_type", [None, 3, ["pil"]]),
    ],
)  # fmt: skip
def test_arguments_of_other_kinds(pipe, name, values):
    for value in values:
        with pytest.raises(ValueError, match=f"expected {name} "):
            pipe(**{name: value})


def test_arguments_of_other_methods(pipe, images):
    wrong = {
        "generator": [lambda: pipe.encode(images, generator=42),
                      lambda: pipe.bits_per_dim(images, generator=[0, 1, 2, 3]),
                      lambda: pipe.inpaint(images, images[:, :1], generator=42),
                      lambda: pipe.interpolate(images, images, generator="0"),
                      lambda: pipe.decode(pipe.encode(images), generator=1),
                      lambda: pipe.prior.sample(2, generator=42),
                      lambda: pipe.level_1.sample(torch.zeros(1, 1, 1).long(), generator=42),
                      lambda: pipe.prior.train()(torch.zeros(2, 1, 1).long(), generator=42)],
        "level": [lambda: pipe.reconstruct(images, True), lambda: pipe.variations(images, "1"),
                  lambda: pipe.preview(images, 0), lambda: pipe.interpolate(images, images, 1.5)],
        "batch_size": [lambda: pipe.preview(images, batch_size=0), lambda: pipe.prior.sample("2"),
                       lambda: pipe.encode(images, "all"),
                       lambda: pipe.inpaint(images, images[:, :1], batch_size=None)],
        "steps": [lambda: pipe.interpolate(images, images, steps=True)],
        "num_particles": [lambda: pipe.inpaint(images, images[:, :1], num_particles="16")],
        "class_labels": [lambda: pipe.log_prob(images, [0, 1, None, 0]),
                         lambda: pipe.compress(images, {0, 1})],
        "num_levels": [lambda: pipe.decompress([b"0" * 12], num_levels="1")],
        "finer_size": [lambda: pipe.level_1.sample(torch.zeros(1, 1, 1).long(), finer_size=2),
                       lambda: pipe.level_1.sample(torch.zeros(1, 1, 1).long(),
                                                   finer_size=("2", "2"))],
        "code_noise": [lambda: pipe.level_1.sample(torch.zeros(1, 1, 1).long(), code_noise="0")],
    }  # fmt: skip
    for name, calls in wrong.items():
        for call in calls:
            with pytest.raises(ValueError, match=f"expected {name} "):
                call()
    sizes = [(2, 2), [2, 2], np.array([2, 2]), torch.Size((2, 2)), torch.tensor([2, 2])]
    for size in sizes:
        z = torch.zeros(1, 1, 1).long()
        assert pipe.level_1.sample(z, finer_size=size).shape == (1, 2, 2)
    assert pipe.prior.sample(np.int64(2)).shape == (2, 1, 1)


def interrupting(step_to_end, calls):
    def callback(pipe, step, _, tensors):
        calls.append(step)
        assert not pipe.interrupt
        pipe._interrupt = step == step_to_end

    return callback


def test_an_interrupted_call_returns_a_preview_of_its_codes():
    levels = [
        tiny_level(num_symbols=4, auxiliary_hidden_size=8, seed=1),
        tiny_level(num_channels=3, codebook_size=4, auxiliary_hidden_size=8, seed=2),
    ]
    pipe = ProgressiveVAEPipeline.from_levels(tiny_prior(), levels)
    pipe.set_progress_bar_config(disable=True)

    def draw(step, **given):
        calls = []
        output = pipe(num_images_per_prompt=4, generator=generators(4), output_type="pt",
                      callback_on_step_end=interrupting(step, calls), **given)  # fmt: skip
        return output, calls

    complete, calls = draw(None)
    assert calls == [0, 1] and not pipe.interrupt
    for step in (0, 1):
        output, calls = draw(step)
        assert calls == [*range(step + 1)] and len(output.codes) == step + 1 and pipe.interrupt
        for ours, theirs in zip(output.codes, complete.codes, strict=False):
            assert torch.equal(ours, theirs)
        assert torch.equal(output.images, pipe.preview(output.codes, output_type="pt"))
    # Batches that were complete before stay as they are.
    calls = []

    def callback(pipe, step, _, tensors):
        calls.append(step)
        pipe._interrupt = len(calls) == 3

    output = pipe(num_images_per_prompt=4, generator=generators(4), output_type="pt",
                  callback_on_step_end=callback, batch_size=2)  # fmt: skip
    assert calls == [0, 1, 0] and len(output.codes) == 2
    assert torch.equal(output.images, complete.images[:2])
    assert torch.equal(draw(None)[0].images, complete.images)  # the next call is not interrupted


def test_an_interrupted_call_without_previews_takes_the_most_probable_values(pipe):
    calls = []
    output = pipe(num_images_per_prompt=2, generator=generators(2), output_type="pt",
                  callback_on_step_end=interrupting(0, calls))  # fmt: skip
    expected = pipe(num_images_per_prompt=2, generator=generators(2), num_levels=1)
    assert calls == [0] and output.images.shape == (2, 3, 5, 7)
    for ours, theirs in zip(output.codes, expected.codes, strict=True):
        assert torch.equal(ours, theirs)
    calls.clear()
    latent = pipe(output_type="latent", callback_on_step_end=interrupting(1, calls))
    assert calls == [0, 1] and torch.equal(latent.images, latent.codes[1])
