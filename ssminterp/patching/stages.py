"""One layer's computation in stages and without hooks, for rows that each go on from the past of their own site.

Rows come in tiles of n, a row for each site, and lie in a tile as `Packing` says: the first n of its tokens are the
sites themselves, which are position 0 of the rows. Tensors are [tiles, tokens, …], or [tiles, n, …] of sites alone.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from ssminterp.models import HookedMamba
from ssminterp.models.mixers.mamba1 import SILU, HookedMambaMixer, weights_at_hand
from ssminterp.patching.products import halves, is_plain, linear, product
from ssminterp_kernels.causal_conv import Activation, causal_conv
from ssminterp_kernels.rows import Packing, Recorded
from ssminterp_kernels.selective_scan import selective_scan

# On the CPU, tokens × d_inner for each thread that go through a layer together: what one stage writes is then at hand
# for the next.
CPU_BLOCK_ELEMENTS = 600_000


class Past(NamedTuple):
    """What a layer remembers of the tokens before each site: [n, d_conv - 1, d_inner] and [n, d_inner, d_state]."""

    window: Tensor
    state: Tensor


class ScanInputs(NamedTuple):
    """What a scan takes in, each [tiles, tokens, …]; `delta` is Δ, or, if `raw`, what Δ is made of."""

    x: Tensor
    delta: Tensor
    B: Tensor
    C: Tensor
    raw: bool

    def map(self, change: Callable[[Tensor], Tensor]) -> ScanInputs:
        """The same change of every tensor."""
        return ScanInputs(change(self.x), change(self.delta), change(self.B), change(self.C), self.raw)

    def at(self, tokens: slice) -> ScanInputs:
        return self.map(lambda tensor: tensor[:, tokens])

    @staticmethod
    def cat(parts: Sequence[ScanInputs], dim: int) -> ScanInputs:
        """Several in a row, all of them raw or none."""
        x, delta, B, C = (torch.cat([part[i] for part in parts], dim) for i in range(4))  # type: ignore[misc]
        return ScanInputs(x, delta, B, C, parts[0].raw)


class Stages:
    """The stages of one layer, in the order of the computation (names and equations as in `mixers.mamba1`).

    A: of the mixer, from `every_A`; None means that it is still to be made.
    keep: the tokens of a tile, ascending, whose gated output is wanted, and gates are given; None means all.
    """

    records_states = False
    """Whether `gated` can write down states on its way."""

    are_launches = False
    """Whether the stages are launches on a GPU, the fewer the better."""

    def __init__(
        self, block: Any, past: Past, packing: Packing, A: Tensor | None = None, keep: list[int] | None = None
    ) -> None:
        self.block = block
        self.mixer: HookedMambaMixer = block.mixer
        self.past = past
        self.packing = packing
        self.keep = keep
        self.at = token_index(keep, past.state.device)
        mixer = self.mixer
        with weights_at_hand(mixer):
            self.A, self.given_D = mixer.A() if A is None else A, mixer.D
        with weights_at_hand(mixer.conv1d):
            self.taps = mixer.conv1d.weight[:, 0].T  # oldest first: d_conv, d_inner
            self.conv_bias = mixer.conv1d.bias
        self.given_dt_bias = mixer.dt_proj.bias if is_plain(mixer.dt_proj) else None

    @cached_property
    def D(self) -> Float[Tensor, " d_inner"]:
        return self.given_D.float()

    @cached_property
    def dt_bias(self) -> Float[Tensor, " d_inner"] | None:
        """None if dt_proj has added it."""
        return None if self.given_dt_bias is None else self.given_dt_bias.float()

    @property
    def n(self) -> int:
        return self.packing.n

    @property
    def reach(self) -> int:
        """How many tokens the conv of a site's own value reaches."""
        return self.packing.tokens_before(len(self.taps))

    @property
    def has_silu(self) -> bool:
        return self.mixer.config.hidden_act in SILU

    @property
    def kept_sites(self) -> list[int]:
        """The sites whose position 0 is kept; they are the first tokens that are."""
        return list(range(self.n)) if self.keep is None else [token for token in self.keep if token < self.n]

    def tiles_at_once(self) -> int:
        """How many tiles of rows go through the layer together: on the CPU, what fits into the caches."""
        per_tile = self.packing.tokens * self.mixer.d_inner
        on_cpu = self.past.state.device.type == "cpu"
        return max(1, CPU_BLOCK_ELEMENTS * torch.get_num_threads() // per_tile) if on_cpu else sys.maxsize

    def normed(self, resid: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_model"]:
        return self.block.norm(resid.to(self.block.norm.weight.dtype))

    def projected(self, mixer_in: Float[Tensor, "*tokens d_model"]) -> tuple[Tensor, Tensor]:
        """in_x and gate, [*tokens, d_inner]."""
        module: Any = self.mixer.in_proj
        if mixer_in.device.type == "cpu" and is_plain(module):
            (of_x, x_bias), (of_gate, gate_bias) = halves(module)
            # oneDNN makes two matrices of 384 columns a fourth faster than one of 768.
            return product(mixer_in, of_x, x_bias), product(mixer_in, of_gate, gate_bias)
        in_x, gate = linear(module, mixer_in).chunk(2, dim=-1)
        return in_x, gate

    def projected_where_read(self, mixer_in: Float[Tensor, "tiles tokens d_model"]) -> tuple[Tensor, Tensor]:
        """in_x of all tokens, gate of those of `keep`."""
        module: Any = self.mixer.in_proj
        if self.keep is None or not is_plain(module):
            in_x, gate = self.projected(mixer_in)
            return in_x, gate[:, self.at]
        (of_x, x_bias), (of_gate, gate_bias) = halves(module)
        return product(mixer_in, of_x, x_bias), product(mixer_in[:, self.at], of_gate, gate_bias)

    def activated(self, in_x: Float[Tensor, "tiles some_tokens d_inner"]) -> Float[Tensor, "tiles some_tokens d_inner"]:
        """x from in_x, of all tokens or those of the first positions."""
        if not self.has_silu:
            return self.mixer.act(self.conv(in_x))
        return self._conv(in_x, "silu")

    def activated_early(
        self, first: Float[Tensor, "tiles n d_inner"], base: Float[Tensor, "1 tokens d_inner"]
    ) -> Float[Tensor, "tiles some_tokens d_inner"]:
        """x of the tokens that the conv of the sites' values reaches, from in_x at the sites and of the base rows."""
        later = base[:, self.n : self.reach].expand(len(first), -1, -1)
        return self.activated(torch.cat([first, later], 1))

    def conv(self, in_x: Float[Tensor, "tiles some_tokens d_inner"]) -> Float[Tensor, "tiles some_tokens d_inner"]:
        return self._conv(in_x, None)

    def _conv(self, in_x: Float[Tensor, "tiles some_tokens d_inner"], activation: Activation) -> Tensor:
        """The conv with its bias, of rows that go on from the windows of their sites."""
        window = tiled(self.past.window, len(in_x)).transpose(1, 2)
        rows = _padded(in_x, self.packing)
        return _packed(
            causal_conv(rows, self.taps.T, self.conv_bias, activation=activation, window=window).y,
            self.packing,
            in_x.shape[1],
        )

    def conv_taps(self, in_x: Float[Tensor, "n d_inner"]) -> Float[Tensor, "n d_inner d_conv"]:
        """The conv's terms at position 0, oldest token first."""
        return torch.cat([self.past.window, in_x[:, None]], 1).transpose(1, 2) * self.taps.T

    def conv_of_taps(self, taps: Float[Tensor, "*rows d_inner d_conv"]) -> Float[Tensor, "*rows d_inner"]:
        conv = taps.sum(-1)
        return conv if self.conv_bias is None else conv + self.conv_bias

    def scan_inputs(self, x: Float[Tensor, "tiles some_tokens d_inner"]) -> ScanInputs:
        dt, B, C = parts(self.mixer, x)
        module: Any = self.mixer.dt_proj
        delta = product(dt.contiguous(), module.weight) if is_plain(module) else module(dt)
        return ScanInputs(x, delta, B, C, raw=True)

    def delta(self, raw: Float[Tensor, "*rows d_inner"]) -> Float[Tensor, "*rows d_inner"]:
        """Δ from what `scan_inputs` has of it."""
        return F.softplus(raw.float() if self.dt_bias is None else raw.float() + self.dt_bias)

    def gated(
        self,
        inputs: ScanInputs,
        gate: Float[Tensor, "tiles n_keep d_inner"],
        record: Recorded | None = None,
    ) -> Float[Tensor, "tiles n_keep d_inner"]:
        """(y + D x) · SiLU(gate) of the tokens that are kept, of rows that go on from the pasts of their sites.

        record: which states to write where, of a single tile, by stages that can.
        """
        assert record is None
        state = tiled(self.past.state, len(inputs.x))
        if self.keep is None:
            return self._scan(inputs, self.packing, state, gate)[0]
        return self._scan(inputs, self.packing, state, None)[0][:, self.at] * F.silu(gate)

    def rejoined(
        self,
        early: ScanInputs,
        first_gate: Float[Tensor, "some n d_inner"] | None,
        base: ScanInputs,
        gate: Float[Tensor, "1 n_keep d_inner"],
    ) -> Float[Tensor, "tiles n_keep d_inner"]:
        """`gated` of rows that take in `early` at their first positions, and then what the base rows do.

        first_gate: the gates of the first tiles at position 0, where they are not the base's.
        """
        tiles, reach = early.x.shape[:2]
        late = base.at(slice(reach, None)).map(lambda tensor: tensor.expand(tiles, -1, -1))
        gates = gate.repeat(tiles, 1, 1)
        if first_gate is not None:
            kept = self.kept_sites
            gates[: len(first_gate), : len(kept)] = first_gate[:, kept]
        return self.gated(ScanInputs.cat([early, late], 1), gates)

    def carried(
        self,
        step: ScanInputs | None,
        states: Float[Tensor, "some n d_inner d_state"] | None,
        base: ScanInputs,
        gate: Float[Tensor, "1 n_keep d_inner"],
    ) -> Float[Tensor, "tiles n_keep d_inner"]:
        """`gated` of rows that part from the base rows at position 0 alone: by what they take in, or by their state.

        step: what the first tiles take in there. states: those of the other tiles after position 0.
        """
        n = self.n
        outs, after = [], []
        if step is not None:
            tiles = len(step.x)
            out, state = self._scan(step, Packing([1] * n), tiled(self.past.state, tiles), None)
            outs, after = [out], [state.unflatten(0, (tiles, n))]
        if states is not None:
            y = read(states, base.C[0, :n]).to(base.x.dtype)
            outs.append((y + self.D * base.x[0, :n]).to(base.x.dtype))
            after.append(states)
        out = torch.cat(outs)
        if self.packing.longest > 1:
            tiles, later = len(out), self.packing.from_position(1)
            inputs = base.at(slice(n, None)).map(lambda tensor: tensor.expand(tiles, -1, -1))
            start = torch.cat(after)[:, : later.n].flatten(0, 1)
            out = torch.cat([out, self._scan(inputs, later, start, None)[0]], 1)
        return out[:, self.at] * F.silu(gate)

    def _scan(
        self,
        inputs: ScanInputs,
        packing: Packing,
        initial_state: Float[Tensor, "rows d_inner d_state"],
        gate: Float[Tensor, "tiles tokens d_inner"] | None,
    ) -> tuple[Float[Tensor, "tiles tokens d_inner"], Float[Tensor, "rows d_inner d_state"]]:
        """y + D x, times SiLU(gate) if there is one, and the states after the longest row's end."""
        padded = inputs.map(lambda tensor: _padded(tensor, packing))
        out = selective_scan(
            padded.x,
            padded.delta,
            self.A,
            padded.B,
            padded.C,
            D=self.D,
            z=None if gate is None else _padded(gate, packing),
            delta_bias=self.dt_bias if inputs.raw else None,
            delta_softplus=inputs.raw,
            initial_state=initial_state,
        )
        return _packed(out.y, packing, packing.tokens), out.final_state

    def out(self, gated: Float[Tensor, "*tokens d_inner"]) -> Float[Tensor, "*tokens d_model"]:
        return linear(self.mixer.out_proj, gated.to(self.past.window.dtype))

    def add_out(
        self,
        resid: Float[Tensor, "#tiles tokens d_model"],
        gated: Float[Tensor, "tiles tokens d_inner"],
        into: Float[Tensor, "tiles tokens d_model"],
    ) -> None:
        """Write residual streams with the mixer's output added to them; `into` may be `resid` itself."""
        torch.add(resid, self.out(gated), out=into)


def parts(mixer: Any, x: Float[Tensor, "*tokens d_inner"]) -> tuple[Tensor, Tensor, Tensor]:
    """dt, B and C."""
    dt, B, C = linear(mixer.x_proj, x).split([mixer.dt_rank, mixer.d_state, mixer.d_state], dim=-1)
    return mixer.normalise(dt, B, C)


def embedded(model: HookedMamba, tokens: Int[Tensor, " tokens"]) -> Float[Tensor, "tokens d_model"]:
    """The residual stream that tokens begin with."""
    found = model.lm.get_input_embeddings()(tokens)
    return found.float() if model.lm.config.residual_in_fp32 else found


def every_A(model: HookedMamba) -> Sequence[Float[Tensor, "d_inner d_state"] | None]:
    """A of every layer, on a GPU in a few launches for all; None where it is cheaper made layer by layer."""
    mixers = [block.mixer for block in model.blocks]
    logs = [mixer.A_log for mixer in mixers]
    at_hand = not any(hasattr(mixer, "_hf_hook") for mixer in mixers)
    if not at_hand or logs[0].device.type == "cpu" or len({log.device for log in logs}) > 1:
        return [None] * len(mixers)
    return (-torch.exp(torch.stack(logs).float())).unbind()


def read(state: Float[Tensor, "*#rows d_inner d_state"], C: Float[Tensor, "*#rows d_state"]) -> Tensor:
    """What C reads from the state."""
    return (state @ C[..., None].to(state.dtype))[..., 0]


def tiled(tensor: Float[Tensor, "n *features"], tiles: int) -> Float[Tensor, "rows *features"]:
    """A copy of n rows for every tile."""
    return tensor.expand(tiles, *tensor.shape).flatten(0, 1)


def _padded(tensor: Float[Tensor, "tiles some_tokens width"], packing: Packing) -> Float[Tensor, "rows pos width"]:
    """Rows side by side, of as many positions as the tokens have. Behind a row's end stands anything."""
    index = packing.padded.clamp(max=tensor.shape[1] - 1)
    length = int(packing.positions[tensor.shape[1] - 1]) + 1
    return tensor[:, index[:, :length].to(tensor.device)].flatten(0, 1)


def _packed(
    rows: Float[Tensor, "rows pos width"], packing: Packing, tokens: int
) -> Float[Tensor, "tiles tokens width"]:
    """The first tokens of tiles of rows."""
    row, position = (index[:tokens].to(rows.device) for index in (packing.rows, packing.positions))
    return rows.unflatten(0, (-1, packing.n))[:, row, position]


def token_index(keep: list[int] | None, device: torch.device) -> slice | Tensor:
    """What picks the tokens: a view, if they follow each other."""
    if keep is None:
        return slice(None)
    if keep[-1] - keep[0] + 1 == len(keep):
        return slice(keep[0], keep[-1] + 1)
    return torch.tensor(keep).to(device, non_blocking=True)
