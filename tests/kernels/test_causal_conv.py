"""The causal convolution and its step, beside a float64 loop: outputs, all gradients, odd shapes, strides, dtypes."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"

from scan_cases import relative_error  # noqa: E402

from ssminterp_kernels.causal_conv import causal_conv, causal_conv_step  # noqa: E402

TRITON_DEVICE = "cuda" if HAS_GPU else "cpu"
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
BACKENDS = [("torch", "cpu"), ("triton", TRITON_DEVICE)]
# batch, pos, d_inner, d_conv, width of the window (None: no window)
SHAPES = [
    (2, 7, 5, 4, None),
    (1, 1, 3, 4, 4),
    (2, 2, 33, 3, 5),
    (3, 63, 40, 2, 1),
    (1, 40, 65, 4, 3),
    (2, 5, 4, 1, 0),
    (1, 3, 2, 6, None),
]


def random_inputs(
    shape: tuple[int, int, int, int, int | None], dtype: torch.dtype, device: str, has_bias: bool = True
) -> dict[str, Any]:
    """Leaves; x is a half of something wider, and its positions are not contiguous either."""
    batch, length, d_inner, d_conv, width = shape

    def draw(*sizes: int) -> Tensor:
        return torch.randn(*sizes, dtype=torch.float64).to(device, dtype)

    inputs: dict[str, Any] = {
        "x": draw(length, 2 * d_inner, batch).permute(2, 0, 1)[..., :d_inner],
        "weight": draw(d_inner, 1, d_conv)[:, 0],
        "bias": draw(d_inner) if has_bias else None,
        "window": None if width is None else draw(batch, width, d_inner).transpose(1, 2),
    }
    return {name: value if value is None else value.detach().requires_grad_() for name, value in inputs.items()}


def in_float64(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: v.detach().double().cpu().requires_grad_() if v is not None else None for name, v in inputs.items()}


def loop(x: Tensor, weight: Tensor, bias: Tensor | None, window: Tensor | None, activation: str | None) -> Tensor:
    """The definition, position by position."""
    d_conv = weight.shape[1]
    before = x.new_zeros(x.shape[0], max(d_conv, 1), x.shape[2])
    if window is not None:
        before = torch.cat([before, window.transpose(1, 2)], dim=1)
    inputs = torch.cat([before, x], dim=1)
    rows = []
    for t in range(before.shape[1], inputs.shape[1]):
        row = (inputs[:, t - d_conv + 1 : t + 1] * weight.t()).sum(1)
        rows.append(row if bias is None else row + bias)
    y = torch.stack(rows, dim=1)
    return F.silu(y) if activation == "silu" else y


def with_gradients(y: Tensor, inputs: dict[str, Any], weights: Tensor) -> dict[str, Tensor]:
    leaves = {name: value for name, value in inputs.items() if value is not None}
    loss = (y.double().cpu() * weights).sum()
    gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return {"y": y} | {
        name: torch.zeros_like(leaf) if g is None else g
        for (name, leaf), g in zip(leaves.items(), gradients, strict=True)
    }


def check(backend: str, device: str, shape: Any, dtype: torch.dtype, activation: Any, has_bias: bool = True) -> None:
    inputs = random_inputs(shape, dtype, device, has_bias)
    weights = torch.randn(*shape[:3], dtype=torch.float64)
    out = causal_conv(**inputs, activation=activation, backend=backend)  # type: ignore[arg-type]
    assert out.window is None
    ours = with_gradients(out.y, inputs, weights)
    wide = in_float64(inputs)
    expected = with_gradients(loop(**wide, activation=activation), wide, weights)
    assert out.y.dtype == dtype
    for name, value in expected.items():
        assert ours[name].shape == value.shape
        if value.numel() and value.abs().max() > 0:
            assert relative_error(ours[name], value) <= TOLERANCE[dtype], name


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("activation", [None, "silu"])
def test_outputs_and_gradients(backend: str, device: str, shape: Any, activation: str | None) -> None:
    check(backend, device, shape, torch.float32, activation)


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(backend: str, device: str, dtype: torch.dtype) -> None:
    check(backend, device, (2, 19, 36, 4, 4), dtype, "silu")
    check(backend, device, (2, 19, 36, 4, None), dtype, None, has_bias=False)


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_is_computed_does_not_depend_on_fusing(backend: Any, device: str, dtype: torch.dtype) -> None:
    """Up to the last digit of a SiLU that is computed elsewhere: sums are rounded before it either way."""
    inputs = {name: t.detach() for name, t in random_inputs((2, 40, 64, 4, 4), dtype, device).items()}
    for options in ({}, {"window": None, "bias": None}):
        given_inputs = inputs | options
        apart = F.silu(causal_conv(**given_inputs, backend=backend).y)
        fused = causal_conv(**given_inputs, activation="silu", backend=backend).y
        # Triton's interpreter cuts bfloat16 off where a GPU rounds it.
        if device == "cuda" or backend == "torch" or dtype == torch.float16:
            assert (apart == fused).float().mean() > 0.99
        torch.testing.assert_close(fused, apart, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    last, _ = causal_conv_step(
        *(inputs["x"][:, -1], inputs["x"][:, -5:-1].transpose(1, 2), inputs["weight"]),
        activation="silu",
        backend=backend,
    )
    torch.testing.assert_close(last, fused[:, -1], rtol=2 * torch.finfo(dtype).eps, atol=1e-3)


def test_float64_and_gradcheck() -> None:
    check("auto", "cpu", (2, 9, 6, 4, 3), torch.float64, "silu")
    inputs = random_inputs((2, 5, 3, 4, 4), torch.float64, "cpu")
    torch.autograd.gradcheck(
        lambda *t: causal_conv(t[0], t[1], t[2], window=t[3], activation="silu").y, [*inputs.values()]
    )


@given(
    length=st.integers(1, 9),
    cut=st.integers(0, 9),
    d_conv=st.integers(1, 5),
    wider=st.integers(0, 2),
    given_window=st.booleans(),
    backend=st.sampled_from(BACKENDS),
    activation=st.sampled_from([None, "silu"]),
)
def test_splitting_anywhere_and_stepping_equal_the_whole(
    length: int, cut: int, d_conv: int, wider: int, given_window: bool, backend: Any, activation: Any
) -> None:
    name, device = backend
    width = d_conv - 1 + wider
    x = torch.randn(2, length, 3, device=device)
    weight, bias = torch.randn(3, d_conv, device=device), torch.randn(3, device=device)
    window = torch.randn(2, 3, width, device=device) if given_window else torch.zeros(2, 3, width, device=device)
    options = {"activation": activation, "backend": name}
    whole = causal_conv(x, weight, bias, window=window if given_window else None, return_window=True, **options)
    cut = min(cut, length - 1)
    kept, parts = window, []
    if cut:
        y, kept = causal_conv(x[:, :cut], weight, bias, window=window, return_window=True, **options)
        parts.append(y)
    for t in range(cut, length):
        before = kept.clone()
        y, kept = causal_conv_step(x[:, t], before, weight, bias, in_place=t % 2 == 0, **options)
        assert (kept is before) == (t % 2 == 0)
        parts.append(y[:, None])
    torch.testing.assert_close(torch.cat(parts, dim=1), whole.y, atol=1e-5, rtol=1e-5)
    if given_window:
        assert torch.equal(kept, whole.window)
    else:
        assert torch.equal(kept[..., width - d_conv + 1 :], whole.window)
    assert torch.equal(kept, torch.cat([window, x.transpose(1, 2)], dim=2)[..., length:])


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_a_step_has_the_gradients_of_a_sequence(backend: Any, device: str) -> None:
    inputs = random_inputs((2, 1, 5, 4, 4), torch.float32, device)
    weights = torch.randn(2, 1, 5, dtype=torch.float64)
    y, after = causal_conv_step(
        inputs["x"][:, 0], inputs["window"], inputs["weight"], inputs["bias"], activation="silu", backend=backend
    )
    ours = with_gradients(y[:, None], inputs, weights)
    wide = in_float64(inputs)
    expected = with_gradients(loop(**wide, activation="silu"), wide, weights)
    for name, value in expected.items():
        assert relative_error(ours[name], value) <= 1e-5, name
    (into_x,) = torch.autograd.grad(after.sum(), inputs["x"])
    assert torch.equal(into_x, torch.ones_like(into_x))
    with pytest.raises(ValueError, match="in_place"):
        causal_conv_step(inputs["x"][:, 0].detach(), inputs["window"], inputs["weight"], in_place=True, backend=backend)


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_nan_and_infinity_stay_where_they_are(backend: Any, device: str) -> None:
    x = torch.randn(2, 30, 4, device=device)
    x[0, 5, 1], x[1, 8, 2] = float("nan"), float("inf")
    x.requires_grad_()
    y = causal_conv(x, torch.rand(4, 4, device=device) + 0.1, activation="silu", backend=backend).y
    touched = ~y.isfinite()
    expected = torch.zeros_like(touched)
    expected[0, 5:9, 1] = expected[1, 8:12, 2] = True
    assert torch.equal(touched, expected)
    (gradient,) = torch.autograd.grad(y[0, 20:].sum() + y[1, :5].sum(), x)
    assert gradient[0, 20:].isfinite().all()
    assert gradient[1, :5].isfinite().all()
    assert gradient[:, :, [0, 3]].isfinite().all()


def test_bad_input(as_users_run_it: None) -> None:
    x, weight, window = torch.randn(2, 5, 4), torch.randn(4, 3), torch.randn(2, 4, 2)
    for arguments, options, message in (
        ((x[0], weight), {}, r"x must have the axes \[batch, pos, d_inner\], got shape \[5, 4\]"),
        ((x[:, :0], weight), {}, "no axis may be empty"),
        ((x, weight[:3]), {}, r"weight must have the axes \[d_inner = 4, d_conv\].*got shape \[3, 3\]"),
        ((x, weight, torch.randn(5)), {}, r"bias must have the axes .*got shape \[5\]"),
        ((x, weight), {"window": window[..., 1:]}, r"window must have .*width ≥ d_conv - 1 = 2.*got shape \[2, 4, 1\]"),
        ((x, weight), {"window": window[:1]}, "window must have"),
        ((x, weight), {"activation": "gelu"}, "activation must be None or 'silu', got 'gelu'"),
        ((x, weight), {"backend": "cuda"}, "backend must be one of"),
        ((x.long(), weight), {}, "x must be real floating point, got torch.int64"),
        ((x, weight.to("meta")), {}, "weight is on meta but x is on cpu"),
        ((x.double(), weight), {"backend": "triton"}, "float64"),
    ):
        with pytest.raises(ValueError, match=message):
            causal_conv(*arguments, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"x must have the axes \[batch, d_inner\], got shape \[2, 5, 4\]"):
        causal_conv_step(x, window, weight)


def test_triton_on_the_cpu_needs_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="needs CUDA tensors"):
        causal_conv(torch.randn(1, 2, 3), torch.randn(3, 2), backend="triton")
