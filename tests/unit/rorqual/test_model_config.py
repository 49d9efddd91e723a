"""Reading config.json: three dialects, one ModelConfig, and errors that name the key."""

import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rorqual.demo import CONFIG
from rorqual.errors import ConfigError
from rorqual.model_config import Dialect, LayerKind, YarnConfig, load_model_config, parse_model_config

INFERENCE = {
    "dim": 256,
    "moe_inter_dim": 256,
    "n_layers": 8,
    "n_hash_layers": 1,
    "n_mtp_layers": 1,
    "n_heads": 8,
    "n_routed_experts": 16,
    "n_shared_experts": 1,
    "n_activated_experts": 2,
    "score_func": "sqrtsoftplus",
    "route_scale": 1.5,
    "vocab_size": 129280,
    "head_dim": 64,
    "rope_head_dim": 16,
    "q_lora_rank": 128,
    "o_groups": 2,
    "o_lora_rank": 64,
    "window_size": 128,
    "compress_ratios": [0, 4, 128, 4, 128, 4, 128, 4, 0],
    "index_n_heads": 16,
    "index_head_dim": 32,
    "index_topk": 64,
    "swiglu_limit": 10.0,
    "norm_eps": 1e-6,
    "max_seq_len": 65536,
    "rope_theta": 10000,
    "compress_rope_theta": 160000,
    "rope_factor": 16,
    "original_seq_len": 4096,
    "beta_fast": 32,
    "beta_slow": 1,
    "expert_dtype": "fp4",
    "dtype": "fp8",
}


def transformers_config() -> dict:
    config = {
        key: value
        for key, value in CONFIG.items()
        if key
        not in ("compress_ratios", "num_hash_layers", "rope_scaling", "quantization_config", "expert_dtype")
    }
    kinds = {0: "sliding_attention", 4: "compressed_sparse_attention", 128: "heavily_compressed_attention"}
    yarn = {"rope_type": "yarn"} | {
        key: value for key, value in CONFIG["rope_scaling"].items() if key != "type"
    }
    return config | {
        "layer_types": [kinds[ratio] for ratio in CONFIG["compress_ratios"][:8]],
        "mlp_layer_types": ["hash_moe"] + ["moe"] * 7,
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 128},
        "rope_parameters": {
            "main": {"rope_type": "default", "rope_theta": 10000},
            "compress": yarn | {"rope_theta": 160000},
        },
    }


def architecture(config) -> dict:
    """Everything that does not depend on how a dialect stores things."""
    skipped = ("dialect", "expert_dtype", "quantised", "num_mtp_blocks")
    return {name: getattr(config, name) for name in config.__slots__ if name not in skipped}


def test_all_dialects_describe_the_same_model():
    public = parse_model_config(CONFIG)
    assert public.dialect is Dialect.PUBLIC
    for raw, dialect in ((INFERENCE, Dialect.INFERENCE), (transformers_config(), Dialect.TRANSFORMERS)):
        config = parse_model_config(raw)
        assert config.dialect is dialect
        assert architecture(config) == architecture(public)


def test_transformers_files_have_float_weights_and_no_mtp_block():
    config = parse_model_config(transformers_config())
    assert (config.expert_dtype, config.quantised, config.num_mtp_blocks) == ("float", False, 0)


def test_the_public_list_of_ratios_is_longer_by_the_mtp_block():
    config = parse_model_config(CONFIG)
    assert config.num_layers == 8
    assert config.layers[1].kind is LayerKind.CSA
    assert config.layers[2].ratio == 128
    assert config.yarn == YarnConfig(
        factor=16, original_max_position_embeddings=4096, beta_fast=32, beta_slow=1
    )


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"hidden_size": None}, "key 'hidden_size' is missing"),
        ({"hidden_size": "256"}, "key 'hidden_size' must be an integer, not '256'"),
        ({"hidden_size": True}, "key 'hidden_size' must be an integer"),
        ({"vocab_size": 0}, "key 'vocab_size' must be at least 1, not 0"),
        ({"routed_scaling_factor": -1}, "key 'routed_scaling_factor' must be positive"),
        ({"model_type": "llama"}, "only 'deepseek_v4' is served"),
        ({"scoring_func": "softmax"}, "key 'scoring_func' is 'softmax'"),
        ({"compress_ratios": [0, 4]}, "key 'compress_ratios' has 2 entries for 8 layers"),
        ({"compress_ratios": [0, 8] * 5}, "key 'compress_ratios' has 8"),
        ({"compress_ratios": 4}, "key 'compress_ratios' must be a list"),
        ({"num_experts_per_tok": 17}, "key 'num_experts_per_tok' \\(17\\) exceeds 16 experts"),
        ({"o_groups": 3}, "must be a multiple of 3"),
        ({"index_head_dim": 8}, "key 'index_head_dim' \\(8\\) must be at least qk_rope_head_dim"),
        ({"expert_dtype": "int4"}, "key 'expert_dtype' is 'int4'"),
        ({"quantization_config": {"weight_block_size": [64, 64]}}, "quantization_config.weight_block_size"),
        ({"rope_scaling": {"type": "linear"}}, "type 'linear'"),
    ],
)
def test_a_bad_value_is_refused_by_the_name_of_its_key(change, complaint):
    with pytest.raises(ConfigError, match=complaint):
        parse_model_config(CONFIG | change)


def test_the_inference_dialect_names_its_own_keys():
    with pytest.raises(ConfigError, match="key 'window_size' is missing"):
        parse_model_config({key: value for key, value in INFERENCE.items() if key != "window_size"})


@pytest.mark.parametrize(
    ("content", "complaint"),
    [(None, "no such file"), ("{", "not JSON"), ("[]", "must hold a JSON object"), ("{}", "is missing")],
)
def test_a_file_that_cannot_be_used_is_named(tmp_path, content, complaint):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=complaint) as caught:
        load_model_config(tmp_path)
    assert str(tmp_path / "config.json") in str(caught.value)


def test_a_directory_and_its_file_are_the_same_model(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    assert (
        load_model_config(tmp_path)
        == load_model_config(tmp_path / "config.json")
        == parse_model_config(CONFIG)
    )


@given(
    st.sampled_from(["hidden_size", "index_topk", "sliding_window", "moe_intermediate_size"]),
    st.integers(1, 10**6),
)
def test_the_fingerprint_changes_exactly_when_the_architecture_does(key, value):
    changed = CONFIG | {key: value}
    same = parse_model_config(changed).fingerprint() == parse_model_config(CONFIG).fingerprint()
    assert same == (CONFIG[key] == value)


KEYS = st.sampled_from(sorted(CONFIG))
JUNK = (
    st.none() | st.booleans() | st.integers(-5, 5) | st.text(max_size=3) | st.lists(st.integers(), max_size=2)
)


@given(st.dictionaries(KEYS, JUNK, max_size=3))
def test_no_junk_in_a_known_key_escapes_as_another_exception(changes):
    with contextlib.suppress(ConfigError):
        parse_model_config(CONFIG | changes)
