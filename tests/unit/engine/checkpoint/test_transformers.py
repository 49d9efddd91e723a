"""Against transformers itself: what it saves we read, and what we initialise it loads and runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.checkpoint.names import Naming, expert_stack, official_name, transformers_name
from engine.checkpoint.reader import open_checkpoint

pytestmark = pytest.mark.slow  # importing transformers takes seconds

Make = Callable[..., Path]


@pytest.fixture(scope="module")
def model() -> Any:
    """A tiny random model with every kind of layer, nothing at its trivial initial value."""
    from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

    config = DeepseekV4Config(
        vocab_size=64,
        hidden_size=32,
        moe_intermediate_size=12,
        num_hidden_layers=4,
        num_attention_heads=4,
        head_dim=16,
        q_lora_rank=24,
        num_experts_per_tok=2,
        n_routed_experts=4,
        layer_types=[
            "sliding_attention",
            "compressed_sparse_attention",
            "heavily_compressed_attention",
            "compressed_sparse_attention",
        ],
        mlp_layer_types=["hash_moe", "moe", "moe", "hash_moe"],
        compress_rates={"compressed_sparse_attention": 4, "heavily_compressed_attention": 16},
        o_groups=2,
        o_lora_rank=8,
        index_n_heads=4,
        index_head_dim=8,
        index_topk=4,
        partial_rotary_factor=0.25,
        max_position_embeddings=512,
    )
    generator = torch.Generator().manual_seed(0)
    model = DeepseekV4ForCausalLM(config)
    with torch.no_grad():
        for values in model.state_dict().values():
            if values.is_floating_point():
                values.normal_(generator=generator)
            else:
                values.random_(0, 4, generator=generator)
    return model


def assert_reads_as(path: Path, model: Any) -> None:
    """Every weight we read is the module's own, and there is nothing else on either side."""
    checkpoint = open_checkpoint(path)
    checkpoint.check()
    assert checkpoint.naming is Naming.TRANSFORMERS
    assert not checkpoint.has_mtp
    state = {name: values.to(torch.float32) for name, values in model.state_dict().items()}
    used: set[str] = set()
    for name, values in checkpoint.tensors():
        theirs = transformers_name(name)
        assert theirs is not None
        used.add(theirs)
        wanted = state[theirs]
        stack = expert_stack(official_name(theirs))
        if stack is not None:
            expert = int(name.split(".")[4])
            names = stack.weight_names(expert)
            wanted = wanted[expert].chunk(len(names))[names.index(name)]
        assert torch.equal(values.to(torch.float32), wanted), name
    assert used == state.keys()


@pytest.mark.parametrize("original_format", [True, False])
def test_what_save_pretrained_writes_is_read(model: Any, tmp_path: Path, original_format: bool) -> None:
    model.save_pretrained(tmp_path, save_original_format=original_format)
    assert_reads_as(tmp_path, model)


@pytest.mark.parametrize("original_format", [True, False])
def test_sharded_bf16_models_are_read(model: Any, tmp_path: Path, original_format: bool) -> None:
    from transformers import DeepseekV4ForCausalLM

    model.save_pretrained(tmp_path / "f32")
    half = DeepseekV4ForCausalLM.from_pretrained(tmp_path / "f32", dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "bf16", save_original_format=original_format, max_shard_size="30KB")
    assert open_checkpoint(tmp_path / "bf16").num_files > 2
    assert_reads_as(tmp_path / "bf16", half)


def test_a_model_loaded_from_our_files_has_our_values_and_answers_of_size_one(
    make_checkpoint: Make, tiny_raw: dict[str, Any]
) -> None:
    from transformers import DeepseekV4ForCausalLM

    # Deep enough that a scale that grows or shrinks a little per layer would show.
    raw = tiny_raw | {
        "num_hidden_layers": 12,
        "compress_ratios": [0, *[4, 128] * 5, 4, 0],
        "hidden_size": 128,
        "vocab_size": 512,
    }
    path = make_checkpoint(raw)
    model, report = DeepseekV4ForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["mismatched_keys"]
    state = model.state_dict()
    for name, values in open_checkpoint(path).tensors():
        theirs = transformers_name(name)
        if theirs is not None and ".experts." not in name:
            assert torch.equal(state[theirs].to(values.dtype), values), name
    ids = torch.arange(200).view(1, -1) * 7 % 512
    with torch.no_grad():
        output = model(ids, output_hidden_states=True, use_cache=False)
    assert output.logits.isfinite().all()
    assert 0.5 < output.logits.std() < 2
    for streams in output.hidden_states:
        assert 0.3 < streams.std() < 3
    # Logits depend on the context, not on the last token alone.
    with torch.no_grad():
        other = model(torch.cat((ids[:, :100].flip(1), ids[:, 100:]), dim=1), use_cache=False)
    assert (other.logits[0, -1] - output.logits[0, -1]).abs().max() > 0.1


def test_ratios_only_transformers_can_say_survive_its_config(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["num_nextn_predict_layers"] == 1
    checkpoint = open_checkpoint(tmp_path)
    assert [layer.ratio for layer in checkpoint.config.layers] == [0, 4, 16, 4]
    assert [layer.hash_routed for layer in checkpoint.config.layers] == [True, False, False, True]
