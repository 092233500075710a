"""Attribution of states by stages, the way of a GPU, gives what autograd gives; elsewhere in Triton's interpreter."""

from typing import Any

import pytest
import torch
from tiny_models import hooked, random_tokens
from torch import Tensor
from xarray import DataArray

from ssminterp import HookedMamba
from ssminterp.patching import attribution as attribution_module
from ssminterp.patching import attribution_patch, attribution_stages
from ssminterp.patching.attribution_stages import suits_stages

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def last_logit(logits: Tensor) -> Tensor:
    return logits[:, -1, 3] - logits[:, -1, 5]


def both_ways(
    model: HookedMamba, monkeypatch: pytest.MonkeyPatch, batch: int = 2, length: int = 5, **options: Any
) -> tuple[DataArray, DataArray]:
    """By stages, and by autograd."""
    model = model.to(DEVICE)
    tokens = random_tokens(batch, length, seed=1).to(DEVICE), random_tokens(batch, length, seed=2).to(DEVICE)
    calls: list[bool] = []
    ran = attribution_stages.attribute_by_stages
    monkeypatch.setattr(attribution_stages, "attribute_by_stages", lambda *a: (calls.append(True), ran(*a))[1])
    found = []
    for by_stages in (True, False):
        monkeypatch.setattr(attribution_module, "_by_stages", lambda task, by_stages=by_stages: by_stages)
        found.append(attribution_patch(model, *tokens, "state", last_logit, **options))
    assert calls == [True]
    return found[0], found[1]


def assert_equal(got: DataArray, expected: DataArray, tolerance: float = 1e-4) -> None:
    assert got.dims == expected.dims
    assert abs(expected).max() > 1e-2
    assert abs(got - expected).max() < tolerance * abs(expected).max()
    for name in ("clean", "corrupted", "baseline"):
        assert got.attrs[name] == pytest.approx(expected.attrs[name], abs=tolerance)


@pytest.mark.parametrize(
    "options",
    [
        {"reduce": None},
        {"direction": "corrupted_to_clean", "by": "channel", "layers": [1, 2], "positions": [1, 3]},
        {"positions": {"role": torch.tensor([4, 0])}, "layers": [1]},
    ],
    ids=["all", "parts", "roles"],
)
def test_it_gives_what_autograd_gives(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    assert_equal(*both_ways(hooked(), monkeypatch, **options))


@pytest.mark.parametrize(
    ("batch", "length", "config"),
    [(1, 33, {"num_hidden_layers": 2}), (2, 3, {"use_bias": True, "use_conv_bias": False, "residual_in_fp32": False})],
    ids=["several segments", "other layers"],
)
def test_other_shapes_of_models_and_runs(
    batch: int, length: int, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_equal(*both_ways(hooked(**config), monkeypatch, batch, length))


@pytest.mark.gpu  # Triton's interpreter does not round to bfloat16 but truncates
def test_half_precision_comes_close(monkeypatch: pytest.MonkeyPatch) -> None:
    model = hooked(hidden_size=64)
    exact = both_ways(model, monkeypatch)[1]
    half, by_autograd = both_ways(model.to(torch.bfloat16), monkeypatch)
    for got in (half, by_autograd):
        assert abs(got - exact).max() < 0.05 * abs(exact).max()


def test_a_metric_without_gradient_is_refused_and_nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    model = hooked().to(DEVICE)
    monkeypatch.setattr(attribution_module, "_by_stages", lambda task: True)
    tokens = random_tokens(2, 4, seed=1).to(DEVICE), random_tokens(2, 4, seed=2).to(DEVICE)
    with pytest.raises(ValueError, match="has no gradient"):
        attribution_patch(model, *tokens, "state", lambda logits: logits[:, -1].argmax(-1).float())
    with torch.inference_mode():
        attribution_patch(model, *tokens, "state", last_logit)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_what_is_watched_or_of_another_kind_is_left_to_autograd() -> None:
    assert not suits_stages(hooked("falcon"))
    model = hooked()
    assert suits_stages(model)
    block = model.blocks[1]
    for module in (model.lm, model.lm.backbone, block, block.norm, block.mixer, block.mixer.x_proj, block.mixer.conv1d):
        handle = module.register_forward_hook(lambda module, arguments, output: output)
        assert not suits_stages(model), type(module)
        handle.remove()
    assert suits_stages(model)
    block.norm.double()
    assert not suits_stages(model)


@pytest.mark.gpu
@pytest.mark.parametrize(("batch", "length"), [(1, 16), (3, 100)])
def test_a_gpu_takes_it_by_itself(batch: int, length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = hooked(hidden_size=64).cuda()
    tokens = random_tokens(batch, length, seed=1).cuda(), random_tokens(batch, length, seed=2).cuda()
    with monkeypatch.context() as without_autograd:
        without_autograd.setattr(attribution_module, "_attribute", None)
        got = attribution_patch(model, *tokens, "state", last_logit)
    expected = attribution_patch(model.cpu(), *(side.cpu() for side in tokens), "state", last_logit)
    assert_equal(got, expected, 1e-3)


@pytest.mark.gpu
def test_where_memory_is_short_autograd_goes_layer_by_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    model = hooked(hidden_size=64).cuda()
    tokens = random_tokens(2, 16, seed=1).cuda(), random_tokens(2, 16, seed=2).cuda()
    expected = attribution_patch(model, *tokens, "state", last_logit)
    monkeypatch.setattr(attribution_module, "free_bytes", lambda device: 0)
    monkeypatch.setattr(attribution_stages, "attribute_by_stages", None)
    assert_equal(attribution_patch(model, *tokens, "state", last_logit), expected)
