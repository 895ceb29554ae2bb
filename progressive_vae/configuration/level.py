"""The config of a level: every architectural knob, once."""

from typing import Any, ClassVar

from transformers import AutoConfig, PreTrainedConfig

from .base import (
    check_classes,
    check_limits,
    check_names,
    check_range,
    name_classes,
    strict_config,
)
from .causal_lm import MAX_LAYERS, causal_config, check_causal_config, small_opt
from .choices import (
    CORRUPTIONS,
    DECODER_ORDERS,
    DOWNSAMPLES,
    GROUP_NUMBERS,
    GUESSING,
    GUIDED,
    PIXEL_DISTRIBUTIONS,
    PIXEL_ORDERS,
)
from .quantizers import QUANTIZER_RULES, QuantizerRules
from .tokenizer import take_shape

NUM_PIXEL_VALUES = 256  # of one color of a pixel
MANY_SYMBOLS = 2048  # more have logits through a table, and are not held for a whole grid
MAX_RASTER_POSITIONS = 256  # of the finer grid, for decoder_order="raster"

# More is a damaged or a hostile file, and would fill the memory before anything else is looked at.
MAX_CODES = 2**20

# What a refit may change; the rest decides what the codes are.
DECODER_FIELDS = ("hidden_size", "num_layers", "pixel_distribution", "pixel_logit_rank",
                  "decoder_order", "num_groups", "backbone_config", "num_classes", "id2label",
                  "class_dropout", "corruption", "corruption_kind")  # fmt: skip

# What only training reads: the weights say the same without it.
TRAINING_FIELDS = ("class_dropout", "picture_weight", "commitment_weight", "codebook_decay",
                   "restart_threshold", "gumbel_temperature", "gumbel_decay",
                   "corruption_kind")  # fmt: skip


@strict_config
class ProgressiveVAELevelConfig(PreTrainedConfig):
    """One level: `P_Ψ(z_i | z_{i+1})` and `P_Θ(z_{i+1} | z_i)`.

    Exactly one of `num_channels` and `num_symbols` says what the finer grid is made of.

    Args:
        num_channels: colors of the image, on the finest level; `None` on the others.
        num_symbols: codebook size of the finer grid; `None` on the finest level.
        codebook_size: K, the number of codes of this level's grid.
        codebook_dim: D, the length of a code vector; `None` stands for 8, and for `"fsq"` for the
            number of its scalars, which it must be there.
        downsample: 2, 4, 8 … 64, the linear factor between this level's grid and the finer one.
        hidden_size: width of the decoder.
        num_layers: residual blocks of the decoder before each group; of `"raster"` those on z, and
            the layers of its causal language model.
        encoder_hidden_size: width of the encoder; `None` stands for `hidden_size`.
        encoder_num_layers: residual blocks of the encoder on each of its grids.
        block_kernel_size: of the second convolution of each residual block, 1 or 3; 3 is dearer by
            a fifth, and no better in equal time.
        value_embed_dim: length of the vector by which the networks see one finer value.
        pixel_distribution: `"categorical"`, a probability of each value; with
            `decoder_order="lattice"` also `"logistics"`, a mixture around the neighbors of a
            pixel that are known already, for smooth pictures, and `"guided_logistics"`, around
            what the auxiliary decoder expects, too.
        pixel_logit_rank: of `"categorical"`, the rank of the ordinal table through which the
            logits of pixels are made, so that near values learn together; 0 for a free logit of
            every value, which is better for few images of few gray values.
        symbol_logit_rank: of symbols, the rank of the table through which their logits are made,
            those of the auxiliary decoder too; 0 for a free logit of every symbol; `None` stands
            for 64 beyond 2,048 symbols and 0 else.
        decoder_order: how the finer grid is split into groups that are predicted in sequence.
            `"factorized"`: one group. `"lattice"`: sub-pixel lattices, coarse first. `"masked"`:
            a fixed random order, few positions first. `"raster"`: one symbol at a time, on
            symbol grids up to 256 positions. `"auxiliary"`: the auxiliary decoder is all there is.
        num_groups: groups of the decoder: 1 of `"factorized"`; 1 + 3k of `"lattice"`, whose
            coarsest has stride 2ᵏ, from downsample to 64; 1 … 256 of `"masked"`; `None` of
            `"raster"`, as there are as many as positions. `None` stands for the one number, for
            the stride downsample of `"lattice"`, and for 8 of `"masked"`.
        backbone_config: of `"raster"`, any causal-LM config of transformers, as a config or as a
            dict with its `model_type`; its vocabulary is set to the symbols. `None` stands for an
            OPT of `num_layers` layers with `hidden_size`.
        quantizer: `"vq"` (nearest code, running k-means), `"fsq"` (finite scalar quantization) or
            `"gumbel"` (a categorical encoder, learned through the Gumbel-softmax).
        commitment_weight: β of `"vq"`, the pull of the encoder towards its code.
        codebook_decay: 1 − γ of `"vq"`, the decay of the codebook's running k-means.
        restart_threshold: of `"vq"`: a code used less than this fraction of the mean use is
            restarted.
        dither: of `"vq"`: root mean square of a pattern that the encoder adds to its latents and
            decoders take away again, so that colors that are nearer to each other than codes
            are can be told apart where they cover more than one code; 0 for none.
        gumbel_temperature: of `"gumbel"`: [at the start, at the end]; it anneals exponentially.
        gumbel_decay: of `"gumbel"`: by how much the temperature is multiplied after each batch.
        auxiliary_hidden_size: width of the auxiliary decoder, by whose picture encoder and codebook
            learn, and which previews show; `None` for none.
        auxiliary_num_layers: its residual blocks on each grid.
        picture_weight: of the squared error of the picture that the auxiliary decoder expects, or
            on a level of symbols that finer ones make of it, beside the nats of an entry.
        num_classes: number of class labels that the decoder is told; 0 for none.
        class_dropout: probability that training shows the decoder the null class instead.
        corruption: while a decoder is refitted, each code of z_i is replaced with a probability
            that is drawn for each example from 0 … corruption and told to the network.
        corruption_kind: what replaces a code: `"random"`, any other one, or `"near"`, one of the
            eight nearest in the codebook.
        tokenizer_config: of the finest level, somebody else's tokenizer in place of its encoder,
            codebook and auxiliary decoder: the fields of a `VQModel` of diffusers, a `JanusVQVAE`
            of transformers or a `"dalle_dvae"`, with the `model_type` `"vq_model"`,
            `"janus_vqgan"` or `"dalle_dvae"` (`tokenizer_configs.py`). It decides `num_channels`,
            `codebook_size`, `codebook_dim` and `downsample`.
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
    encoder_hidden_size: int | None = None
    encoder_num_layers: int = 1
    block_kernel_size: int = 1
    value_embed_dim: int = 16
    pixel_distribution: str = "categorical"
    pixel_logit_rank: int = 64
    symbol_logit_rank: int | None = None
    decoder_order: str = "lattice"
    num_groups: int | None = None
    backbone_config: dict | PreTrainedConfig | None = None
    quantizer: str = "vq"
    commitment_weight: float = 0.25
    codebook_decay: float = 0.99
    restart_threshold: float = 0.03
    dither: float = 0.0
    gumbel_temperature: list[float] | tuple[float, ...] = (1.0, 0.5)
    gumbel_decay: float = 0.999
    auxiliary_hidden_size: int | None = None
    auxiliary_num_layers: int = 1
    picture_weight: float = 100.0
    num_classes: int = 0
    class_dropout: float = 0.1
    corruption: float = 0.0
    corruption_kind: str = "near"
    tokenizer_config: dict | None = None
    finer_fingerprint: str | None = None

    @staticmethod
    def upgrade_config(found: int, fields: dict[str, Any]) -> dict[str, Any]:
        """What a level of an older format says in the words of this one."""
        if found < 3 and fields.get("decoder_order") == "raster":
            raise ValueError(
                f"expected a level of decoder_order='raster' in format_version >= 3, got {found}: "
                "its network has changed, train it again"
            )
        if found < 6:  # not named then, nor was the next
            fields = {"symbol_logit_rank": 0, **fields}
        return {"block_kernel_size": 3, **fields} if found == 1 else fields

    def __post_init__(self, **kwargs):
        check_names(self, kwargs)
        if self.tokenizer_config is not None:
            take_shape(self)
        check_limits(vars(self), codebook_size=MAX_CODES, num_symbols=MAX_CODES,
                      num_layers=MAX_LAYERS, encoder_num_layers=MAX_LAYERS,
                      auxiliary_num_layers=MAX_LAYERS)  # fmt: skip
        self.gumbel_temperature = list(self.gumbel_temperature)
        if self.codebook_dim is None:
            self.codebook_dim = self._quantizer_rules.default_codebook_dim(self)
        if self.symbol_logit_rank is None:
            self.symbol_logit_rank = 64 if (self.num_symbols or 0) > MANY_SYMBOLS else 0
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
            changes: of the fields in `DECODER_FIELDS`.
        """
        if unknown := sorted(set(changes) - set(DECODER_FIELDS)):
            raise ValueError(f"expected changes among {DECODER_FIELDS}, got {unknown}")
        fields = {name: getattr(self, name) for name in ProgressiveVAELevelConfig.__annotations__}
        fields["encoder_hidden_size"] = self.encoder_hidden_size or self.hidden_size
        fields["id2label"] = self.id2label if self.num_classes else None
        if changes.get("decoder_order", self.decoder_order) != self.decoder_order:
            fields["num_groups"] = fields["backbone_config"] = None  # those of the other order
        return ProgressiveVAELevelConfig(**{**fields, **changes})

    def validate_finer(self):
        if (self.num_channels is None) == (self.num_symbols is None):
            raise ValueError(
                "expected one of num_channels (finest level) and num_symbols (other levels), got "
                f"num_channels={self.num_channels} and num_symbols={self.num_symbols}"
            )
        if self.decoder_order == "raster" and self.num_channels is not None:
            raise ValueError(
                f"expected a decoder_order of pixels {PIXEL_ORDERS} on the finest level, got "
                "'raster', which is for symbols"
            )

    def validate_sizes(self):
        check_range(self, num_channels=1, num_symbols=1, codebook_size=1, codebook_dim=1,
                     hidden_size=1, num_layers=1, encoder_hidden_size=1, encoder_num_layers=0,
                     value_embed_dim=1, pixel_logit_rank=0, symbol_logit_rank=0,
                     auxiliary_hidden_size=1, auxiliary_num_layers=0, picture_weight=0,
                     commitment_weight=0, codebook_decay=0, restart_threshold=0,
                     dither=0)  # fmt: skip
        if not 0 <= self.corruption <= 1:
            raise ValueError(f"expected corruption in [0, 1], got {self.corruption}")
        check_classes(self)

    def validate_choices(self):
        for name, choices in (
            ("downsample", DOWNSAMPLES),
            ("block_kernel_size", (1, 3)),
            ("pixel_distribution", PIXEL_DISTRIBUTIONS),
            ("decoder_order", DECODER_ORDERS),
            ("corruption_kind", CORRUPTIONS),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"expected {name} in {choices}, got {getattr(self, name)!r}")
        if self.has_component_means and self.decoder_order != "lattice":
            raise ValueError(
                "expected decoder_order='lattice' for pixel_distribution="
                f"{self.pixel_distribution!r}, got {self.decoder_order!r}"
            )
        if self.is_guided and not self.has_auxiliary:
            raise ValueError(
                "expected auxiliary_hidden_size for pixel_distribution="
                f"{self.pixel_distribution!r}, got None"
            )
        if self.num_groups not in (numbers := self._group_numbers()):
            expected = str(numbers) if len(numbers) < 10 else f"1 … {numbers[-1]}"
            raise ValueError(
                f"expected num_groups among {expected} for decoder_order={self.decoder_order!r} "
                f"and downsample={self.downsample}, got {self.num_groups}"
            )

    def _group_numbers(self) -> list[int | None]:
        is_known = self.decoder_order in GROUP_NUMBERS and self.downsample in DOWNSAMPLES
        return GROUP_NUMBERS[self.decoder_order](self.downsample) if is_known else [self.num_groups]

    def validate_auxiliary(self):
        if self.decoder_order == "auxiliary" and not self.has_auxiliary:
            raise ValueError(
                "expected auxiliary_hidden_size for decoder_order='auxiliary', got None"
            )
        if self.decoder_order == "auxiliary" and self.num_classes:
            raise ValueError(
                "expected num_classes=0 for decoder_order='auxiliary', which knows no classes, got "
                f"{self.num_classes}"
            )

    def validate_backbone(self):
        if self.backbone_config is None:
            return
        if self.decoder_order != "raster":
            raise ValueError(
                "expected backbone_config=None for a decoder_order other than 'raster', got "
                f"{type(self.backbone_config).__name__} for {self.decoder_order!r}"
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

    @property
    def is_finest(self) -> bool:
        return self.num_channels is not None

    @property
    def has_auxiliary(self) -> bool:
        """Whether there is an auxiliary decoder, of its own or its tokenizer's."""
        return self.auxiliary_hidden_size is not None or self.tokenizer_config is not None

    @property
    def has_component_means(self) -> bool:
        """Whether pixels have logistic distributions around guesses."""
        is_asked = self.is_finest and self.decoder_order != "auxiliary"
        return is_asked and self.pixel_distribution in GUESSING

    @property
    def is_guided(self) -> bool:
        """Whether one of the guesses is what the auxiliary decoder expects."""
        return self.has_component_means and self.pixel_distribution in GUIDED

    @property
    def is_stochastic(self) -> bool:
        """Whether `P_Ψ` is a distribution rather than one code."""
        return self._quantizer_rules.is_stochastic

    @property
    def value_channels(self) -> int:
        """Entries at one position of the finer grid: the colors of a pixel, or 1 for a symbol."""
        return self.num_channels or 1

    @property
    def num_values(self) -> int:
        """Values that one entry of the finer grid can take: K_{i+1}, or 256 for a pixel."""
        return NUM_PIXEL_VALUES if self.num_symbols is None else self.num_symbols

    @property
    def raster_config(self) -> PreTrainedConfig:
        """Of the causal network of `"raster"`."""
        if self.backbone_config is not None:
            return self.backbone_config
        default = small_opt(self.hidden_size, self.num_layers, MAX_RASTER_POSITIONS)
        return causal_config(default, self.num_values, MAX_RASTER_POSITIONS)
