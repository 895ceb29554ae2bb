import math
from collections import deque

import datasets
import numpy as np
import PIL.Image
import pytest
import torch

from helpers.models import assert_same, generators, tiny_level, tiny_pipeline, tiny_prior
from progressive_vae import ProgressiveVAEPipeline


def test_log_prob_is_the_sum_of_its_factors(pipe, images):
    z_1, z_2, z_3 = pipe.encode(images)
    pixels = images / 127.5 - 1
    assert torch.equal(pipe.level_3.encode(pixels), z_3)
    assert torch.equal(pipe.level_2.encode(z_3), z_2)
    assert torch.equal(pipe.level_1.encode(z_2), z_1)
    with torch.no_grad():
        factors = {
            "prior": pipe.prior.log_prob(z_1),
            "level_1": pipe.level_1.log_prob(z_2, z_1),
            "level_2": pipe.level_2.log_prob(z_3, z_2),
            "level_3": pipe.level_3.log_prob(pixels, z_3),
        }
    nats = pipe.log_prob(images, batch_size=3)
    assert list(nats) == list(factors)
    for name, value in factors.items():
        assert torch.allclose(nats[name], value, rtol=1e-4)
    bits = pipe.bits_per_dim(images)
    total = -sum(factors.values()).mean().item() / (math.log(2) * 3 * 5 * 7)
    assert bits["total"] == pytest.approx(total, rel=1e-4)
    assert sum(v for k, v in bits.items() if k != "total") == pytest.approx(bits["total"])
    by_name = pipe.log_prob(images, ["0", "1", "1", "0"], batch_size=3)["prior"]
    assert torch.allclose(by_name, pipe.prior.log_prob(z_1, torch.tensor([0, 1, 1, 0])))
    with pytest.raises(ValueError, match="expected 4 class_labels, got 1"):
        pipe.log_prob(images, [0])


@pytest.mark.parametrize("num_channels", [1, 3])
def test_output_types_and_sizes(num_channels):
    pipe = tiny_pipeline(num_channels)
    draw = lambda kind: pipe(num_images_per_prompt=2, generator=generators(2), output_type=kind)  # noqa: E731
    tensor, output = draw("pt").images, draw("pil")
    assert tensor.shape == (2, num_channels, 5, 7)
    assert np.allclose(draw("np").images, tensor.permute(0, 2, 3, 1))
    assert output.images[0].size == (7, 5)
    assert [tuple(z.shape) for z in output.codes] == [(2, 1, 1), (2, 2, 2), (2, 3, 4)]
    assert torch.equal(draw("latent").images, output.codes[-1])
    images, codes = pipe(output_type="pt", return_dict=False)
    assert images.shape[0] == 1 and len(codes) == 3


def test_images_in_any_form_are_the_same_images(pipe, images):
    floats = images.float() / 255
    arrays = images.permute(0, 2, 3, 1).numpy()
    pictures = [PIL.Image.fromarray(a) for a in arrays]
    expected = pipe.encode(images)
    for form in (floats, arrays, arrays / 255.0, pictures, list(images), list(arrays)):
        for ours, theirs in zip(pipe.encode(form), expected, strict=True):
            assert torch.equal(ours, theirs)
    assert len(pipe.encode(pictures[0])[0]) == 1


def test_saved_and_loaded_alike(pipe, images, tmp_path):
    pipe.save_pretrained(tmp_path)
    loaded = ProgressiveVAEPipeline.from_pretrained(tmp_path)
    assert loaded.config.image_size == [5, 7] and loaded.num_levels == 3
    for name, nats in pipe.log_prob(images).items():
        # The order of a sum depends on where weights lie in memory, on some processors.
        torch.testing.assert_close(nats, loaded.log_prob(images)[name], rtol=1e-5, atol=1e-6)
    ours = pipe(generator=generators(1), output_type="pt").images
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(ours, loaded(generator=generators(1), output_type="pt").images)
    for name in pipe.factor_names:
        saved, again = getattr(pipe, name).state_dict(), getattr(loaded, name).state_dict()
        assert saved.keys() == again.keys()
        assert all(torch.equal(saved[k], again[k]) for k in saved)


def test_an_image_does_not_depend_on_its_batch(pipe):
    together = pipe([0, 1], num_images_per_prompt=3, generator=generators(6), output_type="pt")
    pairs = pipe(
        [0, 1], num_images_per_prompt=3, generator=generators(6), output_type="pt", batch_size=2
    )
    assert torch.equal(together.images, pairs.images)
    alone = pipe([1], generator=generators(1, seed=4), output_type="pt")
    assert torch.equal(together.images[4:5], alone.images)


def test_labels_by_name_and_number(pipe):
    pipe.prior.config.id2label = {0: "cat", 1: "dog"}
    assert pipe.get_label_ids(["dog", "cat"]) == [1, 0]
    by_name = pipe(["dog"], generator=generators(1), guidance_scale=2.0, output_type="latent")
    by_number = pipe(1, generator=generators(1), guidance_scale=2.0, output_type="latent")
    assert all(torch.equal(a, b) for a, b in zip(by_name.codes, by_number.codes, strict=True))
    with pytest.raises(ValueError, match=r"class_labels among \['cat', 'dog'\], got \['cow'\]"):
        pipe("cow")


def test_start_from_given_codes(pipe, images):
    codes = pipe.encode(images)
    output = pipe(codes=codes[:2], num_images_per_prompt=2, output_type="latent")
    assert torch.equal(output.codes[1], codes[1].repeat_interleave(2, 0))
    assert len(output.codes) == 3 and len(output.codes[2]) == 8
    assert pipe.decode(codes, "pt").shape == images.shape
    assert pipe.reconstruct(images, level=1, output_type="pt").shape == images.shape
    finest = pipe.reconstruct(images, output_type="pt", generator=generators(4))
    assert torch.equal(finest, pipe.decode(codes, "pt", generators(4)))
    assert torch.equal(pipe(codes=codes, output_type="latent").images, codes[-1])


def test_the_bound_of_stochastic_encoders():
    """E[log P(s, z)] + H(P_Ψ), against the sums over all z of a 1×1 grid."""
    prior = tiny_prior(grid_size=[1, 1])
    level = tiny_level(num_channels=1, quantizer="gumbel")
    pipe = ProgressiveVAEPipeline(prior, level, image_size=[1, 1])
    image, codes = torch.full((1, 1, 1, 1), 77, dtype=torch.uint8), torch.arange(3).view(3, 1, 1)
    pixels = image / 127.5 - 1
    with torch.no_grad():
        joint = prior.log_prob(codes) + level.log_prob(pixels.expand(3, -1, -1, -1), codes)
        encoder = level.quantizer.log_probs(level.encoder(pixels)).flatten()
    bound = (encoder.exp() * (joint - encoder)).sum()
    nats = pipe.log_prob(image.expand(20_000, -1, -1, -1), generator=generators(1)[0])
    assert list(nats) == ["prior", "level_1", "encoders"]
    assert sum(nats.values()).mean().item() == pytest.approx(bound.item(), abs=0.02)
    assert bound < joint.logsumexp(0)
    best = pipe.log_prob(image)  # of the most probable codes: what a codec reaches
    assert sum(best.values()).item() == pytest.approx(joint[encoder.argmax()].item(), rel=1e-4)
    bits = pipe.bits_per_dim(image, generator=generators(1)[0])
    assert bits["encoders"] < 0  # what the choice of z pays back
    assert sum(v for k, v in bits.items() if k != "total") == pytest.approx(bits["total"])


def test_classes_in_the_levels_alone(images):
    """An unconditional prior under a class-conditional level: labels, names and guidance work."""
    level = tiny_level(num_channels=3, num_classes=2, id2label={0: "cat", 1: "dog"})
    pipe = ProgressiveVAEPipeline(tiny_prior(grid_size=[3, 4]), level, image_size=[5, 7])
    pipe.set_progress_bar_config(disable=True)
    assert pipe.labels == {"cat": 0, "dog": 1} and pipe.get_label_ids("dog") == [1]
    given = pipe.log_prob(images, ["dog"] * 4)
    z, pixels = pipe.encode(images)[0], images / 127.5 - 1
    assert torch.allclose(given["level_1"], level.log_prob(pixels, z, torch.ones(4).long()))
    assert torch.equal(given["prior"], pipe.log_prob(images)["prior"])
    draw = lambda **kw: pipe(generator=generators(1), output_type="pt", **kw).images  # noqa: E731
    codes = pipe(generator=generators(1), output_type="latent").codes
    assert not torch.equal(draw(class_labels="dog"), draw(class_labels="cat"))
    by_factor = draw(class_labels="dog", guidance_scale=[1.0, 3.0])
    assert torch.equal(by_factor, draw(class_labels="dog", guidance_scale=3.0))
    assert not torch.equal(by_factor, draw(class_labels="dog"))
    both = pipe(["cat", "dog"], codes=[codes[0].repeat(2, 1, 1)], output_type="pt").images
    assert both.shape == (2, 3, 5, 7)
    numbered = tiny_level(num_channels=3, num_classes=10)
    pipe = ProgressiveVAEPipeline(tiny_prior(grid_size=[3, 4]), numbered, image_size=[5, 7])
    for call in (pipe, pipe.get_label_ids, lambda label: pipe.log_prob(images[:1], label)):
        with pytest.raises(ValueError, match="in 0 … 9, or 10 for the null class, got .12.$"):
            call([12])
    with pytest.raises(ValueError, match="one id2label in all class-conditional parts"):
        ProgressiveVAEPipeline(
            tiny_prior(grid_size=[3, 4], num_classes=3), level, image_size=[5, 7]
        )


def test_arrays_that_run_backwards(pipe, images):
    arrays = images.permute(0, 2, 3, 1).numpy()
    mirrored = arrays[:, ::-1, ::-1]
    for ours, theirs in zip(pipe.encode(mirrored), pipe.encode(mirrored.copy()), strict=True):
        assert torch.equal(ours, theirs)
    as_list = pipe.encode([array[::-1] for array in arrays])
    assert torch.equal(as_list[0], pipe.encode(arrays[:, ::-1].copy())[0])


def test_without_a_prior(pipe, images):
    view = ProgressiveVAEPipeline(None, pipe.level_3, image_size=[5, 7])
    view.set_progress_bar_config(disable=True)
    assert view.reconstruct(images, output_type="pt").shape == images.shape
    for call in (view, lambda: view.log_prob(images)):
        with pytest.raises(ValueError, match="a pipeline with a prior"):
            call()


def test_an_image_with_a_side_of_one():
    for size in ([1, 1], [1, 3]):
        level = tiny_level(num_channels=1, downsample=4)
        pipe = ProgressiveVAEPipeline(tiny_prior(grid_size=[1, 1]), level, image_size=size)
        image = pipe().images[0]
        assert image.size == tuple(reversed(size)) and image.mode == "L"
        assert len(pipe.encode(image)) == 1


@pytest.mark.parametrize("num_levels", [1, 8])
def test_any_number_of_levels(num_levels, tmp_path):
    levels = [tiny_level(num_symbols=3, seed=i) for i in range(num_levels - 1)]
    levels.append(tiny_level(num_channels=1))
    pipe = ProgressiveVAEPipeline.from_levels(
        tiny_prior(grid_size=[1, 1] if num_levels > 1 else [1, 2]), levels, [2, 3]
    )
    pipe.save_pretrained(tmp_path)
    loaded = ProgressiveVAEPipeline.from_pretrained(tmp_path)
    images = torch.randint(256, (2, 1, 2, 3), dtype=torch.uint8)
    assert len(loaded.bits_per_dim(images)) == num_levels + 2
    assert loaded.num_levels == len(loaded().codes) == num_levels
    with pytest.raises(ValueError, match="1 … 8 levels, got 9"):
        ProgressiveVAEPipeline.from_levels(None, [levels[-1]] * 9, [2, 3])


def test_image_size_follows_from_the_prior():
    pipe = ProgressiveVAEPipeline(tiny_prior(), tiny_level(num_channels=1, downsample=4))
    assert pipe.config.image_size == [8, 8]


@pytest.mark.parametrize(
    ("slots", "message"),
    [
        (dict(level_2=None), "without a gap, got levels"),
        (dict(level_1=tiny_level(num_symbols=9)), "level_1 with num_symbols=4"),
        (dict(level_3=None, image_size=[3, 4]), "level_2, the finest, with num_channels"),
        (dict(prior=tiny_prior(grid_size=[2, 2])), "prior with .* to fit level_1"),
        (dict(image_size=[50, 70]), "prior with .* to fit level_1"),
        (dict(image_size=[0, 7]), "image_size of two positive integers"),
        (dict(prior=None, image_size=None), "image_size=.H, W. where there is no prior"),
    ],
)
def test_parts_that_do_not_fit(pipe, slots, message):
    parts = {name: getattr(pipe, name) for name in pipe.factor_names}
    with pytest.raises(ValueError, match=message):
        ProgressiveVAEPipeline(**{**parts, "image_size": [5, 7], **slots})


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(1, 1, 5, 7), r"= \(3, 5, 7\), got \(1, 5, 7\)"),
        (torch.zeros(1, 3, 10, 14), r"= \(3, 5, 7\), got \(3, 10, 14\)"),
        (torch.zeros(1, 3, 5, 7).long(), "dtype uint8 or float, got torch.int64"),
        (torch.full((1, 3, 5, 7), 255.0), r"images in \[0, 1\], got values in \[255.0"),
        (torch.full((1, 3, 5, 7), float("nan")), r"images in \[0, 1\], got values in \[nan"),
        (PIL.Image.new("RGB", (8, 5)), "width 8 and height 5"),
        (PIL.Image.new("RGBA", (7, 5)), "got a PIL image of 'RGBA'"),
        ([], "of length 0"),
        ("picture.png", r"got \['str'\]"),
        (["picture.png"], r"got \['str'\]"),
        ([torch.zeros(3, 5, 7), torch.zeros(3, 5, 8)], "images of one size"),
        (None, r"got \['NoneType'\]"),
    ],
)
def test_bad_images(pipe, images, message):
    for call in (pipe.encode, pipe.log_prob):
        with pytest.raises(ValueError, match=message):
            call(images)


def test_a_batch_has_an_image(pipe, images):
    for call in (pipe.encode, pipe.log_prob):
        with pytest.raises(ValueError, match="batch_size >= 1, got -1"):
            call(images, batch_size=-1)


def test_compiled_parts_are_parts(pipe, images, tmp_path):
    def compiled(part):
        return torch.compile(part, backend="eager")

    expected, codes = pipe.log_prob(images), pipe.encode(images)
    parts = {name: compiled(getattr(pipe, name)) for name in pipe.factor_names}
    pipe.save_pretrained(tmp_path / "plain")
    pipelines = [
        ProgressiveVAEPipeline(**parts, image_size=[5, 7]),
        ProgressiveVAEPipeline.from_levels(None, [*parts.values()][1:], [5, 7]),
        ProgressiveVAEPipeline.from_pretrained(tmp_path / "plain", level_2=parts["level_2"]),
        ProgressiveVAEPipeline.from_pipe(ProgressiveVAEPipeline(**parts, image_size=[5, 7])),
        ProgressiveVAEPipeline(**ProgressiveVAEPipeline(**parts, image_size=[5, 7]).components,
                               image_size=[5, 7]),
    ]  # fmt: skip
    for other in pipelines:
        other.set_progress_bar_config(disable=True)
        for ours, theirs in zip(other.encode(images), codes, strict=True):
            assert torch.equal(ours, theirs)
        if other.prior is not None:
            for name, nats in other.log_prob(images, generator=generators(4)).items():
                assert name == "encoders" or torch.allclose(nats, expected[name], rtol=1e-4)
    pipelines[0].save_pretrained(tmp_path / "compiled")
    assert_same(pipe, ProgressiveVAEPipeline.from_pretrained(tmp_path / "compiled"))


def test_images_in_any_iterable_are_the_same_images(pipe, images):
    arrays = images.permute(0, 2, 3, 1).numpy()
    pictures = [PIL.Image.fromarray(a) for a in arrays]
    features = datasets.Features({"image": datasets.Image()})
    column = datasets.Dataset.from_dict({"image": pictures}, features)["image"]
    read_only = arrays.copy()
    read_only.flags.writeable = False
    calls = [
        lambda x: pipe.encode(x, batch_size=np.int64(3))[0],
        lambda x: pipe.log_prob(x, np.array([0, 1, 1, 0]), batch_size=3)["prior"],
        lambda x: pipe.reconstruct(x, np.int64(2), "pt", generators(4)),
        lambda x: pipe.variations(x, generator=generators(4), output_type="pt").images,
        lambda x: pipe.interpolate(x, images, generator=generators(4), output_type="pt").images,
        lambda x: (
            pipe.inpaint(
                x, torch.ones(5, 7), generator=generators(4), num_particles=1, output_type="pt"
            ).images
        ),
    ]
    forms = [tuple(pictures), tuple(arrays), deque(images), column, read_only]
    for call in calls:
        expected = call(images)
        for form in (*forms, (picture for picture in pictures), iter(images)):
            assert torch.equal(call(form), expected)


def test_images_of_other_kinds(pipe, images):
    wrong = [{"image": images}, {1, 2}, 7, images[0, 0, 0, 0], b"bytes", [[1, 2]], [None]]
    for value in wrong:
        for call in (pipe.encode, pipe.log_prob, pipe.reconstruct, pipe.variations):
            with pytest.raises(
                ValueError, match="expected images as PIL images, arrays or tensors"
            ):
                call(value)


def test_a_generator_for_each_image_of_an_encoder():
    level = tiny_level(num_channels=1, quantizer="gumbel", codebook_size=3)
    pipe = ProgressiveVAEPipeline(tiny_prior(), level, image_size=[4, 4])
    images = torch.randint(256, (5, 1, 4, 4), dtype=torch.uint8)
    together = pipe.encode(images, generator=generators(5))[0]
    assert torch.equal(together, pipe.encode(images, 2, tuple(generators(5)))[0])
    assert torch.equal(together[3:4], pipe.encode(images[3:4], generator=generators(1, seed=3))[0])
    nats = pipe.log_prob(images, generator=generators(5), batch_size=2)["level_1"]
    alone = pipe.log_prob(images[4:], generator=generators(1, seed=4))["level_1"]
    assert torch.allclose(nats[4:], alone, rtol=1e-4)
