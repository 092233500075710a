"""HookedMamba from tokens to logits, and token by token: beside plain transformers, and beside itself without its scan.

    python benchmarks/end_to_end.py                 # mamba-370m's shape on the GPU, about a minute on an H200
    python benchmarks/end_to_end.py --device cpu    # mamba-130m's shape, small inputs
    python benchmarks/end_to_end.py --compiled      # decoding of compiled models alone: minutes, most of them compiling

Random weights, no TF32; medians of repeated, interleaved runs, by the clock, with the device waited for. "Without its
scan" is the same code where the scan returns its input. Decoding is the difference between generating many tokens and
one, greedily, with the cache. Launches are those of the device's kernels, per layer. Prints tables and writes
results/end_to_end_cuda.json or _cpu.json.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pandas as pd
import torch
import transformers
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from transformers import MambaConfig, MambaForCausalLM
from transformers.models.mamba import modeling_mamba

from ssminterp import HookedMamba
from ssminterp.models.mixers import scans
from ssminterp_kernels.selective_scan import ScanOutput

VOCAB = 50280
SHAPES = {
    "mamba-130m": {"hidden_size": 768, "num_hidden_layers": 24},
    "mamba-370m": {"hidden_size": 1024, "num_hidden_layers": 48},
}
FORWARD = {"cuda": ("mamba-370m", [(64, 16), (256, 16), (1, 512)]), "cpu": ("mamba-130m", [(1, 16), (8, 64)])}
DECODING = {"cuda": (["mamba-130m", "mamba-370m"], [1, 16], 32), "cpu": (["mamba-130m"], [1], 12)}
DTYPES = {"cuda": [torch.float32, torch.bfloat16], "cpu": [torch.float32]}
REPEATS = {"hooked": 11, "hooked_without_scan": 11, "transformers": 3, "transformers_without_scan": 5}


def build(name: str, dtype: torch.dtype, device: str) -> tuple[MambaForCausalLM, HookedMamba]:
    """A plain model of a shape, with random weights made on the device, and a hooked copy."""
    torch.manual_seed(0)
    with torch.device(device):
        plain = MambaForCausalLM(MambaConfig(**SHAPES[name], state_size=16, vocab_size=VOCAB)).eval().to(dtype)
    return plain, HookedMamba.from_hf(copy.deepcopy(plain), verify=False)


@contextmanager
def without_scan() -> Iterator[None]:
    """HookedMamba and plain transformers with scans that return their input."""

    def ours(x: Tensor, delta: Tensor, A: Tensor, *others: Any, **more: Any) -> ScanOutput:
        return ScanOutput(x, None, x.new_empty(0))

    def theirs(hidden_states: Tensor, *others: Any, **more: Any) -> Tensor:
        return hidden_states

    with (
        mock.patch.object(scans, "selective_scan", ours),
        mock.patch.object(modeling_mamba, "mamba_selective_scan", theirs),
    ):
        yield


def milliseconds(run: Callable[[], object], device: str) -> float:
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    run()
    wait()
    return (time.perf_counter() - start) * 1e3


def medians(sides: dict[str, Callable[[], object]], device: str) -> dict[str, float]:
    """The median time of each side, in ms, after a run of each that is not counted; sides take turns."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for run in sides.values():
        run()
    for i in range(max(REPEATS.values())):
        for name, run in sides.items():
            if i < REPEATS.get(name, 3):
                times[name].append(milliseconds(run, device))
    return {name: statistics.median(values) for name, values in times.items()}


def launches(run: Callable[[], object], device: str) -> int | None:
    """How many kernels a run launches on the GPU."""
    if device != "cuda":
        return None
    run()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        run()
        torch.cuda.synchronize()
    on_device = (event.name for event in profiled.events() if event.device_type == DeviceType.CUDA)
    return sum(not name.startswith(("Memcpy", "Memset")) for name in on_device)


@torch.no_grad()
def forward_row(plain: Any, model: HookedMamba, batch: int, length: int, device: str) -> dict[str, Any]:
    """Times of one forward, in ms, and launches per layer."""
    tokens = torch.randint(VOCAB, (batch, length), device=device)

    def left_out(run: Callable[[], object]) -> Callable[[], object]:
        def without() -> object:
            with without_scan():
                return run()

        return without

    sides: dict[str, Callable[[], object]] = {
        "hooked": lambda: model(tokens),
        "transformers": lambda: plain(tokens, use_cache=False),
    }
    sides |= {f"{name}_without_scan": left_out(run) for name, run in sides.items()}
    expected = plain(tokens[:2], use_cache=False).logits
    difference = ((expected - model(tokens[:2])).abs().max() / expected.abs().max()).item()
    times = medians(sides, device)
    count = launches(sides["hooked"], device)
    return {
        **{"batch": batch, "pos": length, **times, "of_without_scan": times["hooked"] / times["hooked_without_scan"]},
        "launches_per_layer": None if count is None else count / model.cfg.n_layers,
        "max_relative_difference": difference,
    }


@torch.no_grad()
def decoding_row(plain: Any, model: HookedMamba, batch: int, n_tokens: int, device: str) -> dict[str, Any]:
    """Time per new token of generate, in ms, and launches per layer of one step."""
    tokens = torch.randint(1, VOCAB, (batch, 16), device=device)
    options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    mask = torch.ones_like(tokens)

    def hooked(new: int) -> Callable[[], object]:
        return lambda: model.generate(tokens, new, **options)

    def theirs(new: int) -> Callable[[], object]:
        return lambda: plain.generate(tokens, attention_mask=mask, max_new_tokens=new, **options)

    ways = {"hooked": hooked, "transformers": theirs}
    sides = {f"{name} {new}": way(new) for name, way in ways.items() for new in (1, n_tokens + 1)}
    times = medians(sides, device)
    row = {name: (times[f"{name} {n_tokens + 1}"] - times[f"{name} 1"]) / n_tokens for name in ways}
    steps = [launches(hooked(new), device) for new in (1, 2)]
    count = None if steps[0] is None or steps[1] is None else (steps[1] - steps[0]) / model.cfg.n_layers
    per_second = {f"{name}_tokens_per_s": 1e3 * batch / ms for name, ms in row.items()}
    return {"batch": batch, "hooked_ms": row["hooked"], "transformers_ms": row["transformers"]} | {
        **per_second,
        "launches_per_layer": count,
    }


@torch.no_grad()
def compiled_row(name: str, mode: str, device: str, n_tokens: int = 64) -> dict[str, Any]:
    """Time per new token of generate with a compiled backbone, in ms, and seconds until the first text was there."""
    _, model = build(name, torch.bfloat16, device)
    tokens = torch.randint(1, VOCAB, (1, 16), device=device)

    def generate(new: int) -> Tensor:
        return model.generate(tokens, new, do_sample=False, pad_token_id=0, eos_token_id=None)

    eager = generate(8)
    model.lm.backbone.compile(mode=mode)
    start = time.perf_counter()
    agreed = int((generate(8) == eager).sum()) - tokens.shape[1]
    seconds = time.perf_counter() - start
    times = medians({"1": lambda: generate(1), "many": lambda: generate(n_tokens + 1)}, device)
    per_token = (times["many"] - times["1"]) / n_tokens
    row = {"model": name, "mode": mode, "compiled_ms": per_token, "tokens_per_s": 1e3 / per_token}
    return row | {"compiling_s": seconds, "tokens_as_eager_of_8": agreed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--compiled", action="store_true", help="time the decoding of compiled models, nothing else")
    parser.add_argument("--out", type=Path, help="where the JSON goes")
    chosen = parser.parse_args()
    device = chosen.device
    if device == "cuda" and not torch.cuda.is_available():
        print("benchmarks/end_to_end.py wants a CUDA device, and there is none: pass --device cpu")
        return
    transformers.logging.set_verbosity_error()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    shape, inputs = FORWARD[device]
    names, batches, n_tokens = DECODING[device]
    started = time.perf_counter()
    rows: dict[str, list[dict[str, Any]]] = {"forward": [], "decoding": []}
    if chosen.compiled:
        rows = {"compiled": [compiled_row(names[0], mode, device) for mode in ("default", "reduce-overhead")]}
    for dtype in () if chosen.compiled else DTYPES[device]:
        for name in names:
            described = {"model": name, "dtype": str(dtype).removeprefix("torch.")}
            plain, model = build(name, dtype, device)
            if name == shape:
                for batch, length in inputs:
                    rows["forward"].append(described | forward_row(plain, model, batch, length, device))
            for batch in batches:
                rows["decoding"].append(described | decoding_row(plain, model, batch, n_tokens, device))
            del plain, model
            with torch.cuda.device(0) if device == "cuda" else nullcontext():
                torch.cuda.empty_cache()
    for title, table in rows.items():
        print(f"{title} (times in ms)\n{pd.DataFrame(table).to_string(index=False, float_format='{:.4g}'.format)}\n")
    result = {
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine(),
        **{"torch": torch.__version__, "transformers": transformers.__version__, "python": platform.python_version()},
        **{"threads": torch.get_num_threads(), "seconds": round(time.perf_counter() - started), **rows},
    }
    print({key: value for key, value in result.items() if key not in rows})
    out = chosen.out or Path(__file__).parent / "results" / f"end_to_end_{'compiled_' * chosen.compiled}{device}.json"
    out.parent.mkdir(exist_ok=True, parents=True)
    out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
