"""What is launched again without being worked out anew, compiled for a CUDA device: beside the torch backends."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scan_cases import relative_error
from torch import Tensor

from ssminterp_kernels.causal_conv import causal_conv, causal_conv_step
from ssminterp_kernels.causal_conv import interface as conv_interface
from ssminterp_kernels.scan_step import interface as step_interface
from ssminterp_kernels.scan_step import selective_scan_step
from ssminterp_kernels.selective_scan import StateEdits, contract, selective_scan
from ssminterp_kernels.selective_scan import interface as scan_interface
from ssminterp_kernels.selective_scan.contract import ScanRun, contract_with_adjoint

pytest.importorskip("triton")

from ssminterp_kernels.causal_conv import triton_conv
from ssminterp_kernels.selective_scan import triton_gradients, triton_scan

pytestmark = pytest.mark.gpu

D_INNER, D_STATE = 96, 16


def draw(*shape: int, skip: int = 0) -> Tensor:
    """Random numbers; with `skip` they begin where Triton may not assume that they are aligned."""
    return torch.randn(*shape[:-1], shape[-1] + 2 * skip, device="cuda")[..., skip : skip + shape[-1]]


def scan_inputs(length: int, skip: int) -> dict[str, Tensor]:
    channels, weights = (2, length, D_INNER), (2, length, D_STATE)
    return {
        "x": draw(*channels, skip=skip),
        "delta": draw(*channels),
        "A": -draw(D_INNER, D_STATE).exp(),
        "B": draw(*weights, skip=skip),
        "C": draw(*weights),
        "D": draw(D_INNER),
        "z": draw(*channels, skip=skip),
        "delta_bias": draw(D_INNER),
        "initial_state": draw(2, D_INNER, D_STATE),
    }


def both(function: Any, *positional: Any, **named: Any) -> None:
    """Triton and torch agree."""
    ours, theirs = (function(*positional, **named, backend=backend) for backend in ("triton", "torch"))
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        assert a is None or relative_error(a, b.double()) < 1e-5


@pytest.mark.parametrize("length", [1, 16, 300])
def test_scans_of_the_same_layout_in_turn(length: int) -> None:
    """Fresh tensors, aligned and not, with and without states, edits and gradients, each three times."""
    for turn in range(3):
        for skip in (0, 1):
            inputs = scan_inputs(length, skip)
            both(selective_scan, **inputs, delta_softplus=True, states=sorted({0, length - 1}) if skip else None)
            # One tensor where there were two.
            both(selective_scan, **{**inputs, "delta": inputs["x"], "C": inputs["B"]}, delta_softplus=True)
            edits = StateEdits.at({turn % length: (0.5, draw(2, D_INNER, D_STATE))})
            both(selective_scan, **inputs, delta_softplus=True, edits=edits)
            leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.items()}
            dy = draw(2, length, D_INNER)
            ours, theirs = (
                torch.autograd.grad(
                    selective_scan(**leaves, delta_softplus=True, backend=backend).y, list(leaves.values()), dy
                )
                for backend in ("triton", "torch")
            )
            assert all(relative_error(a, b.double()) < 1e-4 for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("length", [16, 300])
def test_contractions_of_the_same_layout_in_turn(length: int) -> None:
    for _ in range(3):
        a, b = scan_inputs(length, 0), scan_inputs(length, 0)
        runs = (ScanRun(one["x"], one["delta"].abs(), one["B"]) for one in (a, b))
        run_a, run_b, dy = *runs, draw(2, length, D_INNER)
        for sum_d_inner in (False, True):
            options: dict[str, Any] = {"sum_d_inner": sum_d_inner}
            ours, theirs = (
                contract_with_adjoint(run_a, run_b, dy, a["A"], b["C"], **options, backend=backend)
                for backend in ("triton", "torch")
            )
            assert relative_error(ours, theirs.double()) < 1e-4


def test_convs_and_steps_of_the_same_layout_in_turn() -> None:
    weight, bias = draw(D_INNER, 4), draw(D_INNER)
    for _ in range(3):
        for skip in (0, 1):
            x, window = draw(2, 9, D_INNER, skip=skip), draw(2, D_INNER, 4)
            both(causal_conv, x, weight, bias, activation="silu", window=window, return_window=True)
            both(causal_conv_step, x[:, 0], window, weight, bias, activation="silu")
            expected = causal_conv_step(x[:, 1], window, weight, bias, backend="torch")
            y, after = causal_conv_step(x[:, 1], window, weight, bias, in_place=True)
            assert after is window
            assert relative_error(y, expected.y.double()) < 1e-5
            assert torch.equal(after, expected.window)
            leaves = [tensor.detach().requires_grad_() for tensor in (x, weight, bias)]
            gradients = (
                torch.autograd.grad(causal_conv(*leaves, activation="silu", backend=backend).y, leaves, x)
                for backend in ("triton", "torch")
            )
            assert all(relative_error(a, b.double()) < 1e-5 for a, b in zip(*gradients, strict=True))
            inputs = scan_inputs(1, skip)
            at_0 = {name: inputs[name][:, 0] for name in ("x", "delta", "B", "C", "z")}
            others: dict[str, Any] = {name: inputs[name] for name in ("A", "D", "delta_bias")}
            others["delta_softplus"] = True
            both(selective_scan_step, inputs["initial_state"], **at_0, **others)
            correct = selective_scan_step(inputs["initial_state"], **at_0, **others, backend="torch")
            y, state = selective_scan_step(inputs["initial_state"], **at_0, **others, in_place=True)
            assert state is inputs["initial_state"]
            assert relative_error(y, correct.y.double()) < 1e-5
            assert relative_error(state, correct.state.double()) < 1e-5


def test_launches_in_a_cuda_graph() -> None:
    """Replayed launches can be captured, and read what their inputs hold then."""
    inputs = scan_inputs(16, 0)
    for _ in range(2):
        selective_scan(**inputs, delta_softplus=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = selective_scan(**inputs, delta_softplus=True).y
    inputs["x"].normal_()
    graph.replay()
    assert relative_error(y, selective_scan(**inputs, delta_softplus=True, backend="torch").y.double()) < 1e-5


def test_launches_go_to_the_current_stream() -> None:
    inputs = scan_inputs(16, 0)
    selective_scan(**inputs, delta_softplus=True)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        # Long enough that what another stream ran would read x before it is there.
        torch.cuda._sleep(50_000_000)
        x = inputs["x"] * 2
        y = selective_scan(**{**inputs, "x": x}, delta_softplus=True).y
    stream.synchronize()
    assert (
        relative_error(y, selective_scan(**{**inputs, "x": x}, delta_softplus=True, backend="torch").y.double()) < 1e-5
    )


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_launches_go_to_the_device_of_their_tensors() -> None:
    """Also when they are repeated, whichever device is the current one."""
    inputs = {name: tensor.to("cuda:1") for name, tensor in scan_inputs(9, 0).items()}
    x, A, state = inputs["x"], inputs["A"], inputs["initial_state"]
    weight, window = (draw(D_INNER, 4).to("cuda:1"), draw(2, D_INNER, 4).to("cuda:1"))
    at_0 = [inputs[name][:, 0] for name in ("B", "C")]
    with torch.cuda.device(0):
        for _ in range(3):
            both(selective_scan, **inputs, delta_softplus=True)
            both(causal_conv, x, weight, window=window)
            both(causal_conv_step, x[:, 0], window, weight)
            both(selective_scan_step, state, x[:, 0], x[:, 0].abs(), A, *at_0)


def test_the_operators_are_repeated() -> None:
    """Whatever they come to do besides allocating and launching would keep them from it, and show in no result."""
    marked: tuple[Any, ...] = (
        *(scan_interface._final_state_alone, triton_scan._forward, triton_gradients._backward),
        *(contract._contract_again, conv_interface._conv_again, conv_interface._step_again),
        *(triton_conv.conv_forward, triton_conv._backward, step_interface._step_again),
    )
    for function in marked:
        function.known.clear()
    for length in (16, 300):
        inputs = scan_inputs(length, 0)
        x, A, weight, window = inputs["x"], inputs["A"], draw(D_INNER, 4), draw(2, D_INNER, 4)
        selective_scan(**inputs, delta_softplus=True)
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.items()}
        selective_scan(**leaves, delta_softplus=True).y.sum().backward()
        run = ScanRun(x, inputs["delta"], inputs["B"])
        contract_with_adjoint(run, run, draw(2, length, D_INNER), A, inputs["C"], sum_d_inner=True)
        causal_conv(x, weight)
        causal_conv(leaves["x"], weight).y.sum().backward()
        causal_conv_step(x[:, 0], window, weight)
        at_0 = (x[:, 0], x[:, 0].abs(), A, inputs["B"][:, 0], inputs["C"][:, 0])
        selective_scan_step(inputs["initial_state"], *at_0)
    for function in marked:
        assert function.known
        assert None not in function.known.values(), function
