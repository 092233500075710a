"""A trace reads and changes what hooks read and change."""

import nnsight
import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from nnsight import NNsight
from tiny_models import FAMILIES, hooked, tiny_model
from torch import Tensor
from trace_cases import ROOTS, TOKENS, hook

from ssminterp import HookedMamba, HookPoint, patch

MODELS = {family: hooked(family, num_hidden_layers=2) for family in FAMILIES}
NAMES = [name for name in MODELS["mamba"].hook_names() if not name.startswith("blocks.0.")]
CHANGEABLE = [name for name in NAMES if not name.endswith("hook_state")]


@pytest.fixture(params=ROOTS)
def way(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("family", FAMILIES)
def test_every_hook_in_one_trace(way: str, family: str) -> None:
    model = MODELS[family]
    root = ROOTS[way](model)
    with root.trace(TOKENS) as tracer:
        read = {name: hook(root, name).output for name in model.hook_names()}.save()
        result = tracer.result.save()
    logits, cache = model.run_with_cache(TOKENS, "*")
    assert list(read) == list(cache)
    for name in cache:
        torch.testing.assert_close(read[name], cache[name])
    torch.testing.assert_close(result, logits)


@pytest.mark.parametrize("name", NAMES)
def test_every_hook_by_itself(way: str, name: str) -> None:
    """Also those that are computed only when something listens, of which the model must know in time."""
    model = MODELS["mamba"]
    root = ROOTS[way](model)
    with root.trace(TOKENS) as tracer:
        read = hook(root, name).output.save()
        result = tracer.result.save()
    logits, cache = model.run_with_cache(TOKENS, name)
    torch.testing.assert_close(read, cache[name])
    torch.testing.assert_close(result, logits)


@pytest.mark.parametrize("name", CHANGEABLE)
def test_changes_are_those_of_a_hook_function(way: str, name: str) -> None:
    model = MODELS["mamba"]
    root = ROOTS[way](model)
    with root.trace(TOKENS) as tracer:
        hook(root, name).output = hook(root, name).output * 0.5 + 0.1
        replaced = tracer.result.save()
    with root.trace(TOKENS) as tracer:
        hook(root, name).output[:, 2] = 0.3
        edited = tracer.result.save()

    def halve(tensor: Tensor, point: HookPoint) -> Tensor:
        return tensor * 0.5 + 0.1

    def edit(tensor: Tensor, point: HookPoint) -> None:
        tensor[:, 2] = 0.3

    assert torch.equal(replaced, model.run_with_hooks(TOKENS, [(name, halve)]))
    assert torch.equal(edited, model.run_with_hooks(TOKENS, [(name, edit)]))
    if "conv_taps" not in name:
        assert not torch.equal(replaced, edited)


@pytest.mark.parametrize("name", CHANGEABLE)
def test_gradients(way: str, name: str) -> None:
    model = MODELS["mamba"]
    root = ROOTS[way](model)
    with root.trace(TOKENS) as tracer:
        value = hook(root, name).output
        loss = tracer.result.square().sum()
        with loss.backward():
            gradient = value.grad.save()
    logits, cache = model.run_with_cache(TOKENS, name, detach=False)
    (expected,) = torch.autograd.grad(logits.square().sum(), cache[name])
    torch.testing.assert_close(gradient, expected)
    assert gradient.abs().max() > 0


def test_a_changed_gradient_goes_on_changed() -> None:
    model = hooked()
    with model.trace(TOKENS) as tracer:
        value = model.blocks[1].hook_mixer_out.output
        loss = tracer.result.sum()
        with loss.backward():
            value.grad = value.grad * 0
    gradients = [block.mixer.in_proj.weight.grad.abs().max() for block in model.blocks]
    assert gradients[0] > 0
    assert gradients[1] == 0
    assert gradients[2] > 0


def test_what_was_attached_before_is_seen(way: str) -> None:
    """Interventions come first, then the trace, then what records."""
    model = MODELS["mamba"]
    root = ROOTS[way](model)
    name = "blocks.0.mixer.hook_x"
    with model.intervene(patch(name, 2.0, positions=3)):
        with root.trace(TOKENS):
            before = hook(root, name).input[:, 3].clone().save()
            seen = hook(root, name).output[:, 3].clone().save()
        with model.intervene(patch("blocks.0.mixer.hook_y", 3.0)), root.trace(TOKENS):
            after = root.blocks[0].mixer.hook_y.output.save()
    assert (seen == 2).all()
    assert not (before == 2).any()
    assert (after == 3).all()


def test_other_modules_are_envoys_too() -> None:
    model = MODELS["mamba"]
    with model.trace(TOKENS):
        projected = model.blocks[1].mixer.in_proj.output.save()
        in_x = model.blocks[1].mixer.hook_in_x.output.save()
        lens = model.envoy.hf_model.lm_head(model.blocks[1].hook_resid_post.output).save()
        logits = model.envoy.hf_model.lm_head.output.save()
    assert torch.equal(projected.chunk(2, dim=-1)[0], in_x)
    assert lens.shape == logits.shape
    assert isinstance(model.blocks[1].mixer.hook_x, HookPoint)


def test_a_cache_of_all_modules_leaves_out_what_is_computed_on_demand() -> None:
    model = MODELS["mamba"]
    names = model.hook_names()
    with model.trace(TOKENS) as tracer:
        cache = tracer.cache()
    with model.trace(TOKENS) as tracer:
        named = tracer.cache(modules=[model.blocks[0].mixer.hook_A_bar])
    expected = model.run_with_cache(TOKENS)[1]
    paths = {name: f"model.hf_model.{name.replace('blocks', 'backbone.layers')}" for name in names}
    assert {name for name in names if paths[name] in cache} == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(cache[paths[name]].output, value)
    assert named.keys() == [paths["blocks.0.mixer.hook_A_bar"]]
    A_bar = model.run_with_cache(TOKENS, "blocks.0.mixer.hook_A_bar")[1]["A_bar", 0]
    assert torch.equal(named[paths["blocks.0.mixer.hook_A_bar"]].output, A_bar)


def test_edits_and_sessions() -> None:
    model = MODELS["mamba"]
    plain = model(TOKENS)
    with model.envoy.edit() as (_tracer, edited):
        edited.blocks[0].mixer.hook_gate.output[:] = 0
    with edited.trace(TOKENS) as tracer:
        changed = tracer.result.save()
    with model.envoy.session():
        with model.trace(TOKENS):
            x = model.blocks[0].mixer.hook_x.output
        with model.trace(TOKENS.flip(0)) as tracer:
            model.blocks[0].mixer.hook_x.output = x
            patched = tracer.result.save()
    zeroed = model.run_with_hooks(TOKENS, [("blocks.0.mixer.hook_gate", lambda tensor, point: tensor * 0)])
    assert torch.equal(changed, zeroed)
    assert torch.equal(model(TOKENS), plain)
    with model.intervene(patch("blocks.0.mixer.hook_x", model.run_with_cache(TOKENS)[1])):
        torch.testing.assert_close(patched, model(TOKENS.flip(0)))


def test_stopping_early() -> None:
    model = MODELS["mamba"]
    with model.trace(TOKENS) as tracer:
        x = model.blocks[0].mixer.hook_x.output.save()
        tracer.stop()
    assert torch.equal(x, model.run_with_cache(TOKENS)[1]["x", 0])


def test_text_and_state() -> None:
    model = HookedMamba.from_pretrained("nano-mamba")
    texts = ["Then, Shelby and Emma had fun", "Shelby gave"]
    with model.trace(texts):
        delta = model.blocks[0].mixer.hook_delta.output.save()
    assert torch.equal(delta, model.run_with_cache(texts, "*hook_delta")[1]["delta", 0])
    state = model.read(texts[1])
    n = state.n_tokens
    with model.trace(texts[0], state=state, states=[n, -1]) as tracer:
        shown = model.blocks[0].mixer.hook_state.output.save()
        x = model.blocks[1].mixer.hook_x.output.save()
        single = model.blocks[1].mixer.hook_state.at[n + 2].output.save()
        last = model.blocks[1].mixer.hook_state.at[-1].output.save()
        logits = tracer.result.save()
    expected, cache = model.run_with_cache(texts[0], ["*hook_x", "*hook_state"], state=state)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(x, cache["x", 1])
    torch.testing.assert_close(shown, cache["state", 0][:, [0, -1]])
    torch.testing.assert_close(single, cache["state", 1][:, 2])
    torch.testing.assert_close(last, cache["state", 1][:, -1])
    with pytest.raises(ValueError, match="lies in what the state has read"), model.trace(texts[0], state=state):
        model.blocks[1].mixer.hook_state.at[0].output.save()


def test_runs_inside_a_trace_are_runs_of_their_own() -> None:
    model = MODELS["mamba"]
    other = TOKENS.flip(1)
    with model.trace(TOKENS):
        first = model.blocks[0].mixer.hook_x.output.save()
        inner = nnsight.save(model.run_with_cache(other, "*hook_A_bar")[1])
        state = nnsight.save(model.read(other))
        new = model.generate(other, 2, do_sample=False).save()
        second = model.blocks[1].mixer.hook_x.output.save()
    cache = model.run_with_cache(TOKENS)[1]
    torch.testing.assert_close(first, cache["x", 0])
    torch.testing.assert_close(second, cache["x", 1])
    assert torch.equal(inner["A_bar", 1], model.run_with_cache(other, "*hook_A_bar")[1]["A_bar", 1])
    assert torch.equal(state.ssm, model.read(other).ssm)
    assert torch.equal(new, model.generate(other, 2, do_sample=False))


def test_two_nnsight_models_around_one_model() -> None:
    model = hooked()
    first, second = NNsight(model), NNsight(model)
    with first.trace(TOKENS):
        a = first.blocks[0].mixer.hook_A_bar.output.save()
    with second.trace(TOKENS):
        b = second.blocks[0].mixer.hook_A_bar.output.save()
    assert torch.equal(a, b)


@pytest.mark.parametrize("way", ["dispatched", "offloaded"])
@torch.no_grad()
def test_accelerate(way: str) -> None:
    lm = tiny_model(num_hidden_layers=2)
    if way == "dispatched":
        dispatch_model(lm, {"": "cpu"}, main_device="cpu", force_hooks=True)
    else:
        cpu_offload(lm, execution_device=torch.device("cpu"))
    model = HookedMamba.from_hf(lm)
    with model.trace(TOKENS) as tracer:
        A_bar = model.blocks[0].mixer.hook_A_bar.output.save()
        state = model.blocks[1].mixer.hook_state.at[3].output.save()
        result = tracer.result.save()
    logits, cache = MODELS["mamba"].run_with_cache(TOKENS, "*")
    torch.testing.assert_close(A_bar, cache["A_bar", 0])
    torch.testing.assert_close(state, cache["state", 1][:, 3])
    torch.testing.assert_close(result, logits)
