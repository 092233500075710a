"""What every hook of a layer holds in the base rows, computed when a change asks for it."""

from __future__ import annotations

from functools import cached_property

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ssminterp.patching.stages import ScanInputs, Stages, read


class BaseRows:
    """The base rows of a layer, [1, tokens, …]: `inputs` to the scan, and what every hook holds at the n sites.

    resid, mixer_in, in_x: theirs, and those of other tiles behind them; where stages are launches, inputs too.
    """

    def __init__(
        self, stages: Stages, resid: Tensor, mixer_in: Tensor, in_x: Tensor, gate: Tensor, inputs: ScanInputs
    ) -> None:
        self.stages = stages
        self.n = stages.n
        self.of_tiles = (resid, mixer_in, in_x)
        self.all_gate = gate
        self.inputs = inputs

    def value(self, short: str) -> Float[Tensor, "n *features"]:
        return getattr(self, short)

    @cached_property
    def resid_pre(self) -> Tensor:
        return self.of_tiles[0][0, : self.n]

    @cached_property
    def mixer_in(self) -> Tensor:
        return self.of_tiles[1][0, : self.n]

    @cached_property
    def all_in_x(self) -> Tensor:
        return self.of_tiles[2][:1]

    @cached_property
    def in_x(self) -> Tensor:
        return self.all_in_x[0, : self.n]

    @cached_property
    def gate(self) -> Tensor:
        """Zeros at sites that are not kept."""
        kept = self.stages.kept_sites
        if len(kept) == self.n:
            return self.all_gate[0, : self.n]
        gate = self.all_gate.new_zeros(self.n, self.all_gate.shape[-1])
        gate[kept] = self.all_gate[0, : len(kept)]
        return gate

    @cached_property
    def conv(self) -> Tensor:
        return self.stages.conv(self.in_x[None])[0]

    @property
    def conv_taps(self) -> Tensor:
        return self.stages.conv_taps(self.in_x)

    @property
    def x(self) -> Tensor:
        return self.inputs.x[0, : self.n]

    @cached_property
    def delta(self) -> Tensor:
        return self.stages.delta(self.inputs.delta[0, : self.n])

    @property
    def B(self) -> Tensor:
        return self.inputs.B[0, : self.n]

    @property
    def C(self) -> Tensor:
        return self.inputs.C[0, : self.n]

    @cached_property
    def A_bar(self) -> Tensor:
        return torch.exp(self.delta[..., None] * self.stages.A)

    @cached_property
    def B_bar(self) -> Tensor:
        return self.delta[..., None] * self.B[:, None].float()

    @cached_property
    def inflow(self) -> Tensor:
        """What is added to the states at the sites."""
        return self.B_bar * self.x[..., None].float()

    @cached_property
    def state(self) -> Tensor:
        return self.A_bar * self.stages.past.state + self.inflow

    @cached_property
    def y(self) -> Tensor:
        return read(self.state, self.C).to(self.x.dtype)

    @cached_property
    def ssm_out(self) -> Tensor:
        return self.y + self.stages.D * self.x

    @cached_property
    def gated(self) -> Tensor:
        return self.ssm_out * F.silu(self.gate)

    @cached_property
    def mixer_out(self) -> Tensor:
        return self.stages.out(self.gated)

    @cached_property
    def resid_post(self) -> Tensor:
        return self.resid_pre + self.mixer_out
