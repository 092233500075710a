"""Decoding runs the one-step kernels wherever they give exactly what is asked for, and the general scan elsewhere."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, hooked, hooked_pair, random_tokens
from torch import Tensor

from ssminterp import patch
from ssminterp.models.mixers import mamba1, scans

LAYERS, PROMPT, NEW = 2, 5, 6
MODEL = hooked(num_hidden_layers=LAYERS)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often the operators of a sequence and of one step were called."""
    counts: Counter[str] = Counter()

    def counted(module: Any, name: str) -> None:
        function: Callable[..., Any] = getattr(module, name)

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return function(*args, **kwargs)

        monkeypatch.setattr(module, name, wrapper)

    for module, names in (
        (scans, ("selective_scan", "selective_scan_step")),
        (mamba1, ("causal_conv", "causal_conv_step")),
    ):
        for name in names:
            counted(module, name)
    return counts


def test_every_new_token_is_one_step(calls: Counter[str]) -> None:
    MODEL.generate(random_tokens(2, PROMPT), NEW, do_sample=False)
    steps = LAYERS * (NEW - 1)
    assert calls == {
        "selective_scan": LAYERS,
        "causal_conv": LAYERS,
        "selective_scan_step": steps,
        "causal_conv_step": steps,
    }


def test_recording_of_states_and_around_the_conv_keeps_the_steps(calls: Counter[str]) -> None:
    MODEL.generate_with_cache(random_tokens(1, PROMPT), ["*hook_state", "*hook_conv"], max_new_tokens=NEW)
    assert calls["selective_scan_step"] == calls["causal_conv_step"] == LAYERS * (NEW - 1)


def test_an_edited_position_takes_the_general_scan(calls: Counter[str]) -> None:
    value = torch.randn(1, 1, MODEL.cfg.d_inner, MODEL.cfg.d_state)
    with MODEL.intervene(patch("blocks.0.mixer.hook_state", value, positions=[PROMPT + 2])):
        MODEL.generate(random_tokens(1, PROMPT), NEW, do_sample=False)
    assert calls["selective_scan"] == LAYERS + 1
    assert calls["selective_scan_step"] == LAYERS * (NEW - 1) - 1


def test_where_autograd_records_the_cache_is_not_overwritten_in_place(calls: Counter[str]) -> None:
    state = MODEL.read(random_tokens(1, PROMPT))
    before = state.ssm.clone()
    logits = MODEL(random_tokens(1, 1), state=state)
    logits.square().sum().backward()
    assert torch.equal(state.ssm, before)
    assert calls["causal_conv_step"] == 0
    gradients = {name: p.grad for name, p in MODEL.lm.named_parameters()}
    whole = hooked(num_hidden_layers=LAYERS)
    whole_logits = whole(torch.cat([random_tokens(1, PROMPT), random_tokens(1, 1)], dim=1))[:, -1:]
    torch.testing.assert_close(logits, whole_logits, atol=1e-5, rtol=1e-4)
    assert all(g is not None and g.isfinite().all() for g in gradients.values())
    MODEL.zero_grad()


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_what_was_recorded_stays_when_the_state_is_overwritten(family: str) -> None:
    """States, and the tensors around them, of every step are those of one run; so no recording shares the cache."""
    model = hooked(family, num_hidden_layers=LAYERS)
    names = [name for name in model.hook_names() if not name.endswith("hook_logits")]
    state = model.read(random_tokens(2, 3, seed=1))
    kept = state.ssm.clone(), state.conv.clone()
    generated, cache = model.generate_with_cache(
        random_tokens(2, PROMPT), names, max_new_tokens=NEW, state=state, do_sample=False
    )
    _, expected = model.run_with_cache(generated[:, :-1], names, state=state)
    assert torch.equal(state.ssm, kept[0])
    assert torch.equal(state.conv, kept[1])
    for name in names:
        torch.testing.assert_close(cache[name], expected[name], atol=1e-4, rtol=1e-4, msg=name)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("changes", [{"hidden_act": "gelu"}, {"use_conv_bias": False}, {"conv_kernel": 1}], ids=str)
def test_other_convs(family: str, changes: dict[str, Any]) -> None:
    plain, model = hooked_pair(family, **changes)
    tokens = random_tokens(2, PROMPT)
    options: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False}
    expected = plain.generate(tokens, attention_mask=torch.ones_like(tokens), **options)
    assert torch.equal(model.generate(tokens, NEW, do_sample=False), expected)


def test_a_watched_conv_is_called() -> None:
    """Torch's hooks on the conv, and what stands in its place, fire as they do in a model without hooks."""
    model, tokens = hooked(num_hidden_layers=LAYERS), random_tokens(2, PROMPT)
    conv = model.blocks[0].mixer.conv1d
    with torch.no_grad():
        plain = model(tokens)
        handle = conv.register_forward_hook(lambda module, args, output: 0.5 * output)
        halved = model(tokens)
        handle.remove()

        def half(tensor: Tensor, hook: Any) -> Tensor:
            return 0.5 * tensor

        expected = model.run_with_hooks(tokens, [("blocks.0.mixer.hook_conv", half)])
        torch.testing.assert_close(halved, expected, atol=1e-5, rtol=1e-5)
        assert (halved - plain).abs().max() > 1e-3
        torch.testing.assert_close(model(tokens), plain)
