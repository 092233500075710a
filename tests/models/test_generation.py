"""Generating while hooks act: what is generated step by step is what one run of the whole text says."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import FAMILIES, hooked, random_tokens

from ssminterp import HookedMamba, ModelState, ablate, freeze, knockout, patch, scale, steer

MODELS = {family: hooked(family, num_hidden_layers=2) for family in FAMILIES}
PROMPT, NEW, READ = 5, 6, 4
RUN = PROMPT + NEW - 1
NAMES = MODELS["mamba"].hook_names()
families = st.sampled_from(sorted(FAMILIES))
seeds = st.integers(0, 99)


def greedy(logits: torch.Tensor) -> torch.Tensor:
    """The tokens that the logits of the generated positions choose."""
    return logits[:, -NEW:].argmax(-1)


def check_teacher_forced(model: HookedMamba, tokens: torch.Tensor, state: ModelState | None, **options: Any) -> None:
    """What is generated is what each position of one run over the same text chooses, with the same hooks attached."""
    generated = model.generate(tokens, NEW, state=state, do_sample=False, **options)
    assert torch.equal(generated[:, :PROMPT], tokens)
    with torch.no_grad():
        whole = model(generated[:, :-1], state=state)
    assert torch.equal(greedy(whole), generated[:, PROMPT:])


@given(
    family=families,
    name=st.sampled_from(NAMES),
    positions=st.lists(st.integers(0, RUN - 1), min_size=1, max_size=4, unique=True),
    after=st.booleans(),
    seed=seeds,
)
def test_interventions_at_absolute_positions(
    family: str, name: str, positions: list[int], after: bool, seed: int
) -> None:
    model = MODELS[family]
    start = READ if after else 0
    state = model.read(random_tokens(2, READ, seed=1)) if after else None
    tokens = random_tokens(2, PROMPT, seed)
    shape = [model.cfg.axis_size(axis) for axis in model.hook_points[name].spec.axes[2:]]
    value = torch.randn(2, len(positions), *shape, generator=torch.Generator().manual_seed(seed))
    if name.endswith(("A_bar", "delta")):
        value = value.sigmoid()
    with model.intervene(patch(name, value, positions=[start + p for p in positions])):
        check_teacher_forced(model, tokens, state)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("after", [False, True], ids=["from the start", "after a state"])
def test_kinds_of_interventions_and_positions(family: str, after: bool) -> None:
    model = MODELS[family]
    start = READ if after else 0
    state = model.read(random_tokens(2, READ, seed=1)) if after else None
    tokens = random_tokens(2, PROMPT)
    by_example = start + torch.tensor([[1, 7], [8, 3]])
    basis = torch.linalg.qr(torch.randn(model.cfg.d_model, 2))[0]
    direction = torch.randn(model.cfg.d_model)
    kinds = [
        steer("blocks.1.hook_resid_post", direction, 3.0),
        steer("blocks.0.hook_resid_pre", direction, 2.0, positions=slice(start + 3, None, 2)),
        scale("*hook_delta", 0.5, positions=by_example),
        scale("*hook_A_bar", 0.5, positions=start + 6, channels=[0, 3], states=1),
        ablate("*hook_gate", positions=slice(start + 6, start + 8), batch=[1]),
        patch("*hook_C", torch.randn(2, 2, model.cfg.d_state), positions=by_example),
        patch("blocks.1.hook_resid_pre", direction, positions=[start + 2, start + 8], basis=basis),
        patch("*hook_state", torch.randn(2, 2, model.cfg.d_inner, model.cfg.d_state), positions=by_example),
        patch("*hook_state", 0.5, positions=start + 7, batch=[0]),
        patch("blocks.0.mixer.hook_x", torch.randn(2, RUN, model.cfg.d_inner)),
    ]
    plain = model.generate(tokens, NEW, state=state, do_sample=False)
    changed = 0
    for intervention in kinds:
        with model.intervene(intervention):
            check_teacher_forced(model, tokens, state)
            changed += not torch.equal(model.generate(tokens, NEW, state=state, do_sample=False), plain)
    assert changed >= 6
    with model.intervene(*kinds[1:]):
        check_teacher_forced(model, tokens, state)
    roles = {"late": start + torch.tensor([6, 8])}
    with model.intervene(ablate("*hook_mixer_out", positions="late"), roles=roles):
        check_teacher_forced(model, tokens, state)


@pytest.mark.parametrize("after", [False, True])
def test_functions_at_absolute_positions(after: bool) -> None:
    """Functions see the position of the whole text in `hook.position`, each just once."""
    model = MODELS["mamba"]
    start = READ if after else 0
    state = model.read(random_tokens(2, READ, seed=1)) if after else None
    tokens = random_tokens(2, PROMPT)
    seen: dict[str, list[int]] = {"state": [], "x": []}

    def watch(short: str) -> Callable:
        def function(tensor: torch.Tensor, hook: Any) -> torch.Tensor:
            seen[short].append(hook.position)
            return tensor + 0.1 * hook.position

        return function

    wanted = [start + p for p in (8, 2, 6)]
    hooks = [
        ("blocks.0.mixer.hook_state", watch("state"), wanted),
        ("blocks.1.mixer.hook_x", watch("x"), slice(start + 4, None)),
    ]
    with model.hooks(hooks):
        generated = model.generate(tokens, NEW, state=state, do_sample=False)
        assert seen == {"state": sorted(wanted), "x": list(range(start + 4, start + RUN))}
        with torch.no_grad():
            assert torch.equal(greedy(model(generated[:, :-1], state=state)), generated[:, PROMPT:])


def test_negative_positions_count_from_the_end_of_the_prompt() -> None:
    model, tokens = MODELS["mamba"], random_tokens(2, PROMPT)
    state = model.read(random_tokens(2, READ, seed=1))
    for before in (None, state):
        start = READ if before else 0
        pairs = [(-1, start + PROMPT - 1), ([-5, -2], [start, start + 3]), (slice(-2, None), slice(start + 3, None))]
        for negative, absolute in pairs:
            runs = []
            for positions in (negative, absolute):
                with model.intervene(steer("*hook_x", torch.ones(1), 2.0, positions=positions)):
                    runs.append(model.generate_with_cache(tokens, "*hook_resid_post", max_new_tokens=3, state=before))
            assert torch.equal(runs[0][0], runs[1][0])
            for name in runs[0][1]:
                assert torch.equal(runs[0][1][name], runs[1][1][name])


@given(apply_to=st.sampled_from(["prompt", "new", "both"]), seed=seeds, family=families)
def test_apply_to(apply_to: str, seed: int, family: str) -> None:
    """What acts on one part equals what acts on all, restricted to the positions of that part."""
    model, tokens = MODELS[family], random_tokens(2, PROMPT, seed)
    part = {"prompt": slice(0, PROMPT), "new": slice(PROMPT, RUN), "both": slice(None)}[apply_to]
    direction = torch.randn(model.cfg.d_model, generator=torch.Generator().manual_seed(seed))
    with model.intervene(steer("blocks.0.hook_resid_post", direction, 4.0)):
        got = model.generate(tokens, NEW, apply_to=apply_to, do_sample=False)
    with model.intervene(steer("blocks.0.hook_resid_post", direction, 4.0, positions=part)), torch.no_grad():
        assert torch.equal(greedy(model(got[:, :-1])), got[:, PROMPT:])
    calls: list[int] = []
    with model.hooks([("hook_embed", lambda tensor, hook: calls.append(tensor.shape[1]))]):
        model.generate(tokens, NEW, apply_to=apply_to, do_sample=False)
    assert calls == {"prompt": [PROMPT], "new": [1] * (NEW - 1), "both": [PROMPT] + [1] * (NEW - 1)}[apply_to]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("positions", [None, [8, 0, 6, 4], slice(5, None)], ids=str)
@torch.no_grad()
def test_recording_equals_run_with_cache(family: str, after: bool, positions: Any) -> None:
    model, tokens = MODELS[family], random_tokens(2, PROMPT)
    state = model.read(random_tokens(2, READ, seed=1)) if after else None
    if after and positions is not None:
        shift = READ
        positions = slice(5 + shift, None) if isinstance(positions, slice) else [p + shift for p in positions]
    with model.intervene(scale("blocks.0.mixer.hook_B", 2.0)):
        generated, cache = model.generate_with_cache(
            tokens, "*", max_new_tokens=NEW, positions=positions, state=state, do_sample=False
        )
        expected = model.run_with_cache(generated[:, :-1], "*", positions=positions, state=state)[1]
    assert torch.equal(cache.tokens, generated[:, :-1])
    assert list(cache) == model.hook_names()
    assert cache.positions == expected.positions
    assert cache.start == expected.start == (READ if after else 0)
    for name in expected:
        torch.testing.assert_close(cache[name], expected[name], atol=1e-4, rtol=1e-4)
    if positions is None:
        torch.testing.assert_close(cache.at([-1])["x", 0], expected["x", 0][:, -1:], atol=1e-4, rtol=1e-4)


def test_a_recorded_generation_can_be_put_into_another_one() -> None:
    model, tokens = MODELS["mamba"], random_tokens(2, PROMPT)
    with model.intervene(steer("blocks.0.hook_resid_pre", torch.randn(model.cfg.d_model), 5.0)):
        generated, cache = model.generate_with_cache(tokens, "*hook_resid_post", max_new_tokens=NEW)
    others = random_tokens(2, PROMPT, seed=3)
    with model.intervene(freeze("blocks.1.hook_resid_post", cache)):
        assert torch.equal(model.generate(others, NEW, do_sample=False)[:, PROMPT:], generated[:, PROMPT:])


def test_a_generation_that_ends_early() -> None:
    model, tokens = MODELS["mamba"], random_tokens(1, PROMPT)
    plain = model.generate(tokens, NEW, do_sample=False)
    end = int(plain[0, PROMPT + 2])
    stops = plain[0].tolist().index(end, PROMPT)
    generated, cache = model.generate_with_cache(
        tokens, "*hook_x", max_new_tokens=NEW, positions=[PROMPT + 4, 1], do_sample=False, eos_token_id=end
    )
    assert generated.shape[1] == stops + 1
    assert cache.positions == (1,)
    with (
        model.intervene(ablate("*hook_state", positions=PROMPT + 4)),
        pytest.warns(UserWarning, match=rf"ended before position {stops}: hooks at positions \[{PROMPT + 4}\]"),
    ):
        model.generate(tokens, NEW, do_sample=False, eos_token_id=end)


def test_sampling_is_seeded_and_leaves_torch_alone() -> None:
    model, tokens = MODELS["mamba"], random_tokens(3, PROMPT)
    options: dict[str, Any] = {"do_sample": True, "temperature": 2.0, "top_k": 15, "top_p": 0.95}
    torch.manual_seed(5)
    first = model.generate(tokens, 12, seed=1, **options)
    drawn = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(3))
    assert torch.equal(model.generate(tokens, 12, seed=1, **options), first)
    assert not torch.equal(model.generate(tokens, 12, seed=2, **options), first)
    assert torch.equal(
        model.generate(tokens, 12, seed=1, do_sample=True, top_k=1), model.generate(tokens, 12, do_sample=False)
    )
    several = model.generate(tokens, 12, seed=1, num_return_sequences=2, **options)
    assert several.shape == (6, PROMPT + 12)


@pytest.mark.parametrize("chunk", [1, 3, 100])
@torch.no_grad()
def test_hooks_act_in_read_as_in_one_run(chunk: int) -> None:
    model, tokens = MODELS["mamba"], random_tokens(2, 9)
    value = torch.randn(2, 2, model.cfg.d_inner, model.cfg.d_state)
    interventions = [
        patch("blocks.0.mixer.hook_state", value, positions=[7, 2]),
        steer("blocks.0.hook_resid_post", torch.randn(model.cfg.d_model), positions=slice(3, -1)),
        scale("*hook_delta", 0.3, positions=-2),
    ]
    with model.intervene(*interventions):
        expected = model.run_with_cache(tokens, "*hook_state")[1].stack("*hook_state")[:, :, -1]
        torch.testing.assert_close(model.read(tokens, chunk=chunk).ssm, expected, atol=1e-4, rtol=1e-4)
    first = model.read(tokens[:, :4])
    with model.intervene(scale("*hook_delta", 0.3, positions=[5, 8])):
        expected = model.read(tokens).ssm
        torch.testing.assert_close(model.read(tokens[:, 4:], state=first, chunk=chunk).ssm, expected)


def test_positions_of_a_text_whose_length_is_not_known(words_model: HookedMamba) -> None:
    texts = ["the cat sat ", "on the mat"]
    with words_model.intervene(ablate("*hook_x", positions=4)):
        expected = words_model.read("".join(texts)).ssm
        assert torch.equal(words_model.read(iter(texts)).ssm, expected)
    assert not torch.equal(words_model.read(iter(texts)).ssm, expected)
    with words_model.intervene(ablate("*hook_x", positions=6)), pytest.raises(ValueError, match="position 6 is never"):
        words_model.read(iter(texts))
    with words_model.intervene(ablate("*hook_x", positions=-1)), pytest.raises(ValueError, match="not known yet"):
        words_model.read(iter(texts))


def test_texts_of_different_length(words_model: HookedMamba) -> None:
    texts = ["the cat sat on the mat", "John sat"]
    with words_model.intervene(scale("*hook_delta", 0.5)):
        alone = [words_model.generate(text, 5, do_sample=False) for text in texts]
        assert words_model.generate(texts, 5, do_sample=False) == alone
    refused = pytest.raises(ValueError, match="generate from them one by one")
    with words_model.intervene(scale("*hook_delta", 0.5, positions=1)), refused:
        words_model.generate(texts, 5)
    with refused:
        words_model.generate_with_cache(texts, "*hook_x", positions=[1])
    assert words_model.generate_with_cache(texts, "*hook_x", max_new_tokens=3)[1]["x", 0].shape[1] == 8


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize(
    ("positions", "options", "message"),
    [
        (10, {}, r"position 10 is never run .*the last one is not.*hooks act at positions 0 to 9"),
        (4, {"apply_to": "new"}, r"position 4 is not where apply_to='new' lets hooks act; .* 5 to 9"),
        ([2, 5], {"apply_to": "prompt"}, r"position 5 is not where apply_to='prompt'"),
        (-6, {}, "position -1 lies in what the state"),
        (slice(5, 9), {"apply_to": "prompt"}, r"selects none of the positions 0 to 4"),
        (None, {"apply_to": "middle"}, "apply_to must be"),
        (None, {"apply_to": "new", "max_new_tokens": 1}, "cannot take effect: no position is run"),
        (None, {"apply_to": "new", "use_cache": False}, "use apply_to='both'"),
        (None, {"prompt_lookup_num_tokens": 3}, "hooks cannot follow"),
        (None, {"temperature": 2.0}, "temperature cannot take effect without do_sample=True"),
        (None, {"seed": 1, "top_p": 0.5}, "top_p, seed cannot take effect without do_sample=True"),
        (None, {"max_new_tokens": 0}, "at least 1"),
    ],
)
def test_bad_arguments(positions: Any, options: dict[str, Any], message: str) -> None:
    model = MODELS["mamba"]
    with model.intervene(scale("*hook_x", 0.5, positions=positions)), pytest.raises(ValueError, match=message):
        model.generate(random_tokens(2, PROMPT), **({"max_new_tokens": NEW} | options))
    assert all(point.window is None and not point.functions for point in model.hook_points.values())


@pytest.mark.usefixtures("as_users_run_it")
def test_more_bad_arguments() -> None:
    model, tokens = MODELS["mamba"], random_tokens(2, PROMPT)
    state = model.read(tokens)
    with (
        model.intervene(ablate("*hook_state", positions=3)),
        pytest.raises(ValueError, match="position 3 lies in what the state has read already"),
    ):
        model.generate(tokens, NEW, state=state)
    with pytest.raises(ValueError, match="no hooks or interventions are attached"):
        model.generate(tokens, NEW, apply_to="new")
    for options, message in (
        ({"num_beams": 2}, "record with num_beams=1"),
        ({"use_cache": False}, "record with the cache"),
        ({"return_dict_in_generate": True}, "leave return_dict_in_generate out"),
        ({"positions": [11]}, "position 11 is never run"),
    ):
        with pytest.raises(ValueError, match=message):
            model.generate_with_cache(tokens, "*hook_x", max_new_tokens=NEW, **options)
    short = patch("*hook_x", torch.randn(2, PROMPT, model.cfg.d_inner))
    with model.intervene(short), pytest.raises(ValueError, match=r"shape \[2, 5, 16\] does not fit"):
        model.generate(tokens, NEW)
    with model.intervene(knockout(sources=1)), pytest.raises(ValueError, match="pass use_cache=False"):
        model.generate(tokens, NEW)
    with model.intervene(knockout(sources=1)), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert model.generate(tokens, NEW, apply_to="prompt", do_sample=False).shape == (2, PROMPT + NEW)
    assert all(not p.functions and not p.recorders and p.window is None for p in model.hook_points.values())


@torch.no_grad()
def test_without_a_cache_positions_are_those_of_the_text_too() -> None:
    model, tokens = MODELS["mamba"], random_tokens(2, PROMPT)
    steered = [steer("*hook_x", torch.ones(1), 2.0, positions=[3, 7]), ablate("*hook_state", positions=[6])]
    with model.intervene(*steered):
        got = model.generate(tokens, NEW, use_cache=False, do_sample=False)
        assert torch.equal(got, model.generate(tokens, NEW, do_sample=False))


@torch.no_grad()
def test_positions_of_a_run_after_a_state_count_on() -> None:
    """In `forward` and `run_with_cache` as in `generate`."""
    model, tokens = MODELS["mamba"], random_tokens(2, 9)
    state = model.read(tokens[:, :READ])
    with model.intervene(scale("*hook_x", 0.2, positions=[READ + 1, -1])):
        expected = model(tokens)[:, READ:]
        torch.testing.assert_close(model(tokens[:, READ:], state=state), expected, atol=1e-4, rtol=1e-4)
    cache = model.run_with_cache(tokens[:, READ:], "*hook_x", positions=[-1, READ], state=state)[1]
    assert (cache.positions, cache.start) == ((8, READ), READ)
    whole = model.run_with_cache(tokens, "*hook_x", positions=[8, READ])[1]
    torch.testing.assert_close(cache["x", 1], whole["x", 1], atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="position 2 lies in what the state has read"):
        model.run_with_cache(tokens[:, READ:], "*hook_x", positions=[2], state=state)
