"""Rows that go on from a few pasts: the Triton kernels beside float64 references."""

import os

import pytest
import torch
import torch.nn.functional as F

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"

from row_cases import SHAPES, TILES, RowCase, Rows, assert_close, expected_conv  # noqa: E402

from ssminterp_kernels.rows import Packing, Recorded  # noqa: E402
from ssminterp_kernels.rows.triton_stages import TritonScan, conv_rows, conv_tokens, scan_rows  # noqa: E402

DEVICE = "cuda" if HAS_GPU else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def scan_of(case: Rows) -> TritonScan:
    return TritonScan(case.packing, case.A, case.D, case.bias, case.past, case.case.kept)


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(params=SHAPES, ids=str)
def case(request: pytest.FixtureRequest, dtype: torch.dtype) -> Rows:
    return Rows(request.param, DEVICE, dtype)


def test_conv_of_own_inputs_and_of_shared_ones(dtype: torch.dtype) -> None:
    packing = Packing([6, 3, 1])
    for d_conv, n_own, n_out in ((4, 10, 10), (4, 3, packing.tokens_before(4)), (2, 3, packing.tokens_before(2))):
        draw = Rows(RowCase([1], 40, 1, None), DEVICE, dtype).draw
        own, shared = draw(TILES, n_own, 80)[..., 40:], draw(1, 10, 80)[..., :40]
        window, taps, bias = draw(3, d_conv - 1, 40), draw(d_conv, 40), draw(40)
        in_x = torch.cat([own, shared[:, n_own:n_out].expand(TILES, -1, -1)], 1)
        for some_bias, silu in ((bias, True), (None, False)):
            conv = expected_conv(packing, in_x, window, taps, some_bias)
            got = conv_rows(packing, own, None if n_own == n_out else shared, n_out, window, taps, some_bias, silu)
            assert_close(got, F.silu(conv) if silu else conv, TOLERANCE[dtype])


@pytest.mark.parametrize("d_conv", [1, 2, 4])
def test_conv_of_tokens_that_say_what_comes_before_them(dtype: torch.dtype, d_conv: int) -> None:
    """Tokens that tiles share, then tiles of their own: 20 shared ones, and 3 tiles of 7."""
    draw = Rows(RowCase([1], 40, 1, None), DEVICE, dtype).draw
    inputs, taps, bias = draw(1, 20 + 3 * 7, 80)[0, :, 40:], draw(d_conv, 40), draw(40)
    generator = torch.Generator().manual_seed(0)
    earlier = torch.randint(-1, 20, (27, d_conv - 1), generator=generator)
    of_tiles = torch.randint(-8, 20, (7, d_conv - 1), generator=generator)
    earlier[20:] = of_tiles
    for some_bias, silu in ((bias, True), (None, False)):
        got = conv_tokens(inputs, earlier.int().to(DEVICE), 7, taps, some_bias, silu)
        for token in range(len(inputs)):
            tile_, kind = divmod(token - 20, 7) if token >= 20 else (0, token - 20)
            begin = 20 + 7 * tile_
            places = [begin - 2 - p if p < -1 else p for p in earlier[20 + kind].tolist()] + [token]
            terms = [taps[j].double() * inputs[p].double() for j, p in enumerate(places) if p >= 0]
            conv = sum(terms) + (0 if some_bias is None else some_bias.double())
            assert_close(got[token], F.silu(conv) if silu else conv, TOLERANCE[dtype])


def test_pointers_of_any_alignment(dtype: torch.dtype) -> None:
    """A kernel that was compiled for multiples of 16 is none for others with the same strides."""
    wide, taps = torch.randn(9, 96, device=DEVICE).to(dtype), torch.randn(1, 64, device=DEVICE).to(dtype)
    earlier = torch.empty(9, 0, dtype=torch.int32, device=DEVICE)
    for first in (0, 1, 16, 3):
        inputs = wide[:, first : first + 64]
        got = conv_tokens(inputs, earlier, 1, taps, None, silu=False)
        assert_close(got, inputs.double() * taps.double(), TOLERANCE[dtype])


def test_whole_rows(case: Rows, dtype: torch.dtype) -> None:
    own, gate = case.inputs(TILES, case.packing.tokens), case.draw(TILES, len(case.keep), case.case.d_inner)
    got = scan_rows(scan_of(case), own, None, None, gate)
    assert_close(got, case.expected(own, None, None, gate), TOLERANCE[dtype])


@pytest.mark.parametrize("raw", [True, False])
def test_rows_that_take_in_something_else_at_first(case: Rows, dtype: torch.dtype, raw: bool) -> None:
    own = case.inputs(TILES, case.packing.tokens_before(4 if raw else 1), raw)
    base, gate = case.inputs(1, case.packing.tokens), case.draw(1, len(case.keep), case.case.d_inner)
    first_gate = case.draw(2, case.packing.n, case.case.d_inner) if raw else None
    expected = case.expected(own, None, base, gate, first_gate)
    out = torch.full((TILES + 1, *expected.shape[1:]), float("nan"), dtype=dtype, device=DEVICE)
    assert_close(scan_rows(scan_of(case), own, None, base, gate, first_gate, out=out[1:]), expected, TOLERANCE[dtype])
    assert out[0].isnan().all()


def test_rows_whose_state_is_another_at_first(case: Rows, dtype: torch.dtype) -> None:
    states = torch.randn(1, *case.past.shape, device=DEVICE).expand(TILES, -1, -1, -1)
    base, gate = case.inputs(1, case.packing.tokens), case.draw(1, len(case.keep), case.case.d_inner)
    expected = case.expected(None, states, base, gate)
    assert_close(scan_rows(scan_of(case), None, states, base, gate), expected, TOLERANCE[dtype])
    turned = states.transpose(2, 3).contiguous().transpose(2, 3)
    assert torch.equal(
        scan_rows(scan_of(case), None, turned, base, gate), scan_rows(scan_of(case), None, states, base, gate)
    )


def test_states_on_the_way(case: Rows, dtype: torch.dtype) -> None:
    own, gate = case.inputs(1, case.packing.tokens), case.draw(1, len(case.keep), case.case.d_inner)
    last = case.packing.tokens - 1
    slots = torch.full((last + 1,), -1, dtype=torch.int32, device=DEVICE)
    slots[[0, last]] = torch.tensor([2, 0], dtype=torch.int32, device=DEVICE)
    states = torch.full((3, *case.A.shape), float("nan"), device=DEVICE)
    gated = scan_rows(scan_of(case), own, None, None, gate, record=Recorded(slots, states))
    assert torch.equal(gated, scan_rows(scan_of(case), own, None, None, gate))
    assert_close(states[slots[0]], case.expected_state(own, 0), TOLERANCE[dtype])
    assert_close(states[slots[last]], case.expected_state(own, last), TOLERANCE[dtype])
