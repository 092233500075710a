"""One layer's computation in stages and without hooks, for rows that each go on from the past of their own site.

Rows come in tiles of n sites each, so that row r belongs to site r mod n. Position 0 of a row is its site.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeGuard

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ssminterp.models.mixers.mamba1 import HookedMambaMixer, weights_at_hand
from ssminterp_kernels.causal_conv import Activation, causal_conv
from ssminterp_kernels.selective_scan import selective_scan

# On the CPU, tokens × d_inner for each thread that go through a layer together: what one stage writes is then at hand
# for the next.
CPU_BLOCK_ELEMENTS = 600_000


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
    """The stages of one layer, in the order of the computation (names and equations as in `mixers.mamba1`).

    keep: the positions, ascending, whose gated output is wanted, and gates are given; None means all.
    """

    def __init__(self, block: Any, past: Past, keep: list[int] | None = None) -> None:
        self.block = block
        self.mixer: HookedMambaMixer = block.mixer
        self.past = past
        self.keep = keep
        self.at = _index(keep, past.state.device)
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

    def tiles_at_once(self, suffix: int) -> int:
        """How many tiles of rows go through the layer together: on the CPU, what fits into the caches."""
        per_tile = self.n * suffix * self.mixer.d_inner
        on_cpu = self.past.state.device.type == "cpu"
        return max(1, CPU_BLOCK_ELEMENTS * torch.get_num_threads() // per_tile) if on_cpu else sys.maxsize

    def normed(self, resid: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_model"]:
        return self.block.norm(resid.to(self.block.norm.weight.dtype))

    def projected(self, mixer_in: Float[Tensor, "*rows d_model"]) -> tuple[Tensor, Tensor]:
        """in_x and gate, [*rows, d_inner]."""
        in_x, gate = linear(self.mixer.in_proj, mixer_in).chunk(2, dim=-1)
        return in_x, gate

    def projected_where_read(self, mixer_in: Float[Tensor, "rows pos d_model"]) -> tuple[Tensor, Tensor]:
        """in_x at all positions, gate at those of `keep`."""
        module: Any = self.mixer.in_proj
        if self.keep is None or not is_plain(module):
            in_x, gate = self.projected(mixer_in)
            return in_x, gate[:, self.at]
        halves = module.weight.chunk(2)
        biases = (None, None) if module.bias is None else module.bias.chunk(2)
        return product(mixer_in, halves[0], biases[0]), product(mixer_in[:, self.at], halves[1], biases[1])

    def activated(self, in_x: Float[Tensor, "rows pos d_inner"]) -> Float[Tensor, "rows pos d_inner"]:
        """x from in_x."""
        if self.mixer.config.hidden_act not in ("silu", "swish"):
            return self.mixer.act(self.conv(in_x))
        return self._conv(in_x, "silu")

    def conv(self, in_x: Float[Tensor, "rows pos d_inner"]) -> Float[Tensor, "rows pos d_inner"]:
        return self._conv(in_x, None)

    def _conv(self, in_x: Float[Tensor, "rows pos d_inner"], activation: Activation) -> Tensor:
        """The conv with its bias, of rows that go on from the windows of their sites."""
        window = tiled(self.past.window, len(in_x) // self.n).transpose(1, 2)
        return causal_conv(in_x, self.taps.T, self.conv_bias, activation=activation, window=window).y

    def conv_taps(self, in_x: Float[Tensor, "n d_inner"]) -> Float[Tensor, "n d_inner d_conv"]:
        """The conv's terms at position 0, oldest token first."""
        return torch.cat([self.past.window, in_x[:, None]], 1).transpose(1, 2) * self.taps.T

    def conv_of_taps(self, taps: Float[Tensor, "rows d_inner d_conv"]) -> Float[Tensor, "rows d_inner"]:
        conv = taps.sum(-1)
        return conv if self.conv_bias is None else conv + self.conv_bias

    def parts(self, x: Float[Tensor, "rows pos d_inner"]) -> tuple[Tensor, Tensor, Tensor]:
        """dt, B and C."""
        mixer = self.mixer
        dt, B, C = linear(mixer.x_proj, x).split([mixer.dt_rank, mixer.d_state, mixer.d_state], dim=-1)
        return mixer.normalise(dt, B, C)

    def scan_inputs(self, x: Float[Tensor, "rows pos d_inner"]) -> ScanInputs:
        dt, B, C = self.parts(x)
        module: Any = self.mixer.dt_proj
        delta = product(dt.contiguous(), module.weight) if is_plain(module) else module(dt)
        return ScanInputs(x, delta, B, C, raw=True)

    def delta(self, raw: Float[Tensor, "*rows d_inner"]) -> Float[Tensor, "*rows d_inner"]:
        """Δ from what `scan_inputs` has of it."""
        return F.softplus(raw.float() if self.dt_bias is None else raw.float() + self.dt_bias)

    def gated(
        self, inputs: ScanInputs, gate: Float[Tensor, "rows n_keep d_inner"]
    ) -> Float[Tensor, "rows n_keep d_inner"]:
        """(y + D x) · SiLU(gate) at the positions that are kept, of rows that go on from the pasts of their sites."""
        state = self.past.state.repeat(len(inputs.x) // self.n, 1, 1)
        if self.keep is None:
            return self._scan(inputs, state, gate)[0]
        return self._scan(inputs, state, None)[0][:, self.at] * F.silu(gate)

    def rejoined(
        self,
        early: ScanInputs,
        first_gate: Float[Tensor, "some d_inner"] | None,
        base: ScanInputs,
        gate: Float[Tensor, "n n_keep d_inner"],
    ) -> Float[Tensor, "rows n_keep d_inner"]:
        """`gated` of rows that take in `early` at their first positions, and then what the base rows do.

        first_gate: the gates of the first rows at position 0, where they are not the base's.
        """
        n_tiles, reach = len(early.x) // self.n, early.x.shape[1]
        late = base.at(slice(reach, None)).map(lambda tensor: tiled(tensor, n_tiles))
        gates = gate.repeat(n_tiles, 1, 1)
        if first_gate is not None:
            gates[: len(first_gate), 0] = first_gate
        return self.gated(ScanInputs.cat([early, late], 1), gates)

    def carried(
        self,
        step: ScanInputs | None,
        states: Float[Tensor, "some d_inner d_state"] | None,
        base: ScanInputs,
        gate: Float[Tensor, "n n_keep d_inner"],
    ) -> Float[Tensor, "rows n_keep d_inner"]:
        """`gated` of rows that part from the base rows at position 0 alone: by what they take in, or by their state.

        step: what the first rows take in there. states: those of the other rows after position 0.
        """
        now = gate[:, :1] if self.keep is None else None
        outs, after = [], []
        if step is not None:
            n_tiles = len(step.x) // self.n
            out, state = self._scan(
                step, self.past.state.repeat(n_tiles, 1, 1), None if now is None else tiled(now, n_tiles)
            )
            outs, after = [out], [state]
        if states is not None:
            n_tiles = len(states) // self.n
            y = read(states, tiled(base.C[:, 0], n_tiles)).to(base.x.dtype)
            out = (y + self.D * tiled(base.x[:, 0], n_tiles))[:, None]
            outs.append((out if now is None else out * F.silu(tiled(now, n_tiles))).to(base.x.dtype))
            after.append(states)
        first = torch.cat(outs)
        n_tiles = len(first) // self.n
        if base.x.shape[1] > 1:
            later = base.at(slice(1, None)).map(lambda tensor: tiled(tensor, n_tiles))
            rest = None if now is None else tiled(gate[:, 1:], n_tiles)
            first = torch.cat([first, self._scan(later, torch.cat(after), rest)[0]], 1)
        return first if now is not None else first[:, self.at] * F.silu(tiled(gate, n_tiles))

    def _scan(
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

    def out(self, gated: Float[Tensor, "*rows d_inner"]) -> Float[Tensor, "*rows d_model"]:
        return linear(self.mixer.out_proj, gated.to(self.past.window.dtype))


def read(state: Float[Tensor, "rows d_inner d_state"], C: Float[Tensor, "rows d_state"]) -> Tensor:
    """What C reads from the state."""
    return (state @ C[..., None].to(state.dtype))[..., 0]


def tiled(tensor: Float[Tensor, "n *features"], tiles: int) -> Float[Tensor, "rows *features"]:
    """A copy of n rows for every tile."""
    return tensor.expand(tiles, *tensor.shape).flatten(0, 1)


def _index(keep: list[int] | None, device: torch.device) -> slice | Tensor:
    """What picks the positions: a view, if they follow each other."""
    if keep is None:
        return slice(None)
    if keep[-1] - keep[0] + 1 == len(keep):
        return slice(keep[0], keep[-1] + 1)
    return torch.tensor(keep, device=device)
