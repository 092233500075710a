"""Times of the Triton selective scan on a GPU, beside the ceilings set for it and the floors measured in the same run.

    PYTHONPATH=kernels python benchmarks/selective_scan.py --out benchmarks/results/selective_scan.json

Every time is the median over replays of a CUDA graph that holds one call per input set; the sets together are larger
than the L2 cache wherever they fit. So launches cost what they cost the GPU; what Python adds is a line of its own.
Floors: bytes at the bandwidth of a large copy, exponentials at the rate of a kernel that does little else.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssminterp_kernels.selective_scan import StateEdits
from ssminterp_kernels.selective_scan.adjoint import adjoint_states
from ssminterp_kernels.selective_scan.arguments import ScanArguments, check_arguments
from ssminterp_kernels.selective_scan.triton_gradients import backward_plan, scan_backward
from ssminterp_kernels.selective_scan.triton_scan import forward_plan, scan_forward
from ssminterp_kernels.selective_scan.triton_tensors import ScanTensors, scan_tensors

D_STATE = 16
# (batch, pos, d_inner): ceilings in ms for float32 forward, backward, bfloat16 forward, backward (issue 3).
CEILINGS = {
    (1, 2048, 1536): (0.060, 0.15, 0.055, 0.15),
    (1, 2048, 5120): (0.160, 0.45, 0.150, 0.42),
    (8, 512, 2048): (0.120, 0.36, 0.110, 0.32),
    (64, 16, 2048): (0.022, 0.08, 0.022, 0.08),
    (256, 16, 2048): (0.065, 0.26, 0.065, 0.26),
    (1, 16384, 2048): (0.45, 1.5, 0.45, 1.5),
    (8, 2048, 5120): (0.80, 3.2, 0.90, 2.9),
}
COPIED_BYTES = 2**31  # read and written
N_EDITS = 64


def random_arguments(shape: tuple[int, int, int], dtype: torch.dtype, **more: Any) -> ScanArguments:
    batch, length, d_inner = shape

    def draw(*sizes: int) -> Tensor:
        return torch.randn(*sizes, device="cuda", dtype=dtype)

    A = -torch.rand(d_inner, D_STATE, device="cuda") * D_STATE
    wide = {name: torch.randn(d_inner, device="cuda") for name in ("D", "delta_bias")}
    x, delta, z = draw(*shape), draw(*shape), draw(*shape)
    B, C = draw(batch, length, D_STATE), draw(batch, length, D_STATE)
    return check_arguments(ScanArguments(x, delta, A, B, C, z=z, delta_softplus=True, **wide, **more))


def input_sets(shape: tuple[int, int, int], dtype: torch.dtype) -> int:
    """How many sets of inputs together exceed the L2 cache several times over, at most 8."""
    size = 3 * shape[0] * shape[1] * shape[2] * dtype.itemsize
    return max(1, min(8, 300_000_000 // size))


def graph_ms(calls: list[Callable[[], Any]], replays: int = 20) -> float:
    """The median time of one call in ms, all calls in one CUDA graph."""
    return alternating_ms({"": calls}, replays)[""]


def alternating_ms(calls: dict[str, list[Callable[[], Any]]], replays: int = 20) -> dict[str, float]:
    """`graph_ms` of each by name, replayed in turn: what changes with time then changes all of them."""
    graphs = {name: captured(each) for name, each in calls.items()}
    # Capturing gives free memory back to the driver, and for some time after that a GPU is slower.
    time.sleep(0.1)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(replays + 3):
        for name, graph in graphs.items():
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            stop.record()
            torch.cuda.synchronize()
            times[name].append(start.elapsed_time(stop) / len(calls[name]))
    return {name: statistics.median(each[3:]) for name, each in times.items()}


def captured(calls: list[Callable[[], Any]]) -> torch.cuda.CUDAGraph:
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


@triton.jit
def _exponentials(out, repeats, BLOCK: tl.constexpr):
    v = tl.arange(0, BLOCK).to(tl.float32) * -1e-3
    w = v - 0.5
    for _ in tl.range(0, repeats):
        v = -tl.exp2(v)
        w = -tl.exp2(w)
    tl.store(out + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), v + w)


def large_copy() -> Callable[[], Tensor]:
    """A kernel that copies: the copy engine behind copy_ reaches two thirds of its bandwidth."""
    source = torch.empty(COPIED_BYTES // 8, dtype=torch.float32, device="cuda").normal_()
    target = torch.empty_like(source)
    return lambda: torch.mul(source, 1.0, out=target)


def floors() -> dict[str, float]:
    """Copy bandwidth in bytes per ms (read plus written) and exponentials per ms."""
    copy = COPIED_BYTES / graph_ms([large_copy()])
    programs, block, repeats = 132 * 16, 512, 2000
    out = torch.empty(programs * block, device="cuda")
    exponentials = graph_ms([lambda: _exponentials[(programs,)](out, repeats, BLOCK=block, num_warps=4)])
    return {"copy_bytes_per_ms": copy, "exponentials_per_ms": 2 * programs * block * repeats / exponentials}


def time_row(shape: tuple[int, int, int], dtype: torch.dtype, floor: dict[str, float]) -> dict[str, Any]:
    """Forward and backward of one row of the table, with the floors of its bytes and exponentials."""
    batch, length, d_inner = shape
    sets = [scan_tensors(random_arguments(shape, dtype)) for _ in range(input_sets(shape, dtype))]
    forward = graph_ms([lambda s=s: scan_forward(s, save=False) for s in sets])  # type: ignore[misc]
    saved = [(s, scan_forward(s, save=True)[3], torch.randn_like(s.x)) for s in sets]
    backward = graph_ms([lambda a=a: scan_backward(a[0], a[1], a[2], None, None) for a in saved])  # type: ignore[misc]
    elements = batch * length * d_inner
    # Per channel and position: d_state exponentials of the recurrence, one of softplus, one and a reciprocal of SiLU.
    exponentials = elements * (D_STATE + 3) / floor["exponentials_per_ms"]
    bytes_forward = elements * 4 * dtype.itemsize / floor["copy_bytes_per_ms"]
    ceilings = CEILINGS[shape][:2] if dtype == torch.float32 else CEILINGS[shape][2:]
    plan_f, plan_b = forward_plan(sets[0]), backward_plan(sets[0])
    return {
        **{"shape": shape, "dtype": str(dtype), "forward_ms": forward, "backward_ms": backward},
        **{"forward_ceiling_ms": ceilings[0], "backward_ceiling_ms": ceilings[1]},
        **{"forward_bytes_floor_ms": bytes_forward, "forward_exponentials_floor_ms": exponentials},
        "backward_bytes_floor_ms": elements * 7 * dtype.itemsize / floor["copy_bytes_per_ms"],
        **{"forward_chunks": plan_f.n_chunks, "backward_chunks": plan_b.n_chunks},
        **{"peak_memory_of_states": peak_memory(sets[0]), **mamba_ssm_ms(sets[0])},
    }


def mamba_ssm_ms(s: Any) -> dict[str, float]:
    """mamba-ssm's CUDA scan in its own layout, if it is installed; timed without a graph."""
    if importlib.util.find_spec("selective_scan_cuda") is None:
        return {}
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    x, delta, z = (t.transpose(1, 2).contiguous().requires_grad_() for t in (s.x, s.delta, s.z))
    B, C = (t.squeeze(2).transpose(1, 2).contiguous() for t in (s.B, s.C))
    out = selective_scan_fn(x, delta, s.A, B, C, s.D, z, s.bias, True)
    dy = torch.randn_like(out)

    def forward() -> Tensor:
        return selective_scan_fn(x, delta, s.A, B, C, s.D, z, s.bias, True)

    bench = triton.testing.do_bench
    both = bench(lambda: forward().backward(dy), return_mode="median")
    alone = bench(forward, return_mode="median")
    return {"mamba_ssm_forward_ms": alone, "mamba_ssm_backward_ms": both - alone}


def time_extras(shape: tuple[int, int, int], floor: dict[str, float]) -> dict[str, Any]:
    """States at some positions and edits; states and adjoints everywhere, where their bytes and those of inputs and
    outputs take over 0.1 ms at copy bandwidth."""
    extras: dict[str, Any] = {"shape": shape}
    if shape[1] > N_EDITS:
        extras |= {f"{name}_ms": ms for name, ms in time_events(shape).items()}
        torch.cuda.empty_cache()
    extras |= {f"{name}_ms": ms for name, ms in time_edits_everywhere(shape).items()}
    torch.cuda.empty_cache()
    if 4 * math.prod(shape) * (4 + D_STATE) > 0.1 * floor["copy_bytes_per_ms"]:
        extras |= time_trajectories(shape)
        torch.cuda.empty_cache()
    return extras


def forwards(sets: list[ScanArguments], **changes: Any) -> list[Callable[[], Any]]:
    """Calls of the forward scan of each of the sets, changed so."""
    tensors = [scan_tensors(each._replace(**changes)) for each in sets]
    return [lambda s=s: scan_forward(s, save=False) for s in tensors]  # type: ignore[misc]


def time_events(shape: tuple[int, int, int]) -> dict[str, float]:
    """ms without and with states at 8 positions, and with 64 edited positions; float32.

    Edits lie at equal distances, with one state for all of them or with one for each of them and of the examples, or,
    with the latter, at random positions.
    """
    batch, length, d_inner = shape
    sets = [random_arguments(shape, torch.float32) for _ in range(4)]
    eight = tuple(range(5, length, length // 8))
    calls = {"plain": forwards(sets), "eight_positions": forwards(sets, states=eight)}
    evenly = tuple(range(0, length, length // N_EDITS))
    randomly = tuple(sorted(torch.randperm(length, generator=torch.Generator().manual_seed(0))[:N_EDITS].tolist()))
    for name, positions, *sizes in (
        ("one_value_per_channel", evenly, 1, 1),
        ("one_value_per_example", evenly, batch, N_EDITS),
        ("at_random_positions", randomly, batch, N_EDITS),
    ):
        calls[f"edits_{name}"] = set_forwards(sets, positions, torch.randn(*sizes, d_inner, D_STATE, device="cuda"))
    return alternating_ms(calls)


def time_edits_everywhere(shape: tuple[int, int, int]) -> dict[str, float]:
    """ms without edits, and with every position set to zeros, to one state for all of them, or to one for each of them
    and of the examples; float32."""
    batch, length, d_inner = shape
    sets = [random_arguments(shape, torch.float32) for _ in range(4)]
    calls = {"unedited": forwards(sets)}
    for name, values in (
        ("zeros", torch.zeros(1, 1, 1, 1, device="cuda")),
        ("one_value_per_channel", torch.randn(1, 1, d_inner, D_STATE, device="cuda")),
        ("one_value_per_example", torch.randn(batch, length, d_inner, D_STATE, device="cuda")),
    ):
        calls[f"everywhere_{name}"] = set_forwards(sets, range(length), values)
    return alternating_ms(calls)


def set_forwards(sets: list[ScanArguments], positions: Sequence[int], values: Tensor) -> list[Callable[[], Any]]:
    """Calls of the forward scan of each of the sets with the states at some positions set to these values."""
    return forwards(sets, edits=StateEdits(tuple(positions), torch.zeros(1, 1, 1, 1, device="cuda"), values))


def time_trajectories(shape: tuple[int, int, int]) -> dict[str, float]:
    """ms with states and adjoints everywhere, float32, and what part of copy bandwidth that is."""
    sets = [random_arguments(shape, torch.float32) for _ in range(4)]
    adjoints = [
        lambda p=p: adjoint_states(p.x, p.delta, p.A, p.C, p.z, p.delta_bias, True, backend="triton")  # type: ignore[misc]
        for p in sets
    ]
    halves = forwards(sets, states="all", states_dtype=torch.bfloat16)
    everywhere = {"all_states": forwards(sets, states="all"), "all_adjoints": adjoints, "all_states_bfloat16": halves}
    times = alternating_ms({"copy": [large_copy()], **everywhere}, replays=10)
    a, y = sets[0], sets[0].x
    states, final_states = (4 * positions * shape[0] * shape[2] * D_STATE for positions in (shape[1], 1))
    moved = {
        "all_states": states + final_states + bytes_of(a.x, a.delta, a.A, a.B, a.C, a.D, a.z, a.delta_bias, y),
        "all_adjoints": states + bytes_of(y, a.delta, a.A, a.C, a.z, a.delta_bias),
    }
    bandwidth = COPIED_BYTES / times["copy"]
    return {
        **{f"{name}_ms": ms for name, ms in times.items()},
        **{f"{name}_of_copy": each / bandwidth / times[name] for name, each in moved.items()},
    }


def bytes_of(*tensors: Tensor | None) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


def peak_memory(s: ScanTensors) -> dict[str, float]:
    """Memory beyond inputs and outputs, as a part of that of all states; the backward pass's with what it needs of the
    forward pass."""
    trajectory = 4 * s.x.numel() * D_STATE
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    y, _, final_state, _ = scan_forward(s, save=False)
    outputs = torch.cuda.memory_allocated() - before
    forward = torch.cuda.max_memory_allocated() - before - outputs
    boundaries = scan_forward(s, save=True)[3]
    kept = 0 if boundaries is None else boundaries.numel() * 4
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    gradients = scan_backward(s, boundaries, y, None, final_state)
    outputs = torch.cuda.memory_allocated() - before
    backward = torch.cuda.max_memory_allocated() - before - outputs + kept
    del gradients
    return {"forward": forward / trajectory, "backward": backward / trajectory}


def python_microseconds() -> dict[str, float]:
    """What a call costs the CPU, at a shape that costs the GPU next to nothing."""
    from ssminterp_kernels.selective_scan import selective_scan

    a = random_arguments((2, 16, 64), torch.float32)
    call = lambda: selective_scan(a.x, a.delta, a.A, a.B, a.C, a.D, a.z, a.delta_bias, True)  # noqa: E731
    for _ in range(20):
        call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(300):
        call()
    return {"selective_scan": (time.perf_counter() - start) / 300 * 1e6}


def print_row(row: dict[str, Any]) -> None:
    forward, backward = row["forward_ms"], row["backward_ms"]
    memory = row["peak_memory_of_states"]
    floor = max(row["forward_bytes_floor_ms"], row["forward_exponentials_floor_ms"])
    print(
        f"{row['shape']!s:18} {row['dtype'][6:]:9} forward {forward:.4f} (ceiling {row['forward_ceiling_ms']:.3f}, "
        f"{forward / floor:.2f} × floor)  backward {backward:.4f} (ceiling {row['backward_ceiling_ms']:.3f}, "
        f"{backward / row['backward_bytes_floor_ms']:.1f} × bytes)  "
        f"chunks {row['forward_chunks']}/{row['backward_chunks']}  "
        f"memory {memory['forward']:.2%} / {memory['backward']:.2%} of all states",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/selective_scan.json"))
    parser.add_argument("--d-inner", type=int, help="only rows of this width")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="only rows of this dtype")
    parser.add_argument("--no-extras", action="store_true", help="only the table")
    chosen = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks/selective_scan.py measures the Triton scan: it needs a CUDA device, and there is none")
        return
    result: dict[str, Any] = {
        **{"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__},
        **{"python": platform.python_version(), "d_state": D_STATE, **floors(), "rows": [], "extras": []},
    }
    print({k: v for k, v in result.items() if k not in ("rows", "extras")}, flush=True)
    for shape in CEILINGS:
        for dtype in (torch.float32, torch.bfloat16):
            if chosen.d_inner in (None, shape[2]) and chosen.dtype in (None, str(dtype)[6:]):
                result["rows"].append(time_row(shape, dtype, result))
                print_row(result["rows"][-1])
                chosen.out.write_text(json.dumps(result, indent=1) + "\n")
    if not chosen.no_extras:
        result["python_microseconds"] = python_microseconds()
        for shape in CEILINGS:
            result["extras"].append(time_extras(shape, result))
            print(result["extras"][-1], flush=True)
            chosen.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
