"""The selective scan as the paper writes it: one plain loop over positions, differentiable by autograd.

Readable before fast. Every other path is tested against this one in float64. It builds tensors of
[batch, pos, d_inner, d_state], so it is not meant for work.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import einsum, repeat
from jaxtyping import Float
from torch import Tensor

from ssminterp_kernels.selective_scan.edits import StateEdits


def recurrence(
    A_bar: Float[Tensor, "batch pos d_inner d_state"],
    B_bar_x: Float[Tensor, "batch pos d_inner d_state"],
    initial_state: Float[Tensor, "batch d_inner d_state"] | None = None,
    edits: StateEdits | None = None,
) -> Float[Tensor, "batch pos d_inner d_state"]:
    """All states of `state_t = A_bar_t · state_{t-1} + B_bar_x_t`, each edited where `edits` says so."""
    batch, _, d_inner, d_state = A_bar.shape
    state = A_bar.new_zeros(batch, d_inner, d_state) if initial_state is None else initial_state.to(A_bar.dtype)
    unbound = [] if edits is None else _unbound(edits, A_bar.device)
    states = []
    # Unbound at once: the gradient of one position's slice would be as large as the whole sequence.
    for t, (decay, read) in enumerate(zip(A_bar.unbind(1), B_bar_x.unbind(1), strict=True)):
        state = _edited(decay * state + read, t, unbound)
        states.append(state)
    return torch.stack(states, dim=1)


def selective_scan_reference(
    x: Float[Tensor, "batch pos d_inner"],
    delta: Float[Tensor, "batch pos d_inner"],
    A: Float[Tensor, "d_inner d_state"],
    B: Float[Tensor, "batch pos *n_groups d_state"],
    C: Float[Tensor, "batch pos *n_groups d_state"],
    D: Float[Tensor, " d_inner"] | None = None,
    z: Float[Tensor, "batch pos d_inner"] | None = None,
    delta_bias: Float[Tensor, " d_inner"] | None = None,
    delta_softplus: bool = False,
    initial_state: Float[Tensor, "batch d_inner d_state"] | None = None,
    edits: StateEdits | None = None,
) -> tuple[Float[Tensor, "batch pos d_inner"], Float[Tensor, "batch pos d_inner d_state"]]:
    """y and all states, in the dtype of the inputs (use float64). Gu & Dao 2023, algorithm 2 and equation 2a."""
    if delta_bias is not None:
        delta = delta + delta_bias
    if delta_softplus:
        delta = F.softplus(delta)
    B, C = (_one_row_per_channel(weights, x.shape[-1]) for weights in (B, C))
    A_bar = torch.exp(einsum(delta, A, "batch pos d_inner, d_inner d_state -> batch pos d_inner d_state"))
    B_bar_x = (delta * x)[..., None] * B
    states = recurrence(A_bar, B_bar_x, initial_state, edits)
    y = (C * states).sum(-1)
    if D is not None:
        y = y + D * x
    if z is not None:
        y = y * F.silu(z)
    return y, states


def _one_row_per_channel(weights: Tensor, d_inner: int) -> Tensor:
    """B or C, [batch, pos, d_state] or [batch, pos, n_groups, d_state], as [batch, pos, d_inner or 1, d_state]."""
    if weights.dim() == 3:
        return weights[:, :, None]
    return repeat(
        weights, "batch pos n_groups d_state -> batch pos (n_groups k) d_state", k=d_inner // weights.shape[2]
    )


def _unbound(edits: StateEdits, device: torch.device) -> list[tuple[int | Tensor, Tensor, Tensor]]:
    """Of each edit: its position, or those in each batch element; keep and add."""
    keep, add = (
        v.reshape((1,) * (4 - v.dim()) + v.shape).expand(-1, edits.n_edits, -1, -1).unbind(1)
        for v in (edits.keep, edits.add)
    )
    positions = edits.positions.to(device).unbind(1) if isinstance(edits.positions, Tensor) else edits.positions
    return list(zip(positions, keep, add, strict=True))


def _edited(state: Tensor, t: int, edits: list[tuple[int | Tensor, Tensor, Tensor]]) -> Tensor:
    for position, keep, add in edits:
        here = position == t
        if isinstance(here, Tensor):
            state = torch.where(here[:, None, None], keep * state + add, state)
        elif here:
            state = keep * state + add
    return state
