"""A fingerprint knows a model's weights wherever they are, and no others."""

import copy
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from tiny_models import FAMILIES, hooked, tiny_model

from ssminterp import HookedMamba


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_the_same_for_the_same_weights(family: str, tmp_path: Path) -> None:
    lm = tiny_model(family)
    expected = HookedMamba.from_hf(copy.deepcopy(lm)).fingerprint()
    lm.save_pretrained(tmp_path / "checkpoint")
    for dtype in (torch.float32, torch.bfloat16):
        model = HookedMamba.from_pretrained(tmp_path / "checkpoint", dtype=dtype, device="cpu")
        assert model.fingerprint() == expected
    offloaded = [tiny_model(family), tiny_model(family)]
    cpu_offload(offloaded[0], execution_device=torch.device("cpu"))
    disk_offload(offloaded[1], str(tmp_path / "weights"), execution_device=torch.device("cpu"))
    assert [HookedMamba.from_hf(lm).fingerprint() for lm in offloaded] == [expected] * 2
    assert hooked("mamba").fingerprint() != hooked("falcon").fingerprint()


def test_it_changes_with_any_weight() -> None:
    model = hooked(hidden_size=32)
    known = {model.fingerprint()}
    for name, weight in model.lm.named_parameters():
        with torch.no_grad():
            weight.view(-1)[weight.numel() // 3] += 1.0
        assert model.fingerprint() not in known, name
        known.add(model.fingerprint())


def test_it_changes_with_the_order_of_weights() -> None:
    model = hooked(hidden_size=32)
    before = model.fingerprint()
    with torch.no_grad():
        weight = model.blocks[0].mixer.in_proj.weight
        weight.copy_(weight.flip(0))
    assert model.fingerprint() != before


def test_another_seed_is_another_model() -> None:
    assert hooked(seed=1).fingerprint() != hooked(seed=2).fingerprint()
