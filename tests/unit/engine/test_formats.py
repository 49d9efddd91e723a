"""Number formats against their definitions: tables by hand, and a slow scalar reference for the roundings."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import formats

torch.set_num_threads(1)

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
E4M3 = sorted(
    {mantissa / 8 * 2.0**-6 for mantissa in range(8)}
    | {(1 + mantissa / 8) * 2.0**exponent for exponent in range(-6, 9) for mantissa in range(8)} - {480.0}
)
FLOATS = st.floats(-1e6, 1e6, width=32)


def nearest_even(value: float, sizes: list[float]) -> float:
    """The nearest size with the value's sign; of two equally near the one with the even code."""
    size = min(abs(value), sizes[-1])
    code = min(range(len(sizes)), key=lambda index: (abs(sizes[index] - size), index % 2))
    return math.copysign(sizes[code], value)


def reference_round(values: list[float], sizes: list[float], floor: float) -> tuple[list[float], int]:
    """One block, in Python floats: the rounded values and the scale's exponent."""
    size = max(floor, *(abs(value) for value in values))
    fraction, exponent = math.frexp(size / sizes[-1])
    exponent -= fraction == 0.5  # frexp is in [0.5, 1): the ceiling of log2, exactly
    scale = 2.0**exponent
    return [nearest_even(value / scale, sizes) * scale for value in values], exponent


def test_e8m0_bytes_are_powers_of_two() -> None:
    decoded = formats.decode_e8m0(torch.arange(256, dtype=torch.int32).to(torch.uint8))
    assert decoded[:255].tolist() == [2.0 ** (byte - 127) for byte in range(255)]
    assert decoded[255].isnan()


def test_e8m0_encodes_powers_of_two_back_and_rounds_others_up() -> None:
    codes = torch.arange(255, dtype=torch.int32).to(torch.uint8)
    assert torch.equal(formats.encode_e8m0(formats.decode_e8m0(codes)), codes)
    values = torch.tensor([3.0, 1.0000001, 0.0, math.inf, math.nan, 3e38])
    assert formats.encode_e8m0(values).tolist() == [129, 128, 0, 255, 255, 255]


def test_fp4_low_nibble_is_the_even_column() -> None:
    packed = torch.tensor([[0x72, 0x8F], [0x10, 0xE5]], dtype=torch.int32).to(torch.uint8)
    assert formats.unpack_e2m1(packed).tolist() == [[1.0, 6.0, -6.0, 0.0], [0.0, 0.5, 3.0, -4.0]]
    assert formats.unpack_e2m1(packed.view(torch.int8), num_columns=3).tolist() == [
        [1.0, 6.0, -6.0],
        [0.0, 0.5, 3.0],
    ]


def test_every_fp4_byte_survives_unpacking_and_packing() -> None:
    values = formats.unpack_e2m1(torch.arange(256, dtype=torch.int32).to(torch.uint8))
    assert torch.equal(formats.unpack_e2m1(formats.pack_e2m1(values)), values)
    codes = [code for code in range(256) if 8 not in (code & 15, code >> 4)]  # -0 is written as 0
    packed = torch.tensor(codes, dtype=torch.uint8)
    assert torch.equal(formats.pack_e2m1(formats.unpack_e2m1(packed).view(-1, 2)).view(-1), packed)


def test_fp4_rounds_ties_to_even_codes_and_saturates() -> None:
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 7.0])
    rounded = [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 6.0]
    assert formats.unpack_e2m1(formats.pack_e2m1(ties)).tolist() == rounded
    assert formats.unpack_e2m1(formats.pack_e2m1(-ties)).tolist() == [-value for value in rounded]


@given(st.lists(FLOATS, min_size=1, max_size=70))
@settings(deadline=None)
def test_fp4_rounding_equals_the_scalar_reference(values: list[float]) -> None:
    x = torch.tensor(values)
    wanted: list[float] = []
    for start in range(0, len(values), 32):
        wanted += reference_round(x[start : start + 32].tolist(), E2M1, 6 * 2.0**-126)[0]
    assert formats.round_fp4(x).tolist() == wanted


@given(st.lists(FLOATS, min_size=1, max_size=70), st.sampled_from([16, 64, 128]))
@settings(deadline=None)
def test_fp8_rounding_equals_the_scalar_reference(values: list[float], block: int) -> None:
    x = torch.tensor(values)
    wanted: list[float] = []
    for start in range(0, len(values), block):
        wanted += reference_round(x[start : start + block].tolist(), E4M3, 1e-4)[0]
    assert formats.round_fp8(x, block=block).tolist() == wanted


@pytest.mark.parametrize("exponent", [-100, -9, 0, 9, 100])
def test_fp8_scale_steps_exactly_after_the_largest_code(exponent: int) -> None:
    edge = torch.tensor([448.0 * 2.0**exponent])
    above = torch.nextafter(edge, torch.tensor([math.inf]))
    floor = 448 * 2.0**-126
    _, scales = formats.encode_fp8(torch.stack((edge, above)), block=64, floor=floor)
    assert scales.view(-1).tolist() == [127 + exponent, 128 + exponent]


@pytest.mark.parametrize("exponent", [-100, 0, 100])
def test_fp4_scale_steps_exactly_after_the_largest_code(exponent: int) -> None:
    edge = torch.tensor([6.0 * 2.0**exponent])
    above = torch.nextafter(edge, torch.tensor([math.inf]))
    _, scales = formats.encode_fp4(torch.stack((edge, above)))
    assert scales.view(-1).tolist() == [127 + exponent, 128 + exponent]


@given(
    st.integers(1, 5),
    st.integers(1, 200),
    st.sampled_from([64, 128]),
    st.integers(-20, 20),
    st.integers(0, 99),
)
@settings(deadline=None, max_examples=50)
def test_encoding_and_decoding_is_rounding_and_rounding_twice_is_rounding(
    num_rows: int, width: int, block: int, exponent: int, seed: int
) -> None:
    x = torch.randn(num_rows, width, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    rounded = formats.round_fp8(x, block=block)
    codes, scales = formats.encode_fp8(x, block=block)
    assert codes.shape == x.shape
    assert scales.shape == (num_rows, math.ceil(width / block))
    assert torch.equal(formats.decode_fp8(codes, scales, block=block), rounded)
    assert torch.equal(formats.round_fp8(rounded, block=block), rounded)
    assert torch.equal(formats.round_bf16(rounded), rounded)
    rounded = formats.round_fp4(x)
    packed, scales = formats.encode_fp4(x)
    assert packed.shape == (num_rows, math.ceil(width / 2))
    assert scales.shape == (num_rows, math.ceil(width / 32))
    assert torch.equal(formats.decode_fp4(packed, scales, num_columns=width), rounded)
    assert torch.equal(formats.round_fp4(rounded), rounded)
    assert torch.equal(formats.round_bf16(rounded), rounded)


def test_encoding_decoded_values_again_keeps_values_though_not_always_bytes() -> None:
    x = torch.tensor([[225.0, 3.0, 0.1]])
    codes, scales = formats.encode_fp8(x, block=64)
    decoded = formats.decode_fp8(codes, scales, block=64)
    assert decoded[0, 0] == 224  # half the range: from here a scale of half the size is the least that fits
    again, scales_again = formats.encode_fp8(decoded, block=64)
    assert scales_again.item() == scales.item() - 1
    assert torch.equal(formats.decode_fp8(again, scales_again, block=64), decoded)


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_a_broken_value_breaks_its_block_and_no_other(poison: float) -> None:
    x = torch.ones(2, 256)
    x[0, 70] = poison
    for block, rounded, decoded in (
        (64, formats.round_fp8(x, block=64), formats.decode_fp8(*formats.encode_fp8(x, block=64), block=64)),
        (32, formats.round_fp4(x), formats.decode_fp4(*formats.encode_fp4(x))),
    ):
        first = 70 // block * block
        for result in (rounded, decoded):
            assert result[0, first : first + block].isnan().all()
            assert int(result.isnan().sum()) == block


def test_blocks_do_not_see_each_other() -> None:
    x = torch.randn(3, 160, generator=torch.Generator().manual_seed(1))
    x[:, 64:128] *= 1e4
    whole = formats.round_fp8(x, block=64)
    parts = [formats.round_fp8(part, block=64) for part in x.split(64, dim=1)]
    assert torch.equal(whole, torch.cat(parts, dim=1))


def test_a_row_rounds_the_same_alone_and_in_a_batch_and_the_input_stays() -> None:
    x = torch.randn(7, 5, 96, generator=torch.Generator().manual_seed(2))
    before = x.clone()
    fp8, fp4, mixed = (
        formats.round_fp8(x, block=128),
        formats.round_fp4(x),
        formats.hadamard(x[..., :64].contiguous()),
    )
    assert torch.equal(x, before)
    assert torch.equal(formats.round_fp8(x[3, 2], block=128), fp8[3, 2])
    assert torch.equal(formats.round_fp4(x[3, 2]), fp4[3, 2])
    assert torch.equal(formats.hadamard(x[3, 2, :64]), mixed[3, 2])


def test_bf16_tensors_stay_bf16() -> None:
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(3)).to(torch.bfloat16)
    for rounded, exact in (
        (formats.round_fp8(x, block=64), formats.round_fp8(x.float(), block=64)),
        (formats.round_fp4(x), formats.round_fp4(x.float())),
    ):
        assert rounded.dtype is torch.bfloat16
        assert torch.equal(rounded.float(), exact)


@pytest.mark.parametrize("shape", [(128, 128), (1, 1), (129, 300), (40, 260), (256, 64)])
def test_fp8_weights_use_one_scale_per_square_block(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(4))
    weight[:, 128:] *= 1000
    quantised, scale = formats.quantise_fp8_blocks(weight)
    assert quantised.dtype is torch.float8_e4m3fn
    assert scale.dtype is torch.float8_e8m0fnu
    assert quantised.shape == shape
    assert scale.shape == (math.ceil(shape[0] / 128), math.ceil(shape[1] / 128))
    restored = formats.dequantise_fp8_blocks(quantised, scale)
    # By the definition, one value at a time.
    rows, columns = torch.arange(shape[0]) // 128, torch.arange(shape[1]) // 128
    factors = formats.decode_e8m0(scale)[rows][:, columns]
    assert torch.equal(restored, quantised.to(torch.float32) * factors)
    # e4m3 keeps 3 bits after the leading one; near zero the quantum of the block's scale rules.
    assert bool(((restored - weight).abs() <= weight.abs() / 16 + factors * 2.0**-10).all())
    again, scale_again = formats.quantise_fp8_blocks(restored)
    assert torch.equal(formats.dequantise_fp8_blocks(again, scale_again), restored)


@pytest.mark.parametrize("shape", [(4, 64), (3, 33), (2, 1), (5, 100)])
def test_fp4_weights_use_one_scale_per_32_inputs(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(5))
    packed, scale = formats.quantise_fp4(weight)
    assert packed.dtype is torch.int8
    assert scale.dtype is torch.float8_e8m0fnu
    assert packed.shape == (shape[0], math.ceil(shape[1] / 2))
    assert scale.shape == (shape[0], math.ceil(shape[1] / 32))
    assert torch.equal(formats.dequantise_fp4(packed, scale, num_columns=shape[1]), formats.round_fp4(weight))


def test_a_block_of_zeros_is_zero() -> None:
    zeros = torch.zeros(130, 130)
    assert not formats.dequantise_fp8_blocks(*formats.quantise_fp8_blocks(zeros)).any()
    assert not formats.round_fp4(zeros).any()
    assert not formats.round_fp8(zeros, block=64).any()


def test_values_of_known_fp4_weight_bytes() -> None:
    packed = torch.tensor([[0x21] * 16 + [0x0F]], dtype=torch.uint8).view(torch.int8)
    scale = torch.tensor([[128, 126]], dtype=torch.uint8).view(torch.float8_e8m0fnu)
    wanted = [1.0, 2.0] * 16 + [-3.0, 0.0]
    assert formats.dequantise_fp4(packed, scale).tolist() == [wanted]


@pytest.mark.parametrize("width", [1, 2, 8, 128])
def test_hadamard_is_sylvesters_matrix(width: int) -> None:
    matrix = torch.ones(1, 1)
    while len(matrix) < width:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    transformed = formats.hadamard(torch.eye(width))
    torch.testing.assert_close(transformed, matrix / math.sqrt(width), rtol=1e-6, atol=0)
    x = torch.randn(3, 2, width, generator=torch.Generator().manual_seed(6))
    torch.testing.assert_close(formats.hadamard(formats.hadamard(x)), x)


def test_hadamard_refuses_a_width_that_is_no_power_of_two() -> None:
    with pytest.raises(AssertionError, match="power of two"):
        formats.hadamard(torch.ones(2, 12))
