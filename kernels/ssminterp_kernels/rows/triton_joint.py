"""Launches the scan of whole runs and of rows that go on from their states: one launch a layer."""

from __future__ import annotations

from enum import IntEnum
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ssminterp_kernels.rows.mixer_stages import Recorded
from ssminterp_kernels.rows.packing import Packing
from ssminterp_kernels.rows.triton_joint_kernel import B_ROW, DELTA, STATE, joint_scan_kernel
from ssminterp_kernels.selective_scan.triton_plan import next_power_of_2
from ssminterp_kernels.sized_launching import Sized

_BLOCK_D, _WARPS = 64, 2
# With 16 numbers of a state the compiler takes 123 registers a thread. With 96 a fourth more programs run at once, and
# they mostly wait for memory.
_joint_scan, _joint_scan_of_large_states = Sized(joint_scan_kernel, max_registers=96), Sized(joint_scan_kernel)


class Fork(IntEnum):
    """What a fork of the first tile takes from the source run at position 0: the state after it, what Δ is made of
    there, or B."""

    STATE = STATE.value
    DELTA = DELTA.value
    B = B_ROW.value


class JointScan:
    """The scans of runs and of rows, layer after layer.

    Tokens are those of n_runs whole runs, position by position, and behind them tiles, in which the tokens lie as
    `packing` says. The rows of a tile go on from the runs' states. device: of all tensors.
    """

    def __init__(self, packing: Packing, n_runs: int, length: int, d_inner: int, device: torch.device) -> None:
        self.packing = packing
        self.n_runs = n_runs
        self.length = length
        self.n_blocks = -(-d_inner // _BLOCK_D)
        self.device = device
        # Counted on, so that nothing need be set to zero again.
        self._finished = torch.zeros(self.n_blocks, dtype=torch.int32, device=device)
        self._n_finished = 0
        self._kinds: dict[tuple[Fork, ...], Tensor] = {}

    def __call__(
        self,
        x: Float[Tensor, "tokens d_inner"],
        delta: Float[Tensor, "tokens d_inner"],
        A: Float[Tensor, "d_inner d_state"],
        B: Float[Tensor, "tokens d_state"],
        C: Float[Tensor, "tokens d_state"],
        D: Float[Tensor, " d_inner"],
        gate: Float[Tensor, "tokens d_inner"],
        bias: Float[Tensor, " d_inner"] | None,
        record: Recorded,
        sites: Int[Tensor, "n 3"],
        forks: tuple[Fork, ...],
        out: Float[Tensor, "tokens_and_forks d_inner"],
    ) -> None:
        """Writes (y + D x) · SiLU(gate) of all tokens, Δ = softplus(delta + bias), and of tiles behind them.

        record: which states of runs to write where. sites: int32; of every row the place there of the state before it,
        that of the source run's state after its position 0, and the source run's token at position 0. forks: tiles that
        are the first one but for what they take from there; they are written behind the tokens. Of `out`, more tokens
        are left as they are.
        """
        tokens, d_inner = x.shape
        packing, n_tile = self.packing, self.packing.tokens
        d_state = A.shape[1]
        n_tiles = (tokens - self.n_runs * self.length) // n_tile
        n_units = n_tiles + len(forks)
        starts, lengths, _, _ = packing.on(self.device)
        self._n_finished += self.n_runs
        block_n = next_power_of_2(d_state)
        launched = _joint_scan if block_n <= 16 else _joint_scan_of_large_states
        launched(
            (self.n_runs + n_units * packing.n) * self.n_blocks,
            (
                *(_rows(x), _rows(delta), _rows(B), _rows(C), _rows(gate), A, (D, D.stride(0))),
                *(None if bias is None else (bias, bias.stride(0)), out, *record, sites, self._kinds_of(forks)),
                *(starts, lengths, self._finished),
            ),
            (d_inner, d_state),
            (self.n_runs, self.length, n_tiles, n_units, n_tile, self.n_blocks, self._n_finished, 0),
            (d_state == block_n and d_state >= 4, block_n, _BLOCK_D),
            num_warps=_WARPS,
        )

    def _kinds_of(self, forks: tuple[Fork, ...]) -> Tensor:
        if forks not in self._kinds:
            # Never empty, so that the kernel is the same where there are none.
            kinds = torch.tensor([*forks, 0], dtype=torch.int32)
            self._kinds[forks] = kinds.to(self.device, non_blocking=True)
        return self._kinds[forks]


def _rows(tensor: Float[Tensor, "tokens width"]) -> tuple[Any, int]:
    if tensor.stride(1) != 1:
        tensor = tensor.contiguous()
    return tensor, tensor.stride(0)
