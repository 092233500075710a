"""dLoss/dstate at chosen positions or all, without a graph.

With g_t = dLoss/dstate_t, the adjoint: g_t = A_bar_{t+1} · g_{t+1} + C_t · dy_t (Gu & Dao 2023, equation 2a,
transposed). It needs no states, so adjoints everywhere cost what states everywhere cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ssminterp_kernels.backends import on_device_of
from ssminterp_kernels.selective_scan.arguments import ScanArguments, check_arguments
from ssminterp_kernels.selective_scan.edits import StateEdits
from ssminterp_kernels.selective_scan.interface import Backend, choose_backend


@torch.no_grad()
def adjoint_states(
    dy: Float[Tensor, "batch pos d_inner"],
    delta: Float[Tensor, "batch pos d_inner"],
    A: Float[Tensor, "d_inner d_state"],
    C: Float[Tensor, "batch pos *n_groups d_state"],
    z: Float[Tensor, "batch pos d_inner"] | None = None,
    delta_bias: Float[Tensor, " d_inner"] | None = None,
    delta_softplus: bool = False,
    dfinal_state: Float[Tensor, "batch d_inner d_state"] | None = None,
    edits: StateEdits | None = None,
    states: Literal["all"] | Sequence[int] = "all",
    states_dtype: torch.dtype | None = None,
    backend: Backend = "auto",
) -> Float[Tensor, "batch n_positions d_inner d_state"]:
    """dLoss/dstate_t, direct and through all later states, at the positions in `states`.

    dy: the gradient of the scan's y (of the gated y if z is given). dfinal_state: that of its final state.
    delta, A, C, z, delta_bias, delta_softplus, edits: as the scan had them. The adjoint at an edited position is that
    of the state after the edit, which is the gradient with respect to the edit's `add`. states_dtype: torch.bfloat16
    to have the adjoints rounded to half their memory.

    Raises ValueError as `selective_scan` does, which calls dy x and dfinal_state initial_state.
    """
    arguments = check_arguments(
        ScanArguments(
            dy, delta, A, C, C, None, z, delta_bias, delta_softplus, dfinal_state, states, edits, states_dtype
        )
    )
    if choose_backend(arguments, backend) == "triton":
        from ssminterp_kernels.selective_scan.triton_adjoint_states import triton_adjoints

        with on_device_of(arguments.x):
            return triton_adjoints(arguments)
    return _torch_adjoints(arguments)


def _torch_adjoints(arguments: ScanArguments) -> Float[Tensor, "batch n_positions d_inner d_state"]:
    """As `adjoint_states`, position by position; dy is `arguments.x`, dfinal_state is `arguments.initial_state`."""
    batch, length, d_inner, d_state = arguments.sizes
    dtype = arguments.state_dtype
    step = arguments.delta.to(dtype)
    if arguments.delta_bias is not None:
        step = step + arguments.delta_bias.to(dtype)
    step = F.softplus(step) if arguments.delta_softplus else step
    dy = arguments.x.to(dtype)
    if arguments.z is not None:
        dy = dy * F.silu(arguments.z.to(dtype))
    rows = {position: i for i, position in enumerate(arguments.recorded_positions)}
    out = dy.new_empty(batch, len(rows), d_inner, d_state, dtype=arguments.recorded_dtype)
    A, C = arguments.A.to(dtype), arguments.C.to(dtype)
    per_group = d_inner // C.shape[2]
    carry = dy.new_zeros(batch, d_inner, d_state)
    if arguments.initial_state is not None:
        carry = carry + arguments.initial_state
    for t in reversed(range(length)):
        adjoint = carry + dy[:, t, :, None] * C[:, t].repeat_interleave(per_group, dim=1)
        if t in rows:
            out[:, rows[t]] = adjoint
        if arguments.edits is not None:
            adjoint = adjoint * _kept_at(arguments.edits, t, adjoint)
        carry = torch.exp(step[:, t, :, None] * A) * adjoint
    return out


def _kept_at(edits: StateEdits, t: int, like: Tensor) -> Tensor:
    """What the edit at t keeps of the state, broadcastable to [batch, d_inner, d_state]; 1 where there is no edit."""
    keep = edits.keep.expand(like.shape[0], edits.n_edits, *edits.keep.shape[2:]).to(like.dtype)
    if isinstance(edits.positions, Tensor):
        here = (edits.positions.to(like.device) == t)[:, :, None, None]
        return torch.where(here, keep, 1.0).prod(dim=1)
    return keep[:, edits.positions.index(t)] if t in edits.positions else like.new_ones(1)
