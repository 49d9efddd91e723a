"""Reading config.json: three dialects, one ModelConfig, and errors that name the key."""

import contextlib
import json

import pytest
from hypothesis import given, settings
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
        ({"rope_scaling": {"type": "linear"}}, "key 'rope_scaling' has type 'linear'"),
        ({"rope_scaling": "yarn"}, "key 'rope_scaling' must be an object, not 'yarn'"),
        ({"rope_scaling": {"type": "yarn"}}, "key 'rope_scaling.factor' is missing"),
        ({"rope_theta": float("inf")}, "key 'rope_theta' must be positive and finite"),
        ({"rope_theta": 10**400}, "key 'rope_theta' must be positive and finite"),
        ({"compress_rope_theta": 1}, "must be more than 1"),
        ({"compress_ratios": [[4]] * 9}, "key 'compress_ratios' has \\[4\\]"),
        ({"compress_ratios": [False] * 9}, "key 'compress_ratios' has False"),
        ({"eos_token_id": []}, "key 'eos_token_id' must be a token id or a list of them"),
        ({"eos_token_id": [1, "2"]}, "key 'eos_token_id' must be a token id or a list of them"),
        ({"quantization_config": "fp8"}, "key 'quantization_config' must be an object"),
        ({"head_dim": 16}, "key 'head_dim' \\(16\\) must be more than qk_rope_head_dim \\(16\\)"),
    ],
)
def test_a_bad_value_is_refused_by_the_name_of_its_key(change, complaint):
    with pytest.raises(ConfigError, match=complaint):
        parse_model_config(CONFIG | change)


THETAS = {"main": {"rope_theta": 1e4}, "compress": {"rope_theta": 1e5}}


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (
            {"layer_types": ["full_attention"] * 8},
            "key 'layer_types' has 'full_attention'; known are sliding",
        ),
        ({"layer_types": [["sliding_attention"]] * 8}, "key 'layer_types' has"),
        ({"layer_types": ["sliding_attention"]}, "key 'layer_types' has 1 entries for 8 layers"),
        ({"mlp_layer_types": ["dense"] * 8}, "key 'mlp_layer_types' has 'dense'; known are hash_moe, moe"),
        ({"compress_rates": [4, 128]}, "key 'compress_rates' must be an object"),
        (
            {"compress_rates": {"compressed_sparse_attention": "4"}},
            "key 'compress_rates.compressed_sparse_attention' must be an integer",
        ),
        (
            {"compress_rates": {"heavily_compressed_attention": 96}},
            "layer 2: compression ratio 96 must divide",
        ),
        ({"rope_parameters": {"compress": THETAS["compress"]}}, "key 'rope_parameters.main' is missing"),
        ({"rope_parameters": THETAS | {"main": []}}, "key 'rope_parameters.main' must be an object"),
        ({"rope_parameters": THETAS | {"main": {}}}, "key 'rope_parameters.main.rope_theta' is missing"),
        (
            {"rope_parameters": THETAS | {"main": {"rope_type": "yarn", "rope_theta": 1e4}}},
            "key 'rope_parameters.main.rope_type' is 'yarn'; only 'default' is supported",
        ),
        (
            {
                "rope_parameters": THETAS
                | {"compress": {"rope_type": "yarn", "rope_theta": 1e5, "attention_factor": 1.3}}
            },
            "key 'rope_parameters.compress.attention_factor' is 1.3; only 1.0",
        ),
        ({"qk_rope_head_dim": None, "partial_rotary_factor": 0.001}, "leaves 0 channels to rotate"),
    ],
)
def test_the_transformers_dialect_names_its_own_keys(change, complaint):
    with pytest.raises(ConfigError, match=complaint):
        parse_model_config(transformers_config() | change)


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


# --- the releases ---

RELEASE = {
    "architectures": ["DeepseekV4ForCausalLM"], "model_type": "deepseek_v4", "vocab_size": 129280,
    "max_position_embeddings": 1048576, "num_key_value_heads": 1, "head_dim": 512, "qk_rope_head_dim": 64,
    "o_lora_rank": 1024, "sliding_window": 128, "index_n_heads": 64, "index_head_dim": 128, "n_shared_experts": 1,
    "num_experts_per_tok": 6, "num_hash_layers": 3, "num_nextn_predict_layers": 1, "rms_norm_eps": 1e-6,
    "hidden_act": "silu", "swiglu_limit": 10.0, "scoring_func": "sqrtsoftplus", "topk_method": "noaux_tc",
    "norm_topk_prob": True, "hc_mult": 4, "hc_sinkhorn_iters": 20, "hc_eps": 1e-6, "rope_theta": 10000,
    "compress_rope_theta": 160000, "attention_bias": False, "attention_dropout": 0.0, "tie_word_embeddings": False,
    "rope_scaling": {
        "type": "yarn", "factor": 16, "original_max_position_embeddings": 65536, "beta_fast": 32, "beta_slow": 1,
    },
    "torch_dtype": "bfloat16", "bos_token_id": 0, "eos_token_id": 1,
    "quantization_config": {
        "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "scale_fmt": "ue8m0",
        "weight_block_size": [128, 128],
    },
}  # fmt: skip
FLASH = RELEASE | {
    "hidden_size": 4096, "num_hidden_layers": 43, "num_attention_heads": 64, "q_lora_rank": 1024, "o_groups": 8,
    "index_topk": 512, "n_routed_experts": 256, "moe_intermediate_size": 2048, "routed_scaling_factor": 1.5,
    "compress_ratios": [0, 0, *[4, 128] * 20, 4, 0],
}  # fmt: skip
PRO = RELEASE | {
    "hidden_size": 7168, "num_hidden_layers": 61, "num_attention_heads": 128, "q_lora_rank": 1536, "o_groups": 16,
    "index_topk": 1024, "n_routed_experts": 384, "moe_intermediate_size": 3072, "routed_scaling_factor": 2.5,
    "compress_ratios": [128, 128, *[4, 128] * 29, 4, 0], "expert_dtype": "fp4",
}  # fmt: skip


@pytest.mark.parametrize(("raw", "counts"), [(FLASH, (2, 21, 20)), (PRO, (0, 30, 31))], ids=["Flash", "Pro"])
def test_the_releases_have_their_layers(raw, counts):
    config = parse_model_config(raw)
    kinds = [item.kind for item in config.layers]
    assert tuple(kinds.count(kind) for kind in LayerKind) == counts
    assert [item.hash_routed for item in config.layers] == [True] * 3 + [False] * (config.num_layers - 3)
    assert {item.ratio for item in config.layers} <= {0, 4, 128}
    assert (config.num_mtp_blocks, config.nope_head_dim, config.max_position_embeddings) == (1, 448, 1 << 20)
    # The first Flash release does not say how its experts are stored: it is fp4.
    assert (config.expert_dtype, config.quantised) == ("fp4", True)
    assert config.yarn == YarnConfig(
        factor=16, original_max_position_embeddings=65536, beta_fast=32, beta_slow=1
    )


def test_an_architecture_without_quantisation_has_float_weights():
    raw = {key: value for key, value in FLASH.items() if key != "quantization_config"}
    config = parse_model_config(raw)
    assert (config.expert_dtype, config.quantised) == ("float", False)
    assert parse_model_config(FLASH | {"expert_dtype": "fp8"}).expert_dtype == "fp8"


@pytest.mark.slow
def test_what_transformers_saves_of_a_release_is_the_same_model(tmp_path):
    """Read from disk as `save_pretrained` writes it; it keeps neither the storage nor the MTP block."""
    transformers = pytest.importorskip("transformers", reason="needs transformers to write a config")
    for raw in (FLASH, PRO):
        plain = {
            key: value for key, value in raw.items() if key not in ("quantization_config", "expert_dtype")
        }
        transformers.DeepseekV4Config(**plain).save_pretrained(tmp_path)
        assert "layer_types" in json.loads((tmp_path / "config.json").read_text())
        config = load_model_config(tmp_path)
        assert config.dialect is Dialect.TRANSFORMERS
        assert (config.expert_dtype, config.quantised, config.num_mtp_blocks) == ("float", False, 0)
        assert architecture(config) == architecture(parse_model_config(raw))


# --- anything at all ---

KEYS = st.sampled_from(sorted(CONFIG))
SCALARS = st.none() | st.booleans() | st.integers(-5, 5) | st.floats() | st.text(max_size=3)
JUNK = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=9) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
)
NESTED = st.sampled_from(["compress_rates", "rope_parameters", "layer_types", "mlp_layer_types"])


@settings(max_examples=30)
@given(st.dictionaries(KEYS, JUNK, max_size=3))
def test_no_junk_in_a_known_key_escapes_as_another_exception(changes):
    with contextlib.suppress(ConfigError):
        parse_model_config(CONFIG | changes)


@settings(max_examples=30)
@given(st.dictionaries(KEYS | NESTED, JUNK, max_size=3))
def test_no_junk_in_the_transformers_dialect_escapes_as_another_exception(changes):
    with contextlib.suppress(ConfigError):
        parse_model_config(transformers_config() | changes)


@given(st.sampled_from(["main", "compress"]), st.sampled_from(["rope_type", "rope_theta", "factor"]), JUNK)
def test_no_junk_in_a_nested_key_escapes_as_another_exception(part, key, junk):
    raw = transformers_config()
    raw["rope_parameters"][part][key] = junk
    with contextlib.suppress(ConfigError):
        parse_model_config(raw)
