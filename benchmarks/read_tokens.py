"""A long text through `read`: time, and memory that stays flat, at the mamba-130m shape.

    python benchmarks/read_tokens.py                      # a million tokens on a GPU, 4,096 on a CPU
    python benchmarks/read_tokens.py --tokens 50000 --chunk 8192

Random weights and tokens; one call of `read`, looked at from outside at ten places. Also how far the state of the first
chunks is from that of the same tokens in one piece. Prints a table and writes results/read_tokens_<device>.json.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated

import psutil
import torch
import typer
from transformers import MambaConfig, MambaForCausalLM

from ssminterp import HookedMamba
from ssminterp.versions import versions

SHAPE = {"hidden_size": 768, "num_hidden_layers": 24, "state_size": 16, "vocab_size": 50280}
LOOKS = 10
COMPARED_CHUNKS = 4


class Watch:
    """A forward hook that notes time and memory whenever another tenth of the tokens has been read."""

    def __init__(self, total: int, device: torch.device) -> None:
        self.total = total
        self.device = device
        self.read = 0
        self.rows: list[dict[str, float]] = []
        self.start = self._now()

    def __call__(self, module: object, arguments: object, keywords: dict[str, torch.Tensor], output: object) -> None:
        self.read += keywords["input_ids"].shape[1]
        if self.read >= self.total * (len(self.rows) + 1) / LOOKS:
            row = {"tokens": self.read, "seconds": self._now() - self.start}
            row["process_MB"] = psutil.Process().memory_info().rss / 1e6
            if self.device.type == "cuda":
                row["allocated_MB"] = torch.cuda.memory_allocated(self.device) / 1e6
                row["peak_MB"] = torch.cuda.max_memory_allocated(self.device) / 1e6
                torch.cuda.reset_peak_memory_stats(self.device)
            self.rows.append(row)

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def read_watched(model: HookedMamba, tokens: torch.Tensor, chunk: int) -> list[dict[str, float]]:
    """Ten looks at one call of `read`."""
    watch = Watch(tokens.shape[1], model.device)
    handle = model.lm.register_forward_hook(watch, with_kwargs=True)
    try:
        state = model.read(tokens, chunk=chunk)
    finally:
        handle.remove()
    assert state.n_tokens == tokens.shape[1]
    assert state.ssm.isfinite().all()
    return watch.rows


def difference_from_one_piece(model: HookedMamba, tokens: torch.Tensor, chunk: int) -> float:
    """‖state in chunks − state in one piece‖ / ‖state in one piece‖ after some chunks."""
    some = tokens[:, : COMPARED_CHUNKS * chunk]
    whole = model.read(some, chunk=some.shape[1], progress=False).ssm
    parts = model.read(some, chunk=chunk, progress=False).ssm
    return ((parts - whole).norm() / whole.norm()).item()


def main(
    tokens: Annotated[int | None, typer.Option(min=LOOKS, help="a million on a GPU, 4,096 on a CPU by default")] = None,
    chunk: Annotated[
        int | None, typer.Option(min=1, help="tokens read at once; 2,048 on a GPU, 512 on a CPU by default")
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16")] = "float32",
    device: Annotated[str, typer.Option(help="cuda or cpu")] = "cuda" if torch.cuda.is_available() else "cpu",
) -> None:
    on_gpu = torch.device(device).type == "cuda"
    tokens = tokens or (1_000_000 if on_gpu else 4_096)
    chunk = chunk or (2_048 if on_gpu else 512)
    torch.manual_seed(0)
    lm = MambaForCausalLM(MambaConfig(**SHAPE)).eval().to(device, getattr(torch, dtype))
    model = HookedMamba.from_hf(lm)
    text = torch.randint(SHAPE["vocab_size"], (1, tokens))
    model.read(text[:, : 2 * chunk], chunk=chunk, progress=False)  # kernels are compiled, allocators filled
    difference = difference_from_one_piece(model, text, chunk)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    rows = read_watched(model, text, chunk)
    for row in rows:
        print("  ".join(f"{name} {value:,.1f}" for name, value in row.items()))
    seconds = rows[-1]["seconds"]
    state_mb = sum(24 * 1536 * n * (4 if i else getattr(torch, dtype).itemsize) for i, n in enumerate((4, 16))) / 1e6
    print(
        f"{tokens / seconds:,.0f} tokens/s; the state is {state_mb:.2f} MB; chunks against one piece: {difference:.1e}"
    )
    result = {
        "shape": SHAPE,
        "device": torch.cuda.get_device_name(device) if on_gpu else f"CPU, {torch.get_num_threads()} threads",
        "dtype": dtype,
        "tokens": tokens,
        "chunk": chunk,
        "tokens_per_second": tokens / seconds,
        "difference_from_one_piece": difference,
        "looks": rows,
        **versions(),
    }
    out = Path(__file__).parent / "results" / f"read_tokens_{'gpu' if on_gpu else 'cpu'}.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
