"""Adjoint states and their contraction with state differences, torch and Triton, against autograd of the reference."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"

pytest.importorskip("triton")

from scan_cases import ScanCase, in_float64, random_scan_inputs, relative_error  # noqa: E402
from torch import Tensor  # noqa: E402

from ssminterp_kernels.selective_scan import StateEdits, selective_scan_reference  # noqa: E402
from ssminterp_kernels.selective_scan.adjoint import adjoint_states  # noqa: E402
from ssminterp_kernels.selective_scan.contract import ScanRun, contract_with_adjoint  # noqa: E402

DEVICE = "cuda" if HAS_GPU else "cpu"
CASES = (
    ScanCase(length=1),
    ScanCase(length=9, n_groups=2, strided=True),
    ScanCase(length=9, edit_positions=(2, 5)),
    ScanCase(length=9, edit_positions=((2, 8), (0, 5))),
    ScanCase(length=9, optional=(), delta_softplus=False),
    ScanCase(length=140, batch=1, d_inner=2, d_state=2, edit_positions=(70, 71)),
)


def adjoints_by_autograd(inputs: dict[str, Any], dy: Tensor, dfinal: Tensor) -> Tensor:
    """The gradient of <dy, y> + <dfinal, final state> with respect to all states, in float64."""
    double = in_float64({name: value for name, value in inputs.items() if name not in ("states", "edits")})
    batch, length, d_inner = double["x"].shape
    d_state = double["A"].shape[1]
    keep = torch.ones(batch, length, d_inner, d_state, dtype=torch.float64)
    add = torch.zeros_like(keep)
    if "edits" in inputs:
        edits = in_float64({"edits": inputs["edits"]})["edits"]
        for b in range(batch):
            at = edits.positions[b] if isinstance(edits.positions, Tensor) else list(edits.positions)
            keep[b, at] = edits.keep.detach().expand(batch, edits.n_edits, d_inner, d_state)[b]
            add[b, at] = edits.add.detach().expand(batch, edits.n_edits, d_inner, d_state)[b]
    add.requires_grad_()
    y, states = selective_scan_reference(**double, edits=StateEdits(tuple(range(length)), keep, add))
    loss = (y * dy.double().cpu()).sum() + (states[:, -1] * dfinal.double().cpu()).sum()
    return torch.autograd.grad(loss, add)[0]


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_adjoints_equal_autograd(case: ScanCase, backend: str) -> None:
    inputs = random_scan_inputs(case, device=DEVICE)
    dy = torch.randn(inputs["x"].shape, device=DEVICE)
    dfinal = torch.randn(case.batch, case.d_inner, case.d_state, device=DEVICE)
    expected = adjoints_by_autograd(inputs, dy, dfinal)
    shared = {k: inputs[k] for k in ("delta", "A", "C", "z", "delta_bias", "delta_softplus", "edits") if k in inputs}
    ours = adjoint_states(dy, **shared, dfinal_state=dfinal, backend=backend)  # type: ignore[arg-type]
    assert relative_error(ours, expected) <= 1e-5
    some = tuple(sorted({0, case.length // 2, case.length - 1}))
    ours = adjoint_states(dy, **shared, dfinal_state=dfinal, states=some, backend=backend)  # type: ignore[arg-type]
    assert relative_error(ours, expected[:, list(some)]) <= 1e-5


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(
    "case",
    [
        ScanCase(length=7, n_groups=2),
        ScanCase(length=70, batch=1, d_inner=2, d_state=2),
        ScanCase(length=3, d_inner=70, d_state=2),  # several programs a position, the last with channels that are none
    ],
    ids=str,
)
def test_contraction_equals_the_product_of_reference_states_and_adjoints(case: ScanCase, backend: str) -> None:
    inputs = random_scan_inputs(case, device=DEVICE)
    other = random_scan_inputs(case, device=DEVICE)
    dy = torch.randn(inputs["x"].shape, device=DEVICE)
    dfinal = torch.randn(case.batch, case.d_inner, case.d_state, device=DEVICE)
    shared = {name: inputs[name] for name in ("A", "C", "z", "delta_bias", "delta_softplus")}
    a, b = (ScanRun(i["x"], i["delta"], i["B"], i["initial_state"]) for i in (other, inputs))
    double, double_other = in_float64(inputs), in_float64(other | {k: inputs[k] for k in shared})
    (_, states_b), (_, states_a) = (
        selective_scan_reference(**{k: v for k, v in i.items() if k != "states"}) for i in (double, double_other)
    )
    expected = (states_a - states_b) * adjoints_by_autograd(inputs, dy, dfinal)
    ours = contract_with_adjoint(a, b, dy, **shared, dfinal_state=dfinal, backend=backend)  # type: ignore[arg-type]
    assert relative_error(ours, expected.sum(-1)) <= 1e-5
    ours = contract_with_adjoint(a, b, dy, **shared, dfinal_state=dfinal, sum_d_inner=True, backend=backend)  # type: ignore[arg-type]
    assert relative_error(ours, expected.sum((-2, -1))) <= 1e-5
