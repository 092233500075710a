"""The Triton scan as torch.library operators: registration, and `torch.compile` without a graph break."""

from __future__ import annotations

import os

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"

pytest.importorskip("triton")

from own_process import run_in_own_process  # noqa: E402
from scan_cases import ScanCase, random_scan_inputs  # noqa: E402

from ssminterp_kernels.selective_scan.arguments import ScanArguments, check_arguments  # noqa: E402
from ssminterp_kernels.selective_scan.triton_ops import scan_op  # noqa: E402
from ssminterp_kernels.selective_scan.triton_tensors import scan_tensors  # noqa: E402

DEVICE = "cuda" if HAS_GPU else "cpu"
CASES = (
    ScanCase(length=3, d_inner=2, d_state=2, edit_positions=(1,), states=(0, 2)),
    ScanCase(length=34, batch=1, d_inner=2, d_state=2, optional=(), delta_softplus=False, states=None),
)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_opcheck(case: ScanCase) -> None:
    arguments = check_arguments(ScanArguments(**random_scan_inputs(case, device=DEVICE)))
    torch.library.opcheck(scan_op, (*scan_tensors(arguments), True))


def test_opcheck_of_rounded_states() -> None:
    inputs = random_scan_inputs(ScanCase(length=3, d_inner=2, d_state=2), device=DEVICE)
    arguments = check_arguments(ScanArguments(**inputs, states_dtype=torch.bfloat16))
    torch.library.opcheck(scan_op, (*scan_tensors(arguments), True))


COMPILED = """
from scan_cases import ScanCase, in_float64, outputs_and_gradients, random_scan_inputs, reference, relative_error
import torch
from ssminterp_kernels.selective_scan import selective_scan

@torch.compile(fullgraph=True, backend="aot_eager")
def compiled(**inputs):
    out = selective_scan(**inputs, backend="triton")
    return {"y": out.y, "states": out.states, "final_state": out.final_state}

inputs = random_scan_inputs(ScanCase(length=5, edit_positions=(1, 3), states=(3,)), 0, "DEVICE")
ours = outputs_and_gradients(compiled, inputs)
expected = outputs_and_gradients(reference, in_float64(inputs))
assert all(relative_error(ours[name], expected[name]) <= 1e-5 for name in expected)
"""


def test_compiled_without_a_graph_break() -> None:
    run_in_own_process(COMPILED.replace("DEVICE", DEVICE))
