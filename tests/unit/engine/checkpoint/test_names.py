"""Names, against a state dict transformers itself makes, and as a translation that loses nothing."""

from __future__ import annotations

from typing import Any

import pytest

from engine.checkpoint.manifest import Part, expected_weights
from engine.checkpoint.names import expert_stack, is_superfluous, official_name, transformers_name
from rorqual.model_config import parse_model_config


@pytest.fixture
def weights(tiny_raw: dict[str, Any]) -> list[str]:
    config = parse_model_config(tiny_raw)
    return [weight.name for weight in expected_weights(config) if weight.part is not Part.MTP]


def test_official_names_are_their_own(weights: list[str]) -> None:
    assert [official_name(name) for name in weights] == weights


def test_every_main_weight_has_a_transformers_name_that_leads_back(weights: list[str]) -> None:
    for name in weights:
        theirs = transformers_name(name)
        assert theirs is not None, name
        back = official_name(theirs)
        stack = expert_stack(back)
        if stack is None:
            assert back == name
        else:
            assert name in stack.weight_names(int(name.split(".")[4]))


def test_transformers_names_are_distinct_but_for_stacks(weights: list[str]) -> None:
    plain = [transformers_name(name) for name in weights if ".experts." not in name]
    assert len(set(plain)) == len(plain)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("lm_head.weight", "head.weight"),
        ("model.embed_tokens.weight", "embed.weight"),
        ("model.norm.weight", "norm.weight"),
        ("model.hc_head.hc_fn", "hc_head_fn"),
        ("model.layers.12.attn_hc.scale", "layers.12.hc_attn_scale"),
        ("model.layers.0.input_layernorm.weight", "layers.0.attn_norm.weight"),
        ("model.layers.0.post_attention_layernorm.weight", "layers.0.ffn_norm.weight"),
        ("model.layers.2.self_attn.sinks", "layers.2.attn.attn_sink"),
        ("model.layers.2.self_attn.kv_norm.weight", "layers.2.attn.kv_norm.weight"),
        ("model.layers.2.self_attn.compressor.kv_norm.weight", "layers.2.attn.compressor.norm.weight"),
        ("model.layers.2.self_attn.compressor.gate_proj.weight", "layers.2.attn.compressor.wgate.weight"),
        (
            "model.layers.2.self_attn.compressor.indexer.scorer.weights_proj.weight",
            "layers.2.attn.indexer.weights_proj.weight",
        ),
        (
            "model.layers.2.self_attn.compressor.indexer.position_bias",
            "layers.2.attn.indexer.compressor.ape",
        ),
        ("model.layers.2.mlp.shared_experts.gate_proj.weight", "layers.2.ffn.shared_experts.w1.weight"),
        ("model.layers.2.mlp.shared_experts.down_proj.weight", "layers.2.ffn.shared_experts.w2.weight"),
        ("model.layers.2.mlp.gate.e_score_correction_bias", "layers.2.ffn.gate.bias"),
        # What save_pretrained translates back only half.
        ("model.layers.2.attn.norm.weight", "layers.2.attn.kv_norm.weight"),
        ("model.layers.2.attn.wq_a.weight", "layers.2.attn.wq_a.weight"),
        ("model.layers.2.ffn.experts.3.w1.weight", "layers.2.ffn.experts.3.w1.weight"),
        ("model.layers.2.attn.compressor.norm.weight", "layers.2.attn.compressor.norm.weight"),
    ],
)
def test_known_spellings(theirs: str, ours: str) -> None:
    assert official_name(theirs) == ours


def test_a_stack_knows_its_experts_in_the_order_of_their_rows() -> None:
    stack = expert_stack(official_name("model.layers.7.mlp.experts.gate_up_proj"))
    assert stack is not None
    assert stack.weight_names(5) == ("layers.7.ffn.experts.5.w1.weight", "layers.7.ffn.experts.5.w3.weight")
    stack = expert_stack(official_name("model.layers.7.mlp.experts.down_proj"))
    assert stack is not None
    assert stack.weight_names(0) == ("layers.7.ffn.experts.0.w2.weight",)


@pytest.mark.parametrize(
    "name",
    ["model.layers.0.attn.rotary.inv_freq", "layers.x.attn.wkv.weight", "foo", "layers.0.ffn.experts.0.w4"],
)
def test_unknown_names_come_back_as_they_are(name: str) -> None:
    assert official_name(name) == name
    assert transformers_name(name) is None


def test_mtp_weights_have_no_place_in_transformers() -> None:
    assert transformers_name("mtp.0.attn.wkv.weight") is None
    assert official_name("mtp.0.attn.wkv.weight") == "mtp.0.attn.wkv.weight"


def test_copies_of_embedding_and_head_in_an_mtp_block_are_superfluous() -> None:
    assert is_superfluous("mtp.0.head.weight")
    assert is_superfluous("mtp.0.embed.weight")
    assert not is_superfluous("mtp.0.norm.weight")
    assert not is_superfluous("head.weight")
