"""What a trace cannot do says why and how; whatever happens in one, the model is what it was."""

# ruff: noqa: PT012, RUF043, SIM117
# A trace is a block of code, and what stands in it is what raises.

import copy
import gc
import pickle
import subprocess
import sys
import weakref
from collections.abc import Iterator

import pytest
import torch
from nnsight.intervention.interleaver import OutOfOrderError
from peft import LoraConfig, get_peft_model
from tiny_models import hooked, random_tokens
from trace_cases import TOKENS

from ssminterp import HookedMamba
from ssminterp.models.tracing import access

pytestmark = pytest.mark.usefixtures("as_users_run_it")


@pytest.fixture
def model() -> Iterator[HookedMamba]:
    """A model that a bad trace must leave as it was."""
    model = hooked()
    with torch.no_grad():
        before = model(TOKENS)
    yield model
    with torch.no_grad():
        assert torch.equal(model(TOKENS), before)
    assert not any(hook.is_listened_to for hook in model.hook_points.values())
    assert isinstance(model.blocks, torch.nn.ModuleList)


def test_names_that_do_not_exist(model: HookedMamba) -> None:
    with pytest.raises(AttributeError, match=r"'blocks.1.mixer.hook_dleta'. Nearest names: blocks.1.mixer.hook_delta"):
        with model.trace(TOKENS):
            model.blocks[1].mixer.hook_dleta.output.save()
    with pytest.raises(AttributeError, match=r"'hook_logit'. Nearest names: hook_logits"), model.trace(TOKENS):
        model.hook_logit.output.save()
    with pytest.raises(IndexError, match=r"layer 3 does not exist: the model has 3 \(0 to 2\)"), model.trace(TOKENS):
        model.blocks[3].mixer.hook_x.output.save()
    with pytest.raises(AttributeError, match="hook_logits"):
        model.hook_logit  # noqa: B018


def test_out_of_order(model: HookedMamba) -> None:
    with pytest.raises(OutOfOrderError, match=r"blocks.0.mixer.hook_A_bar.output was asked for.* in a second `with"):
        with model.trace(TOKENS):
            model.blocks[0].mixer.hook_y.output.save()
            model.blocks[0].mixer.hook_A_bar.output.save()
    with pytest.raises(OutOfOrderError, match=r"blocks.0.mixer.hook_state.at\[2\].*ascending position"):
        with model.trace(TOKENS):
            model.blocks[0].mixer.hook_state.at[5].output.save()
            model.blocks[0].mixer.hook_state.at[2].output.save()
    with pytest.raises(OutOfOrderError, match=r"^hook_embed.output was asked for.*from hook_embed to hook_logits"):
        with model.trace(TOKENS):
            model.hook_logits.output.save()
            model.hook_embed.output.save()


def test_states(model: HookedMamba) -> None:
    state = "blocks.1.mixer.hook_state"
    with pytest.raises(ValueError, match=rf"{state}.output is to be read only.*at\[position\]"), model.trace(TOKENS):
        model.blocks[1].mixer.hook_state.output = torch.zeros(2, 7, 16, 4)
    with pytest.raises(ValueError, match=r"changed blocks.1.mixer.hook_state without naming positions.*at\[position\]"):
        with model.trace(TOKENS):
            model.blocks[1].mixer.hook_state.output[:, 2] = 0
    with pytest.raises(ValueError, match="changed blocks.1.mixer.hook_state"), model.trace(TOKENS, states=[1, 4]):
        model.blocks[1].mixer.hook_state.output[:, 0] = 0
    for p in (7, -8):
        with pytest.raises(ValueError, match=rf"\[{p}\] are out of range: the sequence has 7"), model.trace(TOKENS):
            model.blocks[1].mixer.hook_state.at[p].output.save()
        with pytest.raises(ValueError, match=rf"\[{p}\] are out of range"), model.trace(TOKENS, states=[p]):
            model.blocks[1].mixer.hook_state.output.save()
    with pytest.raises(ValueError, match="one position at a time"), model.trace(TOKENS):
        model.blocks[1].mixer.hook_state.at[1:3].output.save()
    with pytest.raises(ValueError, match="inside its trace or invoke"), model.trace() as tracer:
        last = model.blocks[1].mixer.hook_state.at[-1]
        with tracer.invoke(TOKENS):
            last.output.save()
    with pytest.raises(ValueError, match="the tensor there has shape"), model.trace(TOKENS):
        model.blocks[1].mixer.hook_state.at[1].output = torch.zeros(3)


def test_replacements(model: HookedMamba) -> None:
    with pytest.raises(ValueError, match=r"hook_x was set to shape \[2, 16\].* has shape \[2, 7, 16\]"):
        with model.trace(TOKENS):
            model.blocks[1].mixer.hook_x.output = torch.zeros(2, 16)
    with pytest.raises(ValueError, match="must be set to a tensor, got int"), model.trace(TOKENS):
        model.blocks[1].mixer.hook_x.output = 0
    with pytest.raises(ValueError, match="by setting its output"), model.trace(TOKENS):
        model.blocks[1].mixer.hook_x.input = torch.zeros(2, 7, 16)


def test_outside_of_a_trace(model: HookedMamba) -> None:
    hook = model.blocks[1].mixer.hook_x
    with pytest.raises(ValueError, match=r"only in the code of `with model.trace"):
        hook.output  # noqa: B018
    with pytest.raises(ValueError, match=r"only in the code of `with model.trace"):
        hook.output = torch.zeros(1)
    with pytest.raises(ValueError, match="taken from the model anew"), model.trace(TOKENS):
        hook.output.save()
    with pytest.raises(ValueError, match="outside of interleaving"):
        model.envoy.blocks[1].mixer.hook_x.output  # noqa: B018


def test_inputs(model: HookedMamba) -> None:
    with pytest.raises(ValueError, match="out of the vocabulary|do not fit the model's vocabulary"):
        with model.trace(TOKENS + 100):
            model.hook_embed.output.save()
    with pytest.raises(ValueError, match="one input, a text or texts or tokens, got 2"), model.trace(TOKENS, TOKENS):
        model.hook_embed.output.save()
    with pytest.raises(ValueError, match="no tokenizer"), model.trace("a text"):
        model.hook_embed.output.save()
    with pytest.raises(ValueError, match="state holds for all invokes"), model.trace() as tracer:
        with tracer.invoke(TOKENS, state=model.read(TOKENS)):
            model.hook_embed.output.save()
        with tracer.invoke(TOKENS):
            model.hook_embed.output.save()
    with pytest.raises(ValueError, match="inside its `with tracer.invoke"), model.trace():
        model.hook_embed.output.save()
    with pytest.raises(TypeError, match="nonsense"), model.trace(TOKENS, nonsense=1):
        model.hook_embed.output.save()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_in_the_code(model: HookedMamba, error: type[BaseException]) -> None:
    for short in ("x", "A_bar", "state", "y"):
        with pytest.raises(error), model.trace(TOKENS, states=[2]):
            getattr(model.blocks[1].mixer, f"hook_{short}").output.save()
            raise error
        with pytest.raises(error), model.trace(TOKENS):
            model.blocks[1].mixer.hook_state.at[3].output.save()
            raise error
    assert all(block.mixer.hook_state.shown is None for block in model.blocks)


def test_copies_of_a_traced_model(model: HookedMamba) -> None:
    with model.trace(TOKENS):
        x = model.blocks[0].mixer.hook_x.output.save()
        model.blocks[0].mixer.hook_state.at[2].output.save()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            other.blocks[0].mixer.in_proj.weight.mul_(2)
        with other.trace(TOKENS):
            doubled = other.blocks[0].mixer.hook_in_x.output.save()
        assert torch.equal(doubled, other.run_with_cache(TOKENS)[1]["in_x", 0])
        with model.trace(TOKENS):
            again = model.blocks[0].mixer.hook_x.output.save()
        assert torch.equal(again, x)


def test_a_model_is_freed_after_traces() -> None:
    def traced() -> weakref.ref:
        model = hooked()
        with model.trace(TOKENS):
            model.blocks[0].mixer.hook_x.output.save()
        return weakref.ref(model)

    alive = traced()
    gc.collect()
    assert alive() is None


def test_adapters_put_in_after_a_trace() -> None:
    model = hooked()
    with model.trace(TOKENS):
        model.blocks[0].mixer.in_proj.output.save()
    adapted = get_peft_model(model.hf_model, LoraConfig(r=2, target_modules=["in_proj"], init_lora_weights=False))
    with model.trace(TOKENS):
        projected = model.blocks[0].mixer.in_proj.output.save()
        in_x = model.blocks[0].mixer.hook_in_x.output.save()
    assert torch.equal(projected.chunk(2, dim=-1)[0], in_x)
    wrapped = HookedMamba.from_hf(adapted)
    with wrapped.trace(TOKENS):
        in_x = wrapped.blocks[0].mixer.hook_in_x.output.save()
    assert torch.equal(in_x, wrapped.run_with_cache(TOKENS)[1]["in_x", 0])


WITHOUT = """
import sys
sys.modules["nnsight"] = None
import torch
from ssminterp import HookedMamba
model = HookedMamba.from_pretrained("nano-mamba")
tokens = torch.arange(6)[None]
model.run_with_cache(tokens, "*")
model.generate(tokens, 2)
for use in (lambda: model.trace(tokens), lambda: model.envoy):
    try:
        use()
    except ImportError as error:
        print(error)
try:
    with model.generate(tokens, max_new_tokens=2) as tracer:
        pass
except ImportError as error:
    print(error)
"""


def test_without_nnsight() -> None:
    run = subprocess.run([sys.executable, "-c", WITHOUT], check=True, capture_output=True, text=True)
    assert run.stdout.count("pip install 'ssminterp[nnsight]'") == 3


def test_an_nnsight_that_is_too_old(model: HookedMamba, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access, "version", lambda name: "0.7.0")
    with pytest.raises(ImportError, match=r"nnsight ≥ 0.8, 0.7.0 is installed"):
        model.trace(random_tokens(1, 2))
