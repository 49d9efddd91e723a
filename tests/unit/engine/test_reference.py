"""The slow reference against transformers, against hand calculation and against itself."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rorqual.model_config import LayerKind, ModelConfig, parse_model_config
from tests.reference.deepseek_v4 import LayerPicks, Picks, ReferenceModel, random_tensors, rope_frequencies
from tests.reference.rounding import Served, hadamard, round_bf16, round_fp4, round_fp8
from tests.reference.weights import tensor_shapes, transformers_tensors

pytestmark = pytest.mark.slow  # all of it together takes ten seconds and more

NUM_TOKENS = 70
ORACLE_TOLERANCE = 3e-5  # of max |logit|
SWA, CSA, HCA = "sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"


@pytest.fixture(autouse=True, scope="module")
def _one_torch_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def raw_config(
    layers: tuple[str, ...] = (SWA, CSA, HCA, CSA), num_hash: int = 2, **changed: Any
) -> dict[str, Any]:
    """A config.json as transformers writes it, small, with window, top-k and clamp tight enough to bind."""
    scaled = {
        "rope_type": "yarn",
        "factor": 16.0,
        "original_max_position_embeddings": 64,
        "attention_factor": 1.0,
    }
    return {
        "vocab_size": 97,
        "hidden_size": 64,
        "moe_intermediate_size": 48,
        "num_hidden_layers": len(layers),
        "num_attention_heads": 4,
        "head_dim": 32,
        "partial_rotary_factor": 0.5,
        "q_lora_rank": 48,
        "o_groups": 2,
        "o_lora_rank": 24,
        "sliding_window": 8,
        "index_n_heads": 16,
        "index_head_dim": 32,
        "index_topk": 4,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "routed_scaling_factor": 1.5,
        "swiglu_limit": 1.0,
        "max_position_embeddings": 1024,
        "layer_types": list(layers),
        "compress_rates": {CSA: 4, HCA: 16},
        "mlp_layer_types": ["hash_moe"] * num_hash + ["moe"] * (len(layers) - num_hash),
        "rope_parameters": {
            "main": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
            "compress": {
                **scaled,
                "rope_theta": 160000.0,
                "partial_rotary_factor": 0.5,
                "beta_fast": 32,
                "beta_slow": 1,
            },
        },
    } | changed


def tiny_config(**changed: Any) -> ModelConfig:
    return replace(parse_model_config(raw_config(**changed)), num_mtp_blocks=1)


def prompt(config: ModelConfig, seed: int = 5, length: int = NUM_TOKENS) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(config.vocab_size, (length,), generator=generator).tolist()


def run(model: ReferenceModel, ids: list[int], forced: list[Picks] | None = None) -> Tensor:
    """Logits [T, V] of a whole prompt."""
    return torch.stack([model.step(token, forced[t] if forced else None) for t, token in enumerate(ids)])


def oracle_model(raw: dict[str, Any], state: dict[str, Tensor]) -> Any:
    transformers = pytest.importorskip("transformers", reason="needs transformers as the outside oracle")
    config = transformers.DeepseekV4Config(**raw)
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    model = transformers.DeepseekV4ForCausalLM(config).eval()
    missing, unexpected = model.load_state_dict(state, strict=False)
    # Rotary tables are buffers that every model computes for itself.
    assert [name for name in missing if "inv_freq" not in name] == []
    assert unexpected == []
    return model


def record_oracle_picks(model: Any) -> list[dict[str, Tensor]]:
    """Hooks that keep what the oracle's indexers and routers choose, one dict per layer."""
    picks: list[dict[str, Tensor]] = [{} for _ in model.model.layers]

    def keep(layer: int, key: str, choose: Callable[[Any], Tensor]) -> Callable[..., None]:
        return lambda _module, _inputs, output: picks[layer].update({key: choose(output)})

    for number, layer in enumerate(model.model.layers):
        layer.mlp.gate.register_forward_hook(keep(number, "experts", lambda output: output[2]))
        if hasattr(layer.self_attn.compressor, "indexer"):
            indexer = layer.self_attn.compressor.indexer
            indexer.register_forward_hook(keep(number, "indexer", lambda output: output[0]))
    return picks


def relative_error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


# --- against transformers ---


@pytest.mark.slow
def test_float32_logits_and_picks_equal_transformers():
    config = tiny_config()
    tensors = random_tensors(config, seed=1)
    ids = prompt(config)
    oracle = oracle_model(raw_config(), transformers_tensors(tensors))
    oracle_picks = record_oracle_picks(oracle)
    with torch.no_grad():
        wanted = oracle(torch.tensor([ids]), use_cache=False).logits[0]
    model = ReferenceModel(config, tensors, "float32")
    found = run(model, ids)

    # The weights must exercise something: logits of a few units, and choices that are not near ties.
    assert 1 < float(wanted.abs().max()) < 10
    assert smallest_margin(model) > 1e-5
    assert relative_error(found, wanted) < ORACLE_TOLERANCE
    for number, chosen in enumerate(oracle_picks):
        for t in range(len(ids)):
            ours = model.picks[t][number]
            assert ours["experts"] == sorted(chosen["experts"][t].tolist())
            if ours["indexer"] is not None:
                assert ours["indexer"] == sorted(chosen["indexer"][t].tolist())


@pytest.mark.slow
def test_float32_mtp_block_equals_a_transformers_layer_between_hand_made_ends():
    config = tiny_config()
    tensors = random_tensors(config, seed=2)
    ids = prompt(config, length=30)
    model = ReferenceModel(config, tensors, "float32")
    run(model, ids[:-1])
    found = [model.mtp_step(t, model.streams[t], ids[t + 1]) for t in range(len(ids) - 1)]

    # The block is a window-only layer: transformers can run it once its input streams are put in place.
    renamed = {
        name.removeprefix("mtp.0."): tensor for name, tensor in tensors.items() if name.startswith("mtp.0.")
    }
    ends = ("e_proj.weight", "h_proj.weight", "enorm.weight", "hnorm.weight")
    lone = {"embed.weight": tensors["embed.weight"], "head.weight": tensors["head.weight"]}
    for name, tensor in renamed.items():
        if name not in ends:
            lone[name if name.startswith(("hc_head", "norm")) else f"layers.0.{name}"] = tensor
    oracle = oracle_model(raw_config(layers=(SWA,), num_hash=0), transformers_tensors(lone))

    def normed(x: Tensor, weight: Tensor) -> Tensor:
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6) * weight

    embedded = tensors["embed.weight"][torch.tensor(ids[1:])]
    e = normed(embedded, renamed["enorm.weight"]) @ renamed["e_proj.weight"].T
    h = normed(torch.stack(model.streams), renamed["hnorm.weight"]) @ renamed["h_proj.weight"].T
    streams = (h + e.unsqueeze(1)).unsqueeze(0)
    oracle.model.layers[0].register_forward_pre_hook(lambda _module, inputs: (streams, *inputs[1:]))
    out: list[Tensor] = []
    oracle.model.layers[0].register_forward_hook(lambda _module, _inputs, output: out.append(output))
    with torch.no_grad():
        wanted = oracle(torch.tensor([ids[1:]]), use_cache=False).logits[0]
    assert relative_error(torch.stack([step.logits for step in found]), wanted) < ORACLE_TOLERANCE
    assert relative_error(torch.stack([step.streams for step in found]), out[0][0]) < ORACLE_TOLERANCE


# --- rope ---


def flash_config() -> ModelConfig:
    return parse_model_config(
        {
            "model_type": "deepseek_v4", "vocab_size": 129280, "hidden_size": 4096, "num_hidden_layers": 43,
            "num_attention_heads": 64, "head_dim": 512, "qk_rope_head_dim": 64, "q_lora_rank": 1024,
            "o_groups": 8, "o_lora_rank": 1024, "sliding_window": 128, "index_n_heads": 64,
            "index_head_dim": 128, "index_topk": 512, "n_routed_experts": 256, "num_experts_per_tok": 6,
            "moe_intermediate_size": 2048, "routed_scaling_factor": 1.5, "num_nextn_predict_layers": 1,
            "rope_theta": 10000, "compress_rope_theta": 160000,
            "rope_scaling": {
                "type": "yarn", "factor": 16, "original_max_position_embeddings": 65536,
                "beta_fast": 32, "beta_slow": 1,
            },
            "compress_ratios": [0, 0, *([4, 128] * 20), 4, 0],
        }
    )  # fmt: skip


def test_rope_frequencies_of_the_real_config_have_the_published_values():
    slowed = rope_frequencies(flash_config(), LayerKind.CSA)
    wanted = {
        0: 1.0,
        14: 5.286857e-3,
        15: 3.635539e-3,
        16: 2.265625e-3,
        20: 2.96978e-4,
        25: 5.372e-6,
        31: 5.68e-7,
    }
    for pair, frequency in wanted.items():
        assert float(slowed[pair]) == pytest.approx(frequency, rel=1e-3 if pair > 20 else 1e-5)
    assert torch.equal(slowed, rope_frequencies(flash_config(), LayerKind.HCA))

    plain = rope_frequencies(flash_config(), LayerKind.WINDOW)
    assert plain.tolist() == pytest.approx([10000 ** (-pair / 32) for pair in range(32)], rel=1e-6)


def test_rope_without_yarn_is_plain_at_the_compressed_base():
    config = replace(flash_config(), yarn=None)
    found = rope_frequencies(config, LayerKind.HCA).tolist()
    assert found == pytest.approx([160000 ** (-pair / 32) for pair in range(32)], rel=1e-6)


# --- number formats ---

E4M3 = sorted(
    {mantissa * 2.0**-9 for mantissa in range(8)}
    | {(8 + mantissa) * 2.0 ** (exponent - 10) for exponent in range(1, 16) for mantissa in range(8)}
    - {480.0}  # the code of NaN
)
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
moderate = st.floats(-1e4, 1e4, width=32, allow_subnormal=False)


def nearest_by_search(values: list[float], *, table: list[float], floor: float) -> list[float]:
    """Round with a power-of-two scale by trying every code; ties go to the even one."""
    largest = max(floor, *(abs(value) for value in values))
    scale = 1.0
    while table[-1] * scale < largest:
        scale *= 2
    while table[-1] * scale / 2 >= largest:
        scale /= 2

    def nearest(value: float) -> float:
        code = min(range(len(table)), key=lambda code: (abs(table[code] * scale - abs(value)), code % 2))
        return math.copysign(table[code] * scale, value)

    return [nearest(value) for value in values]


@settings(max_examples=200, deadline=None)
@given(st.lists(moderate, min_size=1, max_size=6))
def test_fp8_round_trip_takes_the_nearest_code_and_is_idempotent(values: list[float]):
    rounded = round_fp8(torch.tensor(values), block=64)
    wanted = nearest_by_search(torch.tensor(values).tolist(), table=E4M3, floor=1e-4)
    assert rounded.tolist() == wanted
    assert torch.equal(round_fp8(rounded, block=64), rounded)
    assert torch.equal(round_bf16(rounded), rounded)


@settings(max_examples=200, deadline=None)
@given(st.lists(moderate, min_size=1, max_size=6))
def test_fp4_round_trip_takes_the_nearest_code_and_is_idempotent(values: list[float]):
    rounded = round_fp4(torch.tensor(values), block=32)
    wanted = nearest_by_search(torch.tensor(values).tolist(), table=E2M1, floor=6 * 2.0**-126)
    assert rounded.abs().tolist() == [abs(value) for value in wanted]
    assert torch.equal(round_fp4(rounded, block=32), rounded)


def test_fp4_ties_go_to_the_even_code():
    x = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -5.0, 6.0])
    assert round_fp4(x, block=32).tolist() == [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, -4.0, 6.0]


def test_blocks_have_scales_of_their_own_and_the_last_may_be_short():
    x = torch.cat([torch.full((64,), 1e4), torch.full((8,), 1e-2)])
    whole, split = round_fp8(x, block=128), round_fp8(x, block=64)
    assert torch.equal(split[64:], round_fp8(x[64:], block=64))
    assert not torch.equal(whole[64:], split[64:])


def test_fp8_scale_of_a_nearly_zero_block_stays_at_its_floor():
    # 1e-4 / 448 rounds up to 2^-22, whose smallest code is 2^-31: half of that and less is lost.
    assert round_fp8(torch.tensor([2.0**-31, 2.0**-33]), block=64).tolist() == [2.0**-31, 0.0]


def test_hadamard_is_orthonormal_in_sylvester_order():
    assert (hadamard(torch.eye(4)) * 2).tolist() == [
        [1, 1, 1, 1],
        [1, -1, 1, -1],
        [1, 1, -1, -1],
        [1, -1, -1, 1],
    ]
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(hadamard(hadamard(x)), x, atol=1e-5, rtol=0)


# --- served numerics ---


def test_served_differs_from_float32_by_rounding_only():
    config = tiny_config()
    tensors = random_tensors(config, seed=3)
    ids = prompt(config, length=40)
    plain = ReferenceModel(config, tensors, "float32")
    wanted = run(plain, ids)
    served = ReferenceModel(config, tensors, "served")
    found = run(served, ids, forced=plain.picks)
    assert bool(torch.isfinite(found).all())
    assert 1e-3 < relative_error(found, wanted) < 0.3
    assert [[layer["experts"] for layer in token] for token in served.picks] == [
        [layer["experts"] for layer in token] for token in plain.picks
    ]


def test_served_state_holds_only_values_that_the_stored_formats_can_hold():
    config = tiny_config()
    model = ReferenceModel(config, random_tensors(config, seed=3), "served")
    run(model, prompt(config, length=34))
    plain = config.nope_head_dim
    num_rows = 0
    for layer in model.layers:
        for row in [*layer.window.values(), *layer.compressed.rows]:
            assert torch.equal(round_fp8(row[:plain], block=64), row[:plain])
            assert torch.equal(round_bf16(row), row)
        for row in layer.index.rows:
            assert torch.equal(round_fp4(row, block=32), row)
            num_rows += 1
    assert num_rows == 2 * (34 // 4)
    assert all(torch.equal(round_bf16(streams), streams) for streams in model.streams)


@pytest.mark.parametrize("point", ["bf16", "activation", "kv_row", "indexer"])
def test_every_kind_of_rounding_point_changes_the_served_result(point: str):
    # The indexer's rounding shows only where it changes a choice: taking one row only gives it many chances.
    config = tiny_config(index_topk=1)
    tensors = random_tensors(config, seed=3)
    ids = prompt(config, length=26)

    class WithoutPoint(Served):
        pass

    setattr(WithoutPoint, point, lambda _self, x: x)
    lesser = ReferenceModel(config, tensors, "served")
    for layer in [lesser, *lesser.layers]:
        layer.rounding = WithoutPoint()
    whole = ReferenceModel(config, tensors, "served")
    assert not torch.equal(run(lesser, ids), run(whole, ids))


def test_served_kv_row_of_the_first_token_equals_a_literal_calculation():
    config = tiny_config()
    tensors = random_tensors(config, seed=4)
    model = ReferenceModel(config, tensors, "served")
    model.step(11)

    b = round_bf16
    first, streams = "layers.0.", b(tensors["embed.weight"][11]).expand(4, -1)
    v = streams.reshape(-1)
    mixed = tensors[first + "hc_attn_fn"] @ v / torch.sqrt((v * v).mean() + 1e-6)
    scale, base = tensors[first + "hc_attn_scale"], tensors[first + "hc_attn_base"]
    pre = [torch.sigmoid(mixed[j] * scale[0] + base[j]) + 1e-6 for j in range(4)]
    x = b(sum(pre[j] * streams[j] for j in range(4)))
    x = b(x / torch.sqrt((x * x).mean() + 1e-6) * tensors[first + "attn_norm.weight"])
    kv = b(tensors[first + "attn.wkv.weight"] @ round_fp8(x, block=128))
    kv = b(kv / torch.sqrt((kv * kv).mean() + 1e-6) * tensors[first + "attn.kv_norm.weight"])
    # Position 0 does not rotate. The two calculations sum in different orders, so a few codes may differ.
    wanted = torch.cat([round_fp8(kv[:16], block=64), kv[16:]])
    found = model.layers[0].window[0]
    assert float((found == wanted).float().mean()) > 0.9
    torch.testing.assert_close(found, wanted, rtol=0.13, atol=1e-3)


# --- choices, free and forced ---


def smallest_margin(model: ReferenceModel) -> float:
    margins = [
        layer[key] for token in model.picks for layer in token for key in ("indexer_margin", "expert_margin")
    ]
    return min(margin for margin in margins if margin is not None)


@pytest.mark.parametrize("numerics", ["float32", "served"])
def test_forcing_a_models_own_picks_changes_no_bit(numerics: Any):
    config = tiny_config()
    tensors = random_tensors(config, seed=6)
    ids = prompt(config, length=26)
    free = ReferenceModel(config, tensors, numerics)
    forced = ReferenceModel(config, tensors, numerics)
    assert torch.equal(run(free, ids), run(forced, ids, forced=free.picks))
    assert forced.picks == free.picks


@pytest.mark.parametrize("picks", [LayerPicks(indexer=[0, 1, 2, 5]), LayerPicks(experts=[0, 2, 7])])
def test_forced_picks_are_obeyed_and_recorded_beside_the_free_margin(picks: LayerPicks):
    config = tiny_config()
    tensors = random_tensors(config, seed=6)
    ids = prompt(config, length=26)
    free, forced = ReferenceModel(config, tensors, "float32"), ReferenceModel(config, tensors, "float32")
    run(free, ids[:-1])
    run(forced, ids[:-1])
    assert not torch.equal(free.step(ids[-1]), forced.step(ids[-1], [{}, {}, {}, picks]))
    key = "indexer" if "indexer" in picks else "experts"
    recorded = forced.picks[-1][3]
    assert recorded[key] == picks[key]
    assert free.picks[-1][3][key] != picks[key]
    margin = "indexer_margin" if key == "indexer" else "expert_margin"
    assert recorded[margin] == free.picks[-1][3][margin]


def test_forced_picks_that_cannot_be_are_refused():
    config = tiny_config()
    model = ReferenceModel(config, random_tensors(config, seed=6), "float32")
    run(model, prompt(config, length=8))
    for picks, message in (
        ([{}], "are for 1 layers"),
        ([{}, {"indexer": [2]}, {}, {}], "not distinct rows of the 2 visible"),
        ([{}, {}, {"indexer": [0]}, {}], "without an indexer"),
        ([{"indexer": [0]}, {}, {}, {}], "without an indexer"),
        ([{"experts": [0, 1]}, {}, {}, {}], "are not 3 of 8"),
    ):
        fresh = ReferenceModel(config, model.tensors, "float32")
        run(fresh, prompt(config, length=8))
        with pytest.raises(ValueError, match=message):
            fresh.step(3, picks)


def test_all_rows_are_used_until_there_are_more_than_top_k():
    config = tiny_config()
    model = ReferenceModel(config, random_tensors(config, seed=6), "float32")
    run(model, prompt(config, length=24))
    chosen = [token[1]["indexer"] for token in model.picks]
    # Row i is visible from position 4i + 3 on; from the fifth one, at 19, there is something to choose.
    assert chosen[:19] == [None] * 19
    assert all(rows is not None and len(rows) == config.index_topk for rows in chosen[19:])


def test_ties_are_won_by_the_lowest_index():
    config = tiny_config()
    tensors = random_tensors(config, seed=7)
    for name in tensors:
        if name.endswith(("indexer.weights_proj.weight", "gate.weight", "gate.bias")):
            tensors[name] = torch.zeros_like(tensors[name])
    model = ReferenceModel(config, tensors, "float32")
    run(model, prompt(config, length=30))
    last = model.picks[-1][3]
    assert last == {
        "indexer": [0, 1, 2, 3],
        "indexer_margin": 0.0,
        "experts": [0, 1, 2],
        "expert_margin": 0.0,
    }


def test_hash_layers_take_their_experts_from_the_table():
    config = tiny_config()
    tensors = random_tensors(config, seed=8)
    model = ReferenceModel(config, tensors, "float32")
    model.step(42)
    for number in (0, 1):
        table = tensors[f"layers.{number}.ffn.gate.tid2eid"]
        assert model.picks[0][number]["experts"] == sorted(table[42].tolist())
        assert model.picks[0][number]["expert_margin"] is None


# --- the MTP block ---


@pytest.mark.parametrize("numerics", ["float32", "served"])
def test_rejected_drafts_leave_no_trace_in_the_mtp_window(numerics: Any):
    config = tiny_config()
    tensors = random_tensors(config, seed=9)
    ids = prompt(config, length=14)

    def drafted(*, wrongly: bool) -> Tensor:
        model = ReferenceModel(config, tensors, numerics)
        run(model, ids)
        for t in range(10):
            step = model.mtp_step(t, model.streams[t], ids[t + 1])
            if wrongly:
                for ahead in (1, 2):
                    step = model.mtp_step(t + ahead, step.streams, 90 + ahead)
        return model.mtp_step(10, model.streams[10], ids[11]).logits

    assert torch.equal(drafted(wrongly=True), drafted(wrongly=False))


def test_mtp_needs_no_more_history_than_its_window():
    config = tiny_config()
    tensors = random_tensors(config, seed=9)
    ids = prompt(config, length=30)
    whole, late = ReferenceModel(config, tensors, "float32"), ReferenceModel(config, tensors, "float32")
    run(whole, ids)
    for t in range(29):
        wanted = whole.mtp_step(t, whole.streams[t], ids[t + 1])
    for t in range(29 - config.sliding_window, 29):
        found = late.mtp_step(t, whole.streams[t], ids[t + 1])
    assert torch.equal(found.logits, wanted.logits)
    shorter = ReferenceModel(config, tensors, "float32")
    for t in range(30 - config.sliding_window, 29):
        found = shorter.mtp_step(t, whole.streams[t], ids[t + 1])
    assert not torch.equal(found.logits, wanted.logits)


def test_mtp_chains_on_its_own_streams_and_rounds_them_when_served():
    config = tiny_config()
    tensors = random_tensors(config, seed=9)
    model = ReferenceModel(config, tensors, "served")
    run(model, prompt(config, length=4))
    first = model.mtp_step(3, model.streams[3], 5)
    second = model.mtp_step(4, first.streams, int(first.logits.argmax()))
    assert bool(torch.isfinite(second.logits).all())
    assert torch.equal(round_bf16(second.streams), second.streams)
    assert set(model.mtp_picks) == {3, 4}


# --- bad input ---


def test_tensors_that_do_not_fit_are_all_named():
    config = tiny_config()
    tensors = random_tensors(config, seed=10)
    del tensors["norm.weight"]
    tensors["layers.1.attn.compressor.ape"] = torch.zeros(4, 32)
    with pytest.raises(
        ValueError, match=r"2 tensors .*norm\.weight missing.*ape \(4, 32\), wanted \(4, 64\)"
    ):
        ReferenceModel(config, tensors, "float32")


def test_unknown_numerics_tokens_and_blocks_are_refused():
    config = tiny_config().without_mtp()
    tensors = random_tensors(config, seed=10)
    with pytest.raises(ValueError, match="'bf16'"):
        ReferenceModel(config, tensors, "bf16")  # type: ignore[arg-type]
    model = ReferenceModel(config, tensors, "float32")
    with pytest.raises(ValueError, match="token id 97"):
        model.step(97)
    with pytest.raises(ValueError, match="no MTP block"):
        model.mtp_step(0, torch.zeros(4, 64), 1)


def test_the_flash_table_has_every_official_weight_once():
    # 69,187 tensors with their scales: one for each FP8 matrix (5 or 4 per attention, 3 per shared expert, 2
    # per MTP) and three for each of the 256 experts of 44 layers, which this table of dequantised weights
    # does not list.
    shapes = tensor_shapes(flash_config())
    num_scales = 43 * (5 + 3) + 21 + (5 + 3 + 2) + 44 * 256 * 3
    assert len(shapes) == 69187 - num_scales
