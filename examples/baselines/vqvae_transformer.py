"""Baseline: a VQ-VAE with one code grid and an autoregressive transformer over its codes.

The decoder minimizes the squared error. Source: van den Oord et al. 2017; here a transformer
replaces the PixelCNN.
"""

import math
import time
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from progressive_vae.data.code_cache import GridDataset
from progressive_vae.models.causal_lm import cached_step
from progressive_vae.models.quantizers import VectorQuantizer
from progressive_vae.models.value_types import uint8_to_signed, unit_to_uint8
from progressive_vae.training.mixed_precision import fast_attention


class FlatVAE(nn.Module):
    """A VQ-VAE with one code grid; its sides are a quarter of the image's."""

    def __init__(self, num_channels: int, codebook_size: int = 128, width: int = 128):
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(num_channels, width, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, 64, 1),
        )
        self.quantizer = VectorQuantizer(codebook_size, dim=64)
        self.decoder = nn.Sequential(
            nn.Conv2d(64, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.ConvTranspose2d(width, width, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.ConvTranspose2d(width, num_channels, 4, stride=2, padding=1),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Return the training loss of images (B, C, H, W) in [−1, 1]."""
        quantized, _, commitment_loss = self.quantizer(self.encoder(images))
        return F.mse_loss(self.decoder(quantized), images) + commitment_loss

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Return codes (B, H/4, W/4) of images in [−1, 1]."""
        return self.quantizer.encode(self.encoder(images))

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Return images in [0, 1] (B, C, 4h, 4w) of codes (B, h, w)."""
        return (self.decoder(self.quantizer.lookup(codes)) / 2 + 0.5).clamp(0, 1)


def train_for(
    seconds: float, model: nn.Module, step: Callable[[], Tensor], lr: float, dtype: torch.dtype
) -> int:
    """Train for some seconds with AdamW and return the number of steps.

    The learning rate warms up over 100 steps and follows a cosine of the elapsed time.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.99))
    device = next(model.parameters()).device
    start = time.perf_counter()
    steps = 0
    while (share := (time.perf_counter() - start) / seconds) < 1:
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (steps + 1) / 100) * (1 + math.cos(math.pi * share)) / 2
        autocast = torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)
        with fast_attention(device), autocast:
            loss = step()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        steps += 1
    return steps


class VQVAETransformer:
    """A `FlatVAE` and a causal transformer over its codes; the first token is the class."""

    def __init__(
        self,
        num_channels: int,
        num_classes: int,
        size: tuple[int, int],
        seed: int,
        device: torch.device,
    ):
        torch.manual_seed(seed)
        self.size = size
        self.device = device
        self.vae = FlatVAE(num_channels).to(device)
        self.codebook_size = len(self.vae.quantizer.codebook)
        self.num_classes = num_classes
        self.prior = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=self.codebook_size + self.num_classes,
                hidden_size=128,
                intermediate_size=352,
                num_hidden_layers=4,
                num_attention_heads=4,
                max_position_embeddings=1 + math.prod(size),
                bos_token_id=None,
                eos_token_id=None,
                pad_token_id=None,
            )
        ).to(device)

    def fit(self, train: GridDataset, seconds: float, dtype: torch.dtype) -> dict[str, float]:
        """Train the VQ-VAE for half of the time, then the transformer on its codes.

        Args:
            dtype: of matrix products, float32 or bfloat16.

        Returns:
            Images per second of the training of "vae" and "prior".
        """
        half = seconds / 2
        vae_steps = self._fit_vae(train, half, dtype)
        prior_steps = self._fit_prior(train, half, dtype)
        return {"vae": 64 * vae_steps / half, "prior": 128 * prior_steps / half}

    def _fit_vae(self, train: GridDataset, seconds: float, dtype: torch.dtype) -> int:
        batches = train.random_batches(64)

        def next_images() -> Tensor:
            return uint8_to_signed(next(batches)[0].to(self.device))

        first = torch.cat([next_images() for _ in range(30)])
        with torch.no_grad():
            latents = self.vae.encoder(first).movedim(1, -1).flatten(0, -2)
        self.vae.quantizer.initialize(latents, torch.Generator().manual_seed(0))
        steps = train_for(seconds, self.vae, lambda: self.vae(next_images()), 1e-3, dtype)
        self.vae.eval()
        return steps

    def _fit_prior(self, train: GridDataset, seconds: float, dtype: torch.dtype) -> int:
        encoded = [
            (self.vae.encode(uint8_to_signed(images.to(self.device))), labels)
            for images, labels in train.batches(500)
        ]
        codes, labels = (torch.cat(parts) for parts in zip(*encoded, strict=True))
        tokens = torch.cat([self.prompt(labels), codes.flatten(1)], 1)

        def step() -> Tensor:
            rows = tokens[torch.randint(len(tokens), (128,)).to(self.device)]
            return self.prior(rows, labels=rows, use_cache=False).loss

        return train_for(seconds, self.prior, step, 1e-3, dtype)

    def prompt(self, labels: Tensor) -> Tensor:
        """Return the first token (B, 1) of each class (B,): class ids follow the codes."""
        return (labels.to(self.device) + self.codebook_size)[:, None]

    @torch.no_grad()
    def sample(self, labels: Tensor, use_cache: bool) -> Tensor:
        """Sample images in [0, 1] (B, C, H, W) of the classes (B,)."""
        tokens = self.prompt(labels)
        cache = None
        inputs = tokens
        for _ in range(math.prod(self.size)):
            if use_cache:
                output, cache = cached_step(self.prior, cache, input_ids=inputs)
            else:
                output = self.prior(inputs, use_cache=False)
            logits = output.logits[:, -1, : self.codebook_size].float()
            codes = torch.multinomial(logits.softmax(-1), 1)
            tokens = torch.cat([tokens, codes], 1)
            inputs = codes if use_cache else tokens
        return self.vae.decode(tokens[:, 1:].unflatten(1, self.size))

    def sample_labeled(self, num_images: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Sample uint8 images, one class after the other, and yield batches with their labels."""
        torch.manual_seed(seed)
        for labels in (torch.arange(num_images) % self.num_classes).split(250):
            yield unit_to_uint8(self.sample(labels, use_cache=True)).cpu(), labels

    def parts(self) -> dict[str, nn.Module]:
        return {"vae": self.vae, "prior": self.prior}
