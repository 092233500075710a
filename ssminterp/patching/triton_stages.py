"""`Stages` on a GPU, by the Triton kernels of `ssminterp_kernels.rows`."""

from __future__ import annotations

import copy
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ssminterp.patching.products import is_plain, product
from ssminterp.patching.stages import Past, ScanInputs, Stages, parts
from ssminterp_kernels import rows
from ssminterp_kernels.causal_conv import Activation
from ssminterp_kernels.rows.triton_stages import TritonScan, conv_rows, scan_rows


class Room:
    """Where the gated outputs of forks are to be written: the tokens of a tensor from one on."""

    def __init__(self, tokens: Float[Tensor, "tokens d_inner"], first: int) -> None:
        self.tokens = tokens
        self.first = first

    def of(self, tiles: int, tokens: int) -> Float[Tensor, "tiles tokens d_inner"]:
        """The next part of it."""
        width = self.tokens.shape[1]
        found = self.tokens.as_strided((tiles, tokens, width), (tokens * width, width, 1), self.first * width)
        self.first += tiles * tokens
        return found


class TritonStages(Stages):
    """The same stages in few launches, of which each takes the CPU about as long as a small one takes the GPU.

    room: where forks are written; None to allocate it.
    """

    records_states = are_launches = True

    def __init__(
        self,
        block: Any,
        past: Past,
        packing: rows.Packing,
        A: Tensor | None = None,
        keep: list[int] | None = None,
        room: Room | None = None,
    ) -> None:
        super().__init__(block, past, packing, A, keep)
        self.room = room

    def of_rows(self, past: Past, packing: rows.Packing, room: Room) -> TritonStages:
        """The stages of the same layer for other rows, all of which are kept."""
        other = copy.copy(self)
        other.past, other.packing, other.room = past, packing, room
        other.__dict__.pop("_triton_scan", None)
        return other

    def _forks(self, tiles: int, gate: Float[Tensor, "1 n_keep d_inner"]) -> Float[Tensor, "tiles n_keep d_inner"]:
        if self.room is None:
            return gate.new_empty(tiles, *gate.shape[1:])
        return self.room.of(tiles, gate.shape[1])

    def _conv(self, in_x: Float[Tensor, "tiles some_tokens d_inner"], activation: Activation) -> Tensor:
        return self._conv_of(in_x, None, in_x.shape[1], activation)

    def _conv_of(self, own: Tensor, shared: Tensor | None, tokens: int, activation: Activation) -> Tensor:
        inputs = (own, shared, tokens, self.past.window, self.taps, self.conv_bias)
        return conv_rows(self.packing, *inputs, silu=activation == "silu")

    def activated_early(
        self, first: Float[Tensor, "tiles n d_inner"], base: Float[Tensor, "1 tokens d_inner"]
    ) -> Float[Tensor, "tiles some_tokens d_inner"]:
        if not self.has_silu:
            return self.mixer.act(self._conv_of(first, base, self.reach, None))
        return self._conv_of(first, base, self.reach, "silu")

    def scan_inputs(self, x: Float[Tensor, "tiles some_tokens d_inner"]) -> ScanInputs:
        dt, B, C = parts(self.mixer, x)
        module: Any = self.mixer.dt_proj
        if not is_plain(module):
            return ScanInputs(x, module(dt), B, C, raw=True)
        # As a matrix, which needs no copy of dt.
        return ScanInputs(x, product(dt.flatten(0, 1), module.weight).unflatten(0, dt.shape[:2]), B, C, raw=True)

    def gated(
        self,
        inputs: ScanInputs,
        gate: Float[Tensor, "tiles n_keep d_inner"],
        record: rows.Recorded | None = None,
        out: Float[Tensor, "tiles n_keep d_inner"] | None = None,
    ) -> Float[Tensor, "tiles n_keep d_inner"]:
        return scan_rows(self._triton_scan, rows.Early(*inputs), None, None, gate, out=out, record=record)

    def rejoined(
        self,
        early: ScanInputs,
        first_gate: Float[Tensor, "some n d_inner"] | None,
        base: ScanInputs,
        gate: Float[Tensor, "1 n_keep d_inner"],
    ) -> Float[Tensor, "tiles n_keep d_inner"]:
        out = self._forks(len(early.x), gate)
        return scan_rows(self._triton_scan, rows.Early(*early), None, rows.Early(*base), gate, first_gate, out=out)

    def carried(
        self,
        step: ScanInputs | None,
        states: Float[Tensor, "some n d_inner d_state"] | None,
        base: ScanInputs,
        gate: Float[Tensor, "1 n_keep d_inner"],
    ) -> Float[Tensor, "tiles n_keep d_inner"]:
        n_steps, n_states = (0 if some is None else len(some) for some in (step and step.x, states))
        gated = self._forks(n_steps + n_states, gate)
        if step is not None:
            scan_rows(self._triton_scan, rows.Early(*step), None, rows.Early(*base), gate, out=gated[:n_steps])
        if states is not None:
            scan_rows(self._triton_scan, None, states, rows.Early(*base), gate, out=gated[n_steps:])
        return gated

    def add_out(
        self,
        resid: Float[Tensor, "#tiles tokens d_model"],
        gated: Float[Tensor, "tiles tokens d_inner"],
        into: Float[Tensor, "tiles tokens d_model"],
    ) -> None:
        module: Any = self.mixer.out_proj
        fused = is_plain(module) and module.bias is None and resid.dtype == gated.dtype == torch.float32
        if fused and resid is into:
            into.flatten(0, 1).addmm_(gated.flatten(0, 1), module.weight.T)
        elif fused and len(resid) == len(into):
            torch.addmm(resid.flatten(0, 1), gated.flatten(0, 1), module.weight.T, out=into.flatten(0, 1))
        else:
            super().add_out(resid, gated, into)

    @cached_property
    def _triton_scan(self) -> TritonScan:
        return TritonScan(self.packing, self.A, self.given_D, self.given_dt_bias, self.past.state, self.keep)


def scan_inputs_of_tokens(mixer: Any, x: Float[Tensor, "tokens d_inner"]) -> ScanInputs:
    """`TritonStages.scan_inputs` of tokens that lie in no tiles: [tokens, …]."""
    dt, B, C = parts(mixer, x)
    module: Any = mixer.dt_proj
    return ScanInputs(x, product(dt, module.weight) if is_plain(module) else module(dt), B, C, raw=True)
