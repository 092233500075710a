"""Knockouts that cannot be: a ValueError that says why, and a model that is as it was."""

from typing import Any

import pytest
import torch
from tiny_models import hooked, random_tokens

from ssminterp import ablate, knockout

pytestmark = pytest.mark.usefixtures("as_users_run_it")

MODEL, TOKENS = hooked(), random_tokens(3, 9)

BEFORE_ANY_RUN: list[tuple[dict[str, Any], str]] = [
    ({"layers": 3}, r"layers \[3\] do not exist: the model has 3"),
    ({"layers": range(2, 5)}, r"layers \[3, 4\] do not exist"),
    ({"layers": []}, "layers must name at least one layer"),
    ({"layers": [1, 1]}, "at least one layer and none twice"),
    ({"layers": "blocks.1"}, "layers must be an int or a sequence of ints"),
    ({"decay": "none"}, "decay must be 'kept' or 'skipped', got 'none'"),
    ({"sources": 5, "targets": 3}, "source 5 of example 0 lies after every target; the last target is 3"),
    ({"sources": [4, 2], "targets": [1, 5]}, "target 1 of example 0 lies before every source; the first source is 2"),
    ({"sources": torch.tensor([[1], [6]]), "targets": 4}, "source 6 of example 1 lies after every target"),
    ({"sources": "IO", "targets": "S"}, "source 4 of example 1 lies after every target; the last target is 3"),
    ({"sources": ["IO", "who"]}, "there is no role 'who'; roles are IO, S"),
    ({"sources": "who", "roles": None}, "there is no role 'who'; none were given"),
    ({"sources": []}, "positions is empty"),
    ({"sources": [1.5]}, "positions must be an integer"),
    ({"channels": [16]}, r"channels of blocks.0.mixer.hook_state: \[16\] are out of range, there are 16"),
    ({"states": []}, "selects nothing of 4"),
]
IN_THE_RUN: list[tuple[dict[str, Any], str]] = [
    ({"sources": 9}, r"positions \[9\] are out of range: the sequence has 9 positions"),
    ({"sources": -1, "targets": 3}, "source 8 of example 0 lies after every target"),
    ({"sources": slice(5, None), "targets": 3}, "source 5 of example 0 lies after every target"),
    ({"sources": -1}, "no position after the last source that could be a target"),
    ({"sources": torch.tensor([[1], [2]])}, "positions name 2 examples, but .* batch of 3"),
    ({"sources": 1, "batch": [3]}, r"batch: \[3\] are out of range, there are 3"),
]


@pytest.mark.parametrize(("options", "message"), BEFORE_ANY_RUN)
def test_refused_before_any_run(options: dict[str, Any], message: str) -> None:
    roles = {"IO": torch.tensor([1, 4, 2]), "S": torch.tensor([2, 3, 4])}
    options = {"roles": roles} | options
    roles = options.pop("roles")
    with (
        pytest.raises(ValueError, match=message),
        MODEL.intervene(ablate("hook_embed"), knockout(**options), roles=roles),
    ):
        pytest.fail("the context was entered")
    assert not any(point.functions for point in MODEL.hook_points.values())


@pytest.mark.parametrize(("options", "message"), IN_THE_RUN)
def test_refused_in_the_run(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message), MODEL.intervene(knockout(**options)):
        MODEL(TOKENS)
    assert not any(point.functions for point in MODEL.hook_points.values())
    assert all(layer.mixer.hook_y.reads is None for layer in MODEL.blocks)
