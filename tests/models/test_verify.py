"""The check at load time, and hooking a model twice."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import FAMILIES, random_tokens, tiny_model
from torch import Tensor

from ssminterp import HookedMamba
from ssminterp.models.mixers import mamba1

TOKENS = random_tokens(2, 6)


@pytest.fixture
def wrong_mixer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A release of transformers that computes the state matrix in another way than the hooked mixer does."""
    monkeypatch.setattr(mamba1.HookedMambaMixer, "A", lambda self: -torch.exp(self.A_log.float()) * 1.1)


@pytest.mark.usefixtures("wrong_mixer")
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_mixer_that_computes_something_else_is_refused(family: str) -> None:
    """With both sides named, and the model as it was: of the same modules, hooks and logits."""
    plain = tiny_model(family)
    modules = dict(plain.named_modules())
    expected = plain(TOKENS).logits
    with pytest.raises(
        ValueError, match=r"hooked logits of .*differ from plain .*: plain \[.*\], hooked \[.*verify=False"
    ):
        HookedMamba.from_hf(plain)
    assert dict(plain.named_modules()) == modules
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in plain.modules())
    assert torch.equal(plain(TOKENS).logits, expected)


@torch.no_grad()
def test_an_adapter_that_plain_transformers_goes_past_is_named() -> None:
    """dt_proj is not called there. Merged, it acts in both."""
    config = LoraConfig(r=2, target_modules=["dt_proj"], init_lora_weights=False)
    with pytest.raises(ValueError, match=r"adapter changes dt_proj\. .*merge_and_unload.*verify=False"):
        HookedMamba.from_hf(get_peft_model(tiny_model(), config))
    adapted = get_peft_model(tiny_model(), config).eval()
    seen = HookedMamba.from_hf(adapted, verify=False)(TOKENS)
    merged = HookedMamba.from_hf(adapted.merge_and_unload())
    torch.testing.assert_close(merged(TOKENS), seen, atol=1e-4, rtol=1e-4)
    assert (seen - tiny_model()(TOKENS).logits).abs().max() > 0.1


@pytest.mark.usefixtures("wrong_mixer")
def test_verify_can_be_switched_off() -> None:
    assert HookedMamba.from_hf(tiny_model(), verify=False)(TOKENS).isfinite().all()


@pytest.mark.parametrize("difference", [float("nan"), 1e-2])
def test_nan_is_a_difference(difference: float, monkeypatch: pytest.MonkeyPatch) -> None:
    right = mamba1.HookedMambaMixer.forward

    def wrong(self: mamba1.HookedMambaMixer, hidden_states: Tensor, **kwargs: object) -> Tensor:
        return right(self, hidden_states, **kwargs) + difference

    monkeypatch.setattr(mamba1.HookedMambaMixer, "forward", wrong)
    with pytest.raises(ValueError, match="differ from plain"):
        HookedMamba.from_hf(tiny_model())


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_and_the_random_numbers_are_left_alone(training: bool) -> None:
    plain = tiny_model().train(training)
    plain.backbone.norm_f.train(not training)
    before = {name: module.training for name, module in plain.named_modules()}
    state = torch.get_rng_state()
    HookedMamba.from_hf(plain)
    assert torch.equal(torch.get_rng_state(), state)
    now = dict(plain.named_modules())
    assert {name: now[name].training for name in before} == before


def test_twice_on_the_same_model() -> None:
    plain = tiny_model()
    first = HookedMamba.from_hf(plain)
    logits = first(TOKENS)
    second = HookedMamba.from_hf(plain)
    assert second.hook_points == first.hook_points
    assert torch.equal(second(TOKENS), logits)
    seen = []
    second.run_with_hooks(TOKENS, [("blocks.0.hook_resid_pre", lambda tensor, hook: seen.append(1))])
    assert seen == [1]


def test_a_copy_has_hooks_of_its_own() -> None:
    first = HookedMamba.from_hf(tiny_model())
    second = copy.deepcopy(first)
    logits = first(TOKENS)
    assert torch.equal(second(TOKENS), logits)
    for name in first.hook_names():
        assert first.hook_points[name] is not second.hook_points[name]
        assert any(second.hook_points[name] is module for module in second.modules())
    with second.hooks([("*hook_x", lambda tensor, hook: tensor * 0)]):
        assert torch.equal(first(TOKENS), logits)
        assert not torch.equal(second(TOKENS), logits)
    cache = second.run_with_cache(TOKENS, "*hook_state")[1]
    assert len(cache) == 3
    with torch.no_grad():
        second.blocks[0].mixer.D.zero_()
    assert torch.equal(first(TOKENS), logits)


def test_parameters_are_taken_over_not_copied() -> None:
    plain = tiny_model()
    parameters = dict(plain.named_parameters())
    model = HookedMamba.from_hf(plain)
    assert all(parameters[name] is parameter for name, parameter in model.hf_model.named_parameters())
    assert len(list(model.parameters())) == len(parameters)
