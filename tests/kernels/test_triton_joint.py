"""Whole runs and rows that go on from their states, scanned in one launch: beside a float64 reference."""

import os

import pytest
import torch
import torch.nn.functional as F

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"

from row_cases import assert_close  # noqa: E402

from ssminterp_kernels.rows import Packing, Recorded  # noqa: E402
from ssminterp_kernels.rows.triton_joint import Fork, JointScan  # noqa: E402

DEVICE = "cuda" if HAS_GPU else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
N_RUNS, LENGTH = 4, 6
# Rows: of which run the state before them is, which run's values a fork gets, and where both are taken.
BASE, SOURCE, POSITION = [2, 3, 3, 2], [0, 1, 1, 0], [0, 1, 3, 5]
PACKING = Packing([6, 4, 3, 1])


class Layer:
    """A layer's random inputs to the scan, of runs and of tiles behind them, and its weights."""

    def __init__(self, n_tiles: int, d_inner: int, d_state: int, dtype: torch.dtype) -> None:
        tokens = N_RUNS * LENGTH + n_tiles * PACKING.tokens

        def draw(*sizes: int) -> torch.Tensor:
            return torch.randn(*sizes, device=DEVICE).to(dtype)

        self.x, self.delta = draw(tokens, d_inner), draw(tokens, d_inner)
        self.B, self.C = draw(tokens, 5 + 2 * d_state)[:, 5:].chunk(2, dim=-1)
        self.gate = draw(tokens, 2 * d_inner)[:, d_inner:]
        self.A = -torch.rand(d_inner, d_state, device=DEVICE) * 3
        self.D, self.bias = (torch.randn(d_inner, device=DEVICE) for _ in range(2))

    def step(self, h: torch.Tensor, token: int, delta_at: int, B_at: int, with_bias: bool) -> torch.Tensor:
        """The state after a token, its Δ and B being another's."""
        raw = self.delta[delta_at].double()
        step = F.softplus(raw + self.bias.double()) if with_bias else F.softplus(raw)
        inflow = (step * self.x[token].double())[:, None] * self.B[B_at].double()
        return torch.exp(step[:, None] * self.A.double()) * h + inflow

    def out(self, h: torch.Tensor, token: int) -> torch.Tensor:
        y = (h * self.C[token].double()).sum(-1) + self.D.double() * self.x[token].double()
        return y * F.silu(self.gate[token].double())


def expected(layer: Layer, n_tiles: int, forks: list[Fork], with_bias: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The output of all tokens and forks, and the runs' states [runs, positions, …]."""
    n_shared, n_tile = N_RUNS * LENGTH, PACKING.tokens
    out = torch.zeros(n_shared + (n_tiles + len(forks)) * n_tile, len(layer.D), dtype=torch.float64, device=DEVICE)
    states = torch.zeros(N_RUNS, LENGTH, *layer.A.shape, dtype=torch.float64, device=DEVICE)
    for run in range(N_RUNS):
        h = torch.zeros_like(states[0, 0])
        for t in range(LENGTH):
            token = t * N_RUNS + run
            h = states[run, t] = layer.step(h, token, token, token, with_bias)
            out[token] = layer.out(h, token)
    for one in range(n_tiles + len(forks)):
        fork = forks[one - n_tiles] if one >= n_tiles else None
        for row, length in enumerate(PACKING.lengths):
            position, source = POSITION[row], POSITION[row] * N_RUNS + SOURCE[row]
            h = states[BASE[row], position - 1] if position else torch.zeros_like(states[0, 0])
            for t in range(length):
                within = PACKING.starts[t] + row
                token = n_shared + (0 if fork else one * n_tile) + within
                if fork == Fork.STATE and t == 0:
                    h = states[SOURCE[row], position]
                else:
                    delta_at = source if fork == Fork.DELTA and t == 0 else token
                    B_at = source if fork == Fork.B and t == 0 else token
                    h = layer.step(h, token, delta_at, B_at, with_bias)
                out[n_shared + one * n_tile + within] = layer.out(h, token)
    return out, states


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("d_inner", "d_state"), [(64, 16), (80, 3)])
def test_runs_rows_and_forks_layer_after_layer(d_inner: int, d_state: int, dtype: torch.dtype) -> None:
    """Every layer reads the states of its own runs, though all write to the same place."""
    n_shared = N_RUNS * LENGTH
    # In slot 0 nothing is written: the zeros before a run.
    slots = torch.full((n_shared,), -1, dtype=torch.int32)
    sites = torch.zeros(PACKING.n, 3, dtype=torch.int32)
    for row, (base, source, position) in enumerate(zip(BASE, SOURCE, POSITION, strict=True)):
        if position:
            sites[row, 0] = slots[(position - 1) * N_RUNS + base] = 2 * row + 1
        sites[row, 1] = slots[position * N_RUNS + source] = 2 * row + 2
        sites[row, 2] = position * N_RUNS + source
    states = torch.full((2 * PACKING.n + 1, d_inner, d_state), float("nan"), device=DEVICE)
    states[0] = 0
    record = Recorded(slots.to(DEVICE), states)
    scan = JointScan(PACKING, N_RUNS, LENGTH, d_inner, torch.device(DEVICE))
    for n_tiles, forks in ((1, []), (2, [Fork.STATE]), (1, [Fork.DELTA, Fork.B, Fork.STATE, Fork.STATE])):
        layer = Layer(n_tiles, d_inner, d_state, dtype)
        for bias in (layer.bias, None):
            want, runs = expected(layer, n_tiles, forks, bias is not None)
            out = torch.full((len(want) + 2, d_inner), float("nan"), dtype=dtype, device=DEVICE)
            inputs = (layer.x, layer.delta, layer.A, layer.B, layer.C, layer.D, layer.gate, bias)
            scan(*inputs, record, sites.to(DEVICE), tuple(forks), out)
            for part, wanted in ((slice(n_shared), want[:n_shared]), (slice(n_shared, -2), want[n_shared:])):
                assert_close(out[part], wanted, TOLERANCE[dtype])
            assert out[-2:].isnan().all()
            assert_close(states[2], runs[SOURCE[0], POSITION[0]], TOLERANCE[dtype])
            assert_close(states[3], runs[BASE[1], POSITION[1] - 1], TOLERANCE[dtype])
