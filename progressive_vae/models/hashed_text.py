"""A text encoder without training or downloads: a fixed random vector for each word.

    tokenizer: "A red hat" -> hashes of "a", "red", "hat"
    text encoder: hash -> a unit vector of random signs

What attends to the vectors learns the words. Unlike a pretrained text encoder it does not know that
two words mean the same, nor the order of words.
"""

import re
import zlib

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizer
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutput

from ..configuration.hashed_text import HashedTextConfig
from .device_constant import device_constant

PADDING = "<pad>"
MAX_WORDS = 64
PRIME = 2**31 - 1


class HashedTokenizer(PreTrainedTokenizer):
    """The words of a text in lower case; a word's id is 1 + its CRC-32, that of padding is 0."""

    model_input_names = ["input_ids", "attention_mask"]

    def __init__(self, pad_token: str = PADDING, model_max_length: int = MAX_WORDS, **kwargs):
        super().__init__(pad_token=pad_token, model_max_length=model_max_length, **kwargs)

    @property
    def vocab_size(self) -> int:
        return 2**32 + 1

    def get_vocab(self) -> dict[str, int]:
        """Padding alone: the other ids are hashes."""
        return {PADDING: 0}

    def _tokenize(self, text: str, **kwargs) -> list[str]:
        return re.findall(r"\w+", text.casefold())

    def _convert_token_to_id(self, token: str) -> int:
        return 1 + zlib.crc32(token.encode("utf-8", "surrogatepass"))

    def _convert_id_to_token(self, index: int) -> str:
        return f"<{index}>"  # a hash has no inverse

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple:
        """There is none."""
        return ()


class HashedTextEncoder(PreTrainedModel):
    """Token ids -> unit vectors ±1/√D of pairwise independent random signs."""

    config_class = HashedTextConfig
    config: HashedTextConfig
    main_input_name = "input_ids"

    def __init__(self, config: HashedTextConfig):
        super().__init__(config)
        # The only weight, by which the model also has a dtype and a device.
        self.scale = nn.Parameter(torch.empty(1), requires_grad=False)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        if module is self:
            init.constant_(self.scale, self.config.hidden_size**-0.5)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, return_dict: bool = True
    ):
        """`last_hidden_state`, float (B, T, D), of ids int64 (B, T); the mask is not read."""
        factors, offsets = _universal_hashes(self.config.hidden_size, input_ids.device)
        # Universal hashing (Carter & Wegman 1979); products stay below 2⁶².
        hashes = (input_ids[..., None] % PRIME * factors + offsets) % PRIME  # (B, T, D)
        signs = (hashes % 2 * 2 - 1).to(self.scale.dtype)
        output = BaseModelOutput(last_hidden_state=signs * self.scale)
        return output if return_dict else output.to_tuple()


@device_constant
def _universal_hashes(count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    # The stream of `RandomState` never changes.
    random = np.random.RandomState(0)
    factors = torch.from_numpy(random.randint(1, PRIME, count, dtype=np.int64))
    offsets = torch.from_numpy(random.randint(0, PRIME, count, dtype=np.int64))
    return factors.to(device), offsets.to(device)
