"""Torch's RMS norm in the place of Hugging Face's: same values, same gradients, same names."""

import copy

import pytest
import torch
from tiny_models import FAMILIES, hooked_pair, random_tokens, tiny_model

from ssminterp import HookedMamba
from ssminterp.models.norm import FusedRMSNorm


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_values_and_gradients(family: str, weight_dtype: torch.dtype, dtype: torch.dtype) -> None:
    norm = tiny_model(family).backbone.norm_f.to(weight_dtype)
    own = FusedRMSNorm(copy.deepcopy(norm))
    x = (3 * torch.randn(2, 5, 8)).to(dtype).requires_grad_()
    theirs, ours = norm(x), own(x)
    assert ours.dtype == theirs.dtype
    # Rounded where Hugging Face's rounds.
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    tolerance = 2e-2 if torch.bfloat16 in (dtype, weight_dtype) else 1e-5
    weights = torch.randn(2, 5, 8).to(ours.dtype)
    for module, out in ((norm, theirs), (own, ours)):
        (out * weights).sum().backward(inputs=[x, module.weight])
    theirs_of_x = torch.autograd.grad((norm(x) * weights).sum(), x)[0]
    torch.testing.assert_close(x.grad - theirs_of_x, theirs_of_x, atol=4 * tolerance, rtol=4 * tolerance)
    torch.testing.assert_close(own.weight.grad, norm.weight.grad, atol=4 * tolerance, rtol=4 * tolerance)


def test_every_norm_is_taken_over_under_its_name() -> None:
    plain, model = hooked_pair()
    norms = [block.norm for block in model.blocks] + [model.lm.backbone.norm_f]
    assert all(type(norm) is FusedRMSNorm for norm in norms)
    assert model.state_dict().keys() == plain.state_dict().keys()


def test_a_watched_norm_stays_what_it_is() -> None:
    plain = tiny_model()
    seen: list[torch.Size] = []
    plain.backbone.layers[1].norm.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    model = HookedMamba.from_hf(plain, verify=False)
    model(random_tokens(2, 3))
    assert seen == [(2, 3, 8)]
    assert type(model.blocks[1].norm) is not FusedRMSNorm


def test_a_model_that_fails_the_check_keeps_its_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = tiny_model()
    before = [plain.backbone.norm_f, *(block.norm for block in plain.backbone.layers)]
    monkeypatch.setattr(FusedRMSNorm, "forward", lambda self, hidden_states: 2 * hidden_states)
    with pytest.raises(ValueError, match="differ from plain transformers"):
        HookedMamba.from_hf(plain)
    assert [plain.backbone.norm_f, *(block.norm for block in plain.backbone.layers)] == before
