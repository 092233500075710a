"""How fast layer × position sweeps are: one forward per cell beside the resuming engine, in one run.

    python benchmarks/patch_sweep.py [--parts cpu tiny gpu attribution memory] [--threads 2] [--pairs 1 64]

cpu: the mamba-130m shape (random weights), 1 pair of 16 tokens, all 384 cells of one hook. tiny: tiny-mamba on 64 IOI
pairs, eight hooks by role. With CUDA, at the mamba-370m shape: gpu, all 768 cells of one hook; attribution, of all
states; memory, the peak beside a limit. Plain transformers and, at large shapes, the naive engine are timed on a few
cells and multiplied by the number of cells, which the table says. The time of a cell of plain transformers is one
forward: it changes nothing. No part uses TF32. Prints tables, and after each part writes
results/patch_sweep_<device>.json.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from transformers import MambaConfig, MambaForCausalLM

from ssminterp import HookedMamba
from ssminterp.checkpoints import checkpoint_folder
from ssminterp.patching import attribution_patch, patch_sweep
from ssminterp.tasks import make_task
from ssminterp.tasks.metrics import Metric

SHAPES = {
    "mamba-130m": {"hidden_size": 768, "num_hidden_layers": 24, "state_size": 16, "vocab_size": 50280},
    "mamba-370m": {"hidden_size": 1024, "num_hidden_layers": 48, "state_size": 16, "vocab_size": 50280},
}
HOOKS = ("state", "resid_pre", "delta")
IOI_HOOKS = ["resid_pre", "mixer_out", "x", "delta", "B", "C", "state", "gate"]
MEASURED_CELLS = 5
LENGTH = 16


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """Wall-clock time, until the device has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def random_model(shape: str, device: torch.device, dtype: torch.dtype) -> tuple[MambaForCausalLM, HookedMamba]:
    """A plain model with random weights and a hooked model of the same parameters."""
    torch.manual_seed(0)
    with device:
        plain, hooked = (MambaForCausalLM(MambaConfig(**SHAPES[shape])).eval().to(dtype) for _ in range(2))
    hooked.load_state_dict(plain.state_dict())
    return plain, HookedMamba.from_hf(hooked, verify=False)


def last_token(pairs: int, length: int) -> Metric:
    """The difference of two logits at the last position."""
    return Metric("difference", torch.full((pairs,), length - 1), lambda at_end: at_end[:, 3] - at_end[:, 5])


def per_cell(run: Callable[[], object], device: torch.device) -> float:
    """The median time of a run, after one to warm up."""
    run()
    return statistics.median(seconds(run, device) for _ in range(MEASURED_CELLS))


@torch.no_grad()
def against_plain(
    shape: str, pairs: int, device: torch.device, dtype: torch.dtype, repeats: int
) -> list[dict[str, Any]]:
    """All cells of one hook, for several hooks, against one plain forward per cell."""
    plain, model = random_model(shape, device, dtype)
    clean, corrupted = torch.randint(SHAPES[shape]["vocab_size"], (2, pairs, LENGTH), device=device)
    metric, cells = last_token(pairs, LENGTH), model.cfg.n_layers * LENGTH
    plain_total = cells * per_cell(lambda: plain(corrupted, use_cache=False), device)
    few = {"layers": [model.cfg.n_layers // 2], "positions": [LENGTH // 2]}
    rows = []
    for hook in HOOKS:

        def sweep(engine: Any = "resume", hook: str = hook, **where: Any) -> Any:
            return patch_sweep(model, clean, corrupted, hook, metric, engine=engine, progress=False, **where)

        # A naive sweep of one cell runs the model four times: two baselines, the source's values, and the cell.
        naive_total = cells * per_cell(functools.partial(sweep, "naive", **few), device) / 4
        sweep()
        resume = statistics.median(seconds(sweep, device) for _ in range(repeats))
        rows.append(
            {"shape": shape, "dtype": str(dtype).removeprefix("torch."), "pairs": pairs, "hook": hook, "cells": cells}
            | {"plain s": plain_total, "naive s": naive_total, "resume s": resume}
            | {"× plain": plain_total / resume, "× naive": naive_total / resume}
            | {"estimated": f"plain, naive: {MEASURED_CELLS} runs × cells"}
        )
        print(pd.DataFrame(rows[-1:]).to_string(index=False, float_format="{:.4g}".format), flush=True)
    return rows


def ioi(pairs: int, device: torch.device) -> list[dict[str, Any]]:
    """tiny-mamba on IOI by role, both engines in full, beside one plain forward per cell; the largest difference of the
    engines as a share of the metric's range."""
    model = HookedMamba.from_pretrained("tiny-mamba", device=device)
    plain = MambaForCausalLM.from_pretrained(checkpoint_folder("tiny-mamba")).to(device).eval()
    batch = make_task("ioi", model.tokenizer, n=pairs, seed=0).to(device)

    def sweep(engine: Any) -> Any:
        options = {"positions": batch.roles, "reduce": None, "progress": False}
        return patch_sweep(model, batch.clean, batch.corrupted, IOI_HOOKS, batch.metric(), engine=engine, **options)

    resumed = sweep("resume")
    resume = statistics.median(seconds(lambda: sweep("resume"), device) for _ in range(3))
    start = time.perf_counter()
    exact = sweep("naive")
    naive = time.perf_counter() - start
    error = float(abs(resumed - exact).max() / (exact.max() - exact.min()))
    n_cells = exact[..., 0].size
    row = {"shape": "tiny-mamba", "dtype": "float32", "pairs": pairs, "hook": "eight", "cells": n_cells}
    with torch.no_grad():
        plain_total = n_cells * per_cell(lambda: plain(batch.corrupted, use_cache=False), device)
    row |= {"plain s": plain_total, "naive s": naive, "resume s": resume}
    row |= {"× plain": plain_total / resume, "× naive": naive / resume, "error / range": error}
    rows = [row | {"estimated": f"plain: {MEASURED_CELLS} runs × cells"}]
    print(pd.DataFrame(rows).to_string(index=False, float_format="{:.4g}".format), flush=True)
    return rows


def attribution(pairs: int, device: torch.device, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Attribution of all states, at every layer and position, in forwards of the hooked model without hooks."""
    _, model = random_model("mamba-370m", device, dtype)
    clean, corrupted = torch.randint(SHAPES["mamba-370m"]["vocab_size"], (2, pairs, LENGTH), device=device)
    metric = last_token(pairs, LENGTH)
    with torch.no_grad():
        forward = per_cell(lambda: model(corrupted), device)
    took = per_cell(lambda: attribution_patch(model, clean, corrupted, "state", metric), device)
    row = {"shape": "mamba-370m", "dtype": str(dtype).removeprefix("torch."), "pairs": pairs, "hook": "state"}
    rows = [row | {"forward s": forward, "attribution s": took, "forwards": took / forward}]
    print(pd.DataFrame(rows).to_string(index=False, float_format="{:.4g}".format), flush=True)
    return rows


def peak_memory(device: torch.device, length: int = 1024, pairs: int = 64, limit: float = 20e9) -> list[dict[str, Any]]:
    """Peak memory beside the model's and the prompts', at some layers and positions of long prompts, under a limit."""
    _, model = random_model("mamba-370m", device, torch.float32)
    clean, corrupted = torch.randint(SHAPES["mamba-370m"]["vocab_size"], (2, pairs, length), device=device)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    where = {"layers": [0, 16, 32], "positions": [0, length // 2, length - 16]}

    def sweep() -> Any:
        metric = last_token(pairs, length)
        options = {"max_bytes": int(limit), "progress": False}
        return patch_sweep(model, clean, corrupted, ["state", "resid_pre"], metric, **where, **options)

    took = seconds(sweep, device)
    peak = torch.cuda.max_memory_allocated(device) - before
    rows = [
        {"pairs": pairs, "pos": length, "cells": 18, "seconds": took, "peak GB": peak / 1e9, "limit GB": limit / 1e9}
    ]
    print(pd.DataFrame(rows).to_string(index=False, float_format="{:.4g}".format), flush=True)
    return rows


def write(device: torch.device, **part: Any) -> None:
    """Put one part's rows into the results of this kind of machine; the other parts stay."""
    out = Path(__file__).parent / "results" / f"patch_sweep_{device.type}.json"
    out.parent.mkdir(exist_ok=True)
    before = json.loads(out.read_text()) if out.is_file() else {}
    on_gpu = device.type == "cuda"
    machine = torch.cuda.get_device_name() if on_gpu else platform.processor() or platform.machine()
    packages = {name: version(name) for name in ("torch", "transformers", "triton" if on_gpu else "numba")}
    record = {"machine": machine, "threads": torch.get_num_threads(), **packages, **part}
    out.write_text(json.dumps(before | record, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    on_cpu, on_gpu = ["cpu", "tiny"], ["gpu", "attribution", "memory"]
    parser.add_argument("--parts", nargs="+", choices=on_cpu + on_gpu, default=on_cpu + on_gpu)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--pairs", type=int, nargs="+", default=[1, 64], help="of the parts gpu and attribution")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    if "cpu" in options.parts:
        write(cpu, cpu=against_plain("mamba-130m", 1, cpu, torch.float32, repeats=3))
    if "tiny" in options.parts:
        write(cpu, tiny=ioi(64, cpu))
    if not torch.cuda.is_available():
        skipped = [part for part in options.parts if part in on_gpu]
        if skipped:
            print(f"no CUDA device: left out {', '.join(skipped)}")
        return
    runs = list(itertools.product((torch.float32, torch.bfloat16), options.pairs))
    if "gpu" in options.parts:
        rows = []
        for dtype, n in runs:
            rows += against_plain("mamba-370m", n, cuda, dtype, repeats=3)
            write(cuda, gpu=rows)
    if "attribution" in options.parts:
        write(cuda, attribution=[row for dtype, n in runs for row in attribution(n, cuda, dtype)])
    if "memory" in options.parts:
        write(cuda, memory=peak_memory(cuda))


if __name__ == "__main__":
    main()
