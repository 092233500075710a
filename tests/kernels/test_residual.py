"""The residual stream's kernels against float64: what is added, the norm, its gradient, and tokens that fork."""

import pytest
import torch
from torch import Tensor

from ssminterp_kernels.residual import Forks, add_and_norm, norm, norm_backward

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPSILON = 1e-2  # of an inner size, so that a forgotten one shows


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).to(dtype).to(DEVICE)


def reference(resid: Tensor, weight: Tensor) -> Tensor:
    x = resid.double()
    return weight.double() * x * (x.pow(2).mean(-1, keepdim=True) + EPSILON).rsqrt()


def assert_near(got: Tensor, expected: Tensor) -> None:
    error = (got.double() - expected).norm() / expected.norm()
    assert error < (1e-5 if got.dtype == torch.float32 else 1e-2), f"relative error {error:.1e}"


@pytest.mark.parametrize("width", [1, 7, 24, 64])
@pytest.mark.parametrize(
    ("dtype", "stream"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)],
    ids=str,
)
def test_what_is_added_and_its_norm(width: int, dtype: torch.dtype, stream: torch.dtype) -> None:
    resid, added, weight = random(5, width, dtype=stream), random(5, width, dtype=dtype), random(width, dtype=dtype)
    assert_near(norm(resid, weight, EPSILON), reference(resid, weight))
    into = torch.full_like(resid, torch.nan)
    normed = add_and_norm(resid, added, weight, EPSILON, into)
    total = resid.double() + added.double()
    assert (into.dtype, normed.dtype) == (stream, dtype)
    assert_near(into, total)
    assert_near(normed, reference(total, weight))
    in_place = resid.clone()
    assert torch.equal(add_and_norm(in_place, added, weight, EPSILON, in_place), normed)
    assert torch.equal(in_place, into)


@pytest.mark.gpu  # Triton's interpreter does not round but truncate
def test_it_rounds_where_the_modules_round() -> None:
    """In bfloat16 the norm is rounded before the weight: then all numbers but a few agree in every bit."""
    resid, weight = random(64, 24), random(24, dtype=torch.bfloat16)
    rounded = torch.nn.functional.rms_norm(resid.to(torch.bfloat16), (24,), None, EPSILON)
    assert (norm(resid, weight, EPSILON) == weight * rounded).float().mean() > 0.99


@pytest.mark.parametrize(("own", "whole"), [(0, 3), (2, 0), (2, 3)])
def test_forks_go_on_from_other_tokens(own: int, whole: int) -> None:
    old, width = 4, 24
    resid, added, weight = random(old, width), random(old + own, width), random(width)
    origins = torch.tensor([3, 0, 1, 3, 2][: own + whole], dtype=torch.int32, device=DEVICE)
    into = torch.full((old + own + whole, width), torch.nan, device=DEVICE)
    normed = add_and_norm(resid, added, weight, EPSILON, into, Forks(origins, whole))
    from_, added_from = list(range(old)) + origins.tolist(), list(range(old + own)) + origins.tolist()[own:]
    total = resid.double()[from_] + added.double()[added_from]
    assert_near(into, total)
    assert_near(normed, reference(total, weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_gradient_of_a_norm_is_added(dtype: torch.dtype) -> None:
    # What is not to be rounded: Triton's interpreter does it otherwise than a GPU.
    resid, later, weight = random(5, 24, dtype=dtype).float(), random(5, 24), random(24, dtype=dtype)
    dnormed = random(5, 24, dtype=dtype)
    leaf = resid.double().requires_grad_()
    expected = later.double() + torch.autograd.grad(reference(leaf, weight), leaf, dnormed.double())[0]
    gradient, rounded = norm_backward(later, dnormed, resid, weight, EPSILON)
    assert (gradient.dtype, rounded.dtype) == (torch.float32, dtype)
    assert_near(gradient, expected)
    assert_near(rounded, expected)
