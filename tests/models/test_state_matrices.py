"""State matrices that are made for all layers at once, as on a GPU."""

from __future__ import annotations

import pytest
import torch
from tiny_models import hooked
from torch import Tensor

from ssminterp import HookedMamba
from ssminterp.models import HookPoint
from ssminterp.models.mixers import state_matrices
from ssminterp.models.mixers.state_matrices import known_state_matrix

TOKENS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> HookedMamba:
    monkeypatch.setattr(state_matrices, "_saves_launches", lambda device: True)
    return hooked()


def known(model: HookedMamba) -> list[Tensor | None]:
    return [known_state_matrix(block.mixer) for block in model.lm.backbone.layers]


@torch.no_grad()
def test_they_are_the_mixers_own_while_a_run_goes_on_and_forgotten_after_it(
    model: HookedMamba, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def look(tensor: Tensor, hook: HookPoint) -> None:
        seen.extend(known(model))

    logits = model.run_with_hooks(TOKENS, [("blocks.0.mixer.hook_x", look)])
    for block, matrix in zip(model.lm.backbone.layers, seen, strict=True):
        assert matrix is not None
        assert torch.equal(matrix, -torch.exp(block.mixer.A_log))
    assert known(model) == [None] * model.cfg.n_layers
    monkeypatch.undo()
    assert torch.equal(model(TOKENS), logits)


@torch.no_grad()
def test_a_run_that_fails_leaves_none(model: HookedMamba) -> None:
    def fail(tensor: Tensor, hook: HookPoint) -> None:
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        model.run_with_hooks(TOKENS, [("blocks.1.mixer.hook_x", fail)])
    assert known(model) == [None] * model.cfg.n_layers


@torch.no_grad()
def test_weights_that_are_changed_between_runs_count(model: HookedMamba) -> None:
    before = model(TOKENS)
    model.lm.backbone.layers[1].mixer.A_log.data += 1
    assert not torch.allclose(model(TOKENS), before)


def test_gradients_of_the_weights_are_what_they_were(model: HookedMamba, monkeypatch: pytest.MonkeyPatch) -> None:
    logs = [block.mixer.A_log for block in model.lm.backbone.layers]
    found = torch.autograd.grad(model(TOKENS).square().sum(), logs)
    monkeypatch.undo()
    for ours, expected in zip(found, torch.autograd.grad(model(TOKENS).square().sum(), logs), strict=True):
        assert expected.abs().max() > 0
        assert torch.equal(ours, expected)


@torch.no_grad()
def test_generation_is_the_same(model: HookedMamba, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = model.generate(TOKENS, 6)
    monkeypatch.undo()
    assert torch.equal(model.generate(TOKENS, 6), ours)
