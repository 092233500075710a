"""The command line: the study runs, writes only where it was told, and says what is wrong."""

from pathlib import Path

import pytest
from typer.testing import CliRunner
from xarray import load_dataarray

from ssminterp.cli import app


def test_ioi_writes_maps_numbers_and_a_page(tmp_path: Path) -> None:
    out = tmp_path / "ioi"
    options = ["ioi", "--model", "nano-mamba", "--n", "6", "--hooks", "state,x", "--out", str(out)]
    result = CliRunner().invoke(app, options)
    assert result.exit_code == 0, result.output
    assert "Strongest site of each hook by role" in result.output
    assert {p.name for p in tmp_path.iterdir()} == {"ioi"}
    pages = {f"{hook}_by_{kind}.html" for hook in ("state", "x") for kind in ("role", "token")}
    numbers = {"by_role.nc", "by_token.nc"}
    assert {p.name for p in out.iterdir()} == pages | numbers | {"index.html", "plotly.min.js"}
    sweep = load_dataarray(out / "by_role.nc")
    assert set(sweep["hook"].values) == {"state", "x"}
    assert {"IO", "S1", "S2", "end"} <= set(sweep["position"].values)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "./nowhere"], "there is no folder"),
        (["--model", "nano-mamba", "--hooks", "stat"], "short name"),
        (["--dtype", "half"], "dtype must be one of"),
        (["--revision", "v2"], "revision='v2' is for names on the hub"),
        (["--positions", "everywhere"], "--positions must be"),
        (["--n", "0"], "--n"),
    ],
)
def test_bad_options_are_named(options: list[str], message: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["ioi", "--out", str(tmp_path / "out"), *options])
    assert result.exit_code == 2
    assert message in " ".join(result.output.replace("│", " ").split())
    assert not (tmp_path / "out").exists()
