"""The Triton convolution and the one-step kernels as torch.library operators: registration, and `torch.compile`."""

from __future__ import annotations

import os

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"

pytest.importorskip("triton")

from own_process import run_in_own_process  # noqa: E402

from ssminterp_kernels.causal_conv.triton_conv_ops import conv_op, conv_step_in_place_op, conv_step_op  # noqa: E402
from ssminterp_kernels.scan_step.triton_step_ops import step_in_place_op, step_op  # noqa: E402

DEVICE = "cuda" if HAS_GPU else "cpu"


def draw(*sizes: int, grad: bool = False) -> torch.Tensor:
    return torch.randn(*sizes, device=DEVICE).requires_grad_(grad)


@pytest.mark.parametrize("has_window", [False, True])
def test_opcheck_of_the_convolution(has_window: bool) -> None:
    bias, window = (draw(3, grad=True), draw(2, 3, 4, grad=True)) if has_window else (None, None)
    torch.library.opcheck(conv_op, (draw(2, 5, 3, grad=True), draw(3, 4, grad=True), bias, window, has_window))


def test_opcheck_of_steps() -> None:
    for op in (conv_step_op, conv_step_in_place_op):
        torch.library.opcheck(op, (draw(2, 3), draw(2, 3, 4), draw(3, 4), draw(3), True))
    for op in (step_op, step_in_place_op):
        inputs = (draw(2, 3, 4), draw(2, 3), draw(2, 3), draw(3, 4), draw(2, 1, 4), draw(2, 1, 4))
        torch.library.opcheck(op, (*inputs, draw(3), draw(2, 3), None, True))


COMPILED = """
import torch
from ssminterp_kernels.causal_conv import causal_conv, causal_conv_step
from ssminterp_kernels.scan_step import selective_scan_step

def one(x, weight, window, state, A, B, in_place):
    y, after = causal_conv_step(x, window, weight, activation="silu", in_place=in_place, backend="triton")
    y, state = selective_scan_step(state, y, x, A, B, B, delta_softplus=True, in_place=in_place, backend="triton")
    return y, after, state

def whole(x, weight, window):
    y = causal_conv(x, weight, window=window, activation="silu", backend="triton").y
    return y, torch.autograd.grad(y.square().sum(), [x, weight, window])

d = "DEVICE"
weight, A = torch.randn(3, 4, device=d), -torch.rand(3, 2, device=d)
inputs = [torch.randn(*s, device=d) for s in ((2, 3), (2, 3, 4), (2, 3, 2), (2, 2))]
for in_place in (False, True):
    with torch.no_grad():
        runs = []
        for function in (one, torch.compile(one, fullgraph=True, backend="aot_eager")):
            x, window, state, B = (t.clone() for t in inputs)
            runs.append([*function(x, weight, window, state, A, B, in_place), window, state])
    for a, b in zip(*runs):
        torch.testing.assert_close(a, b)
x, window, weight = (t.requires_grad_() for t in (torch.randn(2, 5, 3, device=d), inputs[1].clone(), weight))
forward = torch.compile(lambda *t: causal_conv(t[0], t[1], window=t[2], activation="silu", backend="triton").y,
                        fullgraph=True, backend="aot_eager")
y = forward(x, weight, window)
expected = whole(x, weight, window)
torch.testing.assert_close(y, expected[0])
for a, b in zip(torch.autograd.grad(y.square().sum(), [x, weight, window]), expected[1]):
    torch.testing.assert_close(a, b)
"""


def test_compiled_without_a_graph_break() -> None:
    run_in_own_process(COMPILED.replace("DEVICE", DEVICE))
