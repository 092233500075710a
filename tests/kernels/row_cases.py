"""Rows of different lengths that go on from a few pasts, and what a layer makes of them in float64, row by row."""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from ssminterp_kernels.rows import Early, Packing

TILES = 3


class RowCase(NamedTuple):
    """lengths: of a tile's rows. kept: tokens whose output is wanted; None means all."""

    lengths: list[int]
    d_inner: int
    d_state: int
    kept: list[int] | None


SHAPES = [
    RowCase([1], 16, 4, None),
    RowCase([7, 7, 7], 48, 3, None),
    RowCase([5, 5, 3, 1], 160, 16, None),
    RowCase([37, 20, 2], 160, 16, [0, 5, 58]),
    RowCase([5, 4], 16, 16, [8]),
]


class Rows:
    """Random weights and pasts of a case on a device. `keep` lists what is kept."""

    def __init__(self, case: RowCase, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        self.case, self.device, self.dtype = case, device, dtype
        self.packing = Packing(case.lengths)
        self.keep = list(range(self.packing.tokens)) if case.kept is None else case.kept
        self.A = -torch.rand(case.d_inner, case.d_state, device=device) * 3
        self.D, self.bias = (torch.randn(case.d_inner, device=device) for _ in range(2))
        self.past = torch.randn(self.packing.n, case.d_inner, case.d_state, device=device)

    def inputs(self, tiles: int, tokens: int, raw: bool = True) -> Early:
        """What rows take in; x, B and C are parts of something wider, as in a mixer."""
        d_inner, d_state = self.case.d_inner, self.case.d_state
        x = self.draw(tiles, tokens, 2 * d_inner)[..., :d_inner]
        B, C = self.draw(tiles, tokens, 5 + 2 * d_state)[..., 5:].chunk(2, dim=-1)
        delta = self.draw(tiles, tokens, d_inner)
        return Early(x, delta if raw else delta.float().abs(), B, C, raw)

    def draw(self, *sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, device=self.device).to(self.dtype)

    def expected(
        self,
        own: Early | None,
        states: torch.Tensor | None,
        base: Early | None,
        gate: torch.Tensor,
        first_gate: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(y + D x) · SiLU(gate), [tiles, n_kept, d_inner]. Each row takes in `own` as far as it goes, then `base`."""
        tiles = len(own.x if own is not None else states)  # type: ignore[arg-type]
        out = torch.zeros(tiles, len(self.keep), self.case.d_inner, dtype=torch.float64, device=self.device)
        for tile in range(tiles):
            for row, length in enumerate(self.case.lengths):
                h = self.past[row].double()
                for t in range(length):
                    token = self.packing.starts[t] + row
                    is_own = own is not None and token < own.x.shape[1]
                    inputs, place = (own, tile) if is_own else (base, 0)
                    assert inputs is not None
                    x, delta, B, C = (tensor[place, token].double() for tensor in inputs[:4])
                    step = F.softplus(delta + self.bias.double()) if inputs.raw else delta
                    if states is not None and t == 0:
                        h = states[tile, row].double()
                    else:
                        h = torch.exp(step[:, None] * self.A.double()) * h + (step * x)[:, None] * B
                    if token not in self.keep:
                        continue
                    k = self.keep.index(token)
                    z = gate[tile if len(gate) > 1 else 0, k]
                    if first_gate is not None and t == 0 and tile < len(first_gate):
                        z = first_gate[tile, row]
                    out[tile, k] = ((h * C).sum(-1) + self.D.double() * x) * F.silu(z.double())
        return out

    def expected_state(self, own: Early, token: int) -> torch.Tensor:
        """The state after a token of the first tile, raw inputs."""
        row, position = int(self.packing.rows[token]), int(self.packing.positions[token])
        h = self.past[row].double()
        for t in range(position + 1):
            x, delta, B, _ = (tensor[0, self.packing.starts[t] + row].double() for tensor in own[:4])
            step = F.softplus(delta + self.bias.double())
            h = torch.exp(step[:, None] * self.A.double()) * h + (step * x)[:, None] * B
        return h


def expected_conv(
    packing: Packing,
    in_x: torch.Tensor,
    window: torch.Tensor,
    taps: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """The causal conv of all tokens that in_x has, [tiles, tokens, d_inner], in float64."""
    out = torch.zeros(in_x.shape, dtype=torch.float64, device=in_x.device)
    last = len(taps) - 1
    for token in range(in_x.shape[1]):
        row, t = int(packing.rows[token]), int(packing.positions[token])
        for j, tap in enumerate(taps):
            at = t - last + j
            before = in_x[:, packing.starts[at] + row] if at >= 0 else window[row, last + at]
            out[:, token] += tap.double() * before.double()
    return out if bias is None else out + bias.double()


def assert_close(got: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    assert got.isfinite().all()
    assert float((got - expected).norm() / expected.norm()) < tolerance
