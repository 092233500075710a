"""What the selective scan costs on the CPU: its time inside a forward at the mamba-130m shape, by backend.

    python benchmarks/cpu_scan.py [--repeats 5] [--max-tokens 4096] [--vocab 50280]

Random weights. Scans are timed where the hooked model calls them, bias, softplus, D and gate included, and their
share is that of the same forward; plain transformers runs in between. A small --vocab shows the share among the layers
alone. Prints a table and writes results/cpu_scan.json.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numba
import pandas as pd
import torch
import transformers
from transformers import MambaConfig, MambaForCausalLM

from ssminterp import HookedMamba
from ssminterp.models.mixers import scans as scans_module
from ssminterp_kernels.selective_scan import selective_scan

SHAPE = {"hidden_size": 768, "num_hidden_layers": 24, "state_size": 16}
INPUTS = [(batch, length) for batch in (1, 8) for length in (16, 64, 256, 512)]
BACKENDS = ("numba", "torch")


def milliseconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1e3


@contextmanager
def timed_scans(backend: str) -> Iterator[list[float]]:
    """Make the model's scans use a backend and note how many milliseconds each takes."""
    times: list[float] = []

    def scan(*arguments: Any, **named: Any) -> Any:
        start = time.perf_counter()
        out = selective_scan(*arguments, **named, backend=backend)
        times.append((time.perf_counter() - start) * 1e3)
        return out

    with patch.object(scans_module, "selective_scan", scan):
        yield times


@torch.no_grad()
def measure(plain: MambaForCausalLM, model: HookedMamba, batch: int, length: int, repeats: int) -> dict[str, float]:
    """Medians over interleaved runs, in milliseconds; "share" is the scans' part of the same forward."""
    tokens = torch.randint(plain.config.vocab_size, (batch, length))
    runs: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        runs.setdefault(name, []).append(value)

    model(tokens)
    for _ in range(repeats):
        note("transformers", milliseconds(functools.partial(plain, tokens, use_cache=False)))
        for backend in BACKENDS:
            with timed_scans(backend) as scans:
                forward = milliseconds(functools.partial(model, tokens))
            note(f"{backend} forward", forward)
            note(f"{backend} scan", sum(scans))
            note(f"{backend} share", sum(scans) / forward)
    return {"batch": batch, "pos": length, **{name: statistics.median(values) for name, values in runs.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--max-tokens", type=int, default=4096, help="leave out inputs of more tokens than this")
    parser.add_argument("--vocab", type=int, default=50280)
    options = parser.parse_args()
    shape = SHAPE | {"vocab_size": options.vocab}
    torch.manual_seed(0)
    plain = MambaForCausalLM(MambaConfig(**shape)).eval()
    model = HookedMamba.from_hf(copy.deepcopy(plain))
    inputs = [(batch, length) for batch, length in INPUTS if batch * length <= options.max_tokens]
    table = pd.DataFrame([measure(plain, model, *size, options.repeats) for size in inputs])
    print("milliseconds; a scan's time is the sum over the layers of one forward")
    print(table.to_string(index=False, float_format="{:.3g}".format))
    versions = {"torch": torch.__version__, "numba": numba.__version__, "transformers": transformers.__version__}
    machine = {"machine": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
    record = {"shape": shape, **machine, **versions, "rows": table.to_dict("records")}
    out = Path(__file__).parent / "results" / "cpu_scan.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
