"""States: parts of them, files of them, and the models that may go on from them."""

import dataclasses
import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES, hooked, random_tokens

from ssminterp import ModelState

MODEL = hooked()
TOKENS, OTHERS = random_tokens(3, 9), random_tokens(3, 9, seed=1)
STATE, OTHER = MODEL.read(TOKENS), MODEL.read(OTHERS)
QUESTION = random_tokens(3, 4, seed=2)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_state_comes_back_bit_by_bit(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = hooked(family).to(dtype)
    state = model.read(TOKENS)
    state.save(tmp_path / "state.safetensors")
    again = model.load_state(tmp_path / "state.safetensors")
    assert again.conv.dtype == dtype
    assert again.ssm.dtype == torch.float32
    assert torch.equal(again.conv, state.conv)
    assert torch.equal(again.ssm, state.ssm)
    for field in ("n_tokens", "model_name", "fingerprint", "history"):
        assert getattr(again, field) == getattr(state, field)
    with torch.no_grad():
        assert torch.equal(model(QUESTION, state=again), model(QUESTION, state=state))
    assert [path.name for path in tmp_path.iterdir()] == ["state.safetensors"]


def test_another_model_is_refused(tmp_path: Path) -> None:
    STATE.save(tmp_path / "state.safetensors")
    twin = hooked(seed=1)
    for refused in (
        lambda: twin.load_state(tmp_path / "state.safetensors"),
        lambda: twin(QUESTION, state=STATE),
        lambda: twin.read(QUESTION, state=STATE),
        lambda: twin.generate(QUESTION, 2, state=STATE),
        lambda: STATE.swap(twin.read(TOKENS)),
    ):
        with pytest.raises(ValueError, match=rf"{STATE.fingerprint}.*{twin.fingerprint()}"):
            refused()
    moved = dataclasses.replace(STATE, fingerprint=twin.fingerprint())
    assert twin(QUESTION, state=moved).isfinite().all()


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    STATE.save(path)
    whole = path.read_bytes()
    for cut in (0, 5, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match="cannot be read as a state"):
            ModelState.load(path)
    path.write_bytes(whole)
    tensors = load_file(path)
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"not one that ModelState\.save wrote"):
        ModelState.load(path)
    described = {"n_tokens": 9, "model_name": "x", "fingerprint": "y", "history": []}
    kind = {"kind": "ssminterp.ModelState"}
    save_file(tensors, path, kind | {key: json.dumps(v) for key, v in (described | {"n_tokens": "9"}).items()})
    with pytest.raises(ValueError, match="description is damaged: n_tokens"):
        ModelState.load(path)
    metadata = kind | {key: json.dumps(v) for key, v in described.items()}
    save_file(tensors | {"conv": tensors["conv"][:1].clone()}, path, metadata)
    with pytest.raises(ValueError, match="is no state: its conv windows"):
        ModelState.load(path)
    save_file({"ssm": tensors["ssm"]}, path, metadata)
    with pytest.raises(ValueError, match="cannot be read as a state"):
        ModelState.load(path)
    with pytest.raises(ValueError, match="cannot be read as a state"):
        ModelState.load(tmp_path / "nowhere.safetensors")
    with pytest.raises(ValueError, match="is a folder"):
        ModelState.load(tmp_path)


@pytest.mark.skipif(os.name != "posix", reason="permissions as Unix has them")
def test_files_are_readable_as_other_files_are(tmp_path: Path) -> None:
    (tmp_path / "other").touch()
    STATE.save(tmp_path / "state")
    assert (tmp_path / "state").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_an_interrupted_save_leaves_the_old_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "state.safetensors"
    STATE.save(path)

    def full(tensors: object, beside: Path, metadata: object) -> None:
        beside.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr("ssminterp.models.state_files.save_file", full)
    with pytest.raises(ValueError, match="cannot be written: No space left"):
        OTHER.save(path)
    assert torch.equal(ModelState.load(path).ssm, STATE.ssm)
    assert [p.name for p in tmp_path.iterdir()] == ["state.safetensors"]


@given(layers=st.sets(st.integers(0, 2), min_size=1), channels=st.sets(st.integers(0, 15), min_size=1))
def test_swapping_takes_what_is_named_and_nothing_else(layers: set[int], channels: set[int]) -> None:
    mixed = STATE.swap(OTHER, layers=sorted(layers), channels=sorted(channels))
    taken = torch.zeros(3, 1, 16, 1, dtype=torch.bool)
    taken[[[layer] for layer in sorted(layers)], 0, sorted(channels)] = True
    assert torch.equal(mixed.ssm, torch.where(taken, OTHER.ssm, STATE.ssm))
    assert torch.equal(mixed.conv, torch.where(taken, OTHER.conv, STATE.conv))
    back = mixed.swap(STATE, layers=sorted(layers), channels=sorted(channels))
    assert torch.equal(back.ssm, STATE.ssm)


@torch.no_grad()
def test_swapping_everything_is_the_other_state() -> None:
    assert torch.equal(MODEL(QUESTION, state=STATE.swap(OTHER)), MODEL(QUESTION, state=OTHER))
    only = STATE.swap(OTHER, parts="ssm")
    assert torch.equal(only.ssm, OTHER.ssm)
    assert torch.equal(only.conv, STATE.conv)


@torch.no_grad()
def test_a_batch_of_one_text_and_examples_of_a_batch() -> None:
    alone = MODEL.read(TOKENS[1:2])
    logits = MODEL(QUESTION, state=alone.expand(3))
    for i in range(3):
        torch.testing.assert_close(logits[i : i + 1], MODEL(QUESTION[i : i + 1], state=alone))
    torch.testing.assert_close(MODEL(QUESTION[:1], state=STATE[1]), MODEL(QUESTION[:1], state=alone), atol=1e-5, rtol=0)
    assert STATE[1:].batch == 2
    assert torch.equal(STATE[[2, 0]].ssm, STATE.ssm[:, [2, 0]])
    assert torch.equal(STATE[-1].conv, STATE[2].conv)


@pytest.mark.usefixtures("as_users_run_it")
def test_bad_arguments() -> None:
    for ask, message in (
        (lambda: STATE.swap(OTHER, layers=[3]), r"layers \[3\] do not exist: the state has 3"),
        (lambda: STATE.swap(OTHER, channels=[-1, 16]), r"channels \[-1, 16\] do not exist"),
        (lambda: STATE.swap(OTHER, parts="state"), "parts must be 'conv', 'ssm' or both"),
        (lambda: STATE.swap(OTHER[0]), "batches of 3 and 1"),
        (lambda: STATE.swap(TOKENS), "a ModelState is needed, got Tensor"),
        (lambda: STATE.expand(4), "only one example can be expanded"),
        (lambda: STATE[0].expand(0), "only one example can be expanded"),
        (lambda: STATE[3], r"no examples \[3\]"),
        (lambda: STATE[3:], "it holds a batch of 3"),
        (lambda: MODEL(QUESTION, state=STATE[0]), r"state\.expand\(3\) repeats it"),
    ):
        with pytest.raises(ValueError, match=message):
            ask()


@pytest.mark.parametrize("family", FAMILIES)
def test_generating_from_a_state_equals_generating_from_the_whole_text(family: str) -> None:
    model = hooked(family)
    state = model.read(TOKENS)
    for options in ({}, {"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}):
        whole = model.generate(torch.cat([TOKENS, QUESTION], 1), 8, do_sample=False, **options)
        assert torch.equal(model.generate(QUESTION, 8, state=state, do_sample=False, **options), whole[:, 9:])
    before = state.ssm.clone()
    model.generate(QUESTION, 3, state=state)
    assert torch.equal(state.ssm, before)
