"""Rows that go on from a few pasts: the compiled loops beside float64 references."""

import pytest
import torch
import torch.nn.functional as F

from ssminterp_kernels import rows
from ssminterp_kernels.selective_scan import selective_scan_reference

N_SITES, N_TILES = 3, 4
ROWS = N_SITES * N_TILES


class Case:
    """Random rows of one layer; `keep` as in `RowScan`."""

    def __init__(self, length: int, d_inner: int, d_state: int, keep: list[int] | None) -> None:
        projected = torch.randn(ROWS, length, 2 * d_inner)
        self.x, self.gate = projected.chunk(2, dim=-1)  # strides as in the mixer
        parts = torch.randn(ROWS, length, 5 + 2 * d_state)
        self.dt, self.B, self.C = parts.split([5, d_state, d_state], dim=-1)
        self.dt_weight = torch.randn(d_inner, 5) / 2
        self.A, self.D, self.bias = -torch.rand(d_inner, d_state) * 3, torch.randn(d_inner), torch.randn(d_inner)
        self.past = torch.randn(N_SITES, d_inner, d_state)
        self.keep = list(range(length)) if keep is None else keep
        self.scan = rows.RowScan.of(self.A, self.D, self.dt_weight, self.bias, self.past, keep)
        self.base = rows.Early(*(tensor[:N_SITES] for tensor in (self.x, self.dt, self.B, self.C)), raw=True)

    def expected(
        self,
        x: torch.Tensor,
        delta: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        gate: torch.Tensor,
        start: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """In float64; delta is Δ itself; `start` instead of the pasts."""
        start = self.past.repeat(N_TILES, 1, 1) if start is None else start
        inputs = (tensor.double() for tensor in (x, delta, self.A, B, C))
        y = selective_scan_reference(*inputs, D=self.D.double(), initial_state=start.double())[0]
        return y[:, self.keep] * F.silu(gate.double())

    def step(self, dt: torch.Tensor) -> torch.Tensor:
        return F.softplus(dt.double() @ self.dt_weight.double().T + self.bias.double())


def assert_close(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert got.isfinite().all()
    assert float((got - expected).norm() / expected.norm()) < 1e-5


def tiled(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.repeat(N_TILES, *(1,) * (tensor.dim() - 1))


SHAPES = [(1, 16, 4, None), (7, 48, 3, None), (37, 160, 16, [0, 5, 36]), (5, 16, 16, [4])]


@pytest.fixture(params=SHAPES, ids=str)
def case(request: pytest.FixtureRequest) -> Case:
    return Case(*request.param)


def test_conv_and_silu_go_on_from_the_windows() -> None:
    for d_conv, length in ((4, 6), (4, 2), (2, 5)):
        in_x = torch.randn(ROWS, length, 64)[..., 32:]
        window, taps, bias = torch.randn(N_SITES, d_conv - 1, 32), torch.randn(d_conv, 32), torch.randn(32)
        whole = torch.cat([tiled(window), in_x], dim=1).transpose(1, 2).double()
        for some_bias in (bias, None):
            added = None if some_bias is None else some_bias.double()
            conv = F.conv1d(whole, taps.T[:, None].double(), added, groups=32).transpose(1, 2)
            assert_close(rows.conv_silu(in_x, window, taps, some_bias), F.silu(conv))


def test_scanned_rows(case: Case) -> None:
    gate = case.gate[:, case.keep]
    expected = case.expected(case.x, case.step(case.dt), case.B, case.C, gate)
    assert_close(rows.scanned_rows(case.scan, case.x, case.dt, case.B, case.C, gate), expected)


@pytest.mark.parametrize("raw", [True, False])
def test_rows_that_take_in_something_else_at_first(case: Case, raw: bool) -> None:
    length = case.x.shape[1]
    reach = min(4, length)
    gate = case.gate[:N_SITES, case.keep]
    delta = case.dt if raw else case.step(case.dt).float()
    early = rows.Early(*(tensor[:, :reach] for tensor in (case.x, delta, case.B, case.C)), raw)
    first_gate = torch.randn(ROWS - N_SITES, case.x.shape[2]) if case.keep[0] == 0 else None
    gated = rows.forked_rows(case.scan, early, None, case.base, gate, first_gate)
    gates = tiled(gate).clone()
    if first_gate is not None:
        gates[: len(first_gate), 0] = first_gate
    x, B, C = (
        torch.cat([own[:, :reach], tiled(of_base)[:, reach:]], dim=1)
        for own, of_base in ((case.x, case.base.x), (case.B, case.base.B), (case.C, case.base.C))
    )
    steps = torch.cat([case.step(case.dt)[:, :reach], case.step(tiled(case.base.delta))[:, reach:]], dim=1)
    assert_close(gated, case.expected(x, steps, B, C, gates))


@pytest.mark.parametrize("n_early", [0, 2])
def test_rows_whose_state_is_another_at_first(case: Case, n_early: int) -> None:
    """The last tiles; the first ones take in something else."""
    d_inner, d_state, n_first = case.x.shape[2], case.B.shape[2], n_early * N_SITES
    states, gate = torch.randn(ROWS - n_first, d_inner, d_state), case.gate[:N_SITES, case.keep]
    own = rows.Early(*(tensor[:n_first, :1] for tensor in (case.x, case.dt, case.B, case.C)), raw=True)
    gated = rows.forked_rows(case.scan, own if n_early else None, states, case.base, gate)
    if n_early:
        assert_close(gated[:n_first], rows.forked_rows(case.scan, own, None, case.base, gate))
    steps = case.step(tiled(case.base.delta))
    steps[:, 0] = 0.0  # neither decay nor inflow: the state after position 0 is the one before it
    inputs = (tiled(tensor) for tensor in (case.base.B, case.base.C, gate))
    start = torch.cat([torch.zeros(n_first, d_inner, d_state), states])
    expected = case.expected(tiled(case.base.x), steps, *inputs, start=start)
    assert_close(gated[n_first:], expected[n_first:])


@pytest.mark.parametrize("span", [7, 3])
def test_states_at_places_of_their_own_in_each_run(span: int) -> None:
    case = Case(7, 48, 3, None)
    delta = case.step(case.dt).float()
    places = [(0, 0), (0, 6), (2, 3), (ROWS - 1, 5)]
    out, before = torch.zeros(len(places), 48, 3), rows.blocks(torch.zeros(ROWS, 48, 3))
    for start in range(0, 7, span):
        slots = torch.full((ROWS, min(span, 7 - start)), -1)
        for i, (row, position) in enumerate(places):
            if start <= position < start + span:
                slots[row, position - start] = i
        x, steps, B = (tensor[:, start : start + span] for tensor in (case.x, delta, case.B))
        rows.recorded_states(case.A, x, steps, B, before, slots, out)
    inputs = (tensor.double() for tensor in (case.x, delta, case.A, case.B, case.C))
    states = selective_scan_reference(*inputs)[1]
    assert_close(out, torch.stack([states[place] for place in places]))


@pytest.mark.parametrize("width", [8, 16, 100])
def test_norm(width: int) -> None:
    resid, weight = 3 * torch.randn(130, width), torch.randn(width)
    expected = F.rms_norm(resid.double(), (width,), weight.double(), 1e-5)
    assert_close(rows.normed(resid, weight, 1e-5), expected)


def test_axes_that_do_not_lie_in_one_piece(case: Case) -> None:
    gate = case.gate[:, case.keep]
    inputs = (case.x, case.dt, case.B, case.C, gate)
    strided = (tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in inputs)
    assert torch.equal(rows.scanned_rows(case.scan, *strided), rows.scanned_rows(case.scan, *inputs))


def test_several_threads_do_what_one_does() -> None:
    case = Case(64, 160, 16, None)
    one = rows.scanned_rows(case.scan, case.x, case.dt, case.B, case.C, case.gate)
    torch.set_num_threads(3)
    try:
        assert torch.equal(rows.scanned_rows(case.scan, case.x, case.dt, case.B, case.C, case.gate), one)
    finally:
        torch.set_num_threads(1)


def test_what_suits() -> None:
    good = torch.zeros(2)
    assert rows.suits(good, d_inner=32)
    assert not rows.suits(good, d_inner=24)
    assert not rows.suits(good, good.bfloat16(), d_inner=32)
    assert not rows.suits(good.to("meta"), d_inner=32)
