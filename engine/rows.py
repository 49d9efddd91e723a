"""Rows as the model computes with them, f32, and as the pools keep them: bytes in the form of their component.

Called by whoever reads or writes rows of pools: the pager, tails, and what reads spilled rows from host memory. Knows
no sequence and no page table.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from engine import formats
from kvstore.layout import KV_SCALE_BLOCK, Descriptor, RowForm
from kvstore.pools import ComponentPool
from rorqual.model_config import ModelConfig


def read_rows(pool: ComponentPool, layer: int, ids: Tensor, config: ModelConfig) -> Tensor:
    """Rows of a pool by row id as f32 [..., width]."""
    item = pool.descriptor
    if item.form is RowForm.F32:
        return pool.rows_f32(layer).index_select(0, ids.reshape(-1)).view(*ids.shape, item.width)
    data, scales = pool.data_and_scales(layer)
    unit, row = ids // item.unit_rows, ids % item.unit_rows
    return decode_rows(item, data[unit, row], scales[unit, row], config)


def decode_rows(item: Descriptor, data: Tensor, scales: Tensor, config: ModelConfig) -> Tensor:
    """f32 [..., width] of bytes as `encode_rows` makes them: uint8 [..., data_bytes] and [..., scale_bytes]."""
    if item.form is RowForm.F32:
        return data.contiguous().view(torch.float32)
    return _DECODERS[item.form](data, scales, item.width, config.rope_head_dim)


def write_rows(pool: ComponentPool, layer: int, ids_N: Tensor, rows_Nw: Tensor, config: ModelConfig) -> None:
    item = pool.descriptor
    if item.form is RowForm.F32:
        pool.rows_f32(layer).index_copy_(0, ids_N, rows_Nw)
        return
    data, scales = pool.data_and_scales(layer)
    unit, row = ids_N // item.unit_rows, ids_N % item.unit_rows
    data_Nb, scales_Nb = encode_rows(item, rows_Nw, config)
    data[unit, row] = data_Nb
    if item.scale_bytes:
        scales[unit, row] = scales_Nb


def encode_rows(item: Descriptor, rows_Nw: Tensor, config: ModelConfig) -> tuple[Tensor, Tensor]:
    """The bytes that a pool keeps of f32 rows: data uint8 [N, data_bytes] and scales uint8 [N, scale_bytes]."""
    if item.form in (RowForm.F32, RowForm.BF16):
        plain = rows_Nw if item.form is RowForm.F32 else rows_Nw.to(torch.bfloat16)
        data = plain.contiguous().view(torch.uint8)
        return data, data[:, :0]
    if item.form is RowForm.INDEX_FP4:
        data, scales = formats.encode_fp4(rows_Nw)
        return data, scales.view(torch.uint8)
    num_codes = item.width - config.rope_head_dim
    codes, code_scales = formats.encode_fp8(rows_Nw[:, :num_codes], block=KV_SCALE_BLOCK)
    rotated = rows_Nw[:, num_codes:].to(torch.bfloat16).view(torch.uint8)
    padding = item.scale_bytes - code_scales.shape[1]
    scales = torch.nn.functional.pad(code_scales.view(torch.uint8), (0, padding))
    return torch.cat((codes.view(torch.uint8), rotated), dim=1), scales


def _decode_kv(data: Tensor, scales: Tensor, width: int, rope_head_dim: int) -> Tensor:
    num_codes = width - rope_head_dim
    num_scales = -(-num_codes // KV_SCALE_BLOCK)
    plain = formats.decode_fp8(
        data[..., :num_codes].contiguous(), scales[..., :num_scales].contiguous(), block=KV_SCALE_BLOCK
    )
    rotated = data[..., num_codes:].contiguous().view(torch.bfloat16).float()
    return torch.cat((plain, rotated), dim=-1)


def _decode_index(data: Tensor, scales: Tensor, width: int, rope_head_dim: int) -> Tensor:
    del rope_head_dim
    return formats.decode_fp4(data, scales, num_columns=width)


def _decode_bf16(data: Tensor, scales: Tensor, width: int, rope_head_dim: int) -> Tensor:
    del scales, width, rope_head_dim
    return data.view(torch.bfloat16).float()


_DECODERS: dict[RowForm, Callable[[Tensor, Tensor, int, int], Tensor]] = {
    RowForm.KV_FP8: _decode_kv,
    RowForm.INDEX_FP4: _decode_index,
    RowForm.BF16: _decode_bf16,
}
