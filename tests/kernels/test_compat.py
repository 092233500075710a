"""compat.selective_scan_fn against a plain transcription of what mamba-ssm's function computes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from scan_cases import relative_error
from torch import Tensor

from ssminterp_kernels.compat import selective_scan_fn
from ssminterp_kernels.selective_scan import ScanOutput


def plain(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
) -> tuple[Tensor, Tensor]:
    """[batch, d_inner, pos] layout, one position at a time, in the dtype of the arguments (use float64)."""
    batch, d_inner, length = u.shape
    if delta_bias is not None:
        delta = delta + delta_bias[:, None]
    if delta_softplus:
        delta = F.softplus(delta)

    def at(weights: Tensor, t: int) -> Tensor:
        if weights.dim() == 2:
            return weights
        if weights.dim() == 3:
            return weights[:, None, :, t]
        return weights[..., t].repeat_interleave(d_inner // weights.shape[1], dim=1)

    state = u.new_zeros(batch, d_inner, A.shape[1])
    ys = []
    for t in range(length):
        step = delta[:, :, t, None]
        state = torch.exp(step * A) * state + step * at(B, t) * u[:, :, t, None]
        ys.append((state * at(C, t)).sum(-1))
    y = torch.stack(ys, dim=2)
    if D is not None:
        y = y + D[:, None] * u
    return (y if z is None else y * F.silu(z)), state


def inputs(kind_B: str, kind_C: str, full: bool) -> dict[str, Tensor]:
    batch, d_inner, d_state, length = 2, 6, 3, 9
    shapes = {
        "constant": (d_inner, d_state),
        "varying": (batch, d_state, length),
        "grouped": (batch, 2, d_state, length),
    }
    given = {
        "u": torch.randn(batch, d_inner, length),
        "delta": torch.rand(batch, d_inner, length),
        "A": -torch.rand(d_inner, d_state),
        "B": torch.randn(shapes[kind_B]),
        "C": torch.randn(shapes[kind_C]),
    }
    if full:
        given |= {
            "D": torch.randn(d_inner),
            "z": torch.randn(batch, d_inner, length),
            "delta_bias": torch.randn(d_inner),
        }
    return {name: value.requires_grad_() for name, value in given.items()}


@pytest.mark.parametrize("kind_B", ["constant", "varying", "grouped"])
@pytest.mark.parametrize("kind_C", ["constant", "varying", "grouped"])
@pytest.mark.parametrize("full", [False, True])
def test_output_last_state_and_gradients(kind_B: str, kind_C: str, full: bool) -> None:
    given = inputs(kind_B, kind_C, full)
    double = {name: value.detach().double().requires_grad_() for name, value in given.items()}
    y, last = selective_scan_fn(**given, delta_softplus=full, return_last_state=True)
    expected_y, expected_last = plain(**double, delta_softplus=full)
    assert relative_error(y, expected_y) <= 1e-5
    assert relative_error(last, expected_last) <= 1e-5
    ours = torch.autograd.grad(y.square().sum() + last.sum(), list(given.values()))
    expected = torch.autograd.grad(expected_y.square().sum() + expected_last.sum(), list(double.values()))
    for name, gradient, reference in zip(given, ours, expected, strict=True):
        assert relative_error(gradient, reference) <= 1e-5, name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["constant", "grouped"])
def test_half_precision_inputs_and_float32_weights(dtype: torch.dtype, kind: str) -> None:
    """As in models: u, delta, z and varying B, C in half precision, the rest in float32, constant B and C included."""
    given = inputs(kind, kind, full=True)
    halves = ("u", "delta", "z") if kind == "constant" else ("u", "delta", "z", "B", "C")
    given = {
        name: value.detach().to(dtype if name in halves else torch.float32).requires_grad_()
        for name, value in given.items()
    }
    double = {name: value.detach().double().requires_grad_() for name, value in given.items()}
    y, last = selective_scan_fn(**given, delta_softplus=True, return_last_state=True)
    expected_y, expected_last = plain(**double, delta_softplus=True)
    assert y.dtype == dtype
    assert last.dtype == torch.float32
    assert relative_error(y, expected_y) <= 5e-3
    # The state is never rounded, so neither are constant weights.
    assert relative_error(last, expected_last) <= 1e-5
    weights = torch.randn_like(expected_y)
    ours = torch.autograd.grad((y.double() * weights).sum() + last.sum(), list(given.values()))
    expected = torch.autograd.grad((expected_y * weights).sum() + expected_last.sum(), list(double.values()))
    for name, gradient, reference in zip(given, ours, expected, strict=True):
        assert gradient.dtype == given[name].dtype
        assert relative_error(gradient, reference) <= 1e-2, name


def test_a_sequence_in_mamba_ssm_s_layout_is_not_copied() -> None:
    given = inputs("varying", "varying", full=True)
    seen = []

    def scan(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, *_: object) -> ScanOutput:
        seen.extend((x, delta, B, C, z))
        return ScanOutput(x, None, torch.zeros(()))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ssminterp_kernels.compat.selective_scan", scan)
        selective_scan_fn(**given)
    for tensor, name in zip(seen, ("u", "delta", "B", "C", "z"), strict=True):
        assert tensor.data_ptr() == given[name].data_ptr()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("n_groups", [1, 2])
@pytest.mark.parametrize("length", [128, 372, 4096])
def test_on_the_gpu(dtype: torch.dtype, n_groups: int, length: int) -> None:
    batch, d_inner, d_state = 2, 4, 8
    shapes = {"u": (batch, d_inner, length), "delta": (batch, d_inner, length), "z": (batch, d_inner, length)}
    shapes |= dict.fromkeys(("B", "C"), (batch, n_groups, d_state, length))
    given = {name: torch.randn(shape, device="cuda", dtype=dtype) for name, shape in shapes.items()}
    given |= {
        "A": -torch.rand(d_inner, d_state, device="cuda"),
        **{name: torch.randn(d_inner, device="cuda") for name in ("D", "delta_bias")},
    }
    double = {name: value.double().cpu().requires_grad_() for name, value in given.items()}
    given = {name: value.requires_grad_() for name, value in given.items()}
    y, last = selective_scan_fn(**given, delta_softplus=True, return_last_state=True)
    expected_y, expected_last = plain(**double, delta_softplus=True)
    allowed = 1e-5 if dtype == torch.float32 else 1e-2
    assert relative_error(y, expected_y) <= allowed
    assert relative_error(last, expected_last) <= 1e-5
    weights = torch.randn_like(expected_y)
    ours = torch.autograd.grad((y.double().cpu() * weights).sum() + last.cpu().sum(), list(given.values()))
    expected = torch.autograd.grad((expected_y * weights).sum() + expected_last.sum(), list(double.values()))
    for name, gradient, reference in zip(given, ours, expected, strict=True):
        assert relative_error(gradient, reference) <= allowed, name


def test_without_last_state() -> None:
    given = inputs("varying", "varying", full=False)
    y = selective_scan_fn(**given)
    assert isinstance(y, Tensor)
    assert y.shape == given["u"].shape
    assert y.dtype == given["u"].dtype


@pytest.mark.usefixtures("as_users_run_it")
def test_complex_A_is_refused() -> None:
    given = inputs("varying", "varying", full=False)
    given["A"] = torch.complex(given["A"], given["A"])
    with pytest.raises(ValueError, match="A must be real"):
        selective_scan_fn(**given)


@pytest.mark.usefixtures("as_users_run_it")
def test_wrong_shape_names_the_argument() -> None:
    given = inputs("varying", "varying", full=False)
    given["B"] = given["B"][:, :, :4]
    with pytest.raises(ValueError, match="B must have the axes"):
        selective_scan_fn(**given)
