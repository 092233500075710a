"""Windows of knockouts: each cell is a run with that knockout, and the circuit is found where it is."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from planted import NAME_A, NAME_B, PlantedCircuit, answer, planted_circuit
from tiny_models import hooked, random_tokens
from torch import Tensor

from ssminterp import knockout
from ssminterp.analysis import knockout_sweep

MODEL, TOKENS = hooked(num_hidden_layers=5), random_tokens(3, 9)
ROLES = {"IO": torch.tensor([1, 2, 3]), "S": torch.tensor([2, 4, 5]), "end": torch.tensor([6, 8, 7])}


def third(logits: Tensor) -> Tensor:
    return logits[:, -1, 3]


@torch.no_grad()
def test_every_cell_is_the_run_with_that_knockout() -> None:
    options: dict[str, Any] = {"decay": "skipped", "channels": [1, 4, 7, 8], "states": [0, 2]}
    sources = {"IO": "IO", "both": ["IO", "S"], "first": [0], "all": None}
    found = knockout_sweep(
        MODEL,
        TOKENS,
        third,
        sources,
        "end",
        window=2,
        stride=3,
        roles=ROLES,
        reduce=None,
        progress=False,
        **options,
    )
    assert found.dims == ("source", "layer", "example")
    assert found["source"].values.tolist() == list(sources)
    assert (found["layer"].values.tolist(), found["last_layer"].values.tolist()) == ([0, 3], [1, 4])
    for label, at in sources.items():
        for first in (0, 3):
            cut = knockout([first, first + 1], sources=at, targets="end", **options)
            with MODEL.intervene(cut, roles=ROLES):
                expected = third(MODEL(TOKENS))
            np.testing.assert_allclose(found.sel(source=label, layer=first), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found["third_baseline"], third(MODEL(TOKENS)), rtol=1e-6)


def test_several_metrics_and_means_over_examples() -> None:
    metrics = {"third": third, "right": lambda logits: (logits[:, -1].argmax(-1) == 3).float()}
    found = knockout_sweep(MODEL, TOKENS, metrics, ["IO"], roles=ROLES, progress=False)
    apart = knockout_sweep(MODEL, TOKENS, metrics, ["IO"], roles=ROLES, reduce=None, progress=False)
    assert isinstance(found, xr.Dataset)
    assert found["third"].dims == ("source", "layer")
    np.testing.assert_allclose(found["third"], apart["third"].mean("example"), rtol=1e-5)
    assert found["third"].attrs["baseline"] == pytest.approx(float(apart["third_baseline"].mean()))
    one = knockout_sweep(MODEL, TOKENS, third, ["IO"], roles=ROLES, progress=False)
    xr.testing.assert_allclose(one, found["third"])
    assert one.attrs["model"] == found.attrs["model"] == MODEL.cfg.model_name


@pytest.mark.parametrize("place", [{}, {"layer": 2, "channel": 9, "delay": 1}, {"n_layers": 5, "layer": 3}])
def test_it_finds_the_layer_and_the_source_of_a_planted_circuit(place: dict[str, Any]) -> None:
    circuit: PlantedCircuit = planted_circuit(**place)
    tokens = torch.cat([circuit.prompt(name, 2, 10) for name in (NAME_A, NAME_B)])

    def right(logits: Tensor) -> Tensor:
        return (answer(logits) * torch.tensor([1.0, -1.0]) > 0.3).float()

    each = {str(position): position for position in range(9)}
    for window in (1, 2):
        found = knockout_sweep(circuit.model, tokens, right, each, -1, window=window, progress=False)
        assert found.attrs["baseline"] == 1.0
        for source in each:
            hit = (found["layer"] <= circuit.layer) & (circuit.layer <= found["last_layer"])
            expected = np.where(hit & (source == str(2 + circuit.delay)), 0.0, 1.0)
            np.testing.assert_array_equal(found.sel(source=source), expected)


def test_it_travels_as_netcdf(tmp_path: Path) -> None:
    found = knockout_sweep(MODEL, TOKENS, {"third": third}, {"second": 2}, window=3, reduce=None, progress=False)
    found.to_netcdf(tmp_path / "sweep.nc")
    xr.testing.assert_identical(xr.load_dataset(tmp_path / "sweep.nc"), found)


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 6}, "a window of 6 layers does not fit into the model's 5"),
        ({"window": 0}, "window must be a number of layers, 1 or more, got 0"),
        ({"stride": -1}, "stride must be a number of layers"),
        ({"window": 1.5}, "window must be a number of layers"),
        ({"sources": {}}, "sources is empty"),
        ({"sources": "IO"}, "sources must be {label: positions or roles} or a list of roles, got 'IO'"),
        ({"sources": [3]}, r"sources must be .* got \[3\]"),
        ({"sources": ["IO", "who"]}, "there is no role 'who'; roles are IO, S, end"),
        ({"sources": ["IO", "end"], "targets": "S"}, "source 6 of example 0 lies after every target"),
        (
            {"sources": {"late": -1}, "targets": 4},
            "source 8 of example 0 lies after every target; the last target is 4",
        ),
        ({"sources": {"late": 9}}, "out of range"),
        ({"channels": [99]}, "out of range"),
        ({"reduce": "sum"}, "reduce must be 'mean' or None"),
        ({"metric": lambda logits: logits.mean()}, "must return one number per example"),
    ],
)
def test_what_cannot_be_swept_is_refused(options: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"metric": third, "sources": ["IO"], "roles": ROLES, "progress": False} | options
    with pytest.raises(ValueError, match=message):
        knockout_sweep(MODEL, TOKENS, **arguments)


@pytest.mark.gpu
def test_a_gpu_gives_what_the_cpu_gives() -> None:
    options: dict[str, Any] = {"window": 2, "roles": ROLES, "progress": False}
    model = hooked(num_hidden_layers=5)
    expected = knockout_sweep(model, TOKENS, third, ["IO", "S"], "end", **options)
    found = knockout_sweep(model.to("cuda"), TOKENS, third, ["IO", "S"], "end", **options)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)
