"""Adjoints of all states in whatever tiles a plan chooses, against the same walk position by position in float64."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"

pytest.importorskip("triton")

from scan_cases import ScanCase, in_float64, random_scan_inputs, relative_error  # noqa: E402
from torch import Tensor  # noqa: E402

from ssminterp_kernels.selective_scan import triton_adjoint_states as launching  # noqa: E402
from ssminterp_kernels.selective_scan.adjoint import adjoint_states  # noqa: E402
from ssminterp_kernels.selective_scan.triton_plan import Plan, for_all_adjoints, for_trajectories, plan_scan  # noqa: E402

DEVICE = "cuda" if HAS_GPU else "cpu"
H200 = 132  # multiprocessors


def adjoints_of(case: ScanCase, seed: int | None = None) -> tuple[Tensor, Tensor]:
    """What Triton says and, from float64, what is right."""
    inputs = random_scan_inputs(case, seed, device=DEVICE)
    if seed is not None:
        torch.manual_seed(seed)
    taken = {k: inputs[k] for k in ("delta", "A", "C", "z", "delta_bias", "delta_softplus", "edits") if k in inputs}
    taken["dy"] = torch.randn(inputs["x"].shape, device=DEVICE).to(case.dtype)
    taken["dfinal_state"] = torch.randn(case.batch, case.d_inner, case.d_state, device=DEVICE)
    right = adjoint_states(**in_float64(taken), backend="torch")
    return adjoint_states(**taken, backend="triton"), right


def check(case: ScanCase) -> None:
    assert relative_error(*adjoints_of(case)) <= 1e-5


CASES = (
    ScanCase(length=19, n_groups=2, strided=True),
    ScanCase(length=16, d_inner=3, d_state=17, optional=()),
    ScanCase(batch=3, length=19, edit_positions=((0, 7), (8, 18), (0, 1)), dtype=torch.bfloat16),
)
TILES = (
    {"block_d": 8, "per_thread": 1, "unroll": 16},
    {"block_d": 16, "per_thread": 2, "unroll": 8, "elements": 2},
    {"block_d": 32, "per_thread": 4, "unroll": 4, "chunk_length": 8},
)


@pytest.mark.parametrize("tiles", TILES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_adjoints_are_the_same_in_any_tiles(
    case: ScanCase, tiles: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    chunk_length = tiles.get("chunk_length", case.length)
    scanned = launching.adjoint_plan

    def in_chunks(s: Any) -> Plan:
        return dataclasses.replace(
            scanned(s), unroll=4, chunk_length=chunk_length, n_chunks=-(-case.length // chunk_length)
        )

    def in_tiles(plan: Plan, *_: Any) -> Plan:
        n_blocks = (case.n_groups or 1) * -(-plan.group_size // tiles["block_d"])
        return dataclasses.replace(plan, num_warps=2, max_registers=None, n_blocks=n_blocks, **tiles)

    monkeypatch.setattr(launching, "adjoint_plan", in_chunks)
    monkeypatch.setattr(launching, "for_all_adjoints", in_tiles)
    check(case)


@pytest.mark.parametrize("n_processors", [1, 4, H200])
def test_adjoints_are_the_same_as_planned_for_any_gpu(n_processors: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "processor_count", lambda device: n_processors)
    check(ScanCase(batch=1, length=70, d_inner=37, d_state=4, n_groups=1))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("batch", "length", "d_inner", "n_groups"), [(1, 1000, 2048, None), (3, 200, 1040, 2), (8, 130, 2048, None)]
)
def test_shapes_of_models(batch: int, length: int, d_inner: int, n_groups: int | None, dtype: torch.dtype) -> None:
    case = ScanCase(batch=batch, length=length, d_inner=d_inner, d_state=16, n_groups=n_groups, dtype=dtype)
    check(case)
    first, second = (adjoints_of(case, seed=3)[0] for _ in range(2))
    assert torch.equal(first, second)


@given(
    batch=st.integers(1, 64),
    length=st.integers(1, 20_000),
    d_inner=st.sampled_from([1, 6, 70, 768, 1536, 2048, 5120]),
    d_state=st.sampled_from([1, 16, 24, 64, 128]),
    n_groups=st.sampled_from([1, 2]),
    edited=st.booleans(),
)
def test_plans_cover_all_positions_and_channels(
    batch: int, length: int, d_inner: int, d_state: int, n_groups: int, edited: bool
) -> None:
    d_inner *= n_groups
    sizes = (batch, length, d_inner, d_state, n_groups, H200)
    scanned = plan_scan(*sizes, unroll=8, enough_warps=3, warps_wanted=12, widest_block=64)
    plan = for_all_adjoints(scanned, batch, length, H200, edited)
    assert plan.unroll <= length
    assert (plan.n_chunks - 1) * plan.chunk_length < length <= plan.n_chunks * plan.chunk_length
    assert plan.n_chunks == 1 or (plan.chunk_length, plan.n_chunks) == (scanned.chunk_length, scanned.n_chunks)
    assert plan.n_blocks == n_groups * -(-plan.group_size // plan.block_d)
    held = 32 * plan.num_warps * min(plan.per_thread, plan.block_n)
    assert held <= max(plan.block_d * plan.block_n, 32), "lanes of the narrowest program hold a state each"


def test_programs_are_as_wide_as_gives_most_multiprocessors_one() -> None:
    def planned(batch: int, length: int, d_inner: int, edited: bool = False) -> tuple[Plan, Plan]:
        sizes = (batch, length, d_inner, 16, 1, H200)
        scanned = plan_scan(*sizes, unroll=8, enough_warps=3, warps_wanted=12, widest_block=64)
        return for_all_adjoints(scanned, batch, length, H200, edited), for_trajectories(scanned)

    for shape, block_d, programs in (
        ((8, 512, 2048), 64, 128),
        ((1, 2048, 5120), 64, 80),
        ((1, 16384, 2048), 32, 64),
        ((1, 2048, 1536), 8, 192),
        ((3, 512, 4096), 64, 192),
        ((8, 2048, 5120), 64, 640),
    ):
        plan, _ = planned(*shape)
        assert (plan.block_d, plan.n_chunks) == (block_d, 1)
        assert -(-shape[0] // plan.elements) * plan.n_blocks == programs
    for few in ((1, 16384, 512, False), (1, 16384, 2048, True)):  # too few without chunks, or edits cut tiles
        chosen, wide = planned(*few)
        assert chosen == wide
