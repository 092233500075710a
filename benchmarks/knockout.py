"""What a knockout costs beside a forward without it, at the mamba-130m shape, in every layer at once.

    python benchmarks/knockout.py [--device cuda] [--lengths 64 256 1024]

Random weights, batch 1; the last token must not read four others, in all 24 layers. On the CPU times are of the
process, so that other processes count less; on a GPU of the clock, after synchronising. What is compared takes turns,
and the best of `--repeats` counts. Prints a table and writes results/knockout_{device}.json.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import torch
import transformers
from transformers import MambaConfig, MambaForCausalLM

from ssminterp import HookedMamba, knockout

SHAPE = {"hidden_size": 768, "num_hidden_layers": 24, "state_size": 16, "vocab_size": 50280}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    torch.manual_seed(0)
    model = HookedMamba.from_hf(MambaForCausalLM(MambaConfig(**SHAPE)).eval().to(device))
    rows = [measure(model, length, device, arguments.repeats) for length in arguments.lengths]
    table = pd.DataFrame(rows)
    print(table.to_string(index=False, float_format="{:.3g}".format))
    machine = {
        "machine": torch.cuda.get_device_name() if device.type == "cuda" else platform.platform(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    out = Path(__file__).parent / "results" / f"knockout_{device.type}.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps({"shape": SHAPE, **machine, "rows": table.to_dict("records")}, indent=2) + "\n")


@torch.no_grad()
def measure(model: HookedMamba, length: int, device: torch.device, repeats: int) -> dict[str, float]:
    """One row: seconds of a forward, with and without knockouts, and their ratios."""
    tokens = torch.randint(SHAPE["vocab_size"], (1, length), device=device)
    where = {"sources": slice(length // 4, length // 4 + 4), "targets": -1}
    cuts = {
        "plain": [],
        "decay_kept": [knockout(**where)],
        "decay_skipped": [knockout(**where, decay="skipped")],
        "some_states": [knockout(**where, states=[0, 1, 2])],
    }
    best = dict.fromkeys(cuts, float("inf"))
    for _ in range(repeats):
        for name, cut in cuts.items():
            with model.intervene(*cut):
                best[name] = min(best[name], seconds_of(lambda: model(tokens), device))
    ratios = {f"{name}_ratio": value / best["plain"] for name, value in best.items() if name != "plain"}
    return {"pos": length, **best, **ratios}


def seconds_of(run: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        start = time.process_time()
        run()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
