"""What one writes in an afternoon, to compare with: a VQ-VAE of one level whose decoder minimizes
squared error, and a causal transformer over its codes."""

import math
import time
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from ..data.code_cache import GridDataset
from ..models.causal_lm import cached_step
from ..models.quantizers import VectorQuantizer
from ..models.value_types import uint8_to_signed, unit_to_uint8


class FlatVAE(nn.Module):
    """One grid of codes, a quarter of the image's side; the decoder minimizes squared error."""

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
        self.quantizer = VectorQuantizer(
            codebook_size, 64, 0.25, decay=0.99, restart_threshold=0.03
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(64, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.ConvTranspose2d(width, width, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.ConvTranspose2d(width, num_channels, 4, stride=2, padding=1),
        )

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Images in [−1, 1] -> loss, codes, latents."""
        latents = self.encoder(images)
        codes, quantized, _, commitment_loss = self.quantizer(latents)
        loss = F.mse_loss(self.decoder(quantized), images) + commitment_loss
        return loss, codes, latents

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Codes (B, h, w) -> images in [0, 1]."""
        return (self.decoder(self.quantizer.lookup(codes)) / 2 + 0.5).clamp(0, 1)


def train_for(
    seconds: float, model: nn.Module, step: Callable[[], Tensor], lr: float, dtype: torch.dtype
) -> int:
    """AdamW with a cosine over the clock; the number of steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.99))
    device = next(model.parameters()).device
    start, steps = time.perf_counter(), 0
    while (share := (time.perf_counter() - start) / seconds) < 1:
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (steps + 1) / 100) * (1 + math.cos(math.pi * share)) / 2
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = step()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        steps += 1
    return steps


class Afternoon:
    """A `FlatVAE` and a causal transformer over its codes, with the class as first token."""

    def __init__(
        self,
        num_channels: int,
        num_classes: int,
        size: tuple[int, int],
        seed: int,
        device: torch.device,
    ):
        torch.manual_seed(seed)
        self.size, self.device = size, device
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
        """Half of the time for the autoencoder, half for its prior; images a second of each.
        `dtype`: of the products, float32 or bfloat16."""
        batches = train.random_batches(64)

        def inputs(images: Tensor) -> Tensor:
            return uint8_to_signed(images.to(self.device))

        first = inputs(torch.cat([next(batches)[0] for _ in range(30)]))
        with torch.no_grad():
            latents = self.vae.encoder(first).movedim(1, -1).flatten(0, -2)
        self.vae.quantizer.initialize(latents, torch.Generator().manual_seed(0))

        def vae_step() -> Tensor:
            loss, codes, latents = self.vae(inputs(next(batches)[0]))
            self.vae.quantizer.after_step(latents, codes, lambda tensor: tensor)
            return loss

        steps = train_for(seconds / 2, self.vae, vae_step, 1e-3, dtype)
        with torch.no_grad():
            encoded = [
                (self.vae(inputs(images))[1], labels) for images, labels in train.batches(500)
            ]
        codes, labels = (torch.cat(parts) for parts in zip(*encoded, strict=True))
        tokens = torch.cat([self.prompt(labels), codes.flatten(1)], 1)

        def prior_step() -> Tensor:
            rows = tokens[torch.randint(len(tokens), (128,)).to(self.device)]
            return self.prior(rows, labels=rows, use_cache=False).loss

        prior_steps = train_for(seconds / 2, self.prior, prior_step, 1e-3, dtype)
        half = seconds / 2
        return {"vae": 64 * steps / half, "prior": 128 * prior_steps / half}

    def prompt(self, labels: Tensor) -> Tensor:
        return (labels.to(self.device) + self.codebook_size)[:, None]

    @torch.no_grad()
    def draw(self, labels: Tensor, use_cache: bool) -> Tensor:
        """Images in [0, 1] of classes (B,)."""
        tokens = self.prompt(labels)
        cache, inputs = None, tokens
        for _ in range(math.prod(self.size)):
            if use_cache:
                output, cache = cached_step(self.prior, cache, input_ids=inputs)
            else:
                output = self.prior(inputs, use_cache=False)
            logits = output.logits[:, -1, : self.codebook_size].float()
            drawn = torch.multinomial(logits.softmax(-1), 1)
            tokens = torch.cat([tokens, drawn], 1)
            inputs = drawn if use_cache else tokens
        return self.vae.decode(tokens[:, 1:].unflatten(1, self.size))

    def sample_labeled(self, num_images: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """uint8 images and their labels, the classes in turn."""
        torch.manual_seed(seed)
        for labels in (torch.arange(num_images) % self.num_classes).split(250):
            yield unit_to_uint8(self.draw(labels, use_cache=True)).cpu(), labels

    def parts(self) -> dict[str, nn.Module]:
        return {"vae": self.vae, "prior": self.prior}
