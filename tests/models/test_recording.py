"""run_with_cache: what is recorded equals what hook functions see; positions, layers, offload, gradients, memory."""

import pytest
import torch
from tiny_models import hooked, random_tokens, tiny_model

from ssminterp import HookedMamba, HookPoint
from ssminterp.models import memory
from ssminterp.models.hook_points import Recorder

MODEL = hooked()
TOKENS = random_tokens(2, 7)


@torch.no_grad()
def test_recorded_is_what_functions_see() -> None:
    seen: dict[str, torch.Tensor] = {}

    def keep(tensor: torch.Tensor, hook: HookPoint) -> None:
        seen[hook.name] = tensor.clone()

    with MODEL.hooks([("*", keep)]):
        logits, cache = MODEL.run_with_cache(TOKENS, "*")
    assert list(cache) == MODEL.hook_names()
    assert all(torch.equal(cache[name], seen[name]) for name in cache)
    assert torch.equal(logits, cache["logits"])


@pytest.mark.parametrize("positions", [[5, 0, 3], [6], -2, slice(1, 6, 2), torch.tensor([4, 2])])
@torch.no_grad()
def test_positions_are_slices_in_the_order_given(positions: object) -> None:
    everything = MODEL.run_with_cache(TOKENS, "*")[1]
    cache = MODEL.run_with_cache(TOKENS, "*", positions=positions)[1]
    index = [positions] if isinstance(positions, int) else positions
    expected = torch.arange(7)[index]
    assert list(cache.positions) == expected.tolist()
    for name in cache:
        torch.testing.assert_close(cache[name], everything[name][:, expected], msg=name)


@torch.no_grad()
def test_two_recordings_of_the_same_state_at_different_positions() -> None:
    """A run inside another's context: each gets its own positions."""
    everything = MODEL.run_with_cache(TOKENS, "*hook_state")[1]
    hook = MODEL.hook_points["blocks.1.mixer.hook_state"]
    stores: list[dict[str, torch.Tensor]] = [{}, {}]
    hook.recorders = [Recorder(stores[0], [6, 2]), Recorder(stores[1], [0, 2, 3])]
    try:
        MODEL(TOKENS)
    finally:
        hook.recorders = []
    for store, positions in zip(stores, [[6, 2], [0, 2, 3]], strict=True):
        torch.testing.assert_close(store[hook.name], everything[hook.name][:, positions])


def test_nothing_named_records_all_but_what_is_computed_on_demand() -> None:
    cache = MODEL.run_with_cache(TOKENS)[1]
    on_demand = ("state", "A_bar", "B_bar", "conv_taps")
    assert list(cache) == [n for n in MODEL.hook_names() if not n.endswith(tuple(f"hook_{s}" for s in on_demand))]


def test_names_filters() -> None:
    def names(names_filter: object) -> list[str]:
        return list(MODEL.run_with_cache(TOKENS, names_filter)[1])

    assert names("blocks.*.mixer.hook_B") == [f"blocks.{i}.mixer.hook_B" for i in range(3)]
    assert names(["hook_logits", "blocks.2.hook_resid_pre", "hook_embed"]) == [
        "hook_embed",
        "blocks.2.hook_resid_pre",
        "hook_logits",
    ]
    assert names(lambda name: name.endswith("gate") and ".1." in name) == ["blocks.1.mixer.hook_gate"]


def test_layers() -> None:
    cache = MODEL.run_with_cache(TOKENS, "*hook_x", layers=[2, 0])[1]
    assert list(cache) == ["blocks.0.mixer.hook_x", "blocks.2.mixer.hook_x"]
    with pytest.raises(ValueError, match=r"layers \[3, -1\] do not exist: the model has 3"):
        MODEL.run_with_cache(TOKENS, "*hook_x", layers=[3, 1, -1])
    with pytest.raises(ValueError, match=r"has no hook in layers \[1\]"):
        MODEL.run_with_cache(TOKENS, ["hook_embed", "blocks.2.hook_resid_pre"], layers=[1])


def test_recordings_are_detached_unless_asked() -> None:
    assert not any(tensor.requires_grad for tensor in MODEL.run_with_cache(TOKENS, "*")[1].values())
    logits, cache = MODEL.run_with_cache(TOKENS, "*", detach=False)
    gradients = torch.autograd.grad(logits.sum(), list(cache.values()), allow_unused=True)
    reached = [name for name, gradient in zip(cache, gradients, strict=True) if gradient is not None]
    assert {"hook_embed", "blocks.0.hook_resid_pre", "blocks.2.mixer.hook_delta", "hook_logits"} <= set(reached)


def test_offload_moves_recordings() -> None:
    cache = MODEL.run_with_cache(TOKENS, "*hook_x", offload="meta")[1]
    assert all(tensor.device.type == "meta" for tensor in cache.values())


@torch.no_grad()
def test_recording_changes_nothing() -> None:
    plain = MODEL(TOKENS)
    for names in ("*hook_x", "*hook_delta", "*hook_state", "*"):
        torch.testing.assert_close(MODEL.run_with_cache(TOKENS, names)[0], plain, atol=1e-5, rtol=0)
    assert torch.equal(MODEL(TOKENS), plain)


def test_a_recording_that_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """One byte less than needed: refused before the run, with both sizes and the remedies."""
    needed = 3 * 2 * 7 * 16 * 4 * 4
    monkeypatch.setattr(memory, "free_bytes", lambda device: needed - 1)
    runs: list[object] = []
    with MODEL.hooks([("hook_embed", lambda tensor, hook: runs.append(tensor))]):
        with pytest.raises(
            ValueError, match=r"3 hooks × batch 2 × 7 positions .*are free on cpu: pass positions= or layers="
        ):
            MODEL.run_with_cache(TOKENS, "*hook_state")
        assert not runs
        monkeypatch.setattr(memory, "free_bytes", lambda device: needed)
        assert MODEL.run_with_cache(TOKENS, "*hook_state")[1].stack("*").nbytes == needed
    monkeypatch.setattr(memory, "free_bytes", lambda device: needed // 7)
    MODEL.run_with_cache(TOKENS, "*hook_state", positions=3)


def test_offload_is_a_remedy_where_there_is_somewhere_to_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda device: 0)
    with pytest.raises(ValueError, match="are free on cuda: pass positions=, layers= or offload='cpu'"):
        memory.check_recording_fits([MODEL.hook_points["hook_embed"]], MODEL.cfg, 2, 7, torch.device("cuda"))


def test_the_estimate_is_what_is_recorded() -> None:
    for name in MODEL.hook_names():
        cache = MODEL.run_with_cache(TOKENS, name, positions=[1, 4])[1]
        estimate = memory.recording_bytes([MODEL.hook_points[name]], MODEL.cfg, 2, 2)
        assert estimate == cache[name].nbytes, name


@pytest.mark.parametrize("residual_in_fp32", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["mamba", "falcon"])
def test_what_reduced_precision_keeps_in_float32_is_in_the_estimate(
    family: str, dtype: torch.dtype, residual_in_fp32: bool
) -> None:
    lm = tiny_model(family, residual_in_fp32=residual_in_fp32).to(dtype)
    model = HookedMamba.from_hf(lm, verify=False)
    cache = model.run_with_cache(TOKENS, "*")[1]
    for name in model.hook_names():
        estimate = memory.recording_bytes([model.hook_points[name]], model.cfg, *TOKENS.shape)
        # The embedding is the residual stream's only part in the model's own precision.
        first = residual_in_fp32 and name == "blocks.0.hook_resid_pre"
        assert estimate == cache[name].nbytes * (2 if first else 1), name
        assert estimate >= model.run_with_cache(TOKENS, name)[1][name].nbytes
