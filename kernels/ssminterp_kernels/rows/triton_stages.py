"""Launches the Triton kernels of `rows`: the same stages on a GPU, in float32 and half precision."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ssminterp_kernels.rows.mixer_stages import Early, Recorded
from ssminterp_kernels.rows.packing import Packing
from ssminterp_kernels.rows.triton_kernels import conv_rows_kernel, conv_tokens_kernel, scan_rows_kernel
from ssminterp_kernels.selective_scan.triton_plan import next_power_of_2
from ssminterp_kernels.sized_launching import Sized

_BLOCK_D, _WARPS = 64, 2
_conv_rows, _scan_rows, _conv_tokens = Sized(conv_rows_kernel), Sized(scan_rows_kernel), Sized(conv_tokens_kernel)


class TritonScan(NamedTuple):
    """What the scans of a layer's rows have in common. Δ = softplus(delta + bias); past: the states before the rows.

    kept: the tokens of a tile, ascending, whose output is wanted; None means all.
    """

    packing: Packing
    A: Float[Tensor, "d_inner d_state"]
    D: Float[Tensor, " d_inner"]
    bias: Float[Tensor, " d_inner"] | None
    past: Float[Tensor, "n d_inner d_state"]
    kept: Sequence[int] | None

    @property
    def table(self) -> Tensor | None:
        """The place of every token among those that are kept, or -1; None if all are."""
        if self.kept is None:
            return None
        places = torch.full((self.packing.tokens,), -1, dtype=torch.int32)
        places[list(self.kept)] = torch.arange(len(self.kept), dtype=torch.int32)
        return places.to(self.past.device, non_blocking=True)


def conv_rows(
    packing: Packing,
    own: Float[Tensor, "tiles some d_inner"],
    shared: Float[Tensor, "1 others d_inner"] | None,
    n_out: int,
    window: Float[Tensor, "n n_before d_inner"],
    taps: Float[Tensor, "d_conv d_inner"],
    bias: Float[Tensor, " d_inner"] | None,
    silu: bool,
) -> Float[Tensor, "tiles n_out d_inner"]:
    """The causal depthwise conv at the first n_out tokens, with SiLU if asked.

    own: the inputs at the first tokens. shared: those of all tokens, of which the ones behind are taken, for all tiles.
    window: the d_conv - 1 inputs before each row. taps: oldest first.
    """
    tiles, n_own, d_inner = own.shape
    y = torch.empty(tiles, n_out, d_inner, dtype=own.dtype, device=own.device)
    starts, _, rows, positions = packing.on(own.device)
    block_t, block_d = 16, min(64, max(32, next_power_of_2(d_inner)))
    n_blocks = -(-d_inner // block_d)
    _conv_rows(
        tiles * -(-n_out // block_t) * n_blocks,
        (
            *(_tiled(own), _tiled(shared), (window, *window.stride()), (taps, *taps.stride())),
            *(None if bias is None else (bias, bias.stride(0)), y, starts, rows, positions),
        ),
        (d_inner,),
        (n_own, n_out, n_blocks),
        (len(taps), silu, block_t, block_d),
        num_warps=4,
    )
    return y


def conv_tokens(
    inputs: Float[Tensor, "tokens d_inner"],
    earlier: Int[Tensor, "kinds n_before"],
    n_tile: int,
    taps: Float[Tensor, "d_conv d_inner"],
    bias: Float[Tensor, " d_inner"] | None,
    silu: bool,
) -> Float[Tensor, "tokens d_inner"]:
    """The causal depthwise conv of tokens that tiles share, and behind them of the tiles' own, n_tile of each.

    earlier: the tokens before each, the oldest first, int32, of those that are shared and of a tile: a shared token,
    -1 for none, or -2 - k for token k of the same tile.
    """
    tokens, d_inner = inputs.shape
    y = torch.empty(tokens, d_inner, dtype=inputs.dtype, device=inputs.device)
    block_t, block_d = 16, min(64, max(32, next_power_of_2(d_inner)))
    n_blocks = -(-d_inner // block_d)
    _conv_tokens(
        -(-tokens // block_t) * n_blocks,
        (
            *((inputs, inputs.stride(0)), (taps, *taps.stride())),
            *(None if bias is None else (bias, bias.stride(0)), y, earlier),
        ),
        (d_inner,),
        (tokens, len(earlier) - n_tile, n_tile, n_blocks),
        (len(taps), silu, block_t, block_d),
        num_warps=4,
    )
    return y


def scan_rows(
    scan: TritonScan,
    own: Early | None,
    states: Float[Tensor, "tiles n d_inner d_state"] | None,
    base: Early | None,
    gate: Float[Tensor, "tiles_or_1 n_kept d_inner"],
    first_gate: Float[Tensor, "some n d_inner"] | None = None,
    out: Float[Tensor, "tiles n_kept d_inner"] | None = None,
    record: Recorded | None = None,
) -> Float[Tensor, "tiles n_kept d_inner"]:
    """(y + D x) · SiLU(gate) of rows, from their pasts, or from what their states are after position 0.

    own: what rows take in at their first positions, [tiles, tokens, …], or `states` in its place. base: what they take
    in at the others, [1, tokens, …], raw. gate: of the tokens that are kept, one for all tiles or of each. first_gate:
    the gates of the first tiles at position 0. out: where to write. record: which states of `own` to write where, of a
    single tile.
    """
    packing, past = scan.packing, scan.past
    some = own.x if own is not None else states
    assert some is not None
    tiles, d_inner, d_state = len(some), *past.shape[1:]
    if out is None:
        out = torch.empty(tiles, gate.shape[1], d_inner, dtype=gate.dtype, device=gate.device)
    starts, lengths, _, _ = packing.on(past.device)
    if states is not None and states.stride()[2:] != (d_state, 1):
        states = states.contiguous()
    before = (past, 0, past.stride(0)) if states is None else (states, states.stride(0), states.stride(1))
    reach = packing.reach_of(own.x.shape[1]) if own is not None else 1
    n_blocks = -(-d_inner // _BLOCK_D)
    block_n = next_power_of_2(d_state)
    _scan_rows(
        tiles * packing.n * n_blocks,
        (
            *(before, *_inputs(own), *_inputs(base), scan.A, (scan.D, scan.D.stride(0))),
            *(None if scan.bias is None else (scan.bias, scan.bias.stride(0)), _tiled(gate), _tiled(first_gate)),
            *(scan.table, *(record or (None, None)), out, starts, lengths),
        ),
        (d_inner, d_state),
        (tiles, reach, 0 if first_gate is None else len(first_gate), gate.shape[1], n_blocks, 0),
        (own is not None and own.raw, d_state == block_n and d_state >= 4, block_n, _BLOCK_D),
        num_warps=_WARPS,
    )
    return out


def _tiled(tensor: Tensor | None) -> tuple[Any, ...] | None:
    """A tensor [tiles, tokens, channels] as the kernels take it; one tile serves all."""
    if tensor is None:
        return None
    of_tile, of_token, of_channel = tensor.stride()
    if of_channel != 1:
        tensor = tensor.contiguous()
        of_tile, of_token, _ = tensor.stride()
    return tensor, 0 if tensor.shape[0] == 1 else of_tile, of_token


def _inputs(inputs: Early | None) -> tuple[tuple[Any, ...] | None, ...]:
    return (None,) * 4 if inputs is None else tuple(_tiled(tensor) for tensor in inputs[:4])
