"""The prior `P_Φ(z_1)`: a causal language model of transformers over codes in raster order."""

from dataclasses import dataclass
from typing import Any

import torch
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import ModelOutput

from ..arguments import as_integer
from ..configuration.prior import ProgressiveVAEPriorConfig
from ..configuration.validation import check_codes
from .causal_lm import NUM_CHECKED_TOKENS, CausalLMMixin
from .condition_attention import ConditionAttention
from .conditioning import ClassLabels, Conditioning
from .distributions import Categorical
from .layers import init_weights
from .modeling_utils import ProgressiveVAEPreTrainedModel
from .sampling import Generators, Sampler
from .walk import StepFn


@dataclass
class ProgressiveVAEPriorOutput(ModelOutput):
    """
    Args:
        loss: scalar, −log P_Φ(z_1) in nats per code; minimize it.
        log_prob: log P_Φ(z_1) in nats, summed over the grid, (B,).
        logits: of every code given the codes before it, (B, L_1, K_1).
        hidden_states, attentions: the backbone's, if requested.
    """

    loss: Tensor | None = None
    log_prob: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class ProgressiveVAEPrior(CausalLMMixin, ProgressiveVAEPreTrainedModel):
    """`P_Φ(z_1 | class) = ∏_l P(code_l | class, code_1 … code_{l−1})`.

    The tokens of the backbone are the K_1 codes, then the classes, then the null class; the class
    token is the prompt. Only codes can follow, so the logits of the other tokens are cut off.

    With `condition_dim` a prefix of `num_prefix_tokens` vectors follows the class token. They are
    learned, and attend to the embeddings of the condition; the backbone needs no mask for them.

    `class_labels` are integers or names of `id2label`, (B,): 0 … num_classes − 1, or `num_classes`
    for the null class; `None` is the null class for all. A `Conditioning` may have embeddings, too.
    """

    config: ProgressiveVAEPriorConfig
    base_model_prefix = "backbone"  # the attribute, so that its input embeddings are found
    main_input_name = "codes"
    supports_gradient_checkpointing = True
    _skip_layerwise_casting_patterns = ["prefix"]  # read outside of its forward
    # Attention is in the backbone, which checks support itself.
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = True
    _supports_attention_backend = True

    backbone: PreTrainedModel

    def __init__(self, config: ProgressiveVAEPriorConfig):
        super().__init__(config)
        self.backbone = AutoModelForCausalLM.from_config(config.backbone_config)
        if config.condition_dim is not None:
            width: Any = self.backbone.get_input_embeddings().embedding_dim
            self.prefix = nn.Embedding(config.num_prefix_tokens, width)
            self.condition_attention = ConditionAttention(width, config.condition_dim)
        self.post_init()

    def _init_weights(self, module: nn.Module):
        # The prefix starts as the backbone's own embeddings do.
        is_own = self.config.condition_dim is not None and module in self._attention_modules()
        if is_own:
            init_weights(module)
        else:
            self.backbone._init_weights(module)

    def _attention_modules(self) -> set[nn.Module]:
        return {*self.condition_attention.modules()}

    def forward(
        self,
        codes: Tensor,
        class_labels: ClassLabels = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        generator: Generators = None,
        return_dict: bool | None = None,
    ):
        """Teacher-forced terms of z_1, int64 (B, H_1, W_1).

        In training mode each condition is replaced by the null condition with probability
        `class_dropout` (see `Conditioning.drop`), so that one network learns `P_Φ(z_1)` and
        `P_Φ(z_1 | condition)`; `generator` samples which.

        Returns:
            `ProgressiveVAEPriorOutput`, or a tuple of its fields.
        """
        conditioning = self._conditioning(class_labels, len(codes), codes.device)
        if self.config.is_conditional and self.training:
            conditioning = conditioning.drop(self.config.class_dropout, generator)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        log_prob, backbone_output = self._teacher_forced(
            codes,
            conditioning,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
        )
        output = ProgressiveVAEPriorOutput(
            loss=-log_prob.mean() / self.config.sequence_length,
            log_prob=log_prob,
            logits=self._distribution(backbone_output).logits,
            hidden_states=backbone_output.get("hidden_states"),
            attentions=backbone_output.get("attentions"),
        )
        as_dict = self.config.return_dict if return_dict is None else return_dict
        return output if as_dict else output.to_tuple()

    @apply_forward_hook
    def log_prob(self, codes: Tensor, class_labels: ClassLabels = None) -> Tensor:
        """log P_Φ(z_1 | class) in nats: int64 (B, H_1, W_1) -> (B,)."""
        conditioning = self._conditioning(class_labels, len(codes), codes.device)
        return self._teacher_forced(codes, conditioning)[0]

    def _teacher_forced(
        self, codes: Tensor, conditioning: Conditioning, **options: bool | None
    ) -> tuple[Tensor, ModelOutput]:
        """Log-probabilities in nats, (B,), and the output of the backbone."""
        check_codes(codes, self.config.codebook_size, tuple(self.config.grid_size))
        return self._teacher_forced_log_prob(
            self._prompt(conditioning), codes.flatten(1), **options
        )

    @apply_forward_hook
    @torch.no_grad()
    def sample(
        self,
        batch_size: int,
        class_labels: ClassLabels = None,
        guidance_scale: float = 1.0,
        generator: Generators = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
    ) -> Tensor:
        """Sample z_1, int64 (B, H_1, W_1), code by code with the backbone's key-value cache.

        Args:
            guidance_scale: s > 1 for classifier-free guidance, logits `null + s·(class − null)`
                (Ho & Salimans 2022).
            generator, temperature, top_k, top_p: as in `ProgressiveVAELevel.sample`.
        """
        batch_size = as_integer("batch_size", batch_size, 1)
        sampler = Sampler(
            batch_size,
            generator,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            guidance_scale=guidance_scale,
        )
        conditioning = self._conditioning(class_labels, batch_size, self.device)
        conditioning = conditioning.for_guidance(sampler)
        sampler.preload([1] * self.config.sequence_length, self.device)
        walk = self._compiled_walk or self.walk
        return walk(len(conditioning), sampler.step, conditioning)[:batch_size]

    @apply_forward_hook
    def walk(self, batch_size: int, step_fn: StepFn, class_labels: ClassLabels = None) -> Tensor:
        """Run the autoregressive loop of P_Φ(z_1) and call `step_fn` at each step.

        It visits the codes in raster order and uses the backbone's key-value cache.

        Args:
            batch_size: B, the number of grids.
            step_fn: `(distribution, step) -> codes`, int64 (B, 1), as in
                `ProgressiveVAELevel.walk`. Each step is one code, conditioned on the earlier ones;
                its group is its position, its channel 0.

        Returns:
            the codes, int64 (B, H_1, W_1).

        Raises:
            ValueError: a batch size below 1, invalid labels, or codes of another shape or dtype.
        """
        batch_size = as_integer("batch_size", batch_size, 1)
        conditioning = self._conditioning(class_labels, batch_size, self.device)
        codes = self._generate(self._prompt(conditioning), self.config.sequence_length, step_fn)
        return codes.unflatten(1, tuple(self.config.grid_size))

    def check_causal(self):
        """Raise a `ValueError` unless stepwise log-probabilities, with the cache, agree with those
        of one pass over all codes: else `log_prob` is not a likelihood."""
        length = min(self.config.sequence_length, NUM_CHECKED_TOKENS)
        noise = torch.Generator().manual_seed(0)
        shape = (2, length)
        tokens = torch.randint(
            self.config.codebook_size, shape, generator=noise, device=noise.device
        )
        prompt = self._prompt(self._conditioning(None, 2, self.device))
        self._check_causal(prompt, tokens.to(self.device))

    def _conditioning(
        self, class_labels: ClassLabels, batch_size: int, device: torch.device
    ) -> Conditioning:
        return Conditioning.from_labels(class_labels, self.config, batch_size, device)

    def _prompt(self, conditioning: Conditioning) -> Tensor:
        """The class tokens, int64 (B, 1); with `condition_dim` their embeddings and the prefix,
        float (B, 1 + num_prefix_tokens, width)."""
        tokens = (conditioning.class_ids + self.config.codebook_size)[:, None]
        if self.config.condition_dim is None:
            return tokens
        prefix = self.prefix.weight.expand(len(tokens), -1, -1)
        prefix = self.condition_attention(prefix, conditioning)
        return torch.cat([self.backbone.get_input_embeddings()(tokens), prefix], 1)

    def _inputs(self, context: Tensor, previous: Tensor, start: int) -> dict[str, Tensor]:
        if self.config.condition_dim is None:
            return {"input_ids": previous if start else torch.cat([context, previous], 1)}
        embedded = self.backbone.get_input_embeddings()(previous)
        return {"inputs_embeds": embedded if start else torch.cat([context, embedded], 1)}

    def _distribution(self, output: ModelOutput) -> Categorical:
        logits = output["logits"][:, -self.config.sequence_length :]  # without the prefix
        return Categorical(logits[..., : self.config.codebook_size])
