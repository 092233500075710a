"""How far the selective scan is from its float64 reference: the worst relative error by dtype and quantity.

    PYTHONPATH=kernels python benchmarks/scan_errors.py

On a GPU the Triton scan, about a minute, most of it compiling in parallel; without one the CPU's scans. Shapes are odd,
strided, grouped, long enough to be cut into chunks of time, with edits, initial and recorded states. Error is
‖out − ref‖ / ‖ref‖, where ref is the reference in float64 on the very numbers that the scan got, so that rounding the
inputs to half precision is no error of the scan; rounding its outputs is. Compared as in the tests.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests" / "kernels"))

from scan_cases import (  # noqa: E402
    ScanCase,
    in_float64,
    outputs_and_gradients,
    random_scan_inputs,
    reference,
    relative_error,
    with_backend,
)

from ssminterp_kernels.selective_scan import StateEdits  # noqa: E402
from ssminterp_kernels.selective_scan.adjoint import adjoint_states  # noqa: E402

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CASES = (
    ScanCase(length=1000, d_inner=96, d_state=16),
    ScanCase(length=333, d_inner=70, d_state=16, n_groups=2, strided=True, edit_positions=((0, 7, 8), (5, 100, 332))),
    ScanCase(batch=1, length=3000, d_inner=33, d_state=16, states=(0, 1999, 2999), edit_positions=(64, 2500)),
    ScanCase(batch=40, length=16, d_inner=64, d_state=16, edit_positions=(3,)),
    ScanCase(batch=3, length=61, d_inner=39, d_state=5, n_groups=3),
    ScanCase(length=130, d_inner=32, d_state=64, states=(129,)),
)


def errors_of(case: ScanCase, seed: int, device: str) -> dict[str, float]:
    """Relative errors by quantity: outputs, adjoints, and the gradient of every tensor."""
    torch.set_num_threads(1)
    backend = "triton" if device == "cuda" else "auto"
    inputs = random_scan_inputs(case, seed, device)
    double = in_float64(inputs)
    ours = outputs_and_gradients(with_backend(backend), inputs)
    expected = outputs_and_gradients(reference, double)
    dy = torch.randn(inputs["x"].shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(
        case.dtype
    )
    positions = tuple(sorted({i * (case.length - 1) // 7 for i in range(8)}))
    ours["adjoints"] = adjoints(inputs, dy.to(device), positions, backend)
    expected["adjoints"] = adjoints_by_autograd(double, dy.double(), positions)
    return {name: relative_error(ours[name], expected[name]) for name in expected}


def adjoints(inputs: dict[str, Any], dy: Tensor, positions: tuple[int, ...], backend: str) -> Tensor:
    taken = ("delta", "A", "C", "z", "delta_bias", "delta_softplus")
    with torch.no_grad():
        return adjoint_states(dy, **{name: inputs[name] for name in taken}, states=positions, backend=backend)  # type: ignore[arg-type]


def adjoints_by_autograd(double: dict[str, Any], dy: Tensor, positions: tuple[int, ...]) -> Tensor:
    """dLoss/dstate_t, as the gradient of an addition to the state at t."""
    (batch, _, d_inner), d_state = dy.shape, double["A"].shape[1]
    add = torch.zeros(batch, len(positions), d_inner, d_state, dtype=torch.float64, requires_grad=True)
    edits = StateEdits(positions, torch.ones(1, 1, 1, 1, dtype=torch.float64), add)
    (gradient,) = torch.autograd.grad((reference(**double | {"edits": edits})["y"] * dy).sum(), add)
    return gradient


def job(arguments: tuple[ScanCase, int, str]) -> dict[str, float]:
    return errors_of(*arguments)


def table(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """The worst error over all cases: a row for every quantity, a column for every dtype."""
    worst = pd.DataFrame(rows).groupby(["quantity", "dtype"], sort=False)["error"].max().unstack("dtype")
    return worst[[str(dtype)[6:] for dtype in DTYPES]]


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / f"benchmarks/results/scan_errors_{device}.json")
    parser.add_argument("--seeds", type=int, default=1, help="how many draws of every case")
    parser.add_argument("--processes", type=int, default=min(18, os.cpu_count() or 1))
    chosen = parser.parse_args()
    started = time.perf_counter()
    jobs = [(case.but(dtype=dtype), seed, device) for case in CASES for dtype in DTYPES for seed in range(chosen.seeds)]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(chosen.processes, mp_context=context) as pool:
        results = list(pool.map(job, jobs))
    rows = [
        {"dtype": str(case.dtype)[6:], "quantity": quantity, "case": str(case), "seed": seed, "error": error}
        for (case, seed, _), errors in zip(jobs, results, strict=True)
        for quantity, error in errors.items()
    ]
    print(table(rows).map("{:.1e}".format).to_string())
    result = {
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine(),
        "backend": "triton" if device == "cuda" else "auto: numba for float32, torch for the rest",
        **{"torch": torch.__version__, "python": platform.python_version()},
        **{"seconds": round(time.perf_counter() - started), "worst": table(rows).to_dict(), "rows": rows},
    }
    chosen.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{len(jobs)} cases in {result['seconds']} s, written to {chosen.out}")


if __name__ == "__main__":
    main()
