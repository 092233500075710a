"""Every public shape loads and runs: time, memory and parity of checkpoints with random weights at full size.

    python benchmarks/checkpoint_shapes.py                          # all six shapes, bfloat16, on the GPU
    python benchmarks/checkpoint_shapes.py --device cpu --small     # the same steps on thin models of two layers

For each shape: weights are made on the device and written as their publisher writes them (sharded safetensors with an
index; two shapes in mamba_ssm's format as well), loaded by `HookedMamba.from_pretrained`, run on 2 × 64 tokens beside
plain transformers, and recorded. The first forward and the first recording compile kernels, and are timed apart. The
folder is removed before the next. Prints a table and writes results/checkpoint_shapes.json after each shape, keeping
the rows of shapes that are not asked for.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import statistics
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Nothing is fetched here; without a network, waiting for the hub's answer would be what is measured.
os.environ["HF_HUB_OFFLINE"] = "1"

import pandas as pd
import psutil
import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from ssminterp import HookedMamba
from ssminterp.models.catalogue import SHAPES
from ssminterp.models.verify import TOLERANCE

# The largest first: where time on the GPU is short, they say most.
RUNS = [(shape, "transformers") for shape in reversed(SHAPES)]
RUNS += [("mamba-2.8b", "original"), ("mamba-130m", "original")]
SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "time_step_rank": 4}
BATCH, LENGTH = 2, 64


class HostPeak:
    """The most memory of its own that this process had beyond its start; pages of mapped files are not its own."""

    def __enter__(self) -> HostPeak:
        self._start, self.bytes, self._stop = self._own(), 0, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.005):
            self.bytes = max(self.bytes, self._own() - self._start)

    @staticmethod
    def _own() -> int:
        memory = psutil.Process().memory_info()
        return memory.rss - memory.shared


class Device:
    """Where the models are, with its clock and its memory (CUDA's; 0 for the CPU, whose memory is the host's)."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.is_cuda = torch.device(name).type == "cuda"

    def seconds(self, run: Callable[[], Any]) -> tuple[float, Any]:
        self.wait()
        start = time.perf_counter()
        result = run()
        self.wait()
        return time.perf_counter() - start, result

    def wait(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize()

    def reset_peak(self) -> None:
        gc.collect()
        if self.is_cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated() if self.is_cuda else 0


def random_model(shape: dict[str, Any], device: str, dtype: torch.dtype) -> PreTrainedModel:
    """Weights made where they are to be, without transformers' initialisation; small enough at the mixers' outputs that
    rounding does not grow from layer to layer, as in a trained model."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape), dtype=dtype)
    model = model.to_empty(device=device).eval()
    model.tie_weights()
    generator = torch.Generator(device).manual_seed(0)
    for name, weight in model.named_parameters():
        weight.requires_grad_(False)
        if name.endswith("A_log"):
            states = torch.arange(1, weight.shape[1] + 1, device=device, dtype=torch.float32)
            weight.copy_(states.log().expand_as(weight))
        elif name.endswith((".D", "norm.weight", "norm_f.weight")):
            weight.fill_(1)
        elif name.endswith("dt_proj.bias"):
            weight.uniform_(-6, -2, generator=generator)
        elif name.endswith("bias"):
            weight.zero_()
        else:
            scale = 0.1 if "embeddings" in name else weight[0].numel() ** -0.5
            if "out_proj" in name:
                scale /= 2 * len(model.backbone.layers) ** 0.5
            weight.normal_(0, scale, generator=generator)
    return model


def write(model: PreTrainedModel, folder: Path, format: str) -> None:
    if format == "transformers":
        model.save_pretrained(folder, max_shard_size=model.num_parameters() * model.dtype.itemsize // 3)
        return
    weights = {name.replace("embeddings", "embedding"): weight.cpu() for name, weight in model.state_dict().items()}
    weights["lm_head.weight"] = weights["backbone.embedding.weight"]
    torch.save(weights, folder / "pytorch_model.bin")
    config = {"d_model": model.config.hidden_size, "n_layer": model.config.num_hidden_layers, "vocab_size": 50277}
    config |= {"ssm_cfg": {"dt_rank": model.config.time_step_rank}, "rms_norm": True, "residual_in_fp32": True}
    (folder / "config.json").write_text(json.dumps(config | {"fused_add_norm": True, "pad_vocab_size_multiple": 8}))


def plain_logits(model: PreTrainedModel, tokens: Tensor) -> dict[str, Tensor]:
    """Plain transformers' logits in the model's type, and in float32: how far they are apart is what rounding does."""
    own = model(tokens, use_cache=False).logits.float()
    return {"plain": own, "float32": model.float()(tokens, use_cache=False).logits}


@torch.no_grad()
def measure(name: str, format: str, folder: Path, device: Device, dtype: torch.dtype, small: bool) -> dict[str, Any]:
    shape = SHAPES[name] | (SMALL if small else {})
    made_s, model = device.seconds(lambda: random_model(shape, device.name, dtype))
    written_s, _ = device.seconds(lambda: write(model, folder, format))
    files = [file for file in folder.iterdir() if file.suffix in (".safetensors", ".bin")]
    tokens = torch.randint(50277, (BATCH, LENGTH), generator=torch.Generator().manual_seed(1)).to(device.name)
    expected = plain_logits(model, tokens)
    row = {"shape": name, "format": format, "parameters": model.num_parameters(), "files": len(files)}
    del model
    device.reset_peak()
    with HostPeak() as host:
        load_s, hooked = device.seconds(
            lambda: HookedMamba.from_pretrained(folder, device=device.name, dtype=dtype, verify=False)
        )
    weights = {weight.data_ptr(): weight.nbytes for weight in hooked.parameters()}
    row |= {"make_s": made_s, "write_s": written_s, "weights_gb": sum(weights.values()) / 1e9}
    row |= {"load_unchecked_s": load_s, "load_host_gb": host.bytes / 1e9, "load_device_gb": device.peak() / 1e9}
    first_s, logits = device.seconds(lambda: hooked(tokens).float())
    device.reset_peak()
    forward_s = statistics.median(device.seconds(lambda: hooked(tokens))[0] for _ in range(3))
    row |= {"first_forward_s": first_s, "forward_s": forward_s, "forward_device_gb": device.peak() / 1e9}
    first_s, _ = device.seconds(lambda: hooked.run_with_cache(tokens, "*hook_state"))
    device.reset_peak()
    states_s, (_, cache) = device.seconds(lambda: hooked.run_with_cache(tokens, "*hook_state"))
    row |= {"first_states_s": first_s, "all_states_s": states_s}
    row |= {"states_gb": sum(state.nbytes for state in cache.values()) / 1e9, "states_device_gb": device.peak() / 1e9}
    row |= {"states_finite": all(bool(state.isfinite().all()) for state in cache.values())}
    difference = (logits - expected["plain"]).abs().max().item()
    tolerance = TOLERANCE[dtype] * max(1.0, expected["plain"].abs().max().item())
    if not difference <= tolerance:
        raise ValueError(f"{name} ({format}): logits differ from plain transformers' by {difference}, over {tolerance}")
    return row | {
        "largest_logit": expected["float32"].abs().max().item(),
        "hooked_vs_plain": difference,
        "hooked_vs_float32": (logits - expected["float32"]).abs().max().item(),
        "plain_vs_float32": (expected["plain"] - expected["float32"]).abs().max().item(),
        "same_argmax": (logits.argmax(-1) == expected["plain"].argmax(-1)).float().mean().item(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--shapes", nargs="*", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--small", action="store_true", help="two thin layers of each shape")
    parser.add_argument("--scratch", type=Path, default=None, help="where to write checkpoints, up to 15 GB at a time")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "checkpoint_shapes.json")
    options = parser.parse_args()
    dtype, device = getattr(torch, options.dtype), Device(options.device)
    about = {
        "device": torch.cuda.get_device_name() if device.is_cuda else "cpu",
        "dtype": options.dtype,
        "batch": BATCH,
        "pos": LENGTH,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    warnings.filterwarnings("ignore", message=".* holds no tokenizer")
    rows = []
    if options.out.is_file():
        there = json.loads(options.out.read_text())
        rows = [row for row in there["rows"] if row["shape"] not in options.shapes and about.items() <= there.items()]
    for name, format in RUNS:
        if name not in options.shapes:
            continue
        folder = Path(tempfile.mkdtemp(dir=options.scratch, prefix="checkpoint_shapes_"))
        try:
            rows.append(measure(name, format, folder, device, dtype, options.small))
        finally:
            shutil.rmtree(folder)
        device.reset_peak()
        print(pd.DataFrame(rows[-1:]).T.to_string(header=False, float_format="{:.4g}".format), flush=True)
        options.out.parent.mkdir(exist_ok=True)
        options.out.write_text(json.dumps(about | {"rows": rows}, indent=2) + "\n")
    print(pd.DataFrame(rows).to_string(index=False, float_format="{:.3g}".format))


if __name__ == "__main__":
    main()
