"""What an nnsight trace costs: `model.trace` that reads a hook of all layers beside `run_with_cache` of the same.

    python benchmarks/nnsight_overhead.py

The mamba-130m shape with random weights; the median of repeated, interleaved runs without gradients. Prints a table
and writes results/nnsight_overhead.json.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor
from transformers import MambaConfig, MambaForCausalLM

from ssminterp import HookedMamba

SHAPE = {"hidden_size": 768, "num_hidden_layers": 24, "state_size": 16, "vocab_size": 50280}
INPUTS = [(1, 16), (1, 64), (8, 16), (8, 64)]
REPEATS = 15


def trace_delta(model: HookedMamba, tokens: Tensor) -> list[Tensor]:
    with model.trace(tokens):
        deltas = [block.mixer.hook_delta.output for block in model.blocks].save()
    return deltas


def trace_states(model: HookedMamba, tokens: Tensor) -> list[Tensor]:
    with model.trace(tokens, states=[5, -1]):
        states = [block.mixer.hook_state.output for block in model.blocks].save()
    return states


def trace_nothing(model: HookedMamba, tokens: Tensor) -> Tensor:
    with model.trace(tokens) as tracer:
        logits = tracer.result.save()
    return logits


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


@torch.no_grad()
def compare(model: HookedMamba, batch: int, length: int) -> list[dict[str, object]]:
    """Median seconds of a trace and of the same by hooks, for what each reads."""
    tokens = torch.randint(SHAPE["vocab_size"], (batch, length))
    sides: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "delta of all layers": (
            lambda: trace_delta(model, tokens),
            lambda: model.run_with_cache(tokens, "*hook_delta"),
        ),
        "states of all layers at 2 positions": (
            lambda: trace_states(model, tokens),
            lambda: model.run_with_cache(tokens, "*hook_state", positions=[5, -1]),
        ),
        "logits": (lambda: trace_nothing(model, tokens), lambda: model(tokens)),
    }
    times: dict[str, tuple[list[float], list[float]]] = {what: ([], []) for what in sides}
    for repeat in range(REPEATS + 2):
        for what, runs in sides.items():
            measured = [seconds(run) for run in runs]
            if repeat >= 2:
                for kept, new in zip(times[what], measured, strict=True):
                    kept.append(new)
    return [
        {
            "reads": what,
            "batch": batch,
            "pos": length,
            "trace": statistics.median(traced),
            "hooks": statistics.median(hooked),
        }
        for what, (traced, hooked) in times.items()
    ]


def main() -> None:
    torch.manual_seed(0)
    model = HookedMamba.from_hf(MambaForCausalLM(MambaConfig(**SHAPE)).eval(), verify=False)
    plain = torch.randint(SHAPE["vocab_size"], (1, 16))
    with torch.no_grad():
        model(plain)
        untouched = statistics.median(seconds(lambda: model(plain)) for _ in range(REPEATS))
        trace_nothing(model, plain)
        wrapped = statistics.median(seconds(lambda: model(plain)) for _ in range(REPEATS))
    table = pd.DataFrame([row for batch, length in INPUTS for row in compare(model, batch, length)])
    table["trace ×"] = table["trace"] / table["hooks"]
    print(table.to_string(index=False, float_format="{:.3g}".format))
    print(f"a plain run of 1 × 16 tokens: {untouched:.4f} s before the first trace, {wrapped:.4f} s after it")
    result = {
        "shape": SHAPE,
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in ("torch", "transformers", "nnsight")},
        "plain_run_before_the_first_trace": untouched,
        "plain_run_after_it": wrapped,
        "rows": table.to_dict("records"),
    }
    out = Path(__file__).parent / "results" / "nnsight_overhead.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
