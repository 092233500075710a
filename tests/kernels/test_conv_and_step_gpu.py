"""The convolution and the one-step scan compiled for a CUDA device, at the sizes of real models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from scan_cases import ScanCase, in_float64, random_scan_inputs, reference, relative_error
from torch import Tensor

from ssminterp_kernels.causal_conv import causal_conv, causal_conv_step
from ssminterp_kernels.scan_step import selective_scan_step
from ssminterp_kernels.selective_scan import selective_scan

pytestmark = pytest.mark.gpu

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def random_conv_inputs(shape: tuple[int, int, int, int, int | None], dtype: torch.dtype) -> dict[str, Any]:
    """Leaves; x is a half of something wider, as in a mixer."""
    batch, length, d_inner, d_conv, width = shape

    def draw(*sizes: int) -> Tensor:
        return torch.randn(*sizes, dtype=torch.float32, device="cuda").to(dtype)

    inputs: dict[str, Any] = {
        "x": draw(batch, length, 2 * d_inner)[..., :d_inner],
        "weight": draw(d_inner, 1, d_conv)[:, 0],
        "bias": draw(d_inner),
        "window": None if width is None else draw(batch, d_inner, width),
    }
    return {name: value if value is None else value.detach().requires_grad_() for name, value in inputs.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(64, 16, 2048, 4, None), (3, 1000, 1536, 4, 4), (1, 300_000, 64, 4, None)], ids=str)
def test_the_conv_of_large_shapes(shape: Any, dtype: torch.dtype) -> None:
    """Beside conv1d on the same device, in float64."""
    inputs = random_conv_inputs(shape, dtype)
    weights = torch.randn(*shape[:3], device="cuda", dtype=torch.float64)
    ours = causal_conv(**inputs, activation="silu").y
    gradients = torch.autograd.grad((ours.double() * weights).sum(), [v for v in inputs.values() if v is not None])
    wide = {name: None if v is None else v.detach().double().requires_grad_() for name, v in inputs.items()}
    before = torch.zeros(shape[0], shape[2], 3, device="cuda", dtype=torch.float64)
    before = before if wide["window"] is None else wide["window"][..., -3:]
    source = torch.cat([before, wide["x"].transpose(1, 2)], dim=2)
    y = F.silu(F.conv1d(source, wide["weight"][:, None], wide["bias"], groups=shape[2])).transpose(1, 2)
    expected = torch.autograd.grad((y * weights).sum(), [v for v in wide.values() if v is not None])
    assert relative_error(ours, y) <= TOLERANCE[dtype]
    for g, e in zip(gradients, expected, strict=True):
        assert relative_error(g, e) <= TOLERANCE[dtype]
    again = torch.autograd.grad((causal_conv(**inputs, activation="silu").y.double() * weights).sum(), inputs["weight"])
    assert torch.equal(again[0], gradients[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sizes", [(1, 1536, 16), (64, 2048, 16), (8, 5120, 128)], ids=str)
def test_a_step_of_large_shapes(sizes: tuple[int, int, int], dtype: torch.dtype) -> None:
    batch, d_inner, d_state = sizes
    case = ScanCase(batch=batch, length=1, d_inner=d_inner, d_state=d_state, dtype=dtype, states=None)
    inputs = random_scan_inputs(case, device="cuda")
    expected = reference(**in_float64(inputs))
    with torch.no_grad():
        at_0 = {name: inputs[name][:, 0] for name in ("x", "delta", "B", "C", "z")}
        others = {name: inputs[name] for name in ("A", "D", "delta_bias", "delta_softplus")}
        out = selective_scan_step(inputs["initial_state"], **at_0, **others, in_place=True)
        assert out.state is inputs["initial_state"]
    assert relative_error(out.y, expected["y"][:, 0]) <= TOLERANCE[dtype]
    assert relative_error(out.state, expected["final_state"]) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_conv_steps_in_place_are_the_conv(dtype: torch.dtype) -> None:
    inputs = random_conv_inputs((5, 9, 1536, 4, 4), dtype)
    whole = causal_conv(**inputs, activation="silu").y
    for t in range(9):
        y, after = causal_conv_step(
            *(inputs["x"][:, t], inputs["window"], inputs["weight"], inputs["bias"]), activation="silu", in_place=True
        )
        assert after is inputs["window"]
        assert relative_error(y, whole[:, t].double().cpu()) <= TOLERANCE[dtype]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_of_another_gpu_than_the_current_one() -> None:
    inputs = random_scan_inputs(ScanCase(length=40, d_inner=64, states="all"), device="cuda:1")
    one = random_scan_inputs(ScanCase(length=1, d_inner=64, states=None), device="cuda:1")
    weight = torch.randn(64, 4, device="cuda:1")
    assert torch.cuda.current_device() == 0
    out = selective_scan(**inputs)
    assert relative_error(out.y, reference(**in_float64(inputs))["y"]) <= 1e-5
    (dx,) = torch.autograd.grad(out.y.sum() + out.final_state.sum(), inputs["x"])
    assert dx.isfinite().all()
    conv = causal_conv(inputs["x"], weight, activation="silu").y
    on_cpu = causal_conv(inputs["x"].cpu(), weight.cpu(), activation="silu").y
    torch.testing.assert_close(conv.cpu(), on_cpu, atol=1e-5, rtol=1e-5)
    (dx,) = torch.autograd.grad(conv.sum(), inputs["x"])
    assert dx.isfinite().all()
    with torch.no_grad():
        at_0 = {name: one[name][:, 0] for name in ("x", "delta", "B", "C", "z")}
        others = {name: one[name] for name in ("A", "D", "delta_bias", "delta_softplus")}
        step = selective_scan_step(one["initial_state"], **at_0, **others)
        assert relative_error(step.y, reference(**in_float64(one | {"states": "all"}))["y"][:, 0]) <= 1e-5
        causal_conv_step(inputs["x"][:, 0], torch.zeros(2, 64, 4, device="cuda:1"), weight)
    assert torch.cuda.current_device() == 0
