"""The config of a level."""

from typing import Any, ClassVar

from transformers import AutoConfig, PreTrainedConfig

from ..serialization import FORMAT_VERSION
from .base import (
    PartConfig,
    check_classes,
    check_limits,
    check_names,
    check_range,
    name_classes,
    strict_config,
)
from .causal_lm import MAX_LAYERS, causal_config, check_causal_config, small_opt
from .decoders import (
    BIT_DECODER_TYPES,
    CODE_NOISE_KINDS,
    COMPONENT_MEANS_DISTRIBUTIONS,
    DECODER_TYPES,
    DOWNSAMPLES,
    DROPOUT_DECODER_TYPES,
    GROUP_NUMBERS,
    GUIDED_DISTRIBUTIONS,
    ORDERINGS,
    PIXEL_DECODER_TYPES,
    PIXEL_DISTRIBUTIONS,
)
from .quantizers import QUANTIZER_RULES, QuantizerRules
from .renamed_fields import rename_fields, renamed_names, warn_about_names
from .tokenizer import fixed_sizes, set_tokenizer_fields

NUM_PIXEL_VALUES = 256  # of one color of a pixel
MANY_CODES = 2048  # beyond it logits are computed through a table, in parts
MAX_RASTER_POSITIONS = 256  # of the finer grid, for ordering="raster"
MAX_TRANSFORMER_SIDE = 64  # of the finer grid, for decoder_type="transformer"

# A larger value is a damaged or a hostile file, which would fill the memory.
MAX_BITS = 20
MAX_CODES = 2**MAX_BITS
MAX_CHANNELS = 256
MAX_PALETTE_CHANNELS = 3  # whose values are packed into one integer

# The fields that a refit may change; the others decide the codes.
DECODER_FIELDS = (
    "hidden_size",
    "num_layers",
    "dropout",
    "condition_num_layers",
    "neighbor_inputs",
    "attention_head_dim",
    "pixel_distribution",
    "pixel_logit_rank",
    "palette_size",
    "decoder_type",
    "ordering",
    "num_groups",
    "backbone_config",
    "num_classes",
    "id2label",
    "class_dropout",
    "condition_dim",
    "code_noise",
    "code_noise_kind",
)


@strict_config
class ProgressiveVAELevelConfig(PartConfig):
    """One level: `P_Ψ(z_i | z_{i+1})` and `P_Θ(z_{i+1} | z_i)`.

    Exactly one of `num_channels` and `num_symbols` is set: the finer grid consists of pixels or of
    codes.

    Args:
        num_channels: colors of the image, on the finest level; `None` on the others.
        num_symbols: codebook size of the finer grid; `None` on the finest level.
        codebook_size: K, the number of codes of this level's grid.
        codebook_dim: D, the length of a code vector; `None`: the quantizer's default, 8, or the
            only value that it accepts: for `"fsq"` the number of its scalars, for `"lfq"` and
            `"bsq"` that of the bits of a code.
        downsample: 2, 4, 8 … 64, the linear factor between this level's grid and the finer one.
        hidden_size: width of the decoder.
        num_layers: residual blocks of the decoder before each group; of `"causal_lm"` those on z,
            and the layers of its language model; layers of `"transformer"`.
        dropout: of `"causal_lm"` and `"transformer"`, after attention and feed-forward networks:
            the probability of zeroing an activation in training, which reduces overfitting.
        condition_num_layers: of `"transformer"`, residual blocks on z; `None`: 2, and 0 of others.
        neighbor_inputs: of `"transformer"`: the first state of a position depends on the values of
            its eight neighbors, where earlier groups have them. `None`: whether it is a
            `"transformer"`.
        attention_head_dim: of `"transformer"`, the least number of channels of an attention head.
        encoder_hidden_size: width of the encoder; `None`: `hidden_size`.
        encoder_num_layers: residual blocks of the encoder on each of its grids.
        block_kernel_size: of the second convolution of each residual block, 1 or 3; 3 costs a
            fifth more, and is no better in equal time.
        value_embed_dim: length of the embedding of one finer value.
        pixel_distribution: `"categorical"`, a probability for each value; of `"conv"` with
            `ordering="lattice"` also `"logistic_mixture"`, a discretized mixture of logistics
            around the neighboring pixels of earlier groups, for smooth images, and
            `"guided_logistic_mixture"`, which adds the image that the auxiliary decoder expects.
        pixel_logit_rank: of `"categorical"`, the rank of the ordinal table that computes the
            logits of pixels, so that near values learn together; 0: a free logit for every value,
            which is better for few images of few gray values.
        palette_size: of `"conv"` with `ordering="lattice"`, a pixel may also copy the whole color
            of one of the four nearest pixels of earlier groups, or one of so many colors that are
            frequent in these groups: for images of few colors, such as pixel art; 0: pixels copy
            nothing.
        bits_per_block: of codes: each is split into blocks of so many bits, which are predicted one
            after the other, as the colors of a pixel, so that memory grows with the logarithm of
            `num_symbols`, a power of 2^bits_per_block. With `"conv"` or `"transformer"`, without an
            auxiliary decoder; 0: codes are not split.
        symbol_logit_rank: of codes, the rank of the table that computes their logits, those of the
            auxiliary decoder too; 0: a free logit for every code; `None`: 64 beyond 2,048 codes
            and 0 else.
        decoder_type: the architecture of the decoder. `"conv"`: a convolution net that carries a
            state through the groups. `"transformer"`: a transformer over codes or pixels, on grids
            of up to 64×64, whose attention is causal over the groups. `"causal_lm"`: a causal
            language model of transformers, on grids of up to 256 codes. `"auxiliary"`: only the
            auxiliary decoder.
        ordering: the split of the finer grid into groups, predicted in sequence. `"factorized"`:
            one group. `"lattice"`: sub-pixel lattices, coarse first. `"masked"`: a fixed random
            order, few positions first. `"raster"`: one code at a time. `"diagonal"`: one
            anti-diagonal at a time. `None`: `"lattice"` for `"conv"` and `"transformer"`,
            `"raster"` for `"causal_lm"`, `"factorized"` for `"auxiliary"`. `"transformer"` has all,
            `"conv"` the first three, the others only their own.
        num_groups: groups of the decoder: 1 of `"factorized"`; 1 + 3k of `"lattice"`, whose
            coarsest has stride 2ᵏ, from downsample to 64; 1 … 256 of `"masked"`; `None` of
            `"raster"` and `"diagonal"`, which have as many as positions and as anti-diagonals;
            2c − 1 of `"diagonal"` in cells of c×c, a power of two, all in parallel.
            `None`: the only number, the stride downsample for `"lattice"`, and 8 for `"masked"`.
        backbone_config: of `"causal_lm"`, any causal-LM config of transformers, as a config or as
            a dict with its `model_type`; its vocabulary is set to the codes. `None`: an OPT of
            `num_layers` layers with `hidden_size` and `dropout`.
        quantizer: `"vq"` (nearest code, running k-means), `"fsq"` (finite scalar quantization),
            `"gumbel"` (a categorical encoder, learned through the Gumbel-softmax), `"lfq"`
            (lookup-free: the signs of latents) or `"bsq"` (binary spherical: those of a unit
            vector); of the last two K is a power of two.
        quantizer_gradient: of `"vq"`, of the latents: `"straight_through"`, that of the code,
            `"rotation"`, turned by the angle between latent and code, or `"diveq"`, without its
            part along their difference.
        commitment_weight: β of `"vq"`, `"lfq"` and `"bsq"`, the weight of the distance between
            latents and their codes.
        entropy_weight: of `"lfq"` and `"bsq"`, by which their bits are certain and equally often 0
            and 1.
        codebook_decay: 1 − γ of `"vq"`, the decay of the codebook's running k-means.
        restart_threshold: of `"vq"`: a code used less than this fraction of the mean use is
            restarted.
        dither: of `"vq"`: root mean square of a pattern that the encoder adds to its latents and
            decoders subtract, so that regions of several codes distinguish colors nearer to each
            other than codes; 0: none.
        gumbel_temperature: of `"gumbel"`: [at the start, at the end]; it anneals exponentially.
        gumbel_temperature_decay: of `"gumbel"`: factor of the temperature after each batch.
        auxiliary_hidden_size: width of the auxiliary decoder, by whose loss encoder and codebook
            learn, and whose expected image is the preview; `None`: none.
        auxiliary_num_layers: its residual blocks on each grid.
        reconstruction_weight: of the squared error of the image that the auxiliary decoder
            expects, or on a level of codes that finer ones make of its output, beside the nats of
            one value.
        num_classes: number of class labels that the decoder is conditioned on; 0: none.
        class_dropout: probability of the null condition in place of class and embeddings in
            training, and of each of two alone.
        condition_dim: D, the length of the embeddings that the decoder is conditioned on, as those
            of a text encoder; `None`: none.
        code_noise: noise conditioning augmentation of a refit: each code of z_i is replaced with a
            probability that is uniform in [0, code_noise] for each example and an input of the
            decoder.
        code_noise_kind: the replacement of a code: `"random"`, any other one, or `"near"`, one of
            the eight nearest in the codebook.
        tokenizer_config: of the finest level, a pretrained tokenizer in place of encoder, codebook
            and auxiliary decoder: its `model_type` and fields, which `configuration/tokenizer.py`
            has. It decides `num_channels`, `codebook_size`, `codebook_dim` and `downsample`.
        finer_fingerprint: `fingerprint` of the finer levels on whose codes this part was trained; a
            pipeline refuses other ones. `None`: unchecked.
    """

    model_type = "progressive_vae_level"
    has_no_defaults_at_init: ClassVar[bool] = True  # some versions of transformers would try them
    sub_configs = {"backbone_config": AutoConfig}  # where attn_implementation and dtype go on to

    num_channels: int | None = None
    num_symbols: int | None = None
    codebook_size: int = 64
    codebook_dim: int | None = None
    downsample: int = 2
    hidden_size: int = 64
    num_layers: int = 2
    dropout: float = 0.0
    condition_num_layers: int | None = None
    neighbor_inputs: bool | None = None
    attention_head_dim: int = 32
    encoder_hidden_size: int | None = None
    encoder_num_layers: int = 1
    block_kernel_size: int = 1
    value_embed_dim: int = 16
    pixel_distribution: str = "categorical"
    pixel_logit_rank: int = 64
    palette_size: int = 0
    bits_per_block: int = 0
    symbol_logit_rank: int | None = None
    decoder_type: str = "conv"
    ordering: str | None = None
    num_groups: int | None = None
    backbone_config: dict | PreTrainedConfig | None = None
    quantizer: str = "vq"
    quantizer_gradient: str = "straight_through"
    commitment_weight: float = 0.25
    entropy_weight: float = 0.1
    codebook_decay: float = 0.99
    restart_threshold: float = 0.03
    dither: float = 0.0
    gumbel_temperature: list[float] | tuple[float, ...] = (1.0, 0.5)
    gumbel_temperature_decay: float = 0.999
    auxiliary_hidden_size: int | None = None
    auxiliary_num_layers: int = 1
    reconstruction_weight: float = 100.0
    num_classes: int = 0
    class_dropout: float = 0.1
    condition_dim: int | None = None
    code_noise: float = 0.0
    code_noise_kind: str = "near"
    tokenizer_config: dict | None = None
    finer_fingerprint: str | None = None

    @staticmethod
    def upgrade_config(format_version: int, fields: dict[str, Any]) -> dict[str, Any]:
        """The fields of a file of this or an older format, in this format.

        Old names warn only in this format, where a caller wrote them rather than a file.
        """
        if format_version < 3 and fields.get("decoder_order") == "raster":
            raise ValueError(
                f"expected a level of decoder_order='raster' in format_version >= 3, got "
                f"{format_version}: its network has changed, train it again"
            )
        if format_version == 1:
            fields = {"block_kernel_size": 3, **fields}
        if format_version < 6:
            fields = {"symbol_logit_rank": 0, **fields}
        if format_version < 8 and fields.get("decoder_type") == "transformer":
            older = {"condition_num_layers": 0, "neighbor_inputs": False, "attention_head_dim": 16}
            fields = {**older, **fields}
        if format_version == FORMAT_VERSION:
            warn_about_names(renamed_names(fields))
        return rename_fields(fields)

    def __post_init__(self, **kwargs):
        check_names(self, kwargs)
        if self.tokenizer_config is not None:
            set_tokenizer_fields(self)
        check_limits(vars(self), codebook_size=MAX_CODES, num_symbols=MAX_CODES,
                      num_channels=MAX_CHANNELS, num_layers=MAX_LAYERS, bits_per_block=MAX_BITS,
                      encoder_num_layers=MAX_LAYERS, auxiliary_num_layers=MAX_LAYERS,
                      condition_num_layers=MAX_LAYERS)  # fmt: skip
        self.gumbel_temperature = list(self.gumbel_temperature)
        if self.codebook_dim is None:
            self.codebook_dim = self._quantizer_rules.default_codebook_dim(self)
        if self.symbol_logit_rank is None:
            self.symbol_logit_rank = 64 if self.num_values > MANY_CODES else 0
        is_transformer = self.decoder_type == "transformer"
        if self.condition_num_layers is None:
            self.condition_num_layers = 2 if is_transformer else 0
        if self.neighbor_inputs is None:
            self.neighbor_inputs = is_transformer
        if self.ordering is None and self.decoder_type in DECODER_TYPES:
            self.ordering = DECODER_TYPES[self.decoder_type][0]
        if self.num_groups is None:
            self.num_groups = self._group_numbers()[0]
        if self.backbone_config is not None:
            self.backbone_config = causal_config(
                self.backbone_config, self.num_values, MAX_RASTER_POSITIONS
            )
        name_classes(self)
        super().__post_init__(**kwargs)

    def with_decoder(self, **changes) -> "ProgressiveVAELevelConfig":
        """The config of a level with the same encoder and codebook and another decoder.

        Args:
            changes: of the fields in `DECODER_FIELDS`. Another `decoder_type` or `ordering` resets
                the fields that depend on them.
        """
        warn_about_names(renamed_names(changes))
        changes = rename_fields(changes)
        if unknown := sorted(set(changes) - set(DECODER_FIELDS)):
            raise ValueError(f"expected changes among {DECODER_FIELDS}, got {unknown}")
        fields = {name: getattr(self, name) for name in ProgressiveVAELevelConfig.__annotations__}
        fields["encoder_hidden_size"] = self.encoder_hidden_size or self.hidden_size
        fields["id2label"] = self.id2label if self.num_classes else None
        is_other_type = changes.get("decoder_type", self.decoder_type) != self.decoder_type
        if is_other_type:
            fields["ordering"] = fields["condition_num_layers"] = fields["neighbor_inputs"] = None
        if is_other_type or changes.get("backbone_config") is not None:
            fields["dropout"] = 0.0
        if is_other_type or changes.get("ordering", self.ordering) != self.ordering:
            fields["num_groups"] = None
            fields["backbone_config"] = None
        return ProgressiveVAELevelConfig(**{**fields, **changes})

    def validate_finer(self):
        if (self.num_channels is None) == (self.num_symbols is None):
            raise ValueError(
                "expected one of num_channels (finest level) and num_symbols (other levels), got "
                f"num_channels={self.num_channels} and num_symbols={self.num_symbols}"
            )
        types_of_codes = {*DECODER_TYPES} - {*PIXEL_DECODER_TYPES}
        if self.decoder_type in types_of_codes and self.num_channels is not None:
            raise ValueError(
                f"expected decoder_type in {PIXEL_DECODER_TYPES} on the finest level, got "
                f"{self.decoder_type!r}, which is for codes"
            )

    def validate_sizes(self):
        check_range(self, num_channels=1, num_symbols=1, codebook_size=1, codebook_dim=1,
                     hidden_size=1, num_layers=1, encoder_hidden_size=1, encoder_num_layers=0,
                     value_embed_dim=1, pixel_logit_rank=0, palette_size=0, symbol_logit_rank=0,
                     auxiliary_hidden_size=1, auxiliary_num_layers=0, reconstruction_weight=0,
                     bits_per_block=0, commitment_weight=0, entropy_weight=0, codebook_decay=0,
                     restart_threshold=0, dither=0, attention_head_dim=1,
                     condition_num_layers=0)  # fmt: skip
        if not 0 <= self.code_noise <= 1:
            raise ValueError(f"expected code_noise in [0, 1], got {self.code_noise}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"expected dropout in [0, 1), got {self.dropout}")
        check_classes(self)

    def validate_choices(self):
        for name, choices in (
            ("downsample", DOWNSAMPLES),
            ("block_kernel_size", (1, 3)),
            ("pixel_distribution", PIXEL_DISTRIBUTIONS),
            ("decoder_type", tuple(DECODER_TYPES)),
            ("ordering", ORDERINGS),
            ("code_noise_kind", CODE_NOISE_KINDS),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"expected {name} in {choices}, got {getattr(self, name)!r}")
        if self.ordering not in (orderings := DECODER_TYPES[self.decoder_type]):
            raise ValueError(
                f"expected ordering in {orderings} for decoder_type={self.decoder_type!r}, "
                f"got {self.ordering!r}"
            )
        has_neighbors = self.ordering == "lattice" and self.decoder_type == "conv"
        if self.has_component_means and not has_neighbors:
            raise ValueError(
                "expected ordering='lattice' and decoder_type='conv' for pixel_distribution="
                f"{self.pixel_distribution!r}, got {self.ordering!r} and {self.decoder_type!r}"
            )
        if self.copies_colors and not has_neighbors:
            raise ValueError(
                "expected ordering='lattice' and decoder_type='conv' for "
                f"palette_size={self.palette_size}, got {self.ordering!r} and "
                f"{self.decoder_type!r}"
            )
        if self.copies_colors and self.value_channels > MAX_PALETTE_CHANNELS:
            raise ValueError(
                f"expected num_channels of up to {MAX_PALETTE_CHANNELS} for "
                f"palette_size={self.palette_size}, got {self.num_channels}"
            )
        if self.is_guided and not self.has_auxiliary:
            raise ValueError(
                "expected auxiliary_hidden_size for pixel_distribution="
                f"{self.pixel_distribution!r}, got None"
            )
        if self.num_groups not in (numbers := self._group_numbers()):
            expected = str(numbers) if len(numbers) < 10 else f"1 … {numbers[-1]}"
            raise ValueError(
                f"expected num_groups among {expected} for ordering={self.ordering!r} "
                f"and downsample={self.downsample}, got {self.num_groups}"
            )

    def _group_numbers(self) -> list[int | None]:
        if self.ordering not in GROUP_NUMBERS or self.downsample not in DOWNSAMPLES:
            return [self.num_groups]  # `validate_choices` raises
        return GROUP_NUMBERS[self.ordering](self.downsample)

    def validate_bits_per_block(self):
        if not self.bits_per_block:
            return
        if self.num_symbols != self.num_values**self.value_channels:
            raise ValueError(
                f"expected num_symbols to be a power of 2**{self.bits_per_block} for "
                f"bits_per_block={self.bits_per_block}, got {self.num_symbols}"
            )
        if self.decoder_type not in BIT_DECODER_TYPES or self.has_auxiliary:
            raise ValueError(
                f"expected decoder_type in {BIT_DECODER_TYPES} and no auxiliary decoder for "
                f"bits_per_block={self.bits_per_block}, got {self.decoder_type!r} and "
                f"auxiliary_hidden_size={self.auxiliary_hidden_size}"
            )

    def validate_auxiliary(self):
        if self.decoder_type == "auxiliary" and not self.has_auxiliary:
            raise ValueError(
                "expected auxiliary_hidden_size for decoder_type='auxiliary', got None"
            )
        if self.decoder_type == "auxiliary" and self.is_conditional:
            raise ValueError(
                "expected num_classes=0 and condition_dim=None for decoder_type='auxiliary', which "
                f"has no condition, got {self.num_classes} and {self.condition_dim}"
            )

    def validate_decoder_type(self):
        for name in ("condition_num_layers", "neighbor_inputs"):
            if getattr(self, name) and self.decoder_type != "transformer":
                raise ValueError(
                    f"expected {name}=None unless decoder_type is 'transformer', got "
                    f"{getattr(self, name)} and {self.decoder_type!r}"
                )
        if self.dropout and self.decoder_type not in DROPOUT_DECODER_TYPES:
            raise ValueError(
                f"expected dropout=0 unless decoder_type is in {DROPOUT_DECODER_TYPES}, got "
                f"{self.dropout} and {self.decoder_type!r}"
            )
        if self.dropout and self.backbone_config is not None:
            raise ValueError(
                "expected dropout=0 beside a backbone_config, which has its own, got "
                f"{self.dropout}"
            )

    def validate_backbone(self):
        if self.backbone_config is None:
            return
        if self.decoder_type != "causal_lm":
            raise ValueError(
                "expected backbone_config=None for a decoder_type other than 'causal_lm', got "
                f"{type(self.backbone_config).__name__} for {self.decoder_type!r}"
            )
        check_causal_config(self.backbone_config)

    def validate_quantizer(self):
        self._quantizer_rules.validate(self)
        supports_dither = self._quantizer_rules.supports_dither and self.tokenizer_config is None
        if self.dither and not supports_dither:
            supported = [name for name, rules in QUANTIZER_RULES.items() if rules.supports_dither]
            raise ValueError(
                f"expected dither=0 unless quantizer is in {supported} and tokenizer_config=None, "
                f"got dither={self.dither} and quantizer={self.quantizer!r}"
            )

    @property
    def _quantizer_rules(self) -> type[QuantizerRules]:
        """The quantizer's class.

        Raises:
            ValueError: an unknown quantizer.
        """
        if self.quantizer not in QUANTIZER_RULES:
            choices = tuple(QUANTIZER_RULES)
            raise ValueError(f"expected quantizer in {choices}, got {self.quantizer!r}")
        return QUANTIZER_RULES[self.quantizer]

    def codes_size(self, finer_size: tuple[int, int]) -> tuple[int, int]:
        """(H_{i+1}, W_{i+1}) -> (H_i, W_i), by ceiling division, or as a tokenizer has it.

        Raises:
            ValueError: the tokenizer is for images of another size.
        """
        if sizes := fixed_sizes(self.tokenizer_config):
            if tuple(finer_size) != sizes[0]:
                raise ValueError(
                    f"expected images of {sizes[0]}, the size of the tokenizer, got "
                    f"{tuple(finer_size)}"
                )
            return sizes[1]
        height, width = finer_size
        return -(-height // self.downsample), -(-width // self.downsample)

    def finer_size(self, codes_size: tuple[int, int]) -> tuple[int, int]:
        """(H_i, W_i) -> the largest (H_{i+1}, W_{i+1}) that has such a grid of codes."""
        if sizes := fixed_sizes(self.tokenizer_config):
            return sizes[0]
        return codes_size[0] * self.downsample, codes_size[1] * self.downsample

    @property
    def is_conditional(self) -> bool:
        """Whether the decoder has a condition besides the codes."""
        return bool(self.num_classes) or self.condition_dim is not None

    @property
    def is_finest(self) -> bool:
        return self.num_channels is not None

    @property
    def has_auxiliary(self) -> bool:
        """Whether there is an auxiliary decoder, of its own or its tokenizer's."""
        return self.auxiliary_hidden_size is not None or self.tokenizer_config is not None

    @property
    def has_component_means(self) -> bool:
        """Whether the decoder predicts pixels by a mixture of logistics around component means."""
        has_pixels = self.is_finest and self.decoder_type != "auxiliary"
        return has_pixels and self.pixel_distribution in COMPONENT_MEANS_DISTRIBUTIONS

    @property
    def copies_colors(self) -> bool:
        """Whether pixels may copy the colors of pixels of earlier groups."""
        return self.is_finest and self.decoder_type != "auxiliary" and self.palette_size > 0

    @property
    def is_guided(self) -> bool:
        """Whether one of the component means is the image that the auxiliary decoder expects."""
        return self.has_component_means and self.pixel_distribution in GUIDED_DISTRIBUTIONS

    @property
    def is_stochastic(self) -> bool:
        """Whether `P_Ψ` is a distribution rather than one code."""
        return self._quantizer_rules.is_stochastic

    @property
    def value_channels(self) -> int:
        """Values at one position of the finer grid: the colors of a pixel, or the blocks of a code,
        1 if it is not split."""
        if self.num_symbols is None or not self.bits_per_block:
            return self.num_channels or 1
        return max(1, (self.num_symbols.bit_length() - 1) // self.bits_per_block)

    @property
    def num_values(self) -> int:
        """The number of values of an entry of the finer grid: 256 of a pixel, K_{i+1} of a code, or
        those of a block of its bits."""
        if self.num_symbols is None:
            return NUM_PIXEL_VALUES
        return 2**self.bits_per_block if self.bits_per_block else self.num_symbols

    @property
    def raster_config(self) -> PreTrainedConfig:
        """The backbone's config of `"causal_lm"`."""
        if isinstance(
            self.backbone_config, PreTrainedConfig
        ):  # `__post_init__` makes one of a dict
            return self.backbone_config
        default = small_opt(self.hidden_size, self.num_layers, MAX_RASTER_POSITIONS, self.dropout)
        return causal_config(default, self.num_values, MAX_RASTER_POSITIONS)
