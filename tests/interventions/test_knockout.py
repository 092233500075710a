"""Knockout: exactly the reads that were named are missing, every other read is there."""

from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from planted import NAME_A, PlantedCircuit, answer, planted_circuit
from tiny_models import hooked, random_tokens, tiny_model
from torch import Tensor

from ssminterp import ActivationCache, HookedMamba, ablate, freeze, knockout, patch, scale
from ssminterp.models.mixers import scans
from ssminterp.patching import patch_sweep
from ssminterp.patching.state_scans import scan_suffices

LENGTH, BATCH = 9, 3
TOKENS = random_tokens(BATCH, LENGTH)
NEEDED = ["*hook_x", "*hook_delta", "*hook_B", "*hook_C", "*hook_y"]


@pytest.fixture(scope="module", params=["mamba", "falcon"])
def model(request: pytest.FixtureRequest) -> HookedMamba:
    return hooked(request.param)


def run(model: HookedMamba, *interventions: Any, **options: Any) -> ActivationCache:
    with torch.no_grad(), model.intervene(*interventions, **options):
        return model.run_with_cache(TOKENS, [*NEEDED, "hook_logits"])[1]


def read_pair_by_pair(
    model: HookedMamba, cache: ActivationCache, layer: int, forbidden: Tensor, skipped: Tensor
) -> Tensor:
    """y by a loop over pairs, in float64. forbidden, skipped: [batch, target, source, d_inner, d_state]."""
    x, delta, B, C = (cache[short, layer].double() for short in ("x", "delta", "B", "C"))
    A = model.blocks[layer].mixer.A().double()
    y = torch.zeros_like(x)
    for t in range(x.shape[1]):
        decay = torch.ones(*x[:, t].shape, A.shape[1], dtype=torch.float64)
        for s in range(t, -1, -1):
            part = decay * (delta[:, s] * x[:, s])[..., None] * B[:, s, None]
            y[:, t] += (torch.where(forbidden[:, t, s], 0.0, part) * C[:, t, None]).sum(-1)
            decay = torch.where(skipped[:, t, s], decay, decay * torch.exp(delta[:, s, :, None] * A))
    return y


def pairs(
    model: HookedMamba, targets: Any, sources: Any, channels: Any = slice(None), states: Any = slice(None)
) -> Tensor:
    """True for the pairs named, [batch, target, source, d_inner, d_state]."""
    marked = torch.zeros(BATCH, LENGTH, LENGTH, model.cfg.d_inner, model.cfg.d_state, dtype=torch.bool)
    for t in targets:
        for s in sources:
            part = torch.zeros(model.cfg.d_inner, model.cfg.d_state, dtype=torch.bool)
            part[channels, states] = True
            marked[:, t, s] |= part
    return marked


positions = st.lists(st.integers(0, LENGTH - 1), min_size=1, max_size=4, unique=True).map(sorted)
double = {family: HookedMamba.from_hf(tiny_model(family).double(), verify=False) for family in ("mamba", "falcon")}


@given(st.sampled_from(["mamba", "falcon"]), positions, positions, st.booleans(), st.booleans(), st.booleans())
def test_it_agrees_with_a_loop_over_pairs(
    family: str, sources: list[int], targets: list[int], skip: bool, discretised: bool, some: bool
) -> None:
    model = double[family]
    assume(sources[0] <= targets[-1])
    sources, targets = [s for s in sources if s <= targets[-1]], [t for t in targets if t >= sources[0]]
    channels, states = ([1, 4], [0, 3]) if some else (None, None)
    decay = "skipped" if skip else "kept"
    cut = knockout([0, 2], sources=sources, targets=targets, decay=decay, channels=channels, states=states)
    extra = [ablate("*hook_B_bar", positions=[5])] if discretised else []
    found = run(model, cut, *extra)
    part = {} if channels is None else {"channels": torch.tensor(channels)[:, None], "states": torch.tensor(states)}
    forbidden = pairs(model, targets, sources, **part)
    skipped = forbidden if skip else torch.zeros_like(forbidden)
    if discretised:
        forbidden = forbidden | pairs(model, range(LENGTH), [5])
    for layer in range(3):
        none = torch.zeros_like(forbidden)
        here = (forbidden, skipped) if layer != 1 else (pairs(model, range(LENGTH), [5] if discretised else []), none)
        expected = read_pair_by_pair(model, found, layer, *here)
        error = (found["y", layer] - expected).norm() / expected.norm()
        assert error < (1e-6 if discretised else 1e-12), (layer, error)


def test_other_reads_stay_as_they_are(model: HookedMamba) -> None:
    before, after = run(model), run(model, knockout(1, sources=[2, 3], targets=[4, 7], channels=[0, 5]))
    changed = (before["y", 1] != after["y", 1]).any(0)
    expected = torch.zeros_like(changed)
    expected[[[4], [7]], [0, 5]] = True
    assert torch.equal(changed, expected)
    assert torch.equal(before["y", 0], after["y", 0])


def test_a_target_that_may_read_nothing_reads_nothing(model: HookedMamba) -> None:
    for decay in ("kept", "skipped"):
        y = run(model, knockout(1, targets=[3, 6], decay=decay))["y", 1]
        assert (y[:, [3, 6]] == 0).all()
        assert (y[:, [2, 4, 5, 7]] != 0).all()


def test_the_parts_that_single_knockouts_take_away_add_up(model: HookedMamba) -> None:
    whole = run(model)["y", 2]
    taken = sum(whole - run(model, knockout(2, sources=s, targets=LENGTH - 1))["y", 2] for s in range(LENGTH))
    torch.testing.assert_close(taken[:, -1], whole[:, -1], atol=1e-5, rtol=1e-4)


def test_a_source_that_wrote_nothing_is_not_missed(model: HookedMamba) -> None:
    silent = ablate("*hook_x", positions=3)
    torch.testing.assert_close(
        run(model, silent, knockout(sources=3))["hook_logits"], run(model, silent)["hook_logits"], atol=1e-5, rtol=1e-5
    )


def test_a_skipped_source_is_as_if_it_had_not_been_there(model: HookedMamba) -> None:
    passed = run(model, patch("blocks.1.mixer.hook_delta", 0.0, positions=[3, 4]))["y", 1]
    found = run(model, knockout(1, sources=[3, 4], targets=[6, 8], decay="skipped"))["y", 1]
    torch.testing.assert_close(found[:, [6, 8]], passed[:, [6, 8]], atol=1e-6, rtol=1e-5)
    kept = run(model, knockout(1, sources=[3, 4], targets=[6, 8]))["y", 1]
    assert not torch.allclose(found[:, 6], kept[:, 6], atol=1e-3)


def test_several_forbid_what_any_of_them_forbids(model: HookedMamba) -> None:
    whole = run(model, knockout(1, sources=[2, 3, 4], targets=[5, 8]))["hook_logits"]
    overlapping = [
        knockout(1, sources=[3, 4], targets=[8, 5]),
        knockout([0, 1][1:], sources=[2, 3], targets=5),
        knockout(1, sources=[2, 4], targets=8, channels=slice(0, 9)),
        knockout(1, sources=[2, 4], targets=8, channels=slice(7, None), states=[0, 1]),
        knockout(1, sources=[2], targets=8, channels=slice(5, None), states=[1, 2, 3]),
    ]
    for order in (overlapping, overlapping[::-1], overlapping * 2):
        torch.testing.assert_close(run(model, *order)["hook_logits"], whole, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(run(model, *overlapping[:-1])["hook_logits"], whole, atol=1e-4)


def test_kept_and_skipped_of_one_target_are_both_obeyed(model: HookedMamba) -> None:
    both = [knockout(1, sources=2, targets=8), knockout(1, sources=5, targets=8, decay="skipped")]
    twin = [
        ablate("blocks.1.mixer.hook_x", positions=[2, 5]),
        freeze("blocks.1.mixer.hook_delta", TOKENS),
        freeze("blocks.1.mixer.hook_B", TOKENS),
        freeze("blocks.1.mixer.hook_C", TOKENS),
        ablate("blocks.1.mixer.hook_delta", positions=5),
    ]
    expected = run(model, *twin)["y", 1][:, 8]
    for order in (both, both[::-1]):
        torch.testing.assert_close(run(model, *order)["y", 1][:, 8], expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("whole_state", [True, False])
def test_a_patched_state_is_nobodys_write(model: HookedMamba, whole_state: bool) -> None:
    """Sources before the patch are forgotten by it, those after it still count; however the state is patched."""
    name, value = "blocks.1.mixer.hook_state", torch.randn(BATCH, model.cfg.d_inner, model.cfg.d_state)
    edit = patch(name, value, positions=4, batch=None if whole_state else [0, 1, 2])
    cache = run(model, edit)
    alone = cache["y", 1]
    torch.testing.assert_close(run(model, edit, knockout(1, sources=[1, 4], targets=[6, 8]))["y", 1], alone)
    later = run(model, edit, knockout(1, sources=[5], targets=[6, 8]))["y", 1]
    assert not torch.allclose(later[:, 8], alone[:, 8], atol=1e-3)
    isolated = run(model, edit, knockout(1, targets=8))["y", 1]
    decay = torch.exp(cache["delta", 1][:, 5:].sum(1)[..., None] * model.blocks[1].mixer.A())
    expected = (cache["C", 1][:, 8, None] * decay * value).sum(-1)
    torch.testing.assert_close(isolated[:, 8], expected, atol=1e-5, rtol=1e-4)


def test_it_sees_what_others_make_of_the_inputs_in_any_order(model: HookedMamba) -> None:
    others = [scale("blocks.1.mixer.hook_delta", 1.5), scale("blocks.1.mixer.hook_B", 0.5, positions=[2])]
    cut = knockout(1, sources=2, targets=8)
    first, last = run(model, cut, *others), run(model, *others, cut)
    assert torch.equal(first["hook_logits"], last["hook_logits"])
    expected = read_pair_by_pair(model, last, 1, pairs(model, [8], [2]), pairs(model, [], []))
    torch.testing.assert_close(last["y", 1].double(), expected, atol=1e-5, rtol=1e-4)


def test_on_y_itself_the_order_counts(model: HookedMamba) -> None:
    double_y, cut = scale("blocks.1.mixer.hook_y", 2.0), knockout(1, targets=8)
    assert (run(model, cut, double_y)["y", 1][:, 8] == 0).all()
    torch.testing.assert_close(run(model, double_y, cut)["y", 1][:, 8], run(model)["y", 1][:, 8])


def test_positions_of_every_kind(model: HookedMamba) -> None:
    roles = {"IO": torch.tensor([1, 2, 3]), "S": torch.tensor([2, 4, 5]), "end": torch.tensor([6, 8, 7])}
    one_by_one = [
        run(model, knockout(1, sources=[int(roles["IO"][i]), int(roles["S"][i])], targets=int(roles["end"][i])))
        for i in range(BATCH)
    ]
    expected = torch.stack([cache["hook_logits"][i] for i, cache in enumerate(one_by_one)])
    both = torch.stack([roles["IO"], roles["S"]], 1)
    for cut in (
        knockout(1, sources=["IO", "S"], targets="end"),
        knockout(1, sources=both, targets=roles["end"][:, None]),
        knockout([1], sources=both - LENGTH, targets="end"),
    ):
        torch.testing.assert_close(run(model, cut, roles=roles)["hook_logits"], expected, atol=1e-6, rtol=1e-5)
    after = run(model, knockout(1, sources=slice(2, 4), targets=slice(4, None)))["hook_logits"]
    assert torch.equal(run(model, knockout(1, sources=[2, 3]))["hook_logits"], after)
    part = run(model, knockout(1, sources=[2, 3], batch=[1]))["hook_logits"]
    assert torch.equal(part[1], after[1])
    assert torch.equal(part[[0, 2]], run(model)["hook_logits"][[0, 2]])


def test_what_was_read_before_the_run_is_no_source(model: HookedMamba) -> None:
    state = model.read(random_tokens(BATCH, 6, seed=3))
    with torch.no_grad(), model.intervene(knockout(0, targets=-1)):
        _, cache = model.run_with_cache(TOKENS, "blocks.0.*", state=state)
    decay = torch.exp(cache["delta", 0].sum(1)[..., None] * model.blocks[0].mixer.A())
    expected = (cache["C", 0][:, -1, None] * decay * state.ssm[0]).sum(-1)
    torch.testing.assert_close(cache["y", 0][:, -1], expected, atol=1e-6, rtol=1e-4)


def test_positions_after_a_state_count_from_what_it_read(model: HookedMamba) -> None:
    before = random_tokens(BATCH, 6, seed=3)
    state = model.read(before)
    each = torch.tensor([[7], [8], [9]])
    for sources, targets in ((7, -1), ([7, 8], slice(10, None)), (each, [11, -1]), (slice(6, 9), 12)):
        with torch.no_grad(), model.intervene(knockout(1, sources=sources, targets=targets)):
            found = model(TOKENS, state=state)
            expected = model(torch.cat([before, TOKENS], 1))[:, 6:]
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    with model.intervene(knockout(1, sources=5, targets=9)), pytest.raises(ValueError, match="position 5 lies in what"):
        model(TOKENS, state=state)


def test_padding_on_the_left_changes_nothing(model: HookedMamba) -> None:
    padded, mask = torch.cat([torch.zeros_like(TOKENS[:, :2]), TOKENS], 1), torch.ones(BATCH, LENGTH + 2)
    mask[:, :2] = 0
    with torch.no_grad(), model.intervene(knockout(sources=[4, 5], targets=[-1, 8])):
        found = model(padded, attention_mask=mask.long())[:, 2:]
    expected = run(model, knockout(sources=[2, 3], targets=[-1, 6]))["hook_logits"]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_generation_without_a_cache_goes_on_forbidding(model: HookedMamba) -> None:
    tokens, cut = TOKENS[:1], knockout(1, sources=[2, 3, 4])
    with torch.no_grad(), model.intervene(cut):
        found = model.generate(tokens, 5, use_cache=False, do_sample=False)
        for _ in range(5):
            tokens = torch.cat([tokens, model(tokens)[:, -1:].argmax(-1)], 1)
    assert torch.equal(found, tokens)


def test_no_gradient_reaches_a_skipped_source(model: HookedMamba) -> None:
    x = run(model)["x", 1].clone().requires_grad_()
    held = [freeze(f"blocks.1.mixer.hook_{short}", TOKENS) for short in ("B", "C", "delta")]
    gradients = []
    for cuts in ([], [knockout(1, sources=[2, 5], targets=7)]):
        with model.intervene(patch("blocks.1.mixer.hook_x", x), *held, *cuts):
            y = model.run_with_cache(TOKENS, "blocks.1.mixer.hook_y", detach=False)[1]["y", 1]
        gradients.append(torch.autograd.grad(y[:, 7].sum(), x)[0])
    assert (gradients[1][:, [2, 5]] == 0).all()
    assert (gradients[0][:, :8] != 0).all()
    assert (gradients[1][:, [0, 1, 3, 4, 6, 7]] != 0).all()


@pytest.fixture(params=[{}, {"layer": 0, "channel": 0, "coordinate": 0, "delay": 1}, {"layer": 2, "channel": 9}])
def circuit(request: pytest.FixtureRequest) -> PlantedCircuit:
    return planted_circuit(**request.param)


@torch.no_grad()
def test_it_cuts_a_planted_circuit_where_it_is_and_nowhere_else(circuit: PlantedCircuit) -> None:
    tokens, written, last = circuit.prompt(NAME_A, 2, 10), 2 + circuit.delay, 9
    others = [layer for layer in range(circuit.model.cfg.n_layers) if layer != circuit.layer]
    here = {"channels": [circuit.channel], "states": [circuit.coordinate]}

    def answered(*arguments: Any, **options: Any) -> float:
        with circuit.model.intervene(knockout(*arguments, **options)):
            return answer(circuit.model(tokens)).item()

    plain = answer(circuit.model(tokens)).item()
    for found in (
        answered(circuit.layer, sources=written, targets=last),
        answered(sources=written, targets=last, **here),
        answered(sources=written, decay="skipped"),
    ):
        assert abs(found) < 0.05 * plain
    elsewhere = [p for p in range(last) if p != written]
    not_c = [c for c in range(circuit.model.cfg.d_inner) if c != circuit.channel]
    not_n = [n for n in range(circuit.model.cfg.d_state) if n != circuit.coordinate]
    for found in (
        answered(circuit.layer, sources=elsewhere, targets=last),
        answered(circuit.layer, sources=written, targets=list(range(written, last))),
        answered(others, sources=written, targets=last),
        answered(circuit.layer, sources=written, targets=last, channels=not_c),
        answered(circuit.layer, sources=written, targets=last, states=not_n),
    ):
        assert abs(found - plain) < 0.2 * plain


def test_it_costs_one_scan_more_in_its_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    model, scan, lengths = hooked(), scans.selective_scan, []

    def counted(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        lengths.append(x.shape[1])
        return scan(x, *args, **kwargs)

    monkeypatch.setattr(scans, "selective_scan", counted)
    run(model, knockout([1, 2], sources=[2, 5], targets=[6, 7, 8], decay="skipped", channels=[3]))
    assert lengths == [LENGTH] * 5


@torch.no_grad()
def test_sweeps_run_under_it(model: HookedMamba) -> None:
    def third(logits: Tensor) -> Tensor:
        return logits[:, -1, 3]

    cut, others, name = knockout(1, sources=[2, 3], targets=[6, 8]), random_tokens(BATCH, LENGTH, 4), "hook_x"
    with model.intervene(cut):
        swept = patch_sweep(model, others, TOKENS, "x", third, [1], positions=[3], reduce=None, progress=False)
        value = model.run_with_cache(others, f"*{name}", positions=3)[1]["x", 1]
    found = run(model, cut, patch(f"blocks.1.mixer.{name}", value, positions=[3]))
    torch.testing.assert_close(torch.from_numpy(swept.values).flatten(), third(found["hook_logits"]))
    alone = run(model, patch(f"blocks.1.mixer.{name}", value, positions=[3]))
    assert not torch.allclose(third(alone["hook_logits"]), third(found["hook_logits"]), atol=1e-3)


def test_attribution_does_not_take_the_read_out_for_that_of_the_states() -> None:
    model = hooked()
    assert scan_suffices(model)
    with model.intervene(knockout(1, sources=2)):
        assert not scan_suffices(model)


def test_it_prints_what_it_does() -> None:
    assert repr(knockout(3, sources="IO", targets=-1)) == "knockout([3], sources='IO', targets=-1, decay='kept')"
    shown = repr(knockout(sources=["IO", "S1"], decay="skipped", channels=[4]))
    assert shown == "knockout(None, sources=['IO', 'S1'], targets=None, decay='skipped', channels=[4])"
