"""What a DeepSeek-V4-class model is: widths, ratios and counts, as data read from `config.json`.

Three dialects are read: the public `config.json` (`hidden_size`, `compress_ratios`, ...), the release's
`inference/config.json` (`dim`, `n_layers`, ...), and what transformers' `save_pretrained` writes (`layer_types`,
`compress_rates`, `mlp_layer_types`, `rope_parameters`). Everything downstream sees one `ModelConfig`. No torch.
"""

from __future__ import annotations

import enum
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

from rorqual.errors import ConfigError

PAGE_TOKENS = 256
"""Tokens of a page: the unit of caching, transfer and eviction."""


class LayerKind(enum.Enum):
    WINDOW = "window"  # sliding window only
    CSA = "csa"  # window + top-k of overlapping compressed rows (C4)
    HCA = "hca"  # window + all rows compressed at a high ratio (C128)


class Dialect(enum.Enum):
    PUBLIC = "public"
    INFERENCE = "inference"
    TRANSFORMERS = "transformers"


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerConfig:
    kind: LayerKind
    ratio: int  # tokens per compressed row; 0 for WINDOW
    hash_routed: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class YarnConfig:
    """YaRN by frequency only (no mscale): facts of `rope_scaling`."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float
    beta_slow: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    vocab_size: int
    hidden_size: int
    num_heads: int
    head_dim: int
    rope_head_dim: int
    q_lora_rank: int
    o_groups: int
    o_lora_rank: int
    sliding_window: int
    index_num_heads: int
    index_head_dim: int
    index_topk: int
    num_experts: int
    num_experts_per_token: int
    expert_hidden_size: int
    routed_scaling_factor: float
    swiglu_limit: float
    norm_eps: float
    hc_mult: int
    hc_sinkhorn_iters: int
    hc_eps: float
    rope_theta: float
    compress_rope_theta: float
    yarn: YarnConfig | None
    max_position_embeddings: int
    layers: tuple[LayerConfig, ...]
    num_mtp_blocks: int
    expert_dtype: str  # "fp4" | "fp8" | "float": how routed experts are stored
    quantised: bool  # FP8 128x128 blocks for the other projections, else float weights
    bos_token_id: int
    eos_token_ids: tuple[int, ...]
    dialect: Dialect

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def mtp_layer(self) -> LayerConfig:
        """An MTP block is a window-only layer with learned routing."""
        return LayerConfig(kind=LayerKind.WINDOW, ratio=0, hash_routed=False)

    @property
    def nope_head_dim(self) -> int:
        return self.head_dim - self.rope_head_dim

    def fingerprint(self) -> str:
        """16 hex digits that change when any architectural value changes."""
        text = json.dumps(
            asdict(self), sort_keys=True, default=lambda value: getattr(value, "value", str(value))
        )
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def without_mtp(self) -> ModelConfig:
        return replace(self, num_mtp_blocks=0)


def load_model_config(path: Path) -> ModelConfig:
    """Read a model directory or a config file of any dialect.

    Raises ConfigError naming the file and the key that is missing, of the wrong type or out of range.
    """
    file = path / "config.json" if path.is_dir() else path
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{file}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: cannot be read: {error}") from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"{file}: not JSON: {error}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{file}: must hold a JSON object")
    try:
        return parse_model_config(cast("dict[str, Any]", raw))
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from None


def parse_model_config(raw: Mapping[str, Any]) -> ModelConfig:
    """Turn a decoded config of any dialect into a ModelConfig. Raises ConfigError naming the key."""
    if "dim" in raw and "n_layers" in raw:
        config = _parse(_Fields(raw, _INFERENCE_NAMES), Dialect.INFERENCE)
    else:
        model_type = raw.get("model_type", "deepseek_v4")
        if model_type != "deepseek_v4":
            raise ConfigError(f"model_type is {model_type!r}; only 'deepseek_v4' is served")
        dialect = Dialect.TRANSFORMERS if "layer_types" in raw else Dialect.PUBLIC
        config = _parse(_Fields(raw, {}), dialect)
    _check(config)
    return config


_INFERENCE_NAMES = {
    "hidden_size": "dim",
    "moe_intermediate_size": "moe_inter_dim",
    "num_hidden_layers": "n_layers",
    "num_hash_layers": "n_hash_layers",
    "num_nextn_predict_layers": "n_mtp_layers",
    "num_attention_heads": "n_heads",
    "num_experts_per_tok": "n_activated_experts",
    "scoring_func": "score_func",
    "routed_scaling_factor": "route_scale",
    "qk_rope_head_dim": "rope_head_dim",
    "sliding_window": "window_size",
    "rms_norm_eps": "norm_eps",
    "max_position_embeddings": "max_seq_len",
}
_MISSING = object()


class _Fields:
    """Typed look-ups in a raw config that name the key, as that dialect spells it, when they fail. `within` is the
    path of a nested object, as names begin with it."""

    def __init__(self, raw: Mapping[str, Any], names: Mapping[str, str], within: str = "") -> None:
        self.raw = raw
        self.names = names
        self.within = within

    def has(self, key: str) -> bool:
        return self._found(key) is not None

    def name(self, key: str) -> str:
        return self.within + self.names.get(key, key)

    def value(self, key: str, default: Any = _MISSING) -> Any:
        found = self._found(key)
        if found is not None:
            return found
        if default is _MISSING:
            raise ConfigError(f"key {self.name(key)!r} is missing")
        return default

    def integer(self, key: str, default: Any = _MISSING, *, least: int = 1) -> int:
        found = self.value(key, default)
        if isinstance(found, bool) or not isinstance(found, int):
            raise ConfigError(f"key {self.name(key)!r} must be an integer, not {found!r}")
        if found < least:
            raise ConfigError(f"key {self.name(key)!r} must be at least {least}, not {found}")
        return found

    def number(self, key: str, default: Any = _MISSING) -> float:
        found = self.value(key, default)
        if isinstance(found, bool) or not isinstance(found, int | float):
            raise ConfigError(f"key {self.name(key)!r} must be a number, not {found!r}")
        if not 0 < found < 1e30:  # also refuses NaN, and integers that no float can hold
            raise ConfigError(f"key {self.name(key)!r} must be positive and finite, not {found}")
        return float(found)

    def nested(self, key: str) -> _Fields | None:
        """The object at `key`, None if there is none."""
        found = self._found(key)
        if found is None:
            return None
        if not isinstance(found, dict):
            raise ConfigError(f"key {self.name(key)!r} must be an object, not {found!r}")
        return _Fields(cast("dict[str, Any]", found), {}, f"{self.name(key)}.")

    def expect(self, key: str, wanted: Any) -> None:
        found = self.value(key, wanted)
        if found != wanted:
            raise ConfigError(f"key {self.name(key)!r} is {found!r}; only {wanted!r} is supported")

    def _found(self, key: str) -> Any:
        return self.raw.get(self.names.get(key, key))


def _parse(fields: _Fields, dialect: Dialect) -> ModelConfig:
    fields.expect("scoring_func", "sqrtsoftplus")
    fields.expect("n_shared_experts", 1)
    for key, wanted in (("hidden_act", "silu"), ("num_key_value_heads", 1), ("norm_topk_prob", True)):
        fields.expect(key, wanted)
    for key in ("tie_word_embeddings", "attention_bias", "mlp_bias"):
        fields.expect(key, False)
    num_layers = fields.integer("num_hidden_layers")
    head_dim = fields.integer("head_dim", 512)
    rope_theta, compress_rope_theta, yarn = _parse_rope(fields, dialect)
    num_mtp_blocks = fields.integer(
        "num_nextn_predict_layers", 0 if dialect is Dialect.TRANSFORMERS else 1, least=0
    )
    expert_dtype, quantised = _parse_storage(fields, dialect)
    return ModelConfig(
        vocab_size=fields.integer("vocab_size"),
        hidden_size=fields.integer("hidden_size"),
        num_heads=fields.integer("num_attention_heads"),
        head_dim=head_dim,
        rope_head_dim=_parse_rope_head_dim(fields, head_dim),
        q_lora_rank=fields.integer("q_lora_rank"),
        o_groups=fields.integer("o_groups"),
        o_lora_rank=fields.integer("o_lora_rank"),
        sliding_window=fields.integer("sliding_window"),
        index_num_heads=fields.integer("index_n_heads"),
        index_head_dim=fields.integer("index_head_dim"),
        index_topk=fields.integer("index_topk"),
        num_experts=fields.integer("n_routed_experts"),
        num_experts_per_token=fields.integer("num_experts_per_tok"),
        expert_hidden_size=fields.integer("moe_intermediate_size"),
        routed_scaling_factor=fields.number("routed_scaling_factor"),
        swiglu_limit=fields.number("swiglu_limit", 10.0),
        norm_eps=fields.number("rms_norm_eps", 1e-6),
        hc_mult=fields.integer("hc_mult", 4),
        hc_sinkhorn_iters=fields.integer("hc_sinkhorn_iters", 20),
        hc_eps=fields.number("hc_eps", 1e-6),
        rope_theta=rope_theta,
        compress_rope_theta=compress_rope_theta,
        yarn=yarn,
        max_position_embeddings=fields.integer("max_position_embeddings", 1048576),
        layers=_parse_layers(fields, num_layers),
        # Transformers copies the count but writes no MTP tensors.
        num_mtp_blocks=0 if dialect is Dialect.TRANSFORMERS else num_mtp_blocks,
        expert_dtype=expert_dtype,
        quantised=quantised,
        bos_token_id=fields.integer("bos_token_id", 0, least=0),
        eos_token_ids=_parse_eos(fields),
        dialect=dialect,
    )


def _parse_rope_head_dim(fields: _Fields, head_dim: int) -> int:
    if fields.has("qk_rope_head_dim"):
        return fields.integer("qk_rope_head_dim")
    return int(head_dim * fields.number("partial_rotary_factor", 64 / 512))


def _parse_eos(fields: _Fields) -> tuple[int, ...]:
    found = fields.value("eos_token_id", 1)
    if not isinstance(found, list):
        return (fields.integer("eos_token_id", 1, least=0),)
    ids = cast("list[Any]", found)
    if not ids or any(type(item) is not int or item < 0 for item in ids):
        raise ConfigError(f"key 'eos_token_id' must be a token id or a list of them, not {ids!r}")
    return tuple(ids)


def _parse_layers(fields: _Fields, num_layers: int) -> tuple[LayerConfig, ...]:
    kinds = _parse_kinds(fields, num_layers)
    hashed = _parse_hash_layers(fields, num_layers)
    return tuple(
        LayerConfig(kind=kind, ratio=ratio, hash_routed=is_hash)
        for (kind, ratio), is_hash in zip(kinds, hashed, strict=True)
    )


_TRANSFORMERS_KINDS = {
    "sliding_attention": LayerKind.WINDOW,
    "compressed_sparse_attention": LayerKind.CSA,
    "heavily_compressed_attention": LayerKind.HCA,
}
_RATIO_KINDS = {0: LayerKind.WINDOW, 4: LayerKind.CSA, 128: LayerKind.HCA}


def _parse_kinds(fields: _Fields, num_layers: int) -> list[tuple[LayerKind, int]]:
    if not fields.has("layer_types"):
        ratios = _list(fields, "compress_ratios", num_layers)
        unknown = [ratio for ratio in ratios if type(ratio) is not int or ratio not in _RATIO_KINDS]
        if unknown:
            raise ConfigError(f"key 'compress_ratios' has {unknown[0]!r}; only 0, 4 and 128 are known")
        return [(_RATIO_KINDS[ratio], ratio) for ratio in ratios]
    types = _list(fields, "layer_types", num_layers)
    unknown = [name for name in types if not isinstance(name, str) or name not in _TRANSFORMERS_KINDS]
    if unknown:
        raise ConfigError(f"key 'layer_types' has {unknown[0]!r}; known are {', '.join(_TRANSFORMERS_KINDS)}")
    rates = fields.nested("compress_rates") or _Fields({}, {})
    by_kind = {
        LayerKind.WINDOW: 0,
        LayerKind.CSA: rates.integer("compressed_sparse_attention", 4),
        LayerKind.HCA: rates.integer("heavily_compressed_attention", 128),
    }
    return [(_TRANSFORMERS_KINDS[name], by_kind[_TRANSFORMERS_KINDS[name]]) for name in types]


def _parse_hash_layers(fields: _Fields, num_layers: int) -> list[bool]:
    if fields.has("mlp_layer_types"):
        types = _list(fields, "mlp_layer_types", num_layers)
        unknown = [name for name in types if name not in ("hash_moe", "moe")]
        if unknown:
            raise ConfigError(f"key 'mlp_layer_types' has {unknown[0]!r}; known are hash_moe, moe")
        return [name == "hash_moe" for name in types]
    num_hash = fields.integer("num_hash_layers", 3, least=0)
    return [layer < num_hash for layer in range(num_layers)]


def _list(fields: _Fields, key: str, num_layers: int) -> Sequence[Any]:
    """The first num_layers entries: the public list is longer by one entry for each MTP block."""
    found = fields.value(key)
    if not isinstance(found, list):
        raise ConfigError(f"key {key!r} must be a list, not {found!r}")
    entries = cast("list[Any]", found)
    if len(entries) < num_layers:
        raise ConfigError(f"key {key!r} has {len(entries)} entries for {num_layers} layers")
    return entries[:num_layers]


def _parse_rope(fields: _Fields, dialect: Dialect) -> tuple[float, float, YarnConfig | None]:
    if dialect is Dialect.INFERENCE:
        yarn = None
        if fields.has("rope_factor"):
            yarn = YarnConfig(
                factor=fields.number("rope_factor"),
                original_max_position_embeddings=fields.integer("original_seq_len"),
                beta_fast=fields.number("beta_fast", 32),
                beta_slow=fields.number("beta_slow", 1),
            )
        return fields.number("rope_theta"), fields.number("compress_rope_theta"), yarn
    nested = fields.nested("rope_parameters")
    if nested is not None and nested.has("compress"):
        main, compress = nested.nested("main"), nested.nested("compress")
        if main is None or compress is None:
            raise ConfigError(f"key {nested.name('main')!r} is missing")
        main.expect("rope_type", "default")
        return main.number("rope_theta"), compress.number("rope_theta"), _parse_yarn(compress)
    scaling = fields.nested("rope_scaling") or nested
    yarn = None if scaling is None else _parse_yarn(scaling)
    return fields.number("rope_theta", 10000.0), fields.number("compress_rope_theta", 160000.0), yarn


def _parse_yarn(fields: _Fields) -> YarnConfig | None:
    kind = fields.value("rope_type", fields.value("type", "default"))
    if kind == "default":
        return None
    if kind != "yarn":
        raise ConfigError(f"key '{fields.within[:-1]}' has type {kind!r}; known are default, yarn")
    fields.expect("attention_factor", 1.0)
    return YarnConfig(
        factor=fields.number("factor"),
        original_max_position_embeddings=fields.integer("original_max_position_embeddings"),
        beta_fast=fields.number("beta_fast", 32),
        beta_slow=fields.number("beta_slow", 1),
    )


def _parse_storage(fields: _Fields, dialect: Dialect) -> tuple[str, bool]:
    quantisation = fields.nested("quantization_config")
    if quantisation is None:
        if dialect is not Dialect.INFERENCE or fields.value("dtype", "fp8") != "fp8":
            return "float", False
        quantisation = _Fields({}, {})
    for key, wanted in (
        ("quant_method", "fp8"),
        ("fmt", "e4m3"),
        ("scale_fmt", "ue8m0"),
        ("weight_block_size", [128, 128]),
    ):
        quantisation.expect(key, wanted)
    # The first Flash release lacks the field and stores fp4 experts.
    expert_dtype = fields.value("expert_dtype", quantisation.value("expert_dtype", "fp4"))
    if expert_dtype not in ("fp4", "fp8"):
        raise ConfigError(f"key 'expert_dtype' is {expert_dtype!r}; known are fp4, fp8")
    return cast("str", expert_dtype), True


def _check(config: ModelConfig) -> None:
    """Relations between values that the rest of the code relies on."""
    for name, value, divisor in (
        ("num_attention_heads", config.num_heads, config.o_groups),
        ("qk_rope_head_dim", config.rope_head_dim, 2),
    ):
        if value % divisor:
            raise ConfigError(f"key {name!r} ({value}) must be a multiple of {divisor}")
    if config.rope_head_dim < 2:
        raise ConfigError(f"key 'partial_rotary_factor' leaves {config.rope_head_dim} channels to rotate")
    if config.head_dim <= config.rope_head_dim:
        raise ConfigError(
            f"key 'head_dim' ({config.head_dim}) must be more than qk_rope_head_dim ({config.rope_head_dim})"
        )
    if config.index_head_dim < config.rope_head_dim:
        raise ConfigError(
            f"key 'index_head_dim' ({config.index_head_dim}) must be at least qk_rope_head_dim "
            f"({config.rope_head_dim})"
        )
    if min(config.rope_theta, config.compress_rope_theta) <= 1:
        raise ConfigError("keys 'rope_theta' and 'compress_rope_theta' must be more than 1")
    if config.num_experts_per_token > config.num_experts:
        raise ConfigError(
            f"key 'num_experts_per_tok' ({config.num_experts_per_token}) exceeds {config.num_experts} experts"
        )
    for layer, item in enumerate(config.layers):
        if item.kind is not LayerKind.WINDOW and (item.ratio < 2 or PAGE_TOKENS % item.ratio):
            raise ConfigError(f"layer {layer}: compression ratio {item.ratio} must divide {PAGE_TOKENS}")
    for kind in (LayerKind.CSA, LayerKind.HCA):
        ratios = {item.ratio for item in config.layers if item.kind is kind}
        if len(ratios) > 1:
            raise ConfigError(f"{kind.value} layers have different compression ratios: {sorted(ratios)}")
