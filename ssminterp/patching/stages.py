"""One layer's computation in stages and without hooks, for rows that each go on from the past of their own site.

Rows come in tiles of n sites each, so that row r belongs to site r mod n. Position 0 of a row is its site.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeGuard

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ssminterp.models.mixers.mamba1 import HookedMambaMixer, weights_at_hand
from ssminterp_kernels.selective_scan import selective_scan


class Past(NamedTuple):
    """What a layer remembers of the tokens before each site: [n, d_conv - 1, d_inner] and [n, d_inner, d_state]."""

    window: Tensor
    state: Tensor


class ScanInputs(NamedTuple):
    """What a scan takes in, each [rows, pos, …]; `delta` is Δ, or, if `raw`, what its bias and softplus make Δ of."""

    x: Tensor
    delta: Tensor
    B: Tensor
    C: Tensor
    raw: bool

    def map(self, change: Callable[[Tensor], Tensor]) -> ScanInputs:
        """The same change of every tensor."""
        return ScanInputs(change(self.x), change(self.delta), change(self.B), change(self.C), self.raw)

    def at(self, positions: slice) -> ScanInputs:
        return self.map(lambda tensor: tensor[:, positions])

    @staticmethod
    def cat(parts: Sequence[ScanInputs], dim: int) -> ScanInputs:
        """Several in a row, all of them raw or none."""
        x, delta, B, C = (torch.cat([part[i] for part in parts], dim) for i in range(4))  # type: ignore[misc]
        return ScanInputs(x, delta, B, C, parts[0].raw)


def product(x: Float[Tensor, "*rows d_in"], weight: Float[Tensor, "d_out d_in"], bias: Tensor | None = None) -> Tensor:
    """x weightᵀ + bias. In float32 on the CPU by oneDNN, which can be twice as fast as what `F.linear` takes there."""
    if x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32 and torch.backends.mkldnn.is_available():
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def linear(module: nn.Module, x: Float[Tensor, "*rows d_in"]) -> Tensor:
    """What the module makes of x: by `product`, if it is no more than a matrix that is at hand."""
    return product(x, module.weight, module.bias) if is_plain(module) else module(x)


def is_plain(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a module is a linear layer and nothing else: no adapter, and weights that accelerate does not move."""
    return type(module) is nn.Linear and not hasattr(module, "_hf_hook") and not module._forward_hooks


class Stages:
    """The stages of one layer, in the order of the computation (names and equations as in `mixers.mamba1`)."""

    def __init__(self, block: Any, past: Past) -> None:
        self.block = block
        self.mixer: HookedMambaMixer = block.mixer
        self.past = past
        mixer = self.mixer
        with weights_at_hand(mixer):
            self.A, self.D = mixer.A(), mixer.D.float()
        with weights_at_hand(mixer.conv1d):
            self.taps = mixer.conv1d.weight[:, 0].T  # oldest first: d_conv, d_inner
            self.conv_bias = mixer.conv1d.bias
        self.dt_bias = mixer.dt_proj.bias.float() if is_plain(mixer.dt_proj) else None

    @property
    def n(self) -> int:
        return len(self.past.state)

    def normed(self, resid: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_model"]:
        return self.block.norm(resid.to(self.block.norm.weight.dtype))

    def projected(self, mixer_in: Float[Tensor, "*rows d_model"]) -> tuple[Tensor, Tensor]:
        """in_x and gate, [*rows, d_inner]."""
        in_x, gate = linear(self.mixer.in_proj, mixer_in).chunk(2, dim=-1)
        return in_x, gate

    def projected_where_read(
        self, mixer_in: Float[Tensor, "rows pos d_model"], keep: slice | Tensor
    ) -> tuple[Tensor, Tensor]:
        """in_x at all positions, gate at those of `keep`."""
        module: Any = self.mixer.in_proj
        if not is_plain(module):
            in_x, gate = self.projected(mixer_in)
            return in_x, gate[:, keep]
        halves = module.weight.chunk(2)
        biases = (None, None) if module.bias is None else module.bias.chunk(2)
        return product(mixer_in, halves[0], biases[0]), product(mixer_in[:, keep], halves[1], biases[1])

    def conv(self, in_x: Float[Tensor, "rows pos d_inner"]) -> Float[Tensor, "rows pos d_inner"]:
        """The conv with its bias, as shifted sums: rows are short and many."""
        last, length = len(self.taps) - 1, in_x.shape[1]
        conv = in_x * self.taps[last]
        if self.conv_bias is not None:
            conv += self.conv_bias
        for back in range(1, min(last + 1, length)):
            conv[:, back:].addcmul_(in_x[:, :-back], self.taps[last - back])
        early = self._from_window(min(last, length))
        conv.unflatten(0, (-1, self.n))[:, :, : early.shape[1]] += early
        return conv

    def _from_window(self, length: int) -> Float[Tensor, "n pos d_inner"]:
        """What the inputs before the site add to the conv at the first positions."""
        last = len(self.taps) - 1
        early = self.past.window.new_zeros(self.n, length, self.past.window.shape[2])
        for back in range(1, last + 1):
            reached = min(back, length)
            early[:, :reached] += self.past.window[:, last - back :][:, :reached] * self.taps[last - back]
        return early

    def conv_taps(self, in_x: Float[Tensor, "n d_inner"]) -> Float[Tensor, "n d_inner d_conv"]:
        """The conv's terms at position 0, oldest token first."""
        return torch.cat([self.past.window, in_x[:, None]], 1).transpose(1, 2) * self.taps.T

    def conv_of_taps(self, taps: Float[Tensor, "rows d_inner d_conv"]) -> Float[Tensor, "rows d_inner"]:
        conv = taps.sum(-1)
        return conv if self.conv_bias is None else conv + self.conv_bias

    def scan_inputs(self, x: Float[Tensor, "rows pos d_inner"]) -> ScanInputs:
        mixer = self.mixer
        dt, B, C = linear(mixer.x_proj, x).split([mixer.dt_rank, mixer.d_state, mixer.d_state], dim=-1)
        dt, B, C = mixer.normalise(dt, B, C)
        plain: Any = mixer.dt_proj
        delta = product(dt.contiguous(), plain.weight) if is_plain(plain) else mixer.dt_proj(dt)
        return ScanInputs(x, delta, B, C, raw=True)

    def delta(self, raw: Float[Tensor, "*rows d_inner"]) -> Float[Tensor, "*rows d_inner"]:
        """Δ from what `scan_inputs` has of it."""
        return F.softplus(raw.float() if self.dt_bias is None else raw.float() + self.dt_bias)

    def scan(
        self, inputs: ScanInputs, initial_state: Float[Tensor, "rows d_inner d_state"], gate: Tensor | None
    ) -> tuple[Float[Tensor, "rows pos d_inner"], Float[Tensor, "rows d_inner d_state"]]:
        """y + D x, times SiLU(gate) if there is one, and the final state."""
        out = selective_scan(
            inputs.x,
            inputs.delta,
            self.A,
            inputs.B,
            inputs.C,
            D=self.D,
            z=gate,
            delta_bias=self.dt_bias if inputs.raw else None,
            delta_softplus=inputs.raw,
            initial_state=initial_state,
        )
        return out.y, out.final_state

    def past_state(self, n_tiles: int) -> Float[Tensor, "rows d_inner d_state"]:
        """The states before the sites, a copy for every tile."""
        return self.past.state.repeat(n_tiles, 1, 1)

    def out(self, gated: Float[Tensor, "*rows d_inner"]) -> Float[Tensor, "*rows d_model"]:
        return linear(self.mixer.out_proj, gated.to(self.past.window.dtype))
