"""Metrics of a run, for its card."""

METRICS = {
    "dataset": "some/images",
    "split": "test",
    "num_images": 10,
    "bits_per_dim": {"prior": 0.1, "level_1": 2.0, "total": 2.1},
    "codes": {"level_1": {"codebook_size": 8, "codes_used": 7, "codebook_perplexity": 5.5}},
    "label_accuracy": {"images": 0.9, "level_1": 0.8},
    "frechet_distance": 1.25,
    "num_drawn": 5,
    "phases": {"level_1": {"seconds": 3.0, "images": 30, "images_per_second": 10.0}},
    "sampled_images_per_second": 100.0,
    "seed": 0,
    "machine": "a machine",
    "license": "cc-by-4.0",
    "recipe": {"level_1": {"fit": {"learning_rate": 0.004}}, "run": {"seed": 0}},
}
