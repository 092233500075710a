"""Rows that go on from a few pasts: the compiled loops beside float64 references."""

import pytest
import torch
import torch.nn.functional as F
from row_cases import SHAPES, TILES, RowCase, Rows, assert_close, expected_conv

from ssminterp_kernels import rows


class LowRank(Rows):
    """Rows whose Δ comes from dt, as the loops take it."""

    def __init__(self, case: RowCase) -> None:
        super().__init__(case)
        self.dt_weight = torch.randn(case.d_inner, 5) / 2
        arguments = (self.A, self.D, self.dt_weight, self.bias, self.past, case.kept)
        self.scan = rows.RowScan.of(self.packing, *arguments)

    def dt_inputs(self, tiles: int, tokens: int) -> tuple[rows.Early, rows.Early]:
        """The same twice: with dt, and with what dt_proj makes of it."""
        inputs = self.inputs(tiles, tokens)
        dt = torch.randn(tiles, tokens, 7)[..., :5]
        return inputs._replace(delta=dt), inputs._replace(delta=dt @ self.dt_weight.T)


@pytest.fixture(params=SHAPES, ids=str)
def case(request: pytest.FixtureRequest) -> LowRank:
    return LowRank(request.param)


def test_packing() -> None:
    packing = rows.Packing([4, 2, 2])
    assert packing.starts == [0, 3, 6, 7, 8]
    assert packing.rows.tolist() == [0, 1, 2, 0, 1, 2, 0, 0]
    assert packing.positions.tolist() == [0, 0, 0, 1, 1, 1, 2, 3]
    assert packing.padded[:, :2].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert [packing.tokens_before(t) for t in (0, 1, 3, 9)] == [0, 3, 7, 8]
    assert [packing.reach_of(tokens) for tokens in (3, 6, 8)] == [1, 2, 4]
    assert packing.from_position(2).lengths == [2]
    for lengths in ([], [2, 3], [1, 0]):
        with pytest.raises(ValueError, match="never grow"):
            rows.Packing(lengths)


def test_conv_and_silu_go_on_from_the_windows() -> None:
    packing = rows.Packing([6, 3, 1])
    for d_conv, tokens in ((4, 10), (4, packing.tokens_before(2)), (2, 10)):
        in_x = torch.randn(TILES, tokens, 64)[..., 32:]
        window, taps, bias = torch.randn(3, d_conv - 1, 32), torch.randn(d_conv, 32), torch.randn(32)
        for some_bias in (bias, None):
            expected = F.silu(expected_conv(packing, in_x, window, taps, some_bias))
            assert_close(rows.conv_silu(packing, in_x, window, taps, some_bias), expected)


def test_scanned_rows(case: LowRank) -> None:
    given, projected = case.dt_inputs(TILES, case.packing.tokens)
    gate = case.draw(TILES, len(case.keep), case.case.d_inner)
    assert_close(rows.scanned_rows(case.scan, *given[:4], gate), case.expected(projected, None, None, gate))


@pytest.mark.parametrize("raw", [True, False])
@pytest.mark.parametrize("n_gates", [0, 2])
def test_rows_that_take_in_something_else_at_first(case: LowRank, raw: bool, n_gates: int) -> None:
    tokens = case.packing.tokens_before(4)
    own, projected = case.dt_inputs(TILES, tokens) if raw else [case.inputs(TILES, tokens, raw=False)] * 2
    base, base_projected = case.dt_inputs(1, case.packing.tokens)
    gate = case.draw(1, len(case.keep), case.case.d_inner)
    first_gate = case.draw(n_gates, case.packing.n, case.case.d_inner) if n_gates else None
    expected = case.expected(projected, None, base_projected, gate, first_gate)
    assert_close(rows.forked_rows(case.scan, own, None, base, gate, first_gate), expected)


@pytest.mark.parametrize("n_early", [0, 2])
def test_rows_whose_state_is_another_at_first(case: LowRank, n_early: int) -> None:
    """The last tiles; the first ones take in something else."""
    n, d_inner, d_state = case.past.shape
    states, gate = torch.randn(TILES, n, d_inner, d_state), case.draw(1, len(case.keep), d_inner)
    own, own_projected = case.dt_inputs(n_early, n)
    base, base_projected = case.dt_inputs(1, case.packing.tokens)
    gated = rows.forked_rows(case.scan, own if n_early else None, states, base, gate)
    expected = case.expected(None, states, base_projected, gate)
    if n_early:
        expected = torch.cat([case.expected(own_projected, None, base_projected, gate), expected])
    assert_close(gated, expected)


def test_states_on_the_way(case: LowRank) -> None:
    given, projected = case.dt_inputs(1, case.packing.tokens)
    gate = case.draw(1, len(case.keep), case.case.d_inner)
    last = case.packing.tokens - 1
    slots = torch.full((last + 1,), -1, dtype=torch.int32)
    slots[[0, last]] = torch.tensor([2, 0], dtype=torch.int32)
    states = torch.full((3, *case.A.shape), float("nan"))
    gated = rows.scanned_rows(case.scan, *given[:4], gate, rows.Recorded(slots, states))
    assert torch.equal(gated, rows.scanned_rows(case.scan, *given[:4], gate))
    assert_close(states[slots[0]], case.expected_state(projected, 0))
    assert_close(states[slots[last]], case.expected_state(projected, last))


@pytest.mark.parametrize("width", [8, 16, 100])
def test_norm(width: int) -> None:
    resid, weight = 3 * torch.randn(130, width), torch.randn(width)
    expected = F.rms_norm(resid.double(), (width,), weight.double(), 1e-5)
    assert_close(rows.normed(resid, weight, 1e-5), expected)


def test_axes_that_do_not_lie_in_one_piece(case: LowRank) -> None:
    gate = case.draw(TILES, len(case.keep), case.case.d_inner)
    inputs = (*case.dt_inputs(TILES, case.packing.tokens)[0][:4], gate)
    strided = (tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in inputs)
    assert torch.equal(rows.scanned_rows(case.scan, *strided), rows.scanned_rows(case.scan, *inputs))


def test_several_threads_do_what_one_does() -> None:
    case = LowRank(RowCase([64, 40, 1], 160, 16, None))
    inputs = (*case.dt_inputs(TILES, 105)[0][:4], case.draw(TILES, 105, 160))
    one = rows.scanned_rows(case.scan, *inputs)
    torch.set_num_threads(3)
    try:
        assert torch.equal(rows.scanned_rows(case.scan, *inputs), one)
    finally:
        torch.set_num_threads(1)


def test_what_suits() -> None:
    good = torch.zeros(2)
    assert rows.suits(good, d_inner=32)
    assert not rows.suits(good, d_inner=24)
    assert not rows.suits(good, good.bfloat16(), d_inner=32)
    assert not rows.suits(good.to("meta"), d_inner=32)
