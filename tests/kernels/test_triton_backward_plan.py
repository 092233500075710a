"""Which chunks, segments and memory the backward scan takes, and that no state is overwritten before it is used."""

from __future__ import annotations

import functools
import os
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

pytest.importorskip("triton")

from ssminterp_kernels.selective_scan import triton_gradients, triton_scan, triton_tensors
from ssminterp_kernels.selective_scan.triton_backward_plan import BackwardPlan, plan_backward

SHAPES = ((8, 512, 2048), (1, 16384, 2048), (8, 2048, 5120))


@st.composite
def plans(draw: st.DrawFn) -> tuple[BackwardPlan, int, int, int]:
    """A plan, and the batch, length and bytes of a number that it is for."""
    batch, length = draw(st.integers(1, 64)), draw(st.integers(1, 3000))
    itemsize, outputs = draw(st.sampled_from([2, 4])), draw(st.sampled_from([2, 3]))
    d_inner = draw(st.sampled_from([1, 32, 40, 64, 96, 1536, 2048]))
    d_state = draw(st.sampled_from([1, 8, 16, 16, 16, 64]))
    sizes = (batch, length, d_inner, d_state, 1, draw(st.sampled_from([1, 132])))
    return plan_backward(*sizes, itemsize, outputs), batch, length, itemsize


def segments_of(plan: BackwardPlan, length: int) -> list[list[tuple[int, int]]]:
    """Begin and end of every segment of every chunk."""
    chunks = []
    for first in range(0, length, plan.chunk_length):
        stop = min(first + plan.chunk_length, length)
        begins = [first, *range(first + plan.head, stop, plan.segment)]
        chunks.append(list(zip(begins, [*begins[1:], stop], strict=True)))
    return chunks


@given(plans())
def test_segments_cover_the_sequence_and_their_states_are_counted(drawn: tuple[BackwardPlan, int, int, int]) -> None:
    plan, _, length, _ = drawn
    chunks = segments_of(plan, length)
    assert len(chunks) == plan.n_chunks
    assert all(begin < end for chunk in chunks for begin, end in chunk)
    count = sum(map(len, chunks))
    assert plan.boundaries == (0 if count == 1 else count)
    assert plan.head % 8 == plan.segment % 8 == plan.chunk_length % 8 == 0
    assert plan.head <= plan.segment
    assert plan.n_blocks * plan.block_d >= plan.group_size


@given(plans())
def test_every_kept_state_is_still_there_when_it_is_used(drawn: tuple[BackwardPlan, int, int, int]) -> None:
    """The backward pass played through: who wrote last in which rows of which output."""
    plan, _, length, itemsize = drawn
    for chunk in segments_of(plan, length):
        first, stop = chunk[0][0], chunk[-1][1]
        written: dict[object, object] = {}
        for begin, end in reversed(chunk):
            rows_from = max(begin - plan.head, first)

            def cells(k: int, rows_from: int = rows_from) -> list[object]:
                """Where the k-th state of a segment lies."""
                if k < plan.planes:
                    return [k]
                i, rows = k - plan.planes, 16 // itemsize  # rows of one output, that hold a quarter of a state
                if plan.outputs == 2:
                    quarters = [(q % 2, 2 * i + q // 2) for q in range(4)]
                else:
                    quarters = [*((q, i + i // 3 + 1) for q in range(3)), (i % 3, i // 3 * 4)]
                return [
                    (output, rows_from + rows * number + at)
                    for output, number in quarters
                    for at in range(0, rows, plan.block_t)
                ]

            blocks = -(-(end - begin) // plan.block_t)
            for k in range(blocks - 2):
                for cell in cells(k):
                    assert isinstance(cell, int) or cell[1] + plan.block_t <= stop  # type: ignore[index]
                    assert written.get(cell) != "output"
                    written[cell] = (begin, k)
            for block in reversed(range(blocks)):
                at = begin + block * plan.block_t
                if plan.outputs == 3:
                    written[2, at] = "output"
                if block >= 2:
                    assert all(written[cell] == (begin, block - 2) for cell in cells(block - 2))
                written[0, at] = written[1, at] = "output"


@given(plans())
def test_memory_is_bounded_at_every_shape(drawn: tuple[BackwardPlan, int, int, int]) -> None:
    """As the module says."""
    plan, _, length, _ = drawn
    c = min(plan.chunk_length, length)
    assert plan.chunk_length >= min(32, length)
    assert plan.boundaries + plan.n_chunks * plan.planes <= plan.n_chunks * (c / 72 + 1.5 * c**0.5 + 1)
    assert plan.paired_blocks <= max(1, plan.group_size / 32)


class Allocations(TorchDispatchMode):
    """Counts the bytes that are allocated."""

    n_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__.startswith(("empty", "new_empty")):
            self.n_bytes += result.nbytes
        return result


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_peak_memory_is_a_twentieth_of_all_states(shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted in what is allocated, by tensors without memory and with no launches."""
    for module in (triton_scan, triton_gradients):
        monkeypatch.setattr(module, "launch", lambda *_, **__: None)
        monkeypatch.setattr(module, "processor_count", lambda _: 132)
    batch, length, d_inner = shape
    empty = functools.partial(torch.empty, device="meta")
    x, delta, z = (empty(shape) for _ in range(3))
    B, C = (empty(batch, length, 16) for _ in range(2))
    D, bias = (empty(d_inner) for _ in range(2))
    given_ = (x, delta, empty(d_inner, 16), B, C, D, z, bias, None, None, None, None, None, True, False, torch.float32)
    final_state, boundaries = triton_scan._forward.__wrapped__(*given_, True, None, None)[2:]  # type: ignore[attr-defined]
    with Allocations() as allocations:
        gradients = triton_gradients._backward.__wrapped__(*given_, boundaries, x, None, final_state, True)  # type: ignore[attr-defined]
    outputs = sum(gradient.nbytes for gradient in gradients if gradient is not None)
    extra = boundaries.nbytes + allocations.n_bytes - outputs
    assert 0.02 <= extra / (16 * x.nbytes) <= 0.05


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_peak_memory_on_a_gpu_is_what_was_planned() -> None:
    """When the kernels are first launched, and when the launches are repeated."""
    batch, length, d_inner = SHAPES[0]
    new = functools.partial(torch.randn, device="cuda")
    x, delta, z = (new(batch, length, d_inner) for _ in range(3))
    B, C = (new(batch, length, 16) for _ in range(2))
    tensors = (x, delta, -new(d_inner, 16).exp(), B, C, new(d_inner), z, new(d_inner))
    s = triton_tensors.ScanTensors(*tensors, None, None, None, None, None, True, False, torch.float32)
    _, _, final_state, boundaries = triton_scan.scan_forward(s, save=True)
    assert boundaries is not None
    for _ in range(2):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        gradients = triton_gradients.scan_backward(s, boundaries, x, None, final_state)
        outputs = torch.cuda.memory_allocated() - before
        extra = boundaries.nbytes + torch.cuda.max_memory_allocated() - before - outputs
        del gradients
        assert 0.02 <= extra / (16 * x.nbytes) <= 0.05
