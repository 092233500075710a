"""What all analyses share: the runs they take, the arrays they give."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from tiny_models import hooked, hooked_pair, random_tokens
from torch import Tensor

from ssminterp import HookedMamba, ablate
from ssminterp.analysis import (
    attribute_to_channels,
    attribute_to_layers,
    attribute_to_sources,
    conv_contributions,
    flow_contributions,
    half_lives,
    hidden_attention,
    logit_lens,
    patch_taps,
    spectrum,
    state_lens,
    state_shares,
    step_sizes,
    survival,
    token_contributions,
    top_tokens,
)
from ssminterp.checkpoints.vocabulary import build_tokenizer

Analysis = Callable[[HookedMamba, Any], xr.DataArray | xr.Dataset]

ANALYSES: dict[str, Analysis] = {
    "hidden_attention": lambda model, run: hidden_attention(model, run, 1),
    "token_contributions": lambda model, run: token_contributions(model, run, 1, skip=True),
    "step_sizes": step_sizes,
    "half_lives": lambda model, run: half_lives(model, run, 1),
    "survival": lambda model, run: survival(model, run, 1, 0),
    "share_by_norm": lambda model, run: state_shares(model, run, 1),
    "share_by_read_out": lambda model, run: state_shares(model, run, 1, "read_out"),
    "logit_lens": logit_lens,
    "state_lens": lambda model, run: state_lens(model, run, 1),
    "top_tokens": lambda model, run: top_tokens(model, state_lens(model, run, 1)),
    "attribute_to_layers": lambda model, run: attribute_to_layers(model, run, 3, 4),
    "attribute_to_channels": lambda model, run: attribute_to_channels(model, run, 3, 4),
    "attribute_to_sources": lambda model, run: attribute_to_sources(model, run, 3, 4),
    "flow_contributions": lambda model, run: flow_contributions(model, run, 3, 4)["state"],
    "conv_contributions": lambda model, run: conv_contributions(model, run, 1),
    "conv_norms": lambda model, run: conv_contributions(model, run, 1, reduce="norm"),
}


@pytest.fixture(params=ANALYSES)
def analysis(request: pytest.FixtureRequest) -> Analysis:
    return ANALYSES[request.param]


def numbers(result: xr.DataArray | xr.Dataset) -> np.ndarray:
    if isinstance(result, xr.DataArray):
        return result.values
    return result["logit" if "logit" in result else "delta"].values


def test_a_cache_gives_what_the_tokens_give(analysis: Analysis) -> None:
    model, tokens = hooked(), random_tokens(2, 7)
    cache = model.run_with_cache(tokens, lambda name: "state" not in name and "_bar" not in name)[1]
    np.testing.assert_allclose(numbers(analysis(model, cache)), numbers(analysis(model, tokens)), atol=1e-5)


def test_bfloat16_models_are_analysed_in_float32(analysis: Analysis) -> None:
    plain, model = hooked_pair()
    tokens = random_tokens(2, 7)
    half = HookedMamba.from_hf(plain.to(torch.bfloat16), verify=False)
    found, expected = (numbers(analysis(m, tokens)) for m in (half, model))
    assert found.dtype == expected.dtype
    # Shares are quotients of what may be small: their middle is what bfloat16 keeps.
    assert np.nanmedian(np.abs(found - expected)) <= 0.05 * np.nanmax(np.abs(expected))


@pytest.mark.gpu
def test_a_gpu_gives_what_the_cpu_gives(analysis: Analysis) -> None:
    model, tokens = hooked(), random_tokens(2, 7)
    expected = numbers(analysis(model, tokens))
    np.testing.assert_allclose(numbers(analysis(model.to("cuda"), tokens)), expected, rtol=1e-3, atol=1e-4)


def test_results_travel_as_netcdf(analysis: Analysis, tmp_path: Path) -> None:
    tokenizer = build_tokenizer()
    model = hooked(vocab_size=len(tokenizer))
    model.tokenizer = tokenizer
    result = analysis(model, ["Emma gave an apple to", "Shelby had fun"])
    result.to_netcdf(tmp_path / "result.nc")
    read = xr.load_dataset if isinstance(result, xr.Dataset) else xr.load_dataarray
    opened = read(tmp_path / "result.nc")
    xr.testing.assert_identical(opened, result)


def test_every_analysis_says_what_it_was_made_from(analysis: Analysis) -> None:
    model, tokens = hooked(), random_tokens(1, 7)
    result = analysis(model, tokens)
    attrs = result.attrs or result["delta"].attrs
    assert attrs["model"] == model.cfg.model_name
    assert attrs["dtype"] == "float32"
    assert spectrum(model).attrs["model"] == model.cfg.model_name


def test_labels_say_position_and_token_or_that_examples_differ() -> None:
    tokenizer = build_tokenizer()
    model = hooked(vocab_size=len(tokenizer))
    model.tokenizer = tokenizer
    found = token_contributions(model, ["Emma gave an apple to Shelby", "Emma handed an apple to Angela"], 0)
    assert found["source"].values.tolist() == ["0 Emma", "1 ⟨varies⟩", "2 an", "3 apple", "4 to", "5 ⟨varies⟩"]


def test_a_cache_of_another_model_is_refused() -> None:
    model, tokens = hooked(), random_tokens(1, 7)
    cache = model.run_with_cache(tokens)[1]
    cache.model_name = "another"
    with pytest.raises(ValueError, match="the cache was recorded from another, the model is"):
        half_lives(model, cache, 0)


@torch.no_grad()
def test_changes_after_the_scan_are_refused_and_those_before_it_are_followed() -> None:
    model, tokens = hooked(), random_tokens(1, 7)
    for hook in ("hook_mixer_out", "mixer.hook_y", "mixer.hook_gated", "mixer.hook_A_bar"):
        with (
            model.intervene(ablate(f"blocks.1.{hook}")),
            pytest.raises(ValueError, match=f"hook functions change .*{hook}"),
        ):
            attribute_to_sources(model, tokens, 3)
    with model.intervene(ablate("blocks.1.mixer.hook_B", positions=[2])):
        found = token_contributions(model, tokens, 1)
    np.testing.assert_array_equal(found.values[0, :, 2], 0.0)
    assert np.abs(found.values[0, :, 1]).max() > 0


def test_several_texts_and_their_metric_in_a_tap_sweep() -> None:
    tokenizer = build_tokenizer()
    model = hooked(vocab_size=len(tokenizer))
    model.tokenizer = tokenizer

    def answer(logits: Tensor) -> Tensor:
        return logits[:, -1, 30]

    found = patch_taps(model, ["Emma gave", "Shelby gave"], ["Shelby gave", "Emma gave"], answer, 0, progress=False)
    assert found["position"].values.tolist() == ["0 ⟨varies⟩", "1 gave"]
    assert found.name == "answer"
