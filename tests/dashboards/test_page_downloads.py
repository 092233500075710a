"""What the pages State, Flow, Memory and Learn give to download can be written, and read back as it was."""

import io
from pathlib import Path

import pandas as pd
import pytest
import xarray as xr

from ssminterp import ModelState
from ssminterp.analysis import edge_table
from ssminterp.learn import made_up, recurrence, unrolled
from ssminterp_dashboards import results_flow, results_memory, results_state, views
from ssminterp_dashboards.models import ModelKey

KEY, PROMPT = ModelKey("nano-mamba"), "Shelby gave an apple to"
PAIRS, SWAPPED, QUESTION = "Given red: tiger, iron: lamp.", "Given red: lamp, iron: tiger.", "Now red:"


@pytest.fixture(scope="module")
def downloads() -> dict[str, views.Data]:
    asked = results_flow.question(KEY, PROMPT, "", "")
    edge = results_flow.Edge(0, 4, (1,), "kept")
    return {
        "norms": results_state.norms(KEY, PROMPT),
        "words": results_state.words(KEY, PROMPT, 3, None),
        "state": results_state.state(KEY, PROMPT, 1, 3),
        "compared": results_state.compared(KEY, PROMPT, "Shelby gave a hammer to"),
        "horizons": results_memory.horizons(KEY, PROMPT),
        "survival": results_memory.survival(KEY, PROMPT, 1, 0),
        "sinks": results_memory.sinks(KEY, PROMPT, 0.1).to_xarray(),
        "answered": results_memory.answered(KEY, PAIRS, SWAPPED, QUESTION, (0,)),
        "by layers": results_memory.by_layers(KEY, PAIRS, SWAPPED, QUESTION),
        "edges": edge_table(results_flow.graph(KEY, PROMPT, asked, 0.1)).to_xarray(),
        "cut": results_flow.cut(KEY, PROMPT, edge),
        "by layer": results_flow.by_layer(KEY, PROMPT, asked, edge),
        "steps": recurrence(made_up()),
        "parts": xr.Dataset({"selective": unrolled(made_up()), "fixed": unrolled(made_up(1.0))}),
    }


def test_netcdf_files_hold_what_was_shown(downloads: dict[str, views.Data], tmp_path: Path) -> None:
    for data in downloads.values():
        (tmp_path / "data.nc").write_bytes(views.as_netcdf(data))
        read = xr.load_dataset(tmp_path / "data.nc")
        shown = data.to_dataset(name=str(data.name)) if isinstance(data, xr.DataArray) else data
        xr.testing.assert_equal(read, shown)


def test_tables_have_a_row_for_every_number(downloads: dict[str, views.Data]) -> None:
    for name, data in downloads.items():
        table = pd.read_csv(io.StringIO(views.as_csv(data)))
        arrays = [data] if isinstance(data, xr.DataArray) else list(data.values())
        most = max(array.size for array in arrays)
        assert len(table) == (most if name != "by layers" else sum(array.size for array in arrays)), name
    table = pd.read_csv(io.StringIO(views.as_csv(downloads["by layers"])))
    assert set(table["quantity"]) == {"moved", "baseline"}
    assert {"swap", "run", "value"} <= set(table.columns)


def test_a_cartridge_is_a_file_that_its_model_reads(tmp_path: Path) -> None:
    state = results_memory.cartridge(KEY, PAIRS)
    (tmp_path / "cartridge.safetensors").write_bytes(results_memory.as_file(state))
    read = ModelState.load(tmp_path / "cartridge.safetensors")
    assert (read.ssm == state.ssm).all()
    assert read.fingerprint == state.fingerprint
