"""Which chunks, segments and memory the backward scan takes, and that no state is overwritten before it is used."""

from __future__ import annotations

import functools
import math
import os
from contextlib import ExitStack
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

pytest.importorskip("triton")

import triton
import triton.language as tl

from ssminterp_kernels.selective_scan import triton_gradients, triton_scan, triton_sums, triton_tensors
from ssminterp_kernels.selective_scan.triton_backward_plan import BackwardPlan, plan_backward
from ssminterp_kernels.selective_scan.triton_backward_states import count_kept, last_kept

# (batch, pos, d_inner) of the benchmark's table.
SHAPES = (
    *((1, 2048, 1536), (1, 2048, 5120), (8, 512, 2048), (64, 16, 2048)),
    *((256, 16, 2048), (1, 16384, 2048), (8, 2048, 5120)),
)


class Drawn(NamedTuple):
    """A plan and what it is for."""

    plan: BackwardPlan
    batch: int
    length: int
    d_inner: int
    d_state: int
    itemsize: int

    @property
    def programs(self) -> int:
        """Of each block of channels."""
        return -(-self.batch // self.plan.elements) * self.plan.n_chunks

    def most_memory(self) -> float:
        """The bound that the module states, as a part of all states."""
        c = self.batch * self.length / self.programs
        whole = 8 * math.ceil(c / 8)
        of_elements = self.plan.elements if self.plan.elements > 1 else 0
        states = whole / 72 + of_elements + (3 if self.plan.outputs else 1 + 0.75 * math.sqrt(whole))
        sums = 2 * self.plan.paired_blocks / self.d_inner
        return max(1 / 20, sums + (states + 2 / self.d_state) / c)


@st.composite
def plans(draw: st.DrawFn) -> Drawn:
    batch, length = draw(st.integers(1, 300)), draw(st.one_of(st.integers(1, 64), st.integers(1, 3000)))
    itemsize, outputs = draw(st.sampled_from([2, 4])), draw(st.sampled_from([2, 3]))
    d_inner = draw(st.sampled_from([1, 32, 40, 64, 96, 1536, 2048]))
    d_state = draw(st.sampled_from([1, 8, 16, 16, 16, 64, 256]))
    sizes = (batch, length, d_inner, d_state, 1, draw(st.sampled_from([1, 132])))
    return Drawn(plan_backward(*sizes, itemsize, outputs), batch, length, d_inner, d_state, itemsize)


def segments_of(plan: BackwardPlan, length: int) -> list[list[tuple[int, int]]]:
    """Begin and end of every segment of every chunk."""
    chunks = []
    for first in range(0, length, plan.chunk_length):
        stop = min(first + plan.chunk_length, length)
        begins = [first, *range(first + plan.head, stop, plan.segment)]
        chunks.append(list(zip(begins, [*begins[1:], stop], strict=True)))
    return chunks


@given(plans())
def test_segments_cover_the_sequence_and_their_states_are_counted(drawn: Drawn) -> None:
    plan, length = drawn.plan, drawn.length
    chunks = segments_of(plan, length)
    assert len(chunks) == plan.n_chunks
    assert all(begin < end for chunk in chunks for begin, end in chunk)
    count = sum(map(len, chunks))
    assert plan.boundaries == (0 if count == 1 else count)
    assert plan.head % 8 == plan.segment % 8 == plan.chunk_length % 8 == 0
    assert plan.head <= plan.segment
    assert plan.n_blocks * plan.block_d >= plan.group_size
    assert plan.elements == 1 or plan.n_chunks == 1


@given(plans())
def test_every_kept_state_is_still_there_when_it_is_used(drawn: Drawn) -> None:
    """The backward pass played through: who wrote last in which rows of which output."""
    plan, length = drawn.plan, drawn.length
    of, every = plan.kept
    for chunk in segments_of(plan, length):
        first, stop = chunk[0][0], chunk[-1][1]
        written: dict[object, object] = {}
        for begin, end in reversed(chunk):
            rows_from = max(begin - plan.head, first)

            def cells(k: int, rows_from: int = rows_from) -> list[object]:
                """Where the k-th of a segment's kept states lies."""
                in_shared_memory = min(1, plan.outputs)
                if k < in_shared_memory + plan.planes:
                    return [k]
                i, rows = (
                    k - in_shared_memory - plan.planes,
                    16 // drawn.itemsize,
                )  # rows of one output, that hold a quarter of a state
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
            kept = [b for b in range(1, blocks - 1) if b * of // every > (b - 1) * of // every]
            for k, block in enumerate(kept):
                for cell in cells(k):
                    assert isinstance(cell, int) or cell[1] + plan.block_t <= stop  # type: ignore[index]
                    assert written.get(cell) != "output"
                    written[cell] = (begin, block)
            for block in reversed(range(blocks)):
                at = begin + block * plan.block_t
                if plan.outputs == 3:
                    written[2, at] = "output"
                # From the last state that was kept, the next block is reached by replaying.
                k = sum(each < block for each in kept) - 1
                if k >= 0:
                    assert all(written[cell] == (begin, kept[k]) for cell in cells(k))
                written[0, at] = written[1, at] = "output"


@given(plans())
def test_few_positions_are_replayed_again(drawn: Drawn) -> None:
    of, every = drawn.plan.kept
    assert 0.4 <= of / every <= 1


@pytest.mark.parametrize(
    ("block", "count", "last"), [(-1, 0, 0), (0, 0, 0), (2, 0, 0), (3, 1, 3), (4, 1, 3), (7, 3, 7)]
)
def test_the_kernel_counts_kept_states_as_planned(block: int, count: int, last: int) -> None:
    """Three of every seven: before blocks 3, 5, 7, 10, …"""
    out = torch.zeros(2, dtype=torch.int32, device="cuda" if torch.cuda.is_available() else "cpu")
    _count_kernel[(1,)](out, block, KEPT=(3, 7))
    assert out.tolist() == [count, last]


@triton.jit
def _count_kernel(out, block, KEPT: tl.constexpr):  # type: ignore[no-untyped-def]
    tl.store(out, count_kept(block, KEPT))
    tl.store(out + 1, last_kept(block, KEPT))


class Allocations(TorchDispatchMode):
    """Counts the bytes that are allocated."""

    n_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__.startswith(("empty", "new_empty")):
            self.n_bytes += result.nbytes
        return result


def memory_of_gradients(shape: tuple[int, int, int], dtype: torch.dtype, d_state: int, gated: bool) -> float:
    """What is allocated beside inputs and outputs, as a part of all states: tensors without memory, no launches."""
    batch, length, d_inner = shape
    empty = functools.partial(torch.empty, device="meta", dtype=dtype)
    x, delta, z = (empty(shape) for _ in range(3))
    B, C = (empty(batch, length, d_state) for _ in range(2))
    A, D, bias = (torch.empty(*sizes, device="meta") for sizes in ((d_inner, d_state), (d_inner,), (d_inner,)))
    tensors = (x, delta, A, B, C, D, z if gated else None, bias, None, None, None, None, None)
    flags = (True, False, torch.float32)
    with ExitStack() as patches:
        for module in (triton_scan, triton_gradients, triton_sums):
            patches.enter_context(mock.patch.object(module, "launch"))
            patches.enter_context(mock.patch.object(module, "processor_count", return_value=132))
        forward = triton_scan._forward.__wrapped__(*tensors, *flags, True, None, None)  # type: ignore[attr-defined]
        final_state, boundaries = forward[2:]
        with Allocations() as allocations:
            gradients = triton_gradients._backward.__wrapped__(  # type: ignore[attr-defined]
                *tensors, *flags, boundaries, x, None, final_state, True
            )
    outputs = sum(gradient.nbytes for gradient in gradients if gradient is not None)
    extra = allocations.n_bytes - outputs + (0 if boundaries is None else boundaries.nbytes)
    return extra / (4 * d_state * x.numel())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_peak_memory_is_a_twentieth_of_all_states(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    assert 0.02 <= memory_of_gradients(shape, dtype, 16, gated=True) <= 0.05


@given(plans(), st.booleans())
def test_memory_is_bounded_at_every_shape(drawn: Drawn, gated: bool) -> None:
    """As the module of plans says; counted in what is allocated."""
    dtype = {2: torch.bfloat16, 4: torch.float32}[drawn.itemsize]
    sizes = (drawn.batch, drawn.length, drawn.d_inner, drawn.d_state)
    planned = drawn._replace(plan=plan_backward(*sizes, 1, 132, drawn.itemsize, 2 + gated))
    assert planned.plan.chunk_length >= min(32, drawn.length)
    assert planned.plan.paired_blocks <= max(1, drawn.d_inner / 32)
    assert memory_of_gradients(sizes[:3], dtype, drawn.d_state, gated) <= planned.most_memory() + 1e-9


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_peak_memory_on_a_gpu_is_what_was_planned() -> None:
    """When the kernels are first launched, and when the launches are repeated."""
    batch, length, d_inner = 8, 512, 2048
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
