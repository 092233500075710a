"""The public functions of `rows`: what surrounds the compiled loops of `rows.kernels`."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ssminterp_kernels.rows.layout import GROUP, LANES
from ssminterp_kernels.rows.packing import Packing
from ssminterp_kernels.selective_scan.cpu_threads import run_on_threads

# What a thread must find to do to be worth waking, which takes about half as long.
_SECONDS_PER_THREAD = 100e-6
# Seconds that one channel at one position takes, per state coordinate where there are states.
_CONV, _NORM, _UPDATE, _CARRIED = 0.25e-9, 0.12e-9, 0.15e-9, 1e-9


class RowScan(NamedTuple):
    """What the scans of a layer's rows have in common.

    packing: how rows lie in a tile. rate: A · log2(e) as `blocks` lays it out. dt_weight, bias: Δ = softplus(dt ·
    dt_weight + bias). past: the states before the rows, laid out as the rate. kept: the tokens of a tile, ascending,
    whose output is wanted; None means all.
    """

    packing: Packing
    rate: Float[Tensor, "n_blocks d_state lanes"]
    D: Float[Tensor, " d_inner"]
    dt_weight: Float[Tensor, "dt_rank d_inner"]
    bias: Float[Tensor, " d_inner"]
    past: Float[Tensor, "n n_blocks d_state lanes"]
    kept: list[int] | None

    @staticmethod
    def of(
        packing: Packing,
        A: Float[Tensor, "d_inner d_state"],
        D: Float[Tensor, " d_inner"],
        dt_weight: Float[Tensor, "d_inner dt_rank"],
        bias: Float[Tensor, " d_inner"] | None,
        past: Float[Tensor, "n d_inner d_state"],
        kept: list[int] | None,
    ) -> RowScan:
        """From tensors as a mixer has them."""
        bias = torch.zeros_like(D) if bias is None else bias.contiguous()
        return RowScan(packing, _rate(A), D, dt_weight.T.contiguous(), bias, blocks(past), kept)

    @property
    def table(self) -> np.ndarray[Any, np.dtype[np.int32]]:
        """The place of every token among those that are kept, or -1."""
        if self.kept is None:
            return np.arange(self.packing.tokens, dtype=np.int32)
        places = np.full(self.packing.tokens, -1, np.int32)
        places[self.kept] = np.arange(len(self.kept))
        return places


class Early(NamedTuple):
    """What rows take in at their first positions, [tiles, tokens, …]: if `raw`, dt in place of Δ."""

    x: Tensor
    delta: Tensor
    B: Tensor
    C: Tensor
    raw: bool


class Recorded(NamedTuple):
    """Where a scan writes states: `slots` has the place of the state after every token, or -1."""

    slots: Int[Tensor, " tokens"]
    states: Float[Tensor, "m d_inner d_state"]


def suits(*tensors: Tensor, d_inner: int) -> bool:
    """Whether these functions take them."""
    return d_inner % LANES == 0 and all(t.device.type == "cpu" and t.dtype == torch.float32 for t in tensors)


def blocks(states: Float[Tensor, "n d_inner d_state"]) -> Float[Tensor, "n n_blocks d_state lanes"]:
    """States with blocks of channels innermost."""
    return states.unflatten(1, (-1, LANES)).transpose(2, 3).contiguous()


def _rate(A: Float[Tensor, "d_inner d_state"]) -> Float[Tensor, "n_blocks d_state lanes"]:
    return blocks((A * 1.4426950408889634)[None])[0]


def conv_silu(
    packing: Packing,
    in_x: Float[Tensor, "tiles some_tokens d_inner"],
    window: Float[Tensor, "n n_before d_inner"],
    taps: Float[Tensor, "d_conv d_inner"],
    bias: Float[Tensor, " d_inner"] | None,
) -> Float[Tensor, "tiles some_tokens d_inner"]:
    """SiLU of the causal depthwise conv. window: the d_conv - 1 inputs before each row. taps: oldest first.

    in_x: of all tokens, or those of the first positions.
    """
    x = torch.empty(in_x.shape)
    bias = torch.zeros(in_x.shape[2]) if bias is None else bias
    n_rows = len(in_x) * packing.n
    _run("conv_silu", n_rows, _CONV * x.numel(), *packing.arrays, in_x, window, taps.contiguous(), bias, x)
    return x


def scanned_rows(
    scan: RowScan,
    x: Float[Tensor, "tiles tokens d_inner"],
    dt: Float[Tensor, "tiles tokens dt_rank"],
    B: Float[Tensor, "tiles tokens d_state"],
    C: Float[Tensor, "tiles tokens d_state"],
    gate: Float[Tensor, "tiles n_kept d_inner"],
    record: Recorded | None = None,
) -> Float[Tensor, "tiles n_kept d_inner"]:
    """(y + D x) · SiLU(gate) of every row, from its past. record: which states to write where, of a single tile."""
    gated = torch.empty(gate.shape)
    slots, states = record or (torch.empty(0, dtype=torch.int32), torch.empty(0, 0, 0))
    inputs = (x, dt, True, scan.dt_weight, scan.bias, B, C, scan.rate, scan.D, gate, scan.past, scan.table, slots)
    seconds = _UPDATE * x.numel() * scan.past.shape[2]
    _run("scanned_rows", len(x) * scan.packing.n, seconds, *scan.packing.arrays, *inputs, states, gated)
    return gated


def forked_rows(
    scan: RowScan,
    early: Early | None,
    states: Float[Tensor, "others n d_inner d_state"] | None,
    base: Early,
    gate: Float[Tensor, "1 n_kept d_inner"],
    first_gate: Float[Tensor, "some n d_inner"] | None = None,
) -> Float[Tensor, "tiles n_kept d_inner"]:
    """(y + D x) · SiLU(gate) of rows that differ from their tile's base rows at their first positions alone.

    early: what the first tiles take in there. states: after position 0, of the tiles that then follow and take in what
    the base does; with them, `early` is of one position. base: what the base rows take in, [1, tokens, …], raw. gate:
    the base rows'. first_gate: the gates of the first tiles at position 0, where they are not the base's.

    What a state adds to y is linear in it, so that all tiles share the exponentials of later positions.
    """
    d_inner = base.x.shape[2]
    tiles = sum(0 if some is None else len(some) for some in (early and early.x, states))
    nothing = torch.empty(0, 1, 0)
    first = Early(nothing, nothing, nothing, nothing, False) if early is None else early
    given = torch.empty(0, 1, 1, 0) if states is None else states
    inputs = (base.x, base.delta, scan.dt_weight, scan.bias, base.B, base.C, scan.rate, scan.D, gate)
    gates = torch.empty(0, 1, d_inner) if first_gate is None else first_gate
    gated = torch.empty(tiles, *gate.shape[1:])
    groups = -(-d_inner // (LANES * GROUP))
    seconds = _CARRIED * tiles * base.x.shape[1] * d_inner
    starts = (first.x, first.delta, first.raw, first.B, first.C, given)
    arrays = (*scan.packing.arrays, *starts, *inputs, gates, scan.past, scan.table, gated)
    _run("forked_rows", scan.packing.n * groups, seconds, *arrays)
    return gated


def normed(
    resid: Float[Tensor, "rows d_model"], weight: Float[Tensor, " d_model"], epsilon: float
) -> Float[Tensor, "rows d_model"]:
    """weight · x / sqrt(mean of x² + epsilon) (Zhang & Sennrich 2019, arXiv:1910.07467)."""
    out = torch.empty(resid.shape)
    rows_per_task = 64
    arrays = (rows_per_task, resid.contiguous(), weight, epsilon, out)
    _run("normed", -(-len(resid) // rows_per_task), _NORM * resid.numel(), *arrays)
    return out


def _run(name: str, n_tasks: int, seconds: float, *arguments: Any) -> None:
    """Run all tasks of a kernel, on torch's number of threads if there is enough to do for all of them."""
    from ssminterp_kernels.rows import kernels  # on first use: numba takes a moment to import

    kernel = kernels.compiled(name)
    n_threads = torch.get_num_threads()
    if n_tasks < 2 or seconds < _SECONDS_PER_THREAD * n_threads:
        n_threads = 1
    arrays = [_in_lines(a).detach().numpy() if isinstance(a, Tensor) else a for a in arguments]
    counter = np.zeros(1, np.int64)
    run_on_threads(lambda: kernel(counter, n_tasks, *arrays), n_threads)


def _in_lines(tensor: Tensor) -> Tensor:
    """A tensor whose last axis lies in one piece; outputs do, so that they are never copied."""
    return tensor if tensor.shape[-1] < 2 or tensor.stride(-1) == 1 else tensor.contiguous()
