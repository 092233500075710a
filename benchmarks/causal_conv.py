"""Times of the causal conv with its SiLU, beside torch's conv1d and SiLU as plain transformers calls them.

    PYTHONPATH=kernels python benchmarks/causal_conv.py [--device cpu]

x is a half of in_proj's output, [batch, pos, d_inner]; conv1d gets it transposed, and its output is transposed back and
made contiguous, as the projection after it needs. Medians of repeated runs, on the GPU with a cold L2 cache. Bytes are
those that must be read and written once, at the bandwidth of a large copy. Prints a table and writes
results/causal_conv_cuda.json or _cpu.json.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from ssminterp_kernels.causal_conv import causal_conv, causal_conv_step

D_CONV = 4
# batch, pos, d_inner
SHAPES = {
    "cuda": [(64, 16, 2048), (256, 16, 2048), (1, 2048, 2048), (8, 2048, 5120)],
    "cpu": [(1, 16, 1536), (1, 512, 1536), (8, 64, 1536)],
}
DTYPES = {"cuda": (torch.float32, torch.bfloat16), "cpu": (torch.float32,)}


def milliseconds(run: Callable[[], object], device: str) -> float:
    """The median time of a run."""
    if device == "cuda":
        from triton.testing import do_bench

        return float(do_bench(run, return_mode="median"))
    run()
    times = []
    while len(times) < 5 or (sum(times) < 300 and len(times) < 50):
        start = time.perf_counter()
        run()
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


def row(shape: tuple[int, int, int], dtype: torch.dtype, device: str) -> dict[str, Any]:
    """Forward, backward and one step, in ms."""
    batch, length, d_inner = shape
    draw = {"device": device, "dtype": dtype}
    x = torch.randn(batch, length, 2 * d_inner, **draw)[..., :d_inner].requires_grad_()  # type: ignore[call-overload]
    weight = torch.randn(d_inner, 1, D_CONV, **draw).requires_grad_()  # type: ignore[call-overload]
    bias = torch.randn(d_inner, **draw).requires_grad_()  # type: ignore[call-overload]
    window = torch.randn(batch, d_inner, D_CONV, **draw)  # type: ignore[call-overload]
    leaves = (x, weight, bias)

    def ours() -> Tensor:
        return causal_conv(x, weight[:, 0], bias, activation="silu").y

    def theirs() -> Tensor:
        conv = F.conv1d(x.transpose(1, 2), weight, bias, padding=D_CONV - 1, groups=d_inner)[..., :length]
        return F.silu(conv).transpose(1, 2).contiguous()

    def step() -> object:
        return causal_conv_step(x[:, 0], window, weight[:, 0], bias, activation="silu", in_place=True)

    times: dict[str, float] = {}
    dy = torch.randn_like(x)
    for name, side in (("", ours), ("conv1d_", theirs)):
        with torch.no_grad():
            times[f"{name}forward_ms"] = milliseconds(side, device)
        y = side()
        times[f"{name}backward_ms"] = milliseconds(
            lambda y=y: torch.autograd.grad(y, leaves, dy, retain_graph=True),  # type: ignore[misc]
            device,
        )
    with torch.no_grad():
        times["step_ms"] = milliseconds(step, device)
        difference = (ours() - theirs()).abs().max().item()
    return {"shape": shape, "dtype": str(dtype)[6:], **times, "max_difference": difference}


def copy_bytes_per_ms(device: str) -> float:
    """Bytes read and written per ms by a large elementwise copy."""
    source = torch.empty(2**28 if device == "cuda" else 2**25, device=device).normal_()
    target = torch.empty_like(source)
    return 2 * source.numel() * 4 / milliseconds(lambda: torch.mul(source, 1.0, out=target), device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--out", type=Path, help="where the JSON goes")
    chosen = parser.parse_args()
    device = chosen.device
    if device == "cuda" and not torch.cuda.is_available():
        print("benchmarks/causal_conv.py wants a CUDA device, and there is none: pass --device cpu")
        return
    torch.manual_seed(0)
    bandwidth = copy_bytes_per_ms(device)
    rows = [row(shape, dtype, device) for shape in SHAPES[device] for dtype in DTYPES[device]]
    for one in rows:
        numbers = one["shape"][0] * one["shape"][1] * one["shape"][2] * (4 if one["dtype"] == "float32" else 2)
        one |= {"forward_floor_ms": 2 * numbers / bandwidth, "backward_floor_ms": 3 * numbers / bandwidth}
    print(pd.DataFrame(rows).to_string(index=False, float_format="{:.3g}".format))
    result = {
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine(),
        **{"torch": torch.__version__, "python": platform.python_version(), "threads": torch.get_num_threads()},
        **{"d_conv": D_CONV, "copy_bytes_per_ms": bandwidth, "rows": rows},
    }
    out = chosen.out or Path(__file__).parent / "results" / f"causal_conv_{device}.json"
    out.parent.mkdir(exist_ok=True, parents=True)
    out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
