"""`with model.generate(…) as tracer:` traces a generation; called any other way, `generate` is what it was."""

import pytest
import torch
from nnsight import NNsight
from tiny_models import hooked, random_tokens
from torch import Tensor

from ssminterp import HookedMamba

MODEL = hooked(num_hidden_layers=2)
TOKENS = random_tokens(2, 6)
OPTIONS = {"max_new_tokens": 4, "do_sample": False}


def passes(name: str, tokens: Tensor = TOKENS) -> list[Tensor]:
    """What a hook saw in each pass of a generation."""
    seen: list[Tensor] = []
    with MODEL.hooks([(name, lambda tensor, point: seen.append(tensor.clone()))]):
        MODEL.generate(tokens, **OPTIONS)
    return seen


def test_reading_every_pass() -> None:
    with MODEL.generate(TOKENS, **OPTIONS) as tracer:
        delta, states, last = [].save(), [].save(), [].save()
        for _ in tracer.iter[:4]:
            delta.append(MODEL.blocks[0].mixer.hook_delta.output)
            last.append(MODEL.blocks[1].mixer.hook_state.at[-1].output)
            states.append(MODEL.blocks[1].mixer.hook_state.output)
        result = tracer.result.save()
    assert torch.equal(result, MODEL.generate(TOKENS, **OPTIONS))
    for got, expected in zip(delta, passes("blocks.0.mixer.hook_delta"), strict=True):
        torch.testing.assert_close(got, expected)
    for got, one, expected in zip(states, last, passes("blocks.1.mixer.hook_state"), strict=True):
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(one, expected[:, -1])


@pytest.mark.parametrize("short", ["delta", "A_bar", "B_bar", "conv_taps", "y", "ssm_out", "state"])
@pytest.mark.parametrize("step", [1, 3])
def test_passes_are_counted_also_where_a_hook_was_not_computed(short: str, step: int) -> None:
    """Before the step nothing listens to the hook, so that it is not even computed."""
    name = f"hook_{short}"
    with MODEL.generate(TOKENS, **OPTIONS) as tracer:
        logits = MODEL.hook_logits.output.save()
        for _ in tracer.iter[step]:
            seen = getattr(MODEL.blocks[0].mixer, name).output.save()
            after = getattr(MODEL.blocks[1].mixer, name).output.save()
    torch.testing.assert_close(seen, passes(f"blocks.0.mixer.{name}")[step])
    torch.testing.assert_close(after, passes(f"blocks.1.mixer.{name}")[step])
    torch.testing.assert_close(logits, MODEL(TOKENS))


def test_positions_are_those_of_the_whole_text() -> None:
    """From the end they are those of each pass."""
    prompt = TOKENS.shape[1]
    with MODEL.generate(TOKENS, **OPTIONS) as tracer:
        fourth = MODEL.blocks[0].mixer.hook_state.at[4].output.save()
        second_new = MODEL.blocks[0].mixer.hook_state.at[prompt + 1].output.save()
    with MODEL.generate(TOKENS, **OPTIONS) as tracer:
        for step in tracer.iter[2:4]:
            if step == 2:
                same = MODEL.blocks[0].mixer.hook_state.at[prompt + 1].output.save()
                x = MODEL.blocks[1].mixer.hook_x.output.save()
                newest = MODEL.blocks[1].mixer.hook_state.at[-1].output.save()
            else:
                last = MODEL.blocks[1].mixer.hook_state.at[-1].output.save()
    expected = [passes(f"blocks.{layer}.mixer.hook_state") for layer in (0, 1)]
    torch.testing.assert_close(fourth, expected[0][0][:, 4])
    torch.testing.assert_close(second_new, expected[0][2][:, 0])
    torch.testing.assert_close(same, second_new)
    torch.testing.assert_close(x, passes("blocks.1.mixer.hook_x")[2])
    torch.testing.assert_close(newest, expected[1][2][:, 0])
    torch.testing.assert_close(last, expected[1][3][:, 0])


def test_changing_every_pass() -> None:
    name = "blocks.1.mixer.hook_state"
    with MODEL.generate(TOKENS, **OPTIONS) as tracer:
        for _ in tracer.iter[:4]:
            MODEL.blocks[1].mixer.hook_state.at[-1].output[:] *= -30.0
        result = tracer.result.save()
    with MODEL.hooks([(name, lambda state, point: state * -30, slice(-1, None))]):
        expected = MODEL.generate(TOKENS, **OPTIONS)
    assert torch.equal(result, expected)
    assert not torch.equal(result, MODEL.generate(TOKENS, **OPTIONS))


def test_invokes_are_padded_on_the_left(words_model: HookedMamba) -> None:
    with words_model.generate(**OPTIONS) as tracer:
        with tracer.invoke("the cat"):
            prompt = words_model.blocks[0].mixer.hook_x.output.save()
            last = words_model.blocks[0].mixer.hook_state.at[-1].output.save()
            one = tracer.result.save()
        with tracer.invoke(["the dog sat on the mat", "John"]):
            two = tracer.result.save()
    cache = words_model.run_with_cache("the cat", "*hook_state")[1]
    torch.testing.assert_close(last, cache["state", 0][:, -1])
    torch.testing.assert_close(prompt, words_model.run_with_cache("the cat")[1]["x", 0])
    decode = words_model.tokenizer.batch_decode
    assert decode(one, skip_special_tokens=True) == [words_model.generate("the cat", **OPTIONS)]
    texts = words_model.generate(["the dog sat on the mat", "John"], **OPTIONS)
    assert decode(two, skip_special_tokens=True) == texts


def test_called_in_other_ways_it_generates() -> None:
    expected = MODEL.generate(TOKENS, **OPTIONS)
    with torch.no_grad(): one_line = MODEL.generate(TOKENS, **OPTIONS)  # noqa: E701  # fmt: skip
    listed = [MODEL.generate(TOKENS, **OPTIONS) for _ in range(1)]
    called = (lambda: MODEL.generate(TOKENS, **OPTIONS))()
    with torch.no_grad():
        inside = MODEL.generate(TOKENS, **OPTIONS)
    for got in (one_line, *listed, called, inside):
        assert torch.equal(got, expected)


def test_through_nnsight_itself() -> None:
    root = NNsight(MODEL)
    with root.trace(TOKENS, fn=lambda tokens: MODEL.generate(tokens, **OPTIONS)) as tracer:
        seen = [].save()
        for _ in tracer.iter[:4]:
            seen.append(root.blocks[1].mixer.hook_A_bar.output)
        result = tracer.result.save()
    assert torch.equal(result, MODEL.generate(TOKENS, **OPTIONS))
    for got, expected in zip(seen, passes("blocks.1.mixer.hook_A_bar"), strict=True):
        torch.testing.assert_close(got, expected)


def test_what_a_generation_cannot_do() -> None:
    with pytest.raises(ValueError, match=r"use hook_state.at\[position\]"), MODEL.generate(TOKENS, states=[1]):
        MODEL.hook_embed.output.save()
    with pytest.raises(ValueError, match="padded on the left"), MODEL.generate(**OPTIONS) as tracer:  # noqa: PT012
        with tracer.invoke(TOKENS[:, :3]):
            MODEL.blocks[0].mixer.hook_state.at[0].output.save()
        with tracer.invoke(TOKENS):
            MODEL.blocks[0].mixer.hook_state.at[0].output.save()
