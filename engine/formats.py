"""Number formats: E8M0 scales, FP8 (e4m3) and FP4 (e2m1) values in scaled blocks, bf16, Walsh-Hadamard.

Owns what a code byte means and how a float becomes one. The checkpoint reader and writer call the weight
half, the model's `served` numerics and the wire formats the activation half. Pure functions of tensors:
nothing here keeps state, reads a file or knows a layer.

Every scale is a power of two, 2^ceil(log2(max |x| / largest code)), found on the float's own bits, so
quantising already quantised values changes no value. It may change bytes: where the largest value rounded
down to half the range, the second scale is half the first. So cached bytes are moved, never made again from
values. A block that holds a NaN or an infinity becomes NaN as a whole (scale byte 255), in the rounding and
in the encoding functions alike: a broken value never turns into a plausible one.

Where a last axis is not a multiple of the block, its last block is short. All arithmetic is float32; the
rounding functions give back the dtype they were given. None of them builds an autograd graph.
"""

from __future__ import annotations

import functools

import torch

FP8_WEIGHT_BLOCK = 128
"""Rows and columns that share one scale in an FP8 weight; also the block of FP8 activations."""
FP8_KV_BLOCK = 64
FP4_BLOCK = 32

_FP8_MAX = 448.0
_FP4_MAX = 6.0
_ACTIVATION_FLOOR = 1e-4
# The smallest floors whose scale byte is 1: below them 1/scale would leave the normal floats.
_FP8_FLOOR_MIN = _FP8_MAX * 2.0**-126
_FP4_FLOOR = _FP4_MAX * 2.0**-126

_EXPONENT_MASK = 0x7F800000
_MANTISSA_MASK = 0x7FFFFF
_MANTISSA_BITS = 23


def decode_e8m0(codes: torch.Tensor) -> torch.Tensor:
    """Scales of E8M0 codes (uint8 or float8_e8m0fnu): byte b is 2^(b-127), 255 is NaN."""
    return codes.view(torch.float8_e8m0fnu).to(torch.float32)


def encode_e8m0(values: torch.Tensor) -> torch.Tensor:
    """uint8 codes of the least powers of two not below the positive values; 255 for NaN and overflow."""
    return _scale_codes(values.to(torch.float32), 1.0).masked_fill_(values <= 2.0**-127, 0)


def unpack_e2m1(packed: torch.Tensor, *, num_columns: int | None = None) -> torch.Tensor:
    """float32 values of packed FP4 codes: the low nibble is the even column.

    `packed` is uint8 or int8. With `num_columns` odd, the high nibble of the last byte is padding: it is
    dropped.
    """
    pairs = _e2m1_pairs(packed.device)
    index = packed.reshape(-1).view(torch.uint8).to(torch.int32)
    # One look-up moves both values of a byte, as one 8-byte element: 3x faster than rows of two floats.
    values = torch.index_select(pairs, 0, index).view(torch.float32)
    values = values.view(*packed.shape[:-1], 2 * packed.shape[-1])
    return values if num_columns is None else values[..., :num_columns]


def pack_e2m1(values: torch.Tensor) -> torch.Tensor:
    """uint8 codes of the nearest e2m1 values, ties to even, at most 6; the even column is the low nibble."""
    if values.shape[-1] % 2:
        values = torch.nn.functional.pad(values, (0, 1))
    rounded = _round_e2m1(values.to(torch.float32).clamp(-_FP4_MAX, _FP4_MAX))
    # Doubled e2m1 values are whole numbers in -12..12: a pair is a number in base 25, and one table look-up.
    pairs = torch.add(rounded[..., 0::2], rounded[..., 1::2], alpha=25).mul_(2).add_(12 * 26)
    codes = torch.index_select(_e2m1_bytes(values.device), 0, pairs.to(torch.int32).view(-1))
    return codes.view(pairs.shape)


def dequantise_fp8_blocks(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """float32 [out, in] of an e4m3 weight and its E8M0 scales [ceil(out/128), ceil(in/128)]."""
    num_rows, num_columns = weight.shape
    values = torch.empty(num_rows, num_columns, dtype=torch.float32, device=weight.device)
    column_scales = decode_e8m0(scale).repeat_interleave(FP8_WEIGHT_BLOCK, dim=1)[:, :num_columns]
    for block, row in enumerate(range(0, num_rows, FP8_WEIGHT_BLOCK)):
        rows = slice(row, row + FP8_WEIGHT_BLOCK)
        torch.mul(_decode_e4m3(weight[rows]), column_scales[block], out=values[rows])
    return values


def quantise_fp8_blocks(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The inverse: e4m3 [out, in] and float8_e8m0fnu scales of its 128 x 128 blocks."""
    num_rows, num_columns = weight.shape
    size = FP8_WEIGHT_BLOCK
    padding = (0, -num_columns % size, 0, -num_rows % size)
    blocks = torch.nn.functional.pad(weight.to(torch.float32), padding)
    blocks = blocks.unflatten(1, (-1, size)).unflatten(0, (-1, size))
    codes = _scale_codes(_abs_max(blocks, (1, 3)).clamp_min(_FP8_FLOOR_MIN), _FP8_MAX)
    scaled = (blocks * _inverse_scale(codes)[:, None, :, None]).flatten(2, 3).flatten(0, 1)
    quantised = scaled[:num_rows, :num_columns].to(torch.float8_e4m3fn).contiguous()
    return quantised, codes.view(torch.float8_e8m0fnu)


def dequantise_fp4(
    weight: torch.Tensor, scale: torch.Tensor, *, num_columns: int | None = None
) -> torch.Tensor:
    """float32 [out, in] of packed int8 [out, ceil(in/2)] and E8M0 scales [out, ceil(in/32)]."""
    return decode_fp4(weight.view(torch.uint8), scale.view(torch.uint8), num_columns=num_columns)


def quantise_fp4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The inverse: packed int8 [out, ceil(in/2)] and float8_e8m0fnu scales of 32 inputs each."""
    packed, codes = encode_fp4(weight)
    return packed.view(torch.int8), codes.view(torch.float8_e8m0fnu)


def round_fp8(x: torch.Tensor, *, block: int, floor: float = _ACTIVATION_FLOOR) -> torch.Tensor:
    """What `x` is after a trip through e4m3 with one scale per `block` values of the last axis."""
    blocks = _split(x, block)
    codes = _fp8_scale_codes(blocks, floor)
    rounded = _round_e4m3(blocks * _inverse_scale(codes).unsqueeze(-1))
    return _join(rounded.mul_(decode_e8m0(codes).unsqueeze(-1)), x.shape[-1]).to(x.dtype)


def encode_fp8(
    x: torch.Tensor, *, block: int, floor: float = _ACTIVATION_FLOOR
) -> tuple[torch.Tensor, torch.Tensor]:
    """e4m3 codes [..., width] and E8M0 scale codes [..., ceil(width/block)], both uint8."""
    blocks = _split(x, block)
    codes = _fp8_scale_codes(blocks, floor)
    scaled = blocks * _inverse_scale(codes).unsqueeze(-1)
    return _join(scaled, x.shape[-1]).to(torch.float8_e4m3fn).view(torch.uint8), codes


def decode_fp8(values: torch.Tensor, scales: torch.Tensor, *, block: int) -> torch.Tensor:
    """float32 of what `encode_fp8` made; equal to `round_fp8` of its input."""
    blocks = _split(_decode_e4m3(values), block)
    return _join(blocks.mul_(decode_e8m0(scales).unsqueeze(-1)), values.shape[-1])


def round_fp4(x: torch.Tensor) -> torch.Tensor:
    """What `x` is after a trip through e2m1 with one scale per 32 values of the last axis."""
    blocks = _split(x, FP4_BLOCK)
    codes = _fp4_scale_codes(blocks)
    rounded = _round_e2m1(blocks * _inverse_scale(codes).unsqueeze(-1))
    return _join(rounded.mul_(decode_e8m0(codes).unsqueeze(-1)), x.shape[-1]).to(x.dtype)


def encode_fp4(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Packed e2m1 codes [..., ceil(width/2)] and E8M0 scale codes [..., ceil(width/32)], both uint8."""
    blocks = _split(x, FP4_BLOCK)
    codes = _fp4_scale_codes(blocks)
    # FP4 has no code for NaN: the scale alone carries it, and the values become zeros.
    scaled = (blocks * _inverse_scale(codes).unsqueeze(-1)).nan_to_num_(nan=0.0)
    return pack_e2m1(_join(scaled, x.shape[-1])), codes


def decode_fp4(packed: torch.Tensor, scales: torch.Tensor, *, num_columns: int | None = None) -> torch.Tensor:
    """float32 of what `encode_fp4` made; equal to `round_fp4` of its input."""
    values = unpack_e2m1(packed, num_columns=num_columns)
    width = values.shape[-1]
    return _join(_split(values, FP4_BLOCK).mul_(decode_e8m0(scales).unsqueeze(-1)), width)


def hadamard(x: torch.Tensor) -> torch.Tensor:
    """The normalised Walsh-Hadamard transform of the last axis, in Sylvester order. Its own inverse.

    Butterflies of additions rather than a matrix product: a row's result then cannot depend on how many rows
    there are, which the exact mode relies on. The width must be a power of two.
    """
    width = x.shape[-1]
    assert width & (width - 1) == 0, f"Hadamard width {width} is not a power of two"
    source = x.to(torch.float32).contiguous()
    target, spare = torch.empty_like(source), torch.empty_like(source)
    half = 1
    while half < width:
        pairs, sums = source.unflatten(-1, (-1, 2, half)), target.unflatten(-1, (-1, 2, half))
        torch.add(pairs[..., 0, :], pairs[..., 1, :], out=sums[..., 0, :])
        torch.sub(pairs[..., 0, :], pairs[..., 1, :], out=sums[..., 1, :])
        source, target, spare = target, spare, target
        half *= 2
    return (source * width**-0.5).to(x.dtype)


def round_bf16(x: torch.Tensor) -> torch.Tensor:
    """float32 values rounded to what bfloat16 can hold."""
    return x.to(torch.bfloat16).to(torch.float32)


def _split(x: torch.Tensor, block: int) -> torch.Tensor:
    """float32 [..., num_blocks, block]; a lone short block keeps its width, a short last one gets zeros."""
    width = x.shape[-1]
    x = x.to(torch.float32)
    if width <= block:
        return x.unsqueeze(-2)
    if width % block:
        x = torch.nn.functional.pad(x, (0, -width % block))
    return x.unflatten(-1, (-1, block))


def _join(blocks: torch.Tensor, width: int) -> torch.Tensor:
    return blocks.flatten(-2)[..., :width]


def _abs_max(x: torch.Tensor, dim: int | tuple[int, ...]) -> torch.Tensor:
    # Two vectorised reductions: 4x faster on a CPU than abs().amax(), which writes a copy of x.
    return torch.maximum(x.amax(dim), x.amin(dim).neg_())


def _fp8_scale_codes(blocks: torch.Tensor, floor: float) -> torch.Tensor:
    assert floor >= _FP8_FLOOR_MIN, f"floor {floor} is below what a scale can express"
    return _scale_codes(_abs_max(blocks, -1).clamp_min_(floor), _FP8_MAX)


def _fp4_scale_codes(blocks: torch.Tensor) -> torch.Tensor:
    return _scale_codes(_abs_max(blocks, -1).clamp_min_(_FP4_FLOOR), _FP4_MAX)


def _scale_codes(sizes: torch.Tensor, largest: float) -> torch.Tensor:
    """uint8 E8M0 codes of 2^ceil(log2(size / largest)): the least scale that keeps sizes within `largest`.

    The bits of positive floats order like the numbers, and adding 2^23 to them doubles the number. So the
    difference to the bits of `largest`, rounded up to whole exponents, is the ceiling of the logarithm,
    without a division.
    """
    largest_bits = int(torch.tensor(largest, dtype=torch.float32).view(torch.int32))
    exponents = ((sizes.view(torch.int32) - largest_bits + _MANTISSA_MASK) >> _MANTISSA_BITS) + 127
    return torch.where(sizes < torch.inf, exponents, 255).to(torch.uint8)


def _inverse_scale(codes: torch.Tensor) -> torch.Tensor:
    """1 / decode_e8m0(codes): 254 - b, and 255 stays 255 (NaN) by wrapping around."""
    return decode_e8m0(254 - codes)


def _round_e4m3(y: torch.Tensor) -> torch.Tensor:
    """In place, `y.to(float8_e4m3fn).to(float32)` for |y| <= 448; several times faster on a CPU.

    e4m3 keeps 3 bits after the leading one, so the quantum is 2^-3 of the value's own power of two, and never
    less than 2^-9, that of the subnormals below 2^-6.
    """
    return _round_to_quanta(y, mantissa_bits=3, normal_min=2.0**-6)


def _round_e2m1(y: torch.Tensor) -> torch.Tensor:
    """In place, the nearest of 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives, ties to even, for |y| <= 6."""
    return _round_to_quanta(y, mantissa_bits=1, normal_min=1.0)


def _round_to_quanta(y: torch.Tensor, *, mantissa_bits: int, normal_min: float) -> torch.Tensor:
    """Adding and subtracting 1.5 x 2^23 quanta rounds to a whole number of quanta, ties to even."""
    powers = (y.view(torch.int32) & _EXPONENT_MASK).view(torch.float32)
    magic = powers.clamp_min_(normal_min).mul_(1.5 * 2.0 ** (_MANTISSA_BITS - mantissa_bits))
    return y.add_(magic).sub_(magic)


def _decode_e4m3(values: torch.Tensor) -> torch.Tensor:
    # A table look-up: 5x faster on a CPU than the cast.
    index = values.reshape(-1).view(torch.uint8).to(torch.int32)
    return torch.index_select(_e4m3_values(values.device), 0, index).view(values.shape)


@functools.cache
def _e4m3_values(device: torch.device) -> torch.Tensor:
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    return codes.view(torch.float8_e4m3fn).to(torch.float32).to(device)


def _e2m1_values() -> torch.Tensor:
    sizes = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    return torch.cat((sizes, -sizes))


@functools.cache
def _e2m1_pairs(device: torch.device) -> torch.Tensor:
    """For every byte its two values, as the eight bytes of one int64."""
    byte = torch.arange(256)
    values = _e2m1_values()
    return torch.stack((values[byte & 15], values[byte >> 4]), dim=1).view(torch.int64).view(256).to(device)


@functools.cache
def _e2m1_bytes(device: torch.device) -> torch.Tensor:
    """The byte of the e2m1 values (a, b) at index 2a + 12 + 25 (2b + 12). Zero has the code 0, never -0."""
    digits = torch.zeros(25, dtype=torch.int32)
    for code in (*range(15, 8, -1), *range(8)):
        digits[int(2 * _e2m1_values()[code]) + 12] = code
    table = digits[None, :] | (digits[:, None] << 4)
    return table.view(-1).to(torch.uint8).to(device)
