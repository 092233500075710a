"""No hook point holds another's storage: an edit in place at one changes no value that was read at another."""

import itertools

import pytest
import torch
from tiny_models import FAMILIES, hooked
from torch import Tensor
from trace_cases import ROOTS, TOKENS, hook

from ssminterp import HookPoint

ONE_LAYER = hooked(num_hidden_layers=1)
MODELS = {family: hooked(family, num_hidden_layers=2) for family in FAMILIES}
NAMES = MODELS["mamba"].hook_names()
EDITABLE = [name for name in NAMES if not name.startswith("blocks.0.") and not name.endswith("hook_state")]


def zero(tensor: Tensor, point: HookPoint) -> None:
    tensor.zero_()


@torch.no_grad()
def test_all_pairs() -> None:
    """Read one, edit a later one in place; nothing else listens."""
    model = ONE_LAYER
    names = model.hook_names()
    for first, second in itertools.combinations(names, 2):
        if second.endswith("hook_state"):
            continue
        with model.trace(TOKENS):
            read = hook(model, first).output.save()
            kept = read.clone().save()
            hook(model, second).output.zero_()
        assert torch.equal(read, kept), (first, second)


@pytest.mark.parametrize("way", ROOTS)
@pytest.mark.parametrize("name", EDITABLE)
def test_values_read_earlier_stay(way: str, name: str) -> None:
    """With gradients, as traces usually run: then views of one tensor must not be edited at all."""
    model = MODELS["mamba"]
    root = ROOTS[way](model)
    names = model.hook_names()
    earlier = names[: names.index(name)]
    with root.trace(TOKENS):
        read = [hook(root, other).output for other in earlier].save()
        kept = [tensor.clone() for tensor in read].save()
        hook(root, name).output.zero_()
    for other, value, copy in zip(earlier, read, kept, strict=True):
        assert torch.equal(value, copy), other


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", EDITABLE)
def test_what_follows_from_an_edit_is_what_follows_from_a_hook_function(family: str, name: str) -> None:
    model = MODELS[family]
    names = model.hook_names()
    later = names[names.index(name) :]
    with model.trace(TOKENS):
        hook(model, name).output.zero_()
        read = {other: hook(model, other).output for other in later}.save()
    with model.hooks([(name, zero)]):
        cache = model.run_with_cache(TOKENS, "*")[1]
    for other in later:
        torch.testing.assert_close(read[other], cache[other])


def test_states_at_positions_stay() -> None:
    model = MODELS["mamba"]
    with model.trace(TOKENS):
        state = model.blocks[0].mixer.hook_state
        read = [state.at[p].output for p in (1, 2)].save()
        kept = [tensor.clone() for tensor in read].save()
        state.at[4].output.zero_()
        model.blocks[0].mixer.hook_y.output.zero_()
    assert all(torch.equal(a, b) for a, b in zip(read, kept, strict=True))


def test_torch_hooks_may_edit_in_place_as_well() -> None:
    model = ONE_LAYER
    cache = model.run_with_cache(TOKENS, "*")[1]
    seen: dict[str, Tensor] = {}
    points = model.hook_points
    handles = [
        points["hook_embed"].register_forward_hook(lambda module, args, output: seen.update(embed=output)),
        points["blocks.0.hook_resid_pre"].register_forward_hook(lambda module, args, output: output.detach().zero_()),
    ]
    try:
        model(TOKENS)
    finally:
        for handle in handles:
            handle.remove()
    assert torch.equal(seen["embed"], cache["embed"])
