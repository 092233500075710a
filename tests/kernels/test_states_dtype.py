"""Recorded states and adjoints in bfloat16: the same numbers, rounded, and the same gradients."""

from __future__ import annotations

import os

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"

from scan_cases import (  # noqa: E402
    ScanCase,
    in_float64,
    outputs_and_gradients,
    random_scan_inputs,
    reference,
    relative_error,
    with_backend,
)

from ssminterp_kernels.selective_scan import selective_scan  # noqa: E402
from ssminterp_kernels.selective_scan.adjoint import adjoint_states  # noqa: E402

BF16 = torch.bfloat16
CASES = (
    ScanCase(length=11, d_inner=3),
    ScanCase(length=11, d_state=16, states=(0, 7, 10), edit_positions=(7, 9)),
    ScanCase(length=5, dtype=BF16, n_groups=2, strided=True),
)
BACKENDS = ("torch", "numba", "triton")


def device_of(backend: str) -> str:
    if backend == "triton":
        pytest.importorskip("triton")
        return "cuda" if HAS_GPU else "cpu"
    return "cpu"


def rounded_by(backend: str, values: torch.Tensor) -> torch.Tensor:
    """In bfloat16, to the nearest; Triton's interpreter cuts the lower half off instead."""
    if backend == "triton" and not HAS_GPU:
        return (values.contiguous().view(torch.int32) & -(1 << 16)).view(torch.float32).to(BF16)
    return values.to(BF16)


def suits(backend: str, case: ScanCase) -> bool:
    return backend != "numba" or case.dtype == torch.float32


@pytest.mark.parametrize(
    ("backend", "case"), [(b, c) for b in BACKENDS for c in CASES if suits(b, c)], ids=lambda value: str(value)
)
def test_states_are_rounded_and_nothing_else_changes(backend: str, case: ScanCase) -> None:
    inputs = random_scan_inputs(case, device=device_of(backend))
    full = selective_scan(**inputs, backend=backend)  # type: ignore[arg-type]
    rounded = selective_scan(**inputs, states_dtype=BF16, backend=backend)  # type: ignore[arg-type]
    assert rounded.states is not None
    assert full.states is not None
    assert rounded.states.dtype == BF16
    assert torch.equal(rounded.states, rounded_by(backend, full.states.detach()))
    assert torch.equal(rounded.y, full.y)
    assert torch.equal(rounded.final_state, full.final_state)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_into_rounded_states(backend: str) -> None:
    inputs = random_scan_inputs(ScanCase(length=11, states=(2, 10), edit_positions=(3,)), device=device_of(backend))
    ours = outputs_and_gradients(with_backend(backend), inputs | {"states_dtype": BF16}, ("states",))
    expected = outputs_and_gradients(reference, in_float64(inputs), ("states",))
    for name, gradient in expected.items():
        assert relative_error(ours[name], gradient) <= (1e-5 if name in ("y", "final_state") else 1e-2), name


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("states", ["all", (0, 4, 8)], ids=str)
def test_adjoints_are_rounded(backend: str, states: str | tuple[int, ...]) -> None:
    device = device_of(backend)
    dy, delta = torch.randn(2, 9, 3, device=device), torch.rand(2, 9, 3, device=device)
    A, C = -torch.rand(3, 16, device=device), torch.randn(2, 9, 16, device=device)
    full = adjoint_states(dy, delta, A, C, states=states, backend=backend)  # type: ignore[arg-type]
    rounded = adjoint_states(dy, delta, A, C, states=states, states_dtype=BF16, backend=backend)  # type: ignore[arg-type]
    assert rounded.dtype == BF16
    assert torch.equal(rounded, rounded_by(backend, full))


def test_other_dtypes_and_a_dtype_without_states_are_refused(as_users_run_it: None) -> None:
    inputs = random_scan_inputs(ScanCase())
    with pytest.raises(ValueError, match=r"states_dtype must be torch.float32 or torch.bfloat16 .* got torch.float16"):
        selective_scan(**inputs, states_dtype=torch.float16)
    with pytest.raises(ValueError, match="no states are asked for"):
        selective_scan(**inputs | {"states": None}, states_dtype=BF16)
