"""How all states are written, as planned for an H200."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssminterp_kernels.selective_scan.triton_plan import Plan, for_all_states, plan_scan

H200 = 132  # multiprocessors


def all_states_planned(sizes: tuple[int, ...], save: bool = False, edited: bool = False) -> tuple[Plan, Plan]:
    """The plan that writes all states on an H200, and the plan for scanning; sizes: batch, pos, d_inner, d_state."""
    scanned = plan_scan(*sizes, 1, H200, unroll=8, enough_warps=3, warps_wanted=96, widest_block=64)
    return for_all_states(scanned, sizes[0], sizes[1], H200, save, edited), scanned


@settings(deadline=None, max_examples=200)
@given(
    batch=st.integers(1, 64),
    length=st.integers(1, 2**21),
    d_inner=st.integers(1, 8192),
    d_state=st.integers(1, 256),
    save=st.booleans(),
    edited=st.booleans(),
)
def test_plans_cover_all_positions_and_hold_the_inputs_of_chunks(
    batch: int, length: int, d_inner: int, d_state: int, save: bool, edited: bool
) -> None:
    plan, scanned = all_states_planned((batch, length, d_inner, d_state), save, edited)
    assert plan.n_blocks == scanned.n_blocks
    assert plan.unroll <= length
    assert plan.unroll <= 8 or not (save or edited), "states are saved between tiles of 8"
    assert 1 <= plan.elements <= batch
    assert (plan.n_chunks - 1) * plan.chunk_length < length <= plan.n_chunks * plan.chunk_length
    if plan.is_chunked:
        assert scanned.is_chunked
        assert plan.chunk_length % plan.unroll == 0
        assert plan.elements == 1
        assert not plan.held or plan.chunk_length <= plan.held * plan.unroll
        if length >= 1024:
            assert 3 * plan.n_chunks <= 0.05 * length, "decays, locals and ends beside all states"
    else:
        assert not plan.held


@pytest.mark.parametrize(
    ("shape", "programs", "positions", "beyond"),
    [
        ((1, 2048, 5120), 80, 16, True),
        ((1, 2048, 5632), 88, 16, False),
        ((1, 2048, 8192), 128, 8, True),
        ((8, 512, 2048), 128, 8, True),  # of two batch elements each
        ((3, 2048, 4224), 198, 8, False),
        ((8, 2048, 5120), 640, 16, True),
        ((256, 16, 2048), 8192, 16, False),
        ((4096, 1, 2048), 8192, 1, False),
    ],
)
def test_all_states_in_one_pass_where_most_multiprocessors_have_a_program(
    shape: tuple[int, int, int], programs: int, positions: int, beyond: bool
) -> None:
    plan, _ = all_states_planned((*shape, 16))
    assert -(-shape[0] // plan.elements) * plan.n_blocks == programs
    assert (plan.n_chunks, plan.unroll, plan.beyond) == (1, positions, beyond)


@pytest.mark.parametrize("d_inner", [4096, 9216], ids=["too few programs", "some multiprocessors would have two"])
def test_all_states_in_chunks(d_inner: int) -> None:
    plan, _ = all_states_planned((1, 2048, d_inner, 16))
    assert plan.n_chunks > 1
