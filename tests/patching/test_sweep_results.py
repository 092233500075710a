"""What a sweep returns: labels, baselines and provenance that survive being written; and what it refuses."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr

from ssminterp import HookedMamba
from ssminterp.checkpoints.vocabulary import build_tokenizer
from ssminterp.patching import patch_sweep, strongest
from tests.patching.sweep_cases import last_logit, metric_at
from tests.tiny_models import hooked, random_tokens, tiny_model


@pytest.fixture(scope="module")
def model() -> HookedMamba:
    return hooked()


@pytest.fixture
def pair() -> tuple[torch.Tensor, torch.Tensor]:
    return random_tokens(3, 7, seed=1), random_tokens(3, 7, seed=2)


@pytest.mark.parametrize("engine", ["resume", "naive"])
def test_attributes_say_where_the_numbers_come_from_and_survive_netcdf(tmp_path: Path, engine: Any) -> None:
    tokenizer = build_tokenizer()
    model = HookedMamba.from_hf(tiny_model(vocab_size=len(tokenizer), num_hidden_layers=2), tokenizer)
    clean, corrupted = "Then Emma gave a gift to", "Then Jacob gave a gift to"
    metric = metric_at([5])
    options = {"engine": engine, "progress": False}
    sweep = patch_sweep(model, clean, corrupted, ["x", "state"], metric, **options)
    expected = {"metric": "difference", "engine": engine, "direction": "clean_to_corrupted", "intervention": "patch"}
    expected |= {"clean_prompts": [clean], "corrupted_prompts": [corrupted], "examples": 1, "dtype": "float32"}
    assert expected.items() <= sweep.attrs.items()
    assert {"model", "revision", "architecture", "device", "torch", "transformers", "ssminterp"} <= set(sweep.attrs)
    assert sweep.attrs["clean"] == pytest.approx(float(metric(model(clean).detach())), abs=1e-5)
    assert sweep["position"].values[1] == "1 Jacob"
    sweep.to_netcdf(tmp_path / "sweep.nc")
    again = xr.load_dataarray(tmp_path / "sweep.nc")
    xr.testing.assert_identical(again.drop_attrs(), sweep.drop_attrs())
    assert again.attrs["corrupted"] == sweep.attrs["corrupted"]
    both = patch_sweep(model, clean, corrupted, "x", {"a": metric, "b": metric}, reduce=None, **options)
    both.to_netcdf(tmp_path / "both.nc")
    xr.testing.assert_identical(xr.load_dataset(tmp_path / "both.nc").drop_attrs(), both.drop_attrs())


def test_several_metrics_are_variables_of_a_dataset(
    model: HookedMamba, pair: tuple[torch.Tensor, torch.Tensor]
) -> None:
    metrics = {"early": metric_at([2, 3, 1]), "last": last_logit}
    both = patch_sweep(model, *pair, "x", metrics, reduce=None, progress=False)
    assert set(both.data_vars) >= {"early", "last", "early_clean", "early_corrupted", "last_clean", "last_corrupted"}
    alone = patch_sweep(model, *pair, "x", last_logit, progress=False)
    np.testing.assert_allclose(both["last"].mean("example"), alone, atol=1e-5)
    assert both["last"].attrs["clean"] == pytest.approx(alone.attrs["clean"])
    assert both["early"].attrs["clean"] != pytest.approx(alone.attrs["clean"])
    np.testing.assert_allclose(both["last_clean"], last_logit(model(pair[0]).detach()), atol=1e-5)


def test_the_two_directions_are_each_other_with_prompts_exchanged(
    model: HookedMamba, pair: tuple[torch.Tensor, torch.Tensor]
) -> None:
    there = patch_sweep(model, *pair, ["x", "state"], last_logit, direction="corrupted_to_clean", progress=False)
    exchanged = patch_sweep(model, pair[1], pair[0], ["x", "state"], last_logit, progress=False)
    np.testing.assert_allclose(there.values, exchanged.values, atol=1e-6)
    assert there.attrs["clean"] == exchanged.attrs["corrupted"]
    np.testing.assert_allclose(strongest(there)["moved"], strongest(exchanged)["moved"], atol=1e-5)


def test_the_groups_of_a_partition_change_everything_together(
    model: HookedMamba, pair: tuple[torch.Tensor, torch.Tensor]
) -> None:
    options = {"positions": [2], "layers": [1], "progress": False}
    whole = patch_sweep(model, *pair, "state", last_logit, **options)
    groups = {"all": range(model.cfg.d_inner), "none of the others": [0]}
    by_group = patch_sweep(model, *pair, "state", last_logit, channels=groups, **options)
    assert by_group.dims == ("hook", "layer", "position", "channel")
    assert float(by_group.sel(channel="all").squeeze() - whole.squeeze()) == pytest.approx(0, abs=1e-5)
    table = strongest(by_group)
    assert list(table.columns) == ["hook", "layer", "position", "channel", "last_logit", "moved"]


@pytest.mark.parametrize("engine", ["resume", "naive"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"direction": "sideways"}, "direction must be 'clean_to_corrupted' or"),
        ({"intervention": "noise"}, "intervention must be 'patch', 'zero', 'mean', a function"),
        ({"intervention": lambda now, other: now[:, :1]}, "must return a tensor of shape"),
        ({"layers": []}, "at least one layer"),
        ({"layers": [1, 1]}, "none twice"),
        ({"hooks": ["x", "x"]}, "more than once"),
        ({"channels": {"a": [0, 99]}}, r"channels\['a'\]: \[99\] are out of range, there are 16"),
        ({"channels": {"a": []}}, r"channels\['a'\]: \[\] selects nothing of 16"),
        ({"channels": {}}, "channels is empty"),
        ({"channels": "all"}, "'each' or a mapping"),
        ({"channels": [[0, 1]]}, r"'each' or a mapping of labels to indices, got \[\[0, 1\]\]"),
        ({"hooks": "B", "channels": "each"}, "needs hooks with an axis d_model or d_inner"),
        ({"hooks": ["x", "resid_pre"], "channels": "each"}, "different axes"),
        ({"states": "each"}, "needs hooks with an axis d_state"),
        ({"metric": {}}, "empty mapping"),
        ({"metric": 3}, "metric must be a function"),
        ({"metric": metric_at([1, 2])}, "2 examples"),
        ({"metric": metric_at([1, 2, 9])}, "reads position"),
        ({"metric": {"a": last_logit, "b": lambda logits: logits.sum()}}, "metric 'b' must return one number"),
        ({"max_batch": 1}, "max_batch must be at least 2"),
        ({"max_bytes": 0}, "max_bytes must be at least 1"),
        ({"clean": torch.full((3, 7), 99)}, "vocabulary"),
    ],
)
@pytest.mark.usefixtures("as_users_run_it")
def test_bad_input_is_refused(
    model: HookedMamba, pair: tuple[torch.Tensor, torch.Tensor], engine: str, arguments: dict[str, Any], message: str
) -> None:
    call = {"clean": pair[0], "corrupted": pair[1], "hooks": "x", "metric": last_logit, "progress": False} | arguments
    with pytest.raises(ValueError, match=message):
        patch_sweep(model, engine=engine, **call)
