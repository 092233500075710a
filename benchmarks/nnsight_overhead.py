"""What an nnsight trace costs: `model.trace` that reads a hook of all layers beside `run_with_cache` of the same.

    OMP_NUM_THREADS=1 python benchmarks/nnsight_overhead.py

The mamba-130m shape with random weights, without gradients. Both sides run in turn, each first every other time, for
SECONDS per row; the ratio is the median over the pairs, with its quartiles. Prints a table and writes
results/nnsight_overhead.json. Under 90 s.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TypeAlias

import pandas as pd
import torch
from torch import Tensor
from transformers import MambaConfig, MambaForCausalLM

from ssminterp import HookedMamba

SHAPE = {"hidden_size": 768, "num_hidden_layers": 24, "state_size": 16, "vocab_size": 50280}
SECONDS = 12.0
WARM_UP = 2
FEWEST = 5
PLAIN_RUNS = 15

Run: TypeAlias = Callable[[Tensor], object]


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


def seconds(run: Run, tokens: Tensor) -> float:
    start = time.perf_counter()
    run(tokens)
    return time.perf_counter() - start


@torch.no_grad()
def compare(what: str, batch: int, length: int, traced: Run, hooked: Run) -> dict[str, object]:
    """Median seconds of a trace and of the same by hooks, and how many times as long the trace takes in a pair."""
    pairs: list[tuple[float, float]] = []
    tokens = torch.randint(SHAPE["vocab_size"], (batch, length))
    for _ in range(WARM_UP):
        traced(tokens), hooked(tokens)
    start = time.perf_counter()
    while time.perf_counter() - start < SECONDS or len(pairs) < FEWEST:
        if len(pairs) % 2:
            by_hooks, by_trace = seconds(hooked, tokens), seconds(traced, tokens)
        else:
            by_trace, by_hooks = seconds(traced, tokens), seconds(hooked, tokens)
        pairs.append((by_trace, by_hooks))
    low, middle, high = statistics.quantiles([by_trace / by_hooks for by_trace, by_hooks in pairs], n=4)
    return {
        "reads": what,
        "batch": batch,
        "pos": length,
        "trace": statistics.median(by_trace for by_trace, _ in pairs),
        "hooks": statistics.median(by_hooks for _, by_hooks in pairs),
        "trace ×": middle,
        "quartiles": [round(low, 3), round(high, 3)],
        "pairs": len(pairs),
    }


def main() -> None:
    load = os.getloadavg()[0]
    torch.manual_seed(0)
    model = HookedMamba.from_hf(MambaForCausalLM(MambaConfig(**SHAPE)).eval(), verify=False)
    plain = torch.randint(SHAPE["vocab_size"], (1, 16))
    with torch.no_grad():
        model(plain)
        untouched = statistics.median(seconds(model, plain) for _ in range(PLAIN_RUNS))
        trace_nothing(model, plain)
        wrapped = statistics.median(seconds(model, plain) for _ in range(PLAIN_RUNS))
    delta = partial(trace_delta, model), lambda tokens: model.run_with_cache(tokens, "*hook_delta")
    states = partial(trace_states, model), lambda tokens: model.run_with_cache(tokens, "*hook_state", positions=[5, -1])
    rows = [
        compare("delta of all layers", 1, 16, *delta),
        compare("delta of all layers", 1, 64, *delta),
        compare("delta of all layers", 8, 16, *delta),
        compare("states of all layers at 2 positions", 1, 16, *states),
        compare("logits", 1, 16, partial(trace_nothing, model), model),
    ]
    table = pd.DataFrame(rows)
    print(table.to_string(index=False, float_format="{:.3g}".format))
    print(f"a plain run of 1 × 16 tokens: {untouched:.4f} s before the first trace, {wrapped:.4f} s after it")
    result = {
        "shape": SHAPE,
        "threads": torch.get_num_threads(),
        "load of the machine before and after": [round(loaded, 2) for loaded in (load, os.getloadavg()[0])],
        "versions": {name: version(name) for name in ("torch", "transformers", "nnsight")},
        "plain_run_before_the_first_trace": untouched,
        "plain_run_after_it": wrapped,
        "rows": table.to_dict("records"),
    }
    out = Path(__file__).parent / "results" / "nnsight_overhead.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
