import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import Trainer, TrainingArguments

from helpers.models import decoder_fields, randomize, tiny_level
from helpers.probabilities import all_grids, total_variation
from progressive_vae import ProgressiveVAELevel, ProgressiveVAELevelConfig
from progressive_vae.models import distributions
from progressive_vae.models.fingerprint import fingerprint
from progressive_vae.models.layers import ResidualBlock
from progressive_vae.models.level import ProgressiveVAELevelOutput
from progressive_vae.models.transformer import TransformerLayer


def identity(tensor):
    return tensor


@pytest.mark.parametrize("size", [(1, 1), (5, 7), (8, 8)])
@pytest.mark.parametrize("downsample", [2, 4])
@pytest.mark.parametrize("kind", [dict(num_channels=1), dict(num_channels=3), dict(num_symbols=5)])
def test_any_size(kind, downsample, size):
    level = tiny_level(downsample=downsample, **kind)
    if level.config.is_finest:
        finer = torch.randint(256, (2, kind["num_channels"], *size)) / 127.5 - 1
    else:
        finer = torch.randint(5, (2, *size))
    codes = level.encode(finer)
    assert codes.shape == (2, -(-size[0] // downsample), -(-size[1] // downsample))
    with torch.no_grad():
        assert level.log_prob(finer, codes).shape == (2,)
    drawn = level.sample(codes, finer_size=size)
    assert drawn.shape == finer.shape and drawn.dtype == finer.dtype


@pytest.mark.parametrize("order", ["factorized", "lattice"])
def test_forward_is_the_loss_under_the_uniform_prior(order):
    level = tiny_level(num_channels=1, **decoder_fields(order))
    pixels = torch.randint(256, (3, 1, 4, 6)) / 127.5 - 1
    output = level(pixels)
    codes = level.encode(pixels)
    assert torch.equal(output.codes, codes)
    assert torch.allclose(output.log_prob, level.log_prob(pixels, codes), atol=1e-3)
    commitment = (output.latents - level.quantizer.lookup(codes)).square().mean()
    expected = -output.log_prob.mean() / 24 + 0.25 * commitment
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert isinstance(level(pixels, return_dict=False), tuple)
    output.loss.backward()
    assert all(p.grad is not None for p in level.parameters())


@pytest.mark.parametrize("quantizer", ["vq", "fsq", "gumbel"])
@pytest.mark.parametrize("order", ["factorized", "lattice", "masked", "raster", "transformer"])
def test_saved_and_loaded_alike(order, quantizer, tmp_path):
    level = tiny_level(
        num_symbols=5, codebook_dim=None, downsample=4, quantizer=quantizer, num_classes=2,
        code_noise=0.1, **decoder_fields(order),
    )  # fmt: skip
    finer = torch.randint(5, (2, 5, 7))
    output = level.train()(finer)
    level.after_step(output, identity)
    level.eval().save_pretrained(tmp_path)
    loaded = ProgressiveVAELevel.from_pretrained(tmp_path)
    codes, labels = level.encode(finer), torch.tensor([0, 1])
    assert torch.equal(codes, loaded.encode(finer))
    for given in (None, labels):
        assert torch.equal(
            level.log_prob(finer, codes, given), loaded.log_prob(finer, codes, given)
        )
    ours, theirs = level.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys() and "quantizer.codebook" in ours
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_loss_of_a_stochastic_encoder_has_its_kl():
    level = tiny_level(num_symbols=5, quantizer="gumbel")
    finer = torch.randint(5, (3, 4, 6))
    output = level(finer)
    assert torch.allclose(output.log_prob, level.log_prob(finer, output.codes), atol=1e-4)
    kl = 6 * torch.tensor(3.0).log() - level.encoder_entropy(finer)
    assert output.loss.item() == pytest.approx((kl - output.log_prob).mean().item() / 24, rel=1e-5)
    output.loss.backward()
    assert all(p.grad is not None for p in level.parameters())
    draws = [level.encode(finer, torch.Generator().manual_seed(i)) for i in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


@pytest.mark.parametrize("quantizer", ["vq", "fsq"])
def test_a_deterministic_encoder_has_no_entropy(quantizer):
    level = tiny_level(num_symbols=5, codebook_dim=None, quantizer=quantizer)
    finer = torch.randint(5, (3, 4, 6))
    assert level.encoder_entropy(finer).tolist() == [0, 0, 0]
    assert torch.equal(level.encode(finer), level.encode(finer, torch.Generator()))


def test_a_deeper_transformer_starts_as_the_same_function():
    level = tiny_level(num_symbols=5, decoder_type="transformer")
    finer = torch.randint(5, (3, 4, 6))
    codes = level.encode(finer)
    deeper = level.with_decoder(num_layers=3, num_classes=2)
    assert torch.equal(deeper.log_prob(finer, codes, [0, 1, 0]), level.log_prob(finer, codes))


def test_another_decoder_on_the_same_codes():
    level, finer = tiny_level(num_symbols=5), torch.randint(5, (3, 4, 6))
    codes = level.encode(finer)
    larger = level.with_decoder(hidden_size=16, num_layers=2, decoder_type="causal_lm")
    assert torch.equal(larger.encode(finer), codes)
    assert fingerprint([larger]) == fingerprint([level])
    assert larger.config.encoder_hidden_size == 8  # as the old decoder's width was
    assert larger.config.hidden_size == 16 and larger.config.codebook_size == 3
    # What leaves the architecture alone, or only adds to it, starts from the old weights.
    expected = level.log_prob(finer, codes)
    same = level.with_decoder(code_noise=0.2, num_classes=2, id2label={0: "a", 1: "b"})
    assert torch.equal(same.log_prob(finer, codes), expected)
    assert torch.equal(same.log_prob(finer, codes, ["a", "b", "a"]), expected)
    deeper = level.with_decoder(num_layers=level.config.num_layers + 2)
    assert deeper.num_parameters() > level.num_parameters()
    assert torch.equal(deeper.log_prob(finer, codes), expected)
    assert not torch.equal(level.with_decoder(from_scratch=True).log_prob(finer, codes), expected)
    # Without noise and classes the other weights remain, with another ordering none.
    assert torch.equal(
        same.with_decoder(code_noise=0.0, num_classes=0).log_prob(finer, codes), expected
    )
    assert level.with_decoder(ordering="masked").config.num_groups == 8
    masked = level.with_decoder(ordering="masked", num_groups=4)
    assert not torch.equal(
        masked.decoder.stages[0].blocks[0].conv1.weight,
        level.decoder.stages[0].blocks[0].conv1.weight,
    )
    with pytest.raises(ValueError, match=r"changes among .*got \['codebook_size'\]"):
        level.with_decoder(codebook_size=4)


def test_given_codes_only_the_decoder_learns():
    level, finer = tiny_level(num_symbols=5), torch.randint(5, (3, 4, 6))
    refitted, codes = level.with_decoder(), level.encode(finer)
    output = refitted.train()(finer, codes=codes)
    assert output.latents is None and torch.equal(output.codes, codes)
    assert torch.allclose(output.log_prob, level.log_prob(finer, codes))
    assert output.loss.item() == pytest.approx(-output.log_prob.mean().item() / 24, rel=1e-5)
    output.loss.backward()
    assert all(p.grad is not None for p in refitted.decoder.parameters())
    assert all(p.grad is None for p in refitted.encoder.parameters())
    before = refitted.quantizer.codebook.clone()
    refitted.after_step(output, identity)
    assert torch.equal(refitted.quantizer.codebook, before)


def test_code_noise_is_only_for_training():
    level, finer = tiny_level(num_symbols=5, code_noise=1.0), torch.randint(5, (20, 8, 8))
    codes = level.encode(finer)
    expected = level.log_prob(finer, codes)
    assert torch.allclose(level(finer, codes=codes).log_prob, expected)
    output = level.train()(finer, codes=codes)
    assert not torch.allclose(output.log_prob, expected)
    assert torch.equal(output.codes, codes)
    assert torch.allclose(level.log_prob(finer, codes), expected)  # the stated model is clean
    level.eval()
    draw = lambda strength: level.sample(  # noqa: E731
        codes, generator=torch.Generator().manual_seed(0), code_noise=strength
    )
    assert torch.equal(draw(0.0), draw(0.0)) and not torch.equal(draw(0.0), draw(1.0))
    drawn = level.sample(codes, generator=torch.Generator().manual_seed(0), code_noise=0.5)
    with pytest.warns(FutureWarning, match="corruption is now called code_noise"):
        old = level.sample(codes, generator=torch.Generator().manual_seed(0), corruption=0.5)
    assert torch.equal(old, drawn)
    with pytest.raises(ValueError, match="code_noise without corruption"):
        level.sample(codes, corruption=0.5, code_noise=0.5)
    with pytest.raises(ValueError, match=r"code_noise in \[0, 0.0\].*got 0.1"):
        tiny_level(num_symbols=5).sample(codes, code_noise=0.1)


@pytest.mark.parametrize("order", ["lattice", "raster", "transformer"])
def test_a_class_conditional_decoder(order):
    level = tiny_level(num_symbols=3, num_classes=2, **decoder_fields(order))
    grids = all_grids(3, 2, 2)
    codes, labels = torch.zeros(81, 1, 1, dtype=torch.long), torch.ones(81, dtype=torch.long)
    with torch.no_grad():
        log_prob, null = level.log_prob(grids, codes, labels), level.log_prob(grids, codes)
    assert log_prob.exp().sum().item() == pytest.approx(1, abs=1e-4)
    assert (log_prob - null).abs().max() > 0.01  # the class matters
    likelihoods = []
    for scale in (0.0, 1.0, 3.0):
        drawn = level.sample(
            codes[:1].expand(20_000, -1, -1), torch.ones(20_000).long(), scale,
            torch.Generator().manual_seed(0),
        )  # fmt: skip
        if scale < 2:
            assert total_variation((null, log_prob)[int(scale)], grids, drawn) < 0.04
        given = codes[:1].expand(20_000, -1, -1), torch.ones(20_000).long()
        with torch.no_grad():
            gain = level.log_prob(drawn, *given) - level.log_prob(drawn, given[0])
        likelihoods.append(gain.mean().item())
    assert likelihoods == sorted(likelihoods)
    level.train()
    dropped = tiny_level(num_symbols=3, num_classes=2, **decoder_fields(order), class_dropout=1.0)
    assert torch.allclose(dropped.train()(grids, codes, labels).log_prob, null)


@pytest.mark.parametrize("distribution", ["categorical", "logistic_mixture"])
def test_half_precision_still_knows_256_values(distribution):
    level = tiny_level(num_channels=1, pixel_distribution=distribution).to(torch.bfloat16)
    pixels = (torch.arange(256) / 127.5 - 1).view(1, 1, 16, 16)
    assert torch.equal(level.value_type.to_indices(pixels).flatten(), torch.arange(256))
    assert level.log_prob(pixels, level.encode(pixels)).isfinite().all()
    assert level.sample(level.encode(pixels)).shape == pixels.shape


def test_a_dead_code_comes_back_to_life():
    level, pixels = tiny_level(num_channels=1, codebook_size=16), torch.rand(8, 1, 8, 8) * 2 - 1
    level.quantizer.ema_counts.fill_(10.0)
    level.quantizer.ema_sums.copy_(level.quantizer.codebook * 10)
    level.quantizer.codebook[3] = 1e3  # far from every latent
    level.quantizer.ema_counts[3] = 1e-3
    level.after_step(level(pixels), identity)
    latents = level(pixels).latents.movedim(1, -1).flatten(0, -2)
    assert torch.cdist(level.quantizer.codebook[3:4], latents).min() < 1e-3


@pytest.mark.parametrize("num_dead", [0, 3, 30])
def test_gathered_halves_move_the_codebook_like_the_whole(num_dead):
    """Two threads as processes; neither sends more than a vector for each code at a time."""
    pixels = torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    whole = tiny_level(num_channels=1, codebook_size=32)
    whole.quantizer.is_initialized = True
    whole.quantizer.ema_counts.fill_(1.0)
    whole.quantizer.codebook[:num_dead] = 1e3  # far from every latent
    whole.quantizer.ema_counts[:num_dead] = 0
    halves = [copy.deepcopy(whole) for _ in range(2)]
    whole.after_step(whole(pixels), identity)
    sent = [None, None]
    barrier = threading.Barrier(2, timeout=60)

    def run(rank):
        def gather(tensor):
            assert tensor[0].numel() <= 32 * (1 + whole.config.codebook_dim)
            sent[rank] = tensor
            barrier.wait()
            joined = torch.cat(sent)
            barrier.wait()
            return joined

        halves[rank].after_step(halves[rank](pixels[4 * rank : 4 * rank + 4]), gather)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(run, range(2)))
    for half in halves:
        for name, value in half.quantizer.state_dict().items():
            torch.testing.assert_close(value, whole.quantizer.state_dict()[name])
    assert num_dead == 0 or whole.quantizer.codebook.abs().max() < 100


def test_initialization_is_the_one_asked_for():
    level = ProgressiveVAELevel(ProgressiveVAELevelConfig(num_channels=1, hidden_size=32))
    block = level.decoder.stages[0].blocks[0]
    assert not block.conv2.weight.any() and block.conv1.weight.std() > 0.04
    table = level.decoder.embedding.weight
    assert torch.cdist(table[:1], table[1:2]) < torch.cdist(table[:1], table[128:129])


@pytest.mark.parametrize("quantizer", ["vq", "fsq", "gumbel"])
def test_what_a_checkpoint_lacks_starts_anew(quantizer):
    config = ProgressiveVAELevelConfig(num_channels=1, quantizer=quantizer)
    level = ProgressiveVAELevel.from_pretrained(None, config=config, state_dict={})
    fresh = ProgressiveVAELevel(config).state_dict()
    for name, tensor in level.state_dict().items():
        if tensor.ndim < 2 or (name == "quantizer.codebook" and quantizer != "gumbel"):
            assert torch.equal(tensor, fresh[name]), name  # these are not drawn
    assert level.quantizer.codebook.isfinite().all()


@pytest.mark.parametrize(
    ("finer", "message"),
    [
        (torch.zeros(1, 3, 4, 4), r"finer of shape \(B, 1, H, W\), got \(1, 3, 4, 4\)"),
        (torch.zeros(1, 4, 4), "finer of shape"),
        (torch.zeros(1, 1, 4, 4).long(), "finer of a floating dtype in .*got torch.int64"),
        (torch.full((1, 1, 4, 4), 2.0), r"finer in \[-1, 1\], got values in \[2.0, 2.0\]"),
        (torch.full((1, 1, 4, 4), float("nan")), r"finer in \[-1, 1\], got values in \[nan"),
    ],
)
def test_bad_pixels(finer, message):
    level = tiny_level(num_channels=1)
    for call in (level.encode, level):
        with pytest.raises(ValueError, match=message):
            call(finer)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.encode(torch.zeros(1, 4, 4)), "finer of dtype torch.int64"),
        (lambda m: m.encode(torch.full((1, 4, 4), 9)), "finer in 0 … 4, got values in 9 … 9"),
        (lambda m: m.sample(torch.full((1, 2, 2), -1)), "codes in 0 … 2, got values in -1"),
        (lambda m: m.sample(torch.zeros(1, 2).long()), r"codes of shape \(B, H, W\)"),
        (
            lambda m: m.log_prob(torch.zeros(1, 4, 4).long(), torch.zeros(1, 3, 3).long()),
            r"codes of shape \(B, 2, 2\), got \(1, 3, 3\)",
        ),
        (lambda m: m.sample(torch.zeros(1, 2, 2).long(), temperature=-0.5), "temperature >= 0"),
        (lambda m: m.sample(torch.zeros(1, 2, 2).long(), finer_size=(9, 9)), "finer_size whose"),
    ],
)
def test_bad_codes(call, message):
    with pytest.raises(ValueError, match=message):
        call(tiny_level(num_symbols=5))


def test_output_has_the_loss_in_front():
    assert next(iter(ProgressiveVAELevelOutput(loss=torch.ones(()), codes=torch.ones(1)))) == "loss"


@pytest.mark.parametrize("rank", [None, 0, 3])
@pytest.mark.parametrize("order", ["lattice", "raster", "transformer", "auxiliary"])
def test_many_symbols_trained_saved_and_drawn(order, rank, tmp_path, monkeypatch):
    monkeypatch.setattr(distributions, "LOGITS_PER_CHUNK", 4096 * 6)  # several parts
    level = tiny_level(
        num_symbols=4096, **decoder_fields(order), auxiliary_hidden_size=8, symbol_logit_rank=rank
    )
    finer = torch.randint(4096, (2, 5, 7), generator=torch.Generator().manual_seed(0))
    # In evaluation mode, as the codebook must not move between the two losses.
    optimizer = torch.optim.AdamW(level.parameters(), lr=1e-4)
    losses = []
    for _ in range(2):
        output = level(finer)
        losses.append(output.loss.item())
        optimizer.zero_grad()
        output.loss.backward()
        assert all(p.grad is not None for p in level.parameters())
        optimizer.step()
    assert losses[1] < losses[0]
    level.after_step(output, identity)
    level.eval().save_pretrained(tmp_path)
    loaded = ProgressiveVAELevel.from_pretrained(tmp_path).eval()
    assert loaded.config.symbol_logit_rank == (64 if rank is None else rank)
    codes = level.encode(finer)
    with torch.no_grad():
        assert torch.equal(level.log_prob(finer, codes), loaded.log_prob(finer, codes))
    for controls in ({}, {"temperature": 0.5, "top_k": 9}, {"temperature": 0.0}):
        drawn = [
            each.sample(codes, generator=torch.Generator().manual_seed(0), finer_size=(5, 7),
                        **controls)
            for each in (level, loaded)
        ]  # fmt: skip
        assert torch.equal(*drawn) and drawn[0].shape == finer.shape
    assert level.expect(codes, (5, 7)).shape == (2, 4096, 5, 7)
    other = level.with_decoder(hidden_size=12, num_layers=2, decoder_type="conv", ordering="masked")
    assert torch.equal(other.expect(codes, (5, 7)), level.expect(codes, (5, 7)))


def test_draws_of_many_symbols_do_not_depend_on_the_parts(monkeypatch):
    """Nor those with controls, or guided by a class."""
    level = tiny_level(num_symbols=2100, num_classes=2)
    codes, drawn = torch.randint(3, (3, 2, 3)), []
    for count in (2**23, 2100 * 6 * 2):
        monkeypatch.setattr(distributions, "LOGITS_PER_CHUNK", count)
        for controls in ({"top_p": 0.5}, {"guidance_scale": 2.0, "temperature": 0.7}):
            generator = torch.Generator().manual_seed(0)
            drawn.append(level.sample(codes, [0, 1, 0], generator=generator, **controls))
    assert torch.equal(drawn[0], drawn[2]) and torch.equal(drawn[1], drawn[3])


def test_few_symbols_have_free_logits_as_ever():
    assert tiny_level(num_symbols=2048).config.symbol_logit_rank == 0
    assert tiny_level(num_channels=1).config.symbol_logit_rank == 0
    older = tiny_level(num_symbols=2049, auxiliary_hidden_size=8, format_version=5)
    assert older.config.symbol_logit_rank == 0 and older.auxiliary.table is None
    names = tiny_level(num_symbols=2048, auxiliary_hidden_size=8).state_dict()
    assert names["decoder.stages.0.logits.0.weight"].shape == (2048, 8)
    assert names["auxiliary.out.1.weight"].shape[0] == 2048
    assert not [name for name in names if name.startswith("auxiliary.table")]


def small_level(**config) -> ProgressiveVAELevel:
    torch.manual_seed(0)
    config = {"num_channels": 1, "codebook_size": 16, "hidden_size": 8, "num_layers": 1, **config}
    return ProgressiveVAELevel(ProgressiveVAELevelConfig(**config)).train()


def batches(count: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(8, 1, 8, 8, generator=generator) * 2 - 1 for _ in range(count)]


def train(level, data, after_step=False):
    optimizer = torch.optim.AdamW([p for p in level.parameters() if p.requires_grad], 1e-3)
    for pixels in data:
        output = level(pixels)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if after_step:
            level.after_step(output, identity)


def test_a_loop_that_knows_no_after_step_trains_the_codebook():
    plain, own = small_level(), small_level()
    train(plain, batches(20))
    train(own, batches(20), after_step=True)
    codes = plain.encode(batches(1, seed=1)[0])
    assert len(codes.unique()) > 8
    # Each step is made once, at the latest when weights are saved.
    for (name, ours), theirs in zip(
        plain.state_dict().items(), own.state_dict().values(), strict=True
    ):
        assert torch.equal(ours, theirs), name


def test_the_temperature_anneals_in_any_loop():
    level = small_level(
        quantizer="gumbel", gumbel_temperature_decay=0.5, gumbel_temperature=[1.0, 0.1]
    )
    train(level, batches(3))
    assert level.state_dict()["quantizer.temperature"] == 0.125


def test_a_codebook_that_is_loaded_is_not_initialized_again(tmp_path):
    level = small_level()
    train(level, batches(2))
    level.save_pretrained(tmp_path)
    loaded = ProgressiveVAELevel.from_pretrained(tmp_path).train()
    with torch.random.fork_rng():
        before = torch.random.get_rng_state()
        for each in (level, loaded):
            train(each, batches(2, seed=1))
        assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(
        level.state_dict()["quantizer.codebook"], loaded.state_dict()["quantizer.codebook"]
    )


@pytest.mark.parametrize("case", ["eval", "no gradients", "frozen", "codes"])
def test_codebooks_that_must_not_move(case):
    level = small_level()
    train(level, batches(3))
    before = {name: value.clone() for name, value in level.quantizer.state_dict().items()}
    pixels = batches(1, seed=1)[0]
    codes = level.encode(pixels) if case == "codes" else None
    level.train(case != "eval")
    if case == "frozen":
        level.requires_grad_(False)
    with torch.set_grad_enabled(case != "no gradients"):
        for _ in range(2):
            level(pixels, codes)
    for name, value in level.quantizer.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_level_between_two_steps_is_copied_moved_and_pickled(tmp_path):
    level = small_level()
    train(level, batches(2))
    torch.save(level, tmp_path / "level.pt")
    copies = [copy.deepcopy(level), torch.load(tmp_path / "level.pt", weights_only=False)]
    for other in copies:
        assert torch.equal(other.quantizer.codebook, level.quantizer.codebook)
    level.to(torch.float64).to(torch.float32)
    train(level, batches(1))
    meta = copies[0].to("meta")
    assert meta.state_dict()["quantizer.codebook"].is_meta


def test_the_trainer_of_transformers_trains_a_level(tmp_path):
    data = [{"finer": image} for pixels in batches(8) for image in pixels]

    def trainer(max_steps):
        arguments = TrainingArguments(
            tmp_path, max_steps=max_steps, per_device_train_batch_size=8, save_steps=4,
            use_cpu=True, report_to=[], disable_tqdm=True, seed=0, logging_steps=100,
            gradient_checkpointing=True, eval_strategy="steps", eval_steps=4,
        )  # fmt: skip
        return Trainer(small_level(), arguments, train_dataset=data, eval_dataset=data[:8])

    whole = trainer(8)
    whole.train()
    assert len(whole.model.eval().encode(batches(1, seed=1)[0]).unique()) > 8
    loaded = ProgressiveVAELevel.from_pretrained(tmp_path / "checkpoint-8")
    resumed = trainer(8)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]), name
        assert torch.equal(value, resumed.model.state_dict()[name]), name


@pytest.mark.parametrize(
    "config",
    [
        dict(auxiliary_hidden_size=8),
        dict(num_channels=None, num_symbols=5, decoder_type="causal_lm"),
        dict(num_channels=None, num_symbols=5, decoder_type="transformer"),
    ],
)
def test_gradient_checkpointing_gives_the_same_gradients(config):
    finer = batches(1)[0]
    if config.get("num_symbols"):
        finer = torch.randint(5, (8, 8, 8), generator=torch.Generator().manual_seed(0))

    def gradients(is_enabled) -> tuple[list[torch.Tensor], int]:
        """And how often a residual block, or layer of a transformer, was computed."""
        level, calls = randomize(small_level(**config)).train(), []
        level.gradient_checkpointing_enable()
        if not is_enabled:
            level.gradient_checkpointing_disable()
        assert level.is_gradient_checkpointing == is_enabled
        for block in level.modules():
            if isinstance(block, ResidualBlock):
                block.conv1.register_forward_hook(lambda *_: calls.append(1))
            if isinstance(block, TransformerLayer):
                block.output.register_forward_hook(lambda *_: calls.append(1))
        level(finer).loss.backward()
        return [parameter.grad for parameter in level.parameters()], len(calls)

    expected, once = gradients(False)
    found, count = gradients(True)
    assert count == 2 * once
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
