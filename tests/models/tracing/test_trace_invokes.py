"""Each invoke sees what it would see by itself: its own rows and, where shorter inputs were padded, its positions."""

import pytest
import torch
from tiny_models import hooked, random_tokens
from torch import Tensor
from trace_cases import hook

from ssminterp import HookedMamba

MODEL = hooked(num_hidden_layers=2)
INPUTS = [random_tokens(1, 4), random_tokens(2, 7, seed=1), random_tokens(1, 5, seed=2)]
NAMES = [name for name in MODEL.hook_names() if not name.startswith("blocks.0.") and not name.endswith("hook_state")]


def by_itself(tokens: Tensor, name: str) -> Tensor:
    return MODEL.run_with_cache(tokens, name)[1][name]


@pytest.mark.parametrize("name", NAMES)
def test_reading(name: str) -> None:
    read: list[Tensor] = []
    with MODEL.trace() as tracer:
        for tokens in INPUTS:
            with tracer.invoke(tokens):
                read.append(hook(MODEL, name).output)
        with tracer.invoke():
            everything = hook(MODEL, name).output.save()
    for got, tokens in zip(read, INPUTS, strict=True):
        torch.testing.assert_close(got, by_itself(tokens, name))
    assert everything.shape[:2] == (4, 7)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("in_place", [True, False])
def test_changing_one_leaves_the_others(name: str, in_place: bool) -> None:
    with MODEL.trace() as tracer:
        with tracer.invoke(INPUTS[0]):
            if in_place:
                hook(MODEL, name).output[:, -1] = 0.3
            else:
                value = hook(MODEL, name).output.clone()
                value[:, -1] = 0.3
                hook(MODEL, name).output = value
            first = MODEL.hook_logits.output.save()
        with tracer.invoke(INPUTS[1]):
            second = MODEL.hook_logits.output.save()
    with MODEL.hooks([(name, lambda tensor, point: torch.full_like(tensor, 0.3), [-1])]):
        torch.testing.assert_close(first, MODEL(INPUTS[0]))
    torch.testing.assert_close(second, MODEL(INPUTS[1]))


@pytest.mark.parametrize("name", NAMES)
def test_gradients(name: str) -> None:
    with MODEL.trace() as tracer:
        with tracer.invoke(INPUTS[0]):
            value = hook(MODEL, name).output
            loss = MODEL.hook_logits.output.square().sum()
            with loss.backward():
                gradient = value.grad.save()
        with tracer.invoke(INPUTS[1]):
            MODEL.hook_logits.output.save()
    logits, cache = MODEL.run_with_cache(INPUTS[0], name, detach=False)
    (expected,) = torch.autograd.grad(logits.square().sum(), cache[name])
    torch.testing.assert_close(gradient, expected, atol=1e-4, rtol=1e-4)
    assert expected.abs().max() > 0.1


def test_gradients_of_states() -> None:
    with MODEL.trace() as tracer:
        with tracer.invoke(INPUTS[0]):
            state = MODEL.blocks[0].mixer.hook_state.at[1].output
            loss = MODEL.hook_logits.output.square().sum()
            with loss.backward():
                gradient = state.grad.save()
        with tracer.invoke(INPUTS[1]):
            MODEL.hook_logits.output.save()
    with MODEL.trace(INPUTS[0]):
        state = MODEL.blocks[0].mixer.hook_state.at[1].output
        loss = MODEL.hook_logits.output.square().sum()
        with loss.backward():
            expected = state.grad.save()
    torch.testing.assert_close(gradient, expected, atol=1e-4, rtol=1e-4)


def test_states() -> None:
    """Positions are those of the invoke, also when they are counted from its end."""
    with MODEL.trace(states=[-1, 1]) as tracer:
        with tracer.invoke(INPUTS[0]):
            MODEL.blocks[0].mixer.hook_state.at[2].output[:] = 0
            last_a = MODEL.blocks[0].mixer.hook_state.at[-1].output.save()
            shown_a = MODEL.blocks[0].mixer.hook_state.output.save()
        with tracer.invoke(INPUTS[1]):
            last_b = MODEL.blocks[0].mixer.hook_state.at[-1].output.save()
            shown_b = MODEL.blocks[0].mixer.hook_state.output.save()
        with tracer.invoke(INPUTS[2]):
            last_c = MODEL.blocks[0].mixer.hook_state.at[-1].output.save()
    name = "blocks.0.mixer.hook_state"
    with MODEL.hooks([(name, lambda state, point: state * 0, [2])]):
        expected = by_itself(INPUTS[0], name)
    torch.testing.assert_close(last_a, expected[:, -1])
    torch.testing.assert_close(shown_a, expected[:, [-1, 1]])
    expected = by_itself(INPUTS[1], name)
    torch.testing.assert_close(last_b, expected[:, -1])
    torch.testing.assert_close(shown_b, expected[:, [-1, 1]])
    torch.testing.assert_close(last_c, by_itself(INPUTS[2], name)[:, -1])
    with MODEL.trace() as tracer:
        with tracer.invoke(INPUTS[0]):
            all_a = MODEL.blocks[0].mixer.hook_state.output.save()
        with tracer.invoke(INPUTS[1]):
            all_b = MODEL.blocks[0].mixer.hook_state.output.save()
    torch.testing.assert_close(all_a, by_itself(INPUTS[0], name))
    torch.testing.assert_close(all_b, by_itself(INPUTS[1], name))


def test_envoys_taken_outside_of_the_invokes() -> None:
    with MODEL.trace() as tracer:
        points = [block.mixer.hook_delta for block in MODEL.blocks]
        with tracer.invoke(INPUTS[0]):
            a = [point.output for point in points].save()
        with tracer.invoke(INPUTS[1]):
            b = [point.output for point in points].save()
    for layer in range(2):
        torch.testing.assert_close(a[layer], by_itself(INPUTS[0], f"blocks.{layer}.mixer.hook_delta"))
        torch.testing.assert_close(b[layer], by_itself(INPUTS[1], f"blocks.{layer}.mixer.hook_delta"))


def test_a_second_look_in_an_invoke_of_its_own() -> None:
    """Where the order of the code is not that of the model."""
    with MODEL.trace(INPUTS[1]) as tracer:
        late = MODEL.blocks[1].mixer.hook_x.output.save()
    with MODEL.trace() as tracer:
        with tracer.invoke(INPUTS[1]):
            later = MODEL.blocks[1].mixer.hook_x.output.save()
        with tracer.invoke():
            early = MODEL.blocks[0].mixer.hook_A_bar.output.save()
    torch.testing.assert_close(later, late)
    torch.testing.assert_close(early, by_itself(INPUTS[1], "blocks.0.mixer.hook_A_bar"))


def test_texts(words_model: HookedMamba) -> None:
    with words_model.trace() as tracer:
        with tracer.invoke("the cat sat"):
            one = words_model.hook_logits.output.save()
        with tracer.invoke(["the cat", "the dog sat on the mat"]):
            two = words_model.hook_logits.output.save()
    torch.testing.assert_close(one, words_model("the cat sat"))
    torch.testing.assert_close(two, words_model(["the cat", "the dog sat on the mat"]))


def test_masks() -> None:
    mask = torch.tensor([[0, 1, 1, 1]])
    with MODEL.trace() as tracer:
        with tracer.invoke(INPUTS[0], attention_mask=mask):
            one = MODEL.hook_logits.output.save()
        with tracer.invoke(INPUTS[1]):
            two = MODEL.hook_logits.output.save()
    torch.testing.assert_close(one, MODEL(INPUTS[0], attention_mask=mask))
    torch.testing.assert_close(two, MODEL(INPUTS[1]))
