"""A changed state is what later positions start from: function hooks against an independent loop."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference_model import reference_run
from tiny_models import FAMILIES, hooked, random_tokens
from torch import Tensor

from ssminterp import HookPoint
from ssminterp.models.mixers.state_scan import AffineStateHook, fused_edits

MODELS = {family: hooked(family) for family in FAMILIES}
LENGTH = 8
TOKENS = random_tokens(2, LENGTH)
EDITS: dict[str, Callable[[Tensor], Tensor]] = {
    "halve": lambda state: state * 0.5,
    "shift": lambda state: state + 0.3,
    "square": lambda state: state**2,
    "swap": lambda state: state.flip(0),
    "zero": torch.zeros_like,
}


def as_hook(edit: Callable[[Tensor], Tensor]) -> Callable[[Tensor, HookPoint], Tensor]:
    return lambda state, hook: edit(state)


@pytest.mark.parametrize("family", FAMILIES)
@given(
    where=st.dictionaries(
        st.tuples(st.integers(0, 2), st.integers(0, LENGTH - 1)), st.sampled_from(sorted(EDITS)), min_size=1, max_size=5
    )
)
@torch.no_grad()
def test_any_edits_anywhere_equal_the_loop(family: str, where: dict[tuple[int, int], str]) -> None:
    """Any functions at any layers and positions: logits and every recorded activation follow the changed states."""
    model = MODELS[family]
    edits: dict[int, dict[int, Callable[[Tensor], Tensor]]] = {}
    for (layer, position), name in where.items():
        edits.setdefault(layer, {})[position] = EDITS[name]
    logits, expected = reference_run(model.lm, TOKENS, state_edits=edits)
    fwd_hooks = [(f"blocks.{layer}.mixer.hook_state", as_hook(EDITS[name]), p) for (layer, p), name in where.items()]
    with model.hooks(fwd_hooks):
        torch.testing.assert_close(model(TOKENS), logits, atol=1e-4, rtol=1e-4)
        cache = model.run_with_cache(TOKENS, ["*hook_state", "*hook_y", "*resid_post"])[1]
        for name, value in cache.items():
            torch.testing.assert_close(value, expected[name], atol=1e-4, rtol=1e-4, msg=name)


@pytest.mark.parametrize("positions", [[0], [LENGTH - 1], [-1], [3, 4, 5], list(range(LENGTH)), 2])
@pytest.mark.parametrize("also", ["nothing", "A_bar", "delta", "y"])
@torch.no_grad()
def test_edges_and_other_ways_to_compute(positions: list[int] | int, also: str) -> None:
    """First, last, adjacent and all positions, whichever way the mixer computes its scan."""
    model = MODELS["mamba"]
    wanted = [positions] if isinstance(positions, int) else positions
    logits, expected = reference_run(model.lm, TOKENS, state_edits={1: {p % LENGTH: EDITS["shift"] for p in wanted}})
    names = ["blocks.1.mixer.hook_state"] + ([] if also == "nothing" else [f"blocks.1.mixer.hook_{also}"])
    for edit in (as_hook(EDITS["shift"]), AffineStateHook(1.0, 0.3)):
        with model.hooks([("blocks.1.mixer.hook_state", edit, positions)]):
            got, cache = model.run_with_cache(TOKENS, names)
        torch.testing.assert_close(got, logits, atol=1e-4, rtol=1e-4)
        for name in names:
            torch.testing.assert_close(cache[name], expected[name], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_earlier_positions_and_layers_stay() -> None:
    model = MODELS["mamba"]
    plain, before = model.run_with_cache(TOKENS, "*hook_state")
    with model.hooks([("blocks.1.mixer.hook_state", as_hook(EDITS["zero"]), 4)]):
        logits, after = model.run_with_cache(TOKENS, "*hook_state")
    assert torch.equal(after["state", 0], before["state", 0])
    torch.testing.assert_close(after["state", 1][:, :4], before["state", 1][:, :4])
    torch.testing.assert_close(logits[:, :4], plain[:, :4], atol=1e-5, rtol=0)
    changed = (after["state", 1][:, 4:] - before["state", 1][:, 4:]).abs().flatten(2).amax(2)
    assert (changed > 1e-3).all()  # a changed state is felt at every later position
    assert ((logits - plain)[:, 4:].abs().amax((0, 2)) > 1e-4).all()


@torch.no_grad()
def test_functions_run_in_the_order_of_registration_affine_or_not() -> None:
    model, name = MODELS["mamba"], "blocks.1.mixer.hook_state"
    logits, _ = reference_run(model.lm, TOKENS, state_edits={1: {3: lambda state: (state * 2 + 1) * 3}})
    doubled, plus_one, tripled = AffineStateHook(2.0, 0.0), AffineStateHook(1.0, 1.0), AffineStateHook(3.0, 0.0)
    plain_plus_one = as_hook(lambda state: state + 1)
    for functions in ([doubled, plus_one, tripled], [doubled, plain_plus_one, tripled]):
        got = model.run_with_hooks(TOKENS, [(name, function, [3]) for function in functions])
        torch.testing.assert_close(got, logits, atol=1e-4, rtol=1e-4)
    other_order = model.run_with_hooks(TOKENS, [(name, function, [3]) for function in (tripled, plus_one, doubled)])
    assert (other_order - logits).abs().max() > 1e-3


def test_fused_edits_lie_on_the_device_of_the_scan() -> None:
    for keep, add in ((1.0, torch.zeros(2, 3)), (torch.zeros(2, 3), 1.0), (0.5, 0.0)):
        edits = fused_edits({1: [AffineStateHook(keep, add)]}, torch.device("meta"))
        assert edits is not None
        assert edits.keep.device == edits.add.device == torch.device("meta")


@torch.no_grad()
def test_a_function_sees_what_earlier_edits_left() -> None:
    model, name = MODELS["mamba"], "blocks.1.mixer.hook_state"
    seen: list[Tensor] = []
    with model.hooks(
        [(name, AffineStateHook(0.0, 7.0), 3), (name, lambda state, hook: seen.append(state.clone()), [3, 4])]
    ):
        cache = model.run_with_cache(TOKENS, name)[1]
    assert (seen[0] == 7.0).all()
    torch.testing.assert_close(seen[1], cache["state", 1][:, 4])


@torch.no_grad()
def test_a_reader_without_positions_sees_the_changed_trajectory() -> None:
    model, name = MODELS["mamba"], "blocks.1.mixer.hook_state"
    seen: list[Tensor] = []
    expected = reference_run(model.lm, TOKENS, state_edits={1: {3: EDITS["square"]}})[1][name]
    model.run_with_hooks(
        TOKENS, [(name, lambda states, hook: seen.append(states.clone())), (name, as_hook(EDITS["square"]), [3])]
    )
    torch.testing.assert_close(seen[0], expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_editing_the_state_in_place() -> None:
    model, name = MODELS["mamba"], "blocks.1.mixer.hook_state"

    def in_place(state: Tensor, hook: HookPoint) -> None:
        state[:, 2] = 0.0

    def returned(state: Tensor, hook: HookPoint) -> Tensor:
        keep = torch.ones(state.shape[1], 1)
        keep[2] = 0.0
        return state * keep

    got, expected = (model.run_with_hooks(TOKENS, [(name, edit, [1, 5])]) for edit in (in_place, returned))
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
    assert (got - model(TOKENS)).abs().max() > 1e-3


@torch.no_grad()
def test_a_state_changed_before_the_cut_is_carried_into_the_continuation() -> None:
    model, name = MODELS["mamba"], "blocks.1.mixer.hook_state"
    whole = model.run_with_hooks(TOKENS, [(name, as_hook(EDITS["square"]), [2])])
    with model.hooks([(name, as_hook(EDITS["square"]), [2])]):
        state = model.read(TOKENS[:, :4])
    torch.testing.assert_close(model(TOKENS[:, 4:], state=state), whole[:, 4:], atol=1e-4, rtol=1e-4)


def overwrite(states: Tensor, hook: HookPoint) -> None:
    states[:, 0] = 0.0


@pytest.mark.parametrize("change", [as_hook(EDITS["halve"]), as_hook(EDITS["shift"]), overwrite])
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_a_change_without_positions_is_an_error(change: Callable[..., Tensor | None], mode: type) -> None:
    model, name = MODELS["mamba"], "blocks.1.mixer.hook_state"
    with mode():
        with pytest.raises(ValueError, match=r"changed blocks.1.mixer.hook_state without naming positions"):
            model.run_with_hooks(TOKENS, [(name, change)])
        model.run_with_hooks(TOKENS, [(name, lambda states, hook: None)])


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_a_torch_hook_that_replaces_the_trajectory_is_an_error(register: str) -> None:
    point = MODELS["mamba"].hook_points["blocks.1.mixer.hook_state"]
    for change in (
        lambda module, *args: args[-1] * 2.0 if isinstance(args[-1], Tensor) else (args[-1][0] * 2.0,),
        zero_all,
    ):
        handle = getattr(point, register)(change)
        try:
            with pytest.raises(ValueError, match="hook_state"):
                MODELS["mamba"](TOKENS)
        finally:
            handle.remove()


def zero_all(module: HookPoint, args: tuple[Tensor], output: Tensor | None = None) -> None:
    args[0].zero_()
