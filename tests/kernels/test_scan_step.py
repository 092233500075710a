"""The one-step scan beside the float64 reference over one position: outputs, gradients, in place, dtypes, strides."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"

from scan_cases import TOLERANCE, ScanCase, in_float64, random_scan_inputs, reference, relative_error  # noqa: E402

from ssminterp_kernels.scan_step import StepOutput, selective_scan_step  # noqa: E402
from ssminterp_kernels.selective_scan import selective_scan  # noqa: E402

BACKENDS = [("torch", "cpu"), ("triton", "cuda" if HAS_GPU else "cpu")]
CASES = [
    ScanCase(length=1, strided=True),
    ScanCase(length=1, batch=3, d_inner=1, d_state=17),
    ScanCase(length=1, d_inner=37, d_state=16, n_groups=1, delta_softplus=False),
    ScanCase(length=1, d_inner=6, d_state=5, n_groups=3, strided=True),
    ScanCase(length=1, d_inner=2, d_state=256, optional=("initial_state",), delta_softplus=False),
    ScanCase(length=1, d_inner=40, optional=("initial_state", "D")),
    *(ScanCase(length=1, d_inner=33, dtype=dtype, strided=True) for dtype in (torch.bfloat16, torch.float16)),
]


def step_of(inputs: dict[str, Any], **options: Any) -> StepOutput:
    """The step that a scan over one position is."""
    at_0 = {name: inputs[name][:, 0] for name in ("x", "delta", "B", "C", "z") if name in inputs}
    others = {name: inputs[name] for name in ("A", "D", "delta_bias", "delta_softplus") if name in inputs}
    return selective_scan_step(inputs["initial_state"], **at_0, **others, **options)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize(("backend", "device"), BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_outputs(case: ScanCase, backend: str, device: str, in_place: bool) -> None:
    inputs = random_scan_inputs(case, device=device)
    expected = reference(**in_float64(inputs))
    with torch.no_grad():
        before = inputs["initial_state"].clone()
        out = step_of(inputs, backend=backend, in_place=in_place)
    assert (out.state is inputs["initial_state"]) == in_place
    assert in_place or torch.equal(inputs["initial_state"], before)
    assert out.y.dtype == case.dtype
    assert out.state.dtype == torch.float32
    assert relative_error(out.y, expected["y"][:, 0]) <= TOLERANCE[out.y.dtype]
    assert relative_error(out.state, expected["final_state"]) <= TOLERANCE[out.state.dtype]


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
@pytest.mark.parametrize("case", [CASES[0], CASES[3]], ids=str)
def test_gradients_are_those_of_the_scan(case: ScanCase, backend: str, device: str) -> None:
    inputs = random_scan_inputs(case, device=device)
    out = step_of(inputs, backend=backend)
    wide = in_float64(inputs)
    expected = reference(**wide)
    weights = torch.randn(out.state.shape, dtype=torch.float64), torch.randn(out.y.shape, dtype=torch.float64)

    def gradients(y: Tensor, state: Tensor, leaves: dict[str, Any]) -> dict[str, Tensor]:
        loss = (state.double().cpu() * weights[0]).sum() + (y.double().cpu() * weights[1]).sum()
        named = {name: leaf for name, leaf in leaves.items() if isinstance(leaf, Tensor)}
        return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))

    ours = gradients(out.y, out.state, inputs)
    for name, value in gradients(expected["y"][:, 0], expected["final_state"], wide).items():
        assert relative_error(ours[name], value) <= 1e-5, name


@given(
    d_inner=st.integers(1, 9),
    d_state=st.integers(1, 6),
    length=st.integers(1, 5),
    backend=st.sampled_from(BACKENDS),
    in_place=st.booleans(),
)
def test_steps_are_the_scan(d_inner: int, d_state: int, length: int, backend: Any, in_place: bool) -> None:
    name, device = backend
    case = ScanCase(length=length, d_inner=d_inner, d_state=d_state, states=None)
    inputs = random_scan_inputs(case, device=device)
    with torch.no_grad():
        whole = selective_scan(**inputs, backend="torch")
        state, ys = inputs["initial_state"].clone(), []
        for t in range(length):
            here = {k: v[:, t : t + 1] if k in ("x", "delta", "B", "C", "z") else v for k, v in inputs.items()}
            y, state = step_of(here | {"initial_state": state}, backend=name, in_place=in_place)
            ys.append(y)
    torch.testing.assert_close(torch.stack(ys, dim=1), whole.y, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(state, whole.final_state, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_extreme_steps_and_bad_numbers_stay_local(backend: str, device: str) -> None:
    d_inner = 5
    state, A = torch.randn(2, d_inner, 3, device=device), -torch.rand(d_inner, 3, device=device) - 0.5
    x, B, C = torch.randn(2, d_inner, device=device), *torch.randn(2, 2, 3, device=device)
    delta = torch.tensor([0.0, 1e4, 1.0, float("nan"), float("inf")], device=device).expand(2, -1)
    y, after = selective_scan_step(state, x, delta, A, B, C, backend=backend)
    torch.testing.assert_close(after[:, 0], state[:, 0])
    torch.testing.assert_close(after[:, 1], 1e4 * x[:, 1, None] * B)
    assert y[:, :3].isfinite().all()
    assert after[:, 3].isnan().all()
    assert not after[:, 4].isfinite().any()


def test_bad_input(as_users_run_it: None) -> None:
    good: dict[str, Any] = {
        "state": torch.zeros(2, 4, 3),
        "x": torch.randn(2, 4),
        "delta": torch.rand(2, 4),
        "A": -torch.rand(4, 3),
        "B": torch.randn(2, 3),
        "C": torch.randn(2, 3),
    }
    for changes, message in (
        ({"x": torch.randn(2, 1, 4)}, r"x must have the axes \[batch, d_inner\].*got shapes \[2, 1, 4\]"),
        ({"state": torch.zeros(2, 3, 4)}, r"state must have .* = \[2, 4, 3\].*got shape \[2, 3, 4\]"),
        ({"state": torch.zeros(2, 4, 3, dtype=torch.bfloat16)}, "state must be torch.float32 when x is torch.float32"),
        ({"delta": torch.rand(2, 5)}, r"delta must have .*got shape \[2, 5\]"),
        ({"z": torch.rand(1, 4)}, r"z must have .*got shape \[1, 4\]"),
        ({"D": torch.rand(3)}, r"D must have .*got shape \[3\]"),
        ({"B": torch.randn(2, 3, 3), "C": torch.randn(2, 3, 3)}, r"B must have .*got shape \[2, 3, 3\]"),
        ({"B": torch.randn(2, 2, 3)}, "B and C must have the same number of groups"),
        ({"x": torch.ones(2, 4, dtype=torch.long)}, "x must be real floating point"),
        ({"A": (-torch.rand(4, 3)).to("meta")}, "A is on meta but x is on cpu"),
        ({"backend": "numba"}, "backend must be one of"),
        ({"x": torch.randn(2, 4).requires_grad_(), "in_place": True}, "in_place overwrites a state"),
    ):
        with pytest.raises(ValueError, match=message):
            selective_scan_step(**{**good, **changes})
