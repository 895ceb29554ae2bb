"""Grids of samples."""

import numpy as np

from helpers.models import AUXILIARY, generators, pipeline_of, tiny_pipeline
from progressive_vae.visualization import image_grid, sample_grid, sample_grid_size, side_by_side


def test_a_row_of_samples_for_each_class():
    pipe = tiny_pipeline()
    assert sample_grid_size(pipe) == (2, 10)
    samples = pipe([0, 1], num_images_per_prompt=3, generator=generators(6, seed=5)).images
    grid = sample_grid(pipe, seed=5, columns=3)
    assert np.array_equal(np.asarray(grid), np.asarray(image_grid(samples, 3)))


def test_previews_of_the_sampled_codes_stand_beside_the_samples():
    pipe = pipeline_of(**AUXILIARY)
    assert sample_grid_size(pipe) == (10, 5)
    output = pipe(num_images_per_prompt=20, generator=generators(20))
    blocks = [pipe.preview(output.codes, 1), pipe.preview(output.codes, 2), output.images]
    expected = side_by_side([image_grid(images, 2) for images in blocks])
    assert np.array_equal(np.asarray(sample_grid(pipe, columns=2)), np.asarray(expected))


def test_samples_are_those_of_the_sampling_settings():
    pipe = tiny_pipeline()
    exact = np.asarray(sample_grid(pipe, columns=2))
    pipe.register_to_config(sampling={"temperature": 0.5})
    assert not np.array_equal(np.asarray(sample_grid(pipe, columns=2)), exact)
