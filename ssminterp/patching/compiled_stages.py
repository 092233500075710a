"""`Stages` in float32 on the CPU, by the compiled loops of `ssminterp_kernels.rows`."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ssminterp.models.norm import FusedRMSNorm
from ssminterp.patching.products import is_plain
from ssminterp.patching.stages import Past, ScanInputs, Stages, parts
from ssminterp_kernels import rows
from ssminterp_kernels.backends import takes_triton


class CompiledStages(Stages):
    """The same stages, each in one pass over memory; what follows a change of the state alone, without exponentials."""

    records_states = True

    def normed(self, resid: Float[Tensor, "*tokens d_model"]) -> Float[Tensor, "*tokens d_model"]:
        norm = self.block.norm
        is_plain_norm = type(norm) is FusedRMSNorm and not norm._forward_hooks and not hasattr(norm, "_hf_hook")
        if not is_plain_norm or not norm.weight.dtype == resid.dtype == torch.float32:
            return super().normed(resid)
        return rows.normed(resid.flatten(0, -2), norm.weight, norm.variance_epsilon).view(resid.shape)

    def activated(self, in_x: Float[Tensor, "tiles some_tokens d_inner"]) -> Float[Tensor, "tiles some_tokens d_inner"]:
        if not self.has_silu:
            return super().activated(in_x)
        return rows.conv_silu(self.packing, in_x, self.past.window, self.taps, self.conv_bias)

    def scan_inputs(self, x: Float[Tensor, "tiles some_tokens d_inner"]) -> ScanInputs:
        """In place of what makes Δ, what dt_proj makes that of."""
        return ScanInputs(x, *parts(self.mixer, x), raw=True)

    def delta(self, raw: Float[Tensor, "*rows dt_rank"]) -> Float[Tensor, "*rows d_inner"]:
        return super().delta(F.linear(raw, self.mixer.dt_proj.weight))

    def gated(
        self,
        inputs: ScanInputs,
        gate: Float[Tensor, "tiles n_keep d_inner"],
        record: rows.Recorded | None = None,
    ) -> Float[Tensor, "tiles n_keep d_inner"]:
        return rows.scanned_rows(self._row_scan, inputs.x, inputs.delta, inputs.B, inputs.C, gate, record)

    def rejoined(
        self,
        early: ScanInputs,
        first_gate: Float[Tensor, "some n d_inner"] | None,
        base: ScanInputs,
        gate: Float[Tensor, "1 n_keep d_inner"],
    ) -> Float[Tensor, "tiles n_keep d_inner"]:
        return rows.forked_rows(self._row_scan, rows.Early(*early), None, rows.Early(*base), gate, first_gate)

    def carried(
        self,
        step: ScanInputs | None,
        states: Float[Tensor, "some n d_inner d_state"] | None,
        base: ScanInputs,
        gate: Float[Tensor, "1 n_keep d_inner"],
    ) -> Float[Tensor, "tiles n_keep d_inner"]:
        early = None if step is None else rows.Early(*step)
        return rows.forked_rows(self._row_scan, early, states, rows.Early(*base), gate)

    @cached_property
    def _row_scan(self) -> rows.RowScan:
        return rows.RowScan.of(
            self.packing, self.A, self.D, self.mixer.dt_proj.weight, self.dt_bias, self.past.state, self.keep
        )


def stages_class(mixer: Any, *held: Tensor) -> type[Stages]:
    """The fastest stages that suit where a mixer is and what it and some tensors are held in."""
    weight = mixer.conv1d.weight
    if takes_triton(weight):
        from ssminterp.patching.triton_stages import TritonStages  # Triton may not be installed

        return TritonStages
    suits = rows.suits(mixer.A_log, mixer.D, weight, *held, d_inner=mixer.d_inner) and is_plain(mixer.dt_proj)
    return CompiledStages if suits else Stages


def stages_of(
    block: Any, past: Past, packing: rows.Packing, A: Tensor | None = None, keep: list[int] | None = None
) -> Stages:
    """One layer by the fastest stages that suit it."""
    return stages_class(block.mixer, past.window, past.state)(block, past, packing, A, keep)
