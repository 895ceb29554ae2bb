"""One call of a pipeline: its controls, its callback, its thread."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import generators, tiny_level, tiny_prior

from progressive_vae import ProgressiveVAEPipeline


def test_a_preview_takes_the_most_probable_finer_values(pipe):
    preview = pipe(num_images_per_prompt=4, num_levels=1, output_type="pt", generator=generators(4))
    greedy = pipe(codes=preview.codes[:1], temperature=0.0, output_type="pt")
    assert torch.equal(preview.images, greedy.images)
    drawn = pipe(num_images_per_prompt=4, output_type="pt", generator=generators(4))
    assert torch.equal(drawn.codes[0], preview.codes[0])


def test_levels_are_told_how_corrupt_codes_are():
    level = tiny_level(num_channels=1, corruption=0.2)
    pipe = ProgressiveVAEPipeline(tiny_prior(), level, image_size=[4, 4])
    pipe.set_progress_bar_config(disable=True)

    def draw(strength):
        return pipe(generator=generators(1), corruption=strength, output_type="pt").images

    assert not torch.equal(draw(0.0), draw(0.2))
    assert torch.equal(draw(0.2), draw([0.0, 0.2])) and torch.equal(draw(0.2), draw(0.9))


def test_controls_of_each_factor(pipe):
    same = pipe(temperature=[1.0, 1.0, 1.0, 1.0], generator=generators(1), output_type="pt").images
    assert torch.equal(same, pipe(generator=generators(1), output_type="pt").images)
    greedy = pipe(temperature=0, output_type="pt").images
    assert torch.equal(greedy, pipe(top_k=1, output_type="pt").images)
    assert torch.equal(greedy, pipe(top_p=1e-6, output_type="pt").images)


def test_callback_sees_and_replaces_codes(pipe):
    seen = []

    def callback(_, step, __, tensors):
        seen.append((step, len(tensors["codes"])))
        if step == 1:
            return {"codes": [*tensors["codes"][:1], torch.zeros(1, 2, 2, dtype=torch.long)]}

    output = pipe(callback_on_step_end=callback, output_type="pt")
    assert seen == [(0, 1), (1, 2), (2, 3)] and pipe.num_timesteps == 4
    assert not output.codes[1].any()


def test_callback_sets_the_guidance_of_what_follows():
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


def test_threads_that_share_a_pipeline_do_not_meet():
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


def test_a_call_within_a_call_gives_way_to_it():
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


def test_a_temperature_next_to_nothing_is_nothing(pipe):
    cold = pipe(temperature=0.0, output_type="pt").images
    for temperature in (1e-38, 1e-300, 1e-9):
        assert torch.equal(pipe(temperature=temperature, output_type="pt").images, cold)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(class_labels=[12]), "class_labels in 0 … 1, or 2 for the null class, got .12."),
        (dict(class_labels=[5]), "class_labels in 0 … 1, or 2 for the null class"),
        (dict(corruption=0.1), "corruption=0, as no level learned it, got 0.1"),
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
            "class_labels=None, as no drawn factor .*got .0.",
        ),
        (
            dict(codes=[torch.zeros(1, 1, 1).long()], guidance_scale=2.0),
            "guidance_scale=1 without class_labels, got 2.0",
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
