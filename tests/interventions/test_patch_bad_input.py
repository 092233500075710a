"""Patches that do not fit: a ValueError that names both sides, and a model that is as it was."""

from typing import Any

import pytest
import torch
from tiny_models import hooked, random_tokens

from ssminterp import ablate, patch

pytestmark = pytest.mark.usefixtures("as_users_run_it")

MODEL = hooked()
TOKENS = random_tokens(2, 7)
STATE, DELTA = "blocks.1.mixer.hook_state", "blocks.1.mixer.hook_delta"

# (arguments of patch, what the message must say); found out before any run
BEFORE_ANY_RUN: list[tuple[tuple[Any, ...], str]] = [
    ((DELTA, torch.zeros(2, 15), 3), r"\[2, 15\] does not fit blocks.1.mixer.hook_delta: .*\[batch, d_inner=16\]"),
    ((DELTA, torch.zeros(2, 7, 15)), r"\[2, 7, 15\] does not fit .*\[batch, pos, d_inner=16\]"),
    ((DELTA, torch.zeros(2, 1, 1, 16), 3), r"\[2, 1, 1, 16\] does not fit"),
    ((DELTA, torch.zeros(2, 3, 16), [1, 2]), r"\[2, 3, 16\] does not fit .*\[batch, pos=2, d_inner=16\]"),
    ((STATE, torch.zeros(2, 4, 16), 3), r"\[2, 4, 16\] does not fit .*\[batch, d_inner=16, d_state=4\]"),
    ((STATE, torch.zeros(2, 3, 16, 4), [1, 2]), r"\[batch, pos=2, d_inner=16, d_state=4\]"),
    ((STATE, torch.zeros(3, 1, 16, 4), torch.tensor([[1], [2]])), r"\[batch=2, pos=1, d_inner=16, d_state=4\]"),
    ((STATE, 0.0), "an intervention on blocks.1.mixer.hook_state needs positions, an int or a list"),
    ((STATE, 0.0, slice(1, 3)), "needs positions, an int or a list"),
    ((DELTA, 0.0, []), "positions is empty"),
    ((STATE, 0.0, torch.zeros(2, 0, dtype=torch.long)), "positions is empty"),
    ((DELTA, 0.0, [1, 2, 1]), r"positions=\[1, 2, 1\] names a position twice"),
    ((STATE, 0.0, torch.tensor([[1, 2], [3, 3]])), r"positions=\[3, 3\] names a position twice"),
    ((DELTA, 0.0, [1.5]), r"positions must be an integer or a flat list of integers, got \[1.5\]"),
    ((DELTA, 0.0, 1.0), "positions must be an integer"),
    ((DELTA, 0.0, torch.tensor([True, False])), "positions must be an integer"),
    ((DELTA, 0.0, "S2"), r"there is no role 'S2'; none were given"),
    ((DELTA, 0.0, torch.zeros(1, 1, 1, dtype=torch.long)), "positions must be an integer"),
    (("blocks.3.mixer.hook_delta", 0.0, 1), "Nearest names: .*hook_delta"),
    (("*hook_stat", 0.0, 1), r"no hook is called '\*hook_stat'"),
]

# found out in the run, which alone knows the batch and the length
IN_THE_RUN: list[tuple[tuple[Any, ...], str]] = [
    ((DELTA, torch.zeros(3, 16), 3), r"\[3, 16\] does not fit blocks.1.mixer.hook_delta.* \[2, 16\]"),
    ((DELTA, torch.zeros(2, 6, 16)), r"\[2, 6, 16\] does not fit .*\[2, 7, 16\]"),
    ((DELTA, torch.zeros(2, 2, 16), slice(0, 3)), r"\[2, 2, 16\] does not fit .*\[2, 3, 16\]"),
    ((DELTA, 0.0, torch.tensor([[1], [2], [3]])), "positions name 3 examples, but .* batch of 2"),
    ((DELTA, 0.0, 7), r"positions \[7\] are out of range: the sequence has 7 positions \(0 to 6\)"),
    ((DELTA, 0.0, [0, -8]), r"positions \[-8\] are out of range"),
    ((DELTA, 0.0, [6, -1]), r"positions=\[6, 6\] names a position twice"),
    ((DELTA, 0.0, slice(3, 3)), "selects none of the 7 positions"),
    ((DELTA, 0.0, torch.tensor([[1], [9]])), r"positions \[9\] are out of range"),
    ((STATE, torch.zeros(3, 16, 4), 3), r"\[3, 16, 4\] does not fit blocks.1.mixer.hook_state.*\[2, 16, 4\]"),
    ((STATE, 0.0, [2, 7]), r"positions \[7\] are out of range"),
    ((STATE, 0.0, torch.tensor([[1], [9]])), r"positions \[9\] are out of range"),
    ((STATE, 0.0, [6, -1]), "names one position of this run twice.* it is 6"),
    ((STATE, 0.0, torch.tensor([[2, 5], [0, -7]])), "names one position of this run twice.* it is 0"),
    ((STATE, 0.0, torch.tensor([[1], [2], [3]])), r"\[3, 1, 1\] does not fit blocks.1.mixer.hook_state"),
]


def ids(cases: list[tuple[tuple[Any, ...], str]]) -> list[str]:
    return [f"{i}-{message[:30]}" for i, (_, message) in enumerate(cases)]


@pytest.mark.parametrize(("arguments", "message"), BEFORE_ANY_RUN, ids=ids(BEFORE_ANY_RUN))
def test_refused_before_any_run(arguments: tuple[Any, ...], message: str) -> None:
    plain = MODEL(TOKENS)
    with pytest.raises(ValueError, match=message), MODEL.intervene(patch("hook_embed", 0.0), patch(*arguments)):
        pytest.fail("the context was entered")
    assert torch.equal(MODEL(TOKENS), plain)


@pytest.mark.parametrize(("arguments", "message"), IN_THE_RUN, ids=ids(IN_THE_RUN))
def test_refused_in_the_run(arguments: tuple[Any, ...], message: str) -> None:
    plain = MODEL(TOKENS)
    with pytest.raises(ValueError, match=message), MODEL.intervene(patch(*arguments)):
        MODEL(TOKENS)
    assert torch.equal(MODEL(TOKENS), plain)


def test_patches_of_different_batches_at_one_state() -> None:
    interventions = (ablate(STATE, positions=1), patch(STATE, torch.zeros(3, 16, 4), positions=4))
    with pytest.raises(ValueError, match=r"\[3, 16, 4\] does not fit"), MODEL.intervene(*interventions):
        MODEL(TOKENS)


def test_positions_from_both_ends_may_meet_in_different_examples() -> None:
    value = torch.randn(2, 16, 4, generator=torch.Generator().manual_seed(0))
    with MODEL.intervene(patch(STATE, value[:, None], torch.tensor([[6], [-1]]))):
        by_example = MODEL(TOKENS)
    with MODEL.intervene(patch(STATE, value, -1)):
        torch.testing.assert_close(by_example, MODEL(TOKENS))


def test_a_position_named_twice_is_refused_also_where_an_edit_is_not_affine() -> None:
    basis = torch.linalg.qr(torch.randn(16, 2, generator=torch.Generator().manual_seed(0)))[0]
    said = "names one position of this run twice"
    turned = patch(STATE, torch.zeros(1, 2, 16, 4), [-1, 6], basis=basis)
    with pytest.raises(ValueError, match=said), MODEL.intervene(turned):
        MODEL(TOKENS)
    with pytest.raises(ValueError, match=said), MODEL.intervene(ablate(STATE, positions=[3, -4])):
        MODEL.generate(TOKENS, 2)
