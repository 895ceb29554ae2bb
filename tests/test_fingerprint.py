import pytest
import torch

from helpers.models import randomize, tiny_level, tiny_pipeline
from progressive_vae import ProgressiveVAEPipeline, ProgressiveVAEPrior
from progressive_vae.models.fingerprint import fingerprint


def test_a_fingerprint_is_of_encoder_and_codebook_alone():
    level = tiny_level(num_channels=1)
    before = fingerprint([level])
    randomize(level.decoder, seed=7)
    level.quantizer.ema_counts -= 1
    assert fingerprint([level]) == before
    level.quantizer.codebook[0, 0] *= -1
    changed = fingerprint([level])
    assert changed != before
    with torch.no_grad():
        next(level.encoder.parameters())[0, 0] *= -1
    assert fingerprint([level]) not in (before, changed)
    assert fingerprint([level, level]) != fingerprint([level])
    level.config.dither = 0.5
    told = fingerprint([level])
    level.config.dither = 0.25
    assert len({changed, told, fingerprint([level])}) == 3


@pytest.mark.parametrize("quantizer", ["vq", "fsq", "gumbel"])
def test_rounding_leaves_the_fingerprint(quantizer):
    level = tiny_level(num_channels=1, quantizer=quantizer, codebook_dim=None, codebook_size=4)
    before = fingerprint([level])
    with torch.no_grad():
        next(level.encoder.parameters())[0, 0] *= 1e-20  # less than half precision can hold
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        assert fingerprint([level.to(dtype)]) == before


def test_an_optimization_step_changes_the_fingerprint():
    level = tiny_level(num_channels=1, hidden_size=16)
    before = fingerprint([level])
    optimizer = torch.optim.AdamW(level.encoder.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(0)
    level(torch.rand(2, 1, 4, 4, generator=generator) * 2 - 1).loss.backward()
    optimizer.step()
    assert fingerprint([level]) != before


def test_parts_that_do_not_belong_together_are_refused(tmp_path):
    pipe = tiny_pipeline()
    assert pipe.prior.config.finer_fingerprint is None  # unset means unchecked
    pipe.prior.config.finer_fingerprint = fingerprint(pipe.levels)
    pipe.level_1.config.finer_fingerprint = fingerprint(pipe.levels[1:])
    pipe.save_pretrained(tmp_path)
    loaded = ProgressiveVAEPipeline.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded.prior.config.finer_fingerprint == fingerprint(loaded.levels)

    other = tiny_level(num_symbols=5, codebook_size=4, seed=9)
    with pytest.raises(ValueError, match=r"expected \['level_1', 'level_2', 'level_3'\] with the"):
        ProgressiveVAEPipeline.from_pretrained(tmp_path, level_2=other)
    free = ProgressiveVAEPrior.from_pretrained(tmp_path / "prior", finer_fingerprint=None)
    with pytest.raises(ValueError, match=r"expected \['level_2', 'level_3'\] with.*codes level_1"):
        ProgressiveVAEPipeline.from_pretrained(tmp_path, level_2=other, prior=free)
    # What is coarser does not matter, and a refit of what is finer neither.
    deeper = loaded.level_2.with_decoder(num_layers=2)
    ProgressiveVAEPipeline.from_pretrained(tmp_path, level_2=deeper, dtype=torch.bfloat16)


def test_an_override_is_saved(tmp_path):
    pipe = tiny_pipeline()
    pipe.prior.config.finer_fingerprint = "of others"
    pipe.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"got .*`from_pretrained\(…, finer_fingerprint=None\)`"):
        ProgressiveVAEPipeline.from_pretrained(tmp_path)
    free = ProgressiveVAEPrior.from_pretrained(tmp_path / "prior", finer_fingerprint=None)
    ProgressiveVAEPipeline.from_pretrained(tmp_path, prior=free).save_pretrained(tmp_path)
    ProgressiveVAEPipeline.from_pretrained(tmp_path)


def test_compilation_leaves_the_fingerprint():
    level = tiny_level(num_channels=1)
    before = fingerprint([level])
    assert fingerprint([torch.compile(level, backend="eager")]) == before
    level.encoder = torch.compile(level.encoder, backend="eager")
    assert fingerprint([level]) == before
