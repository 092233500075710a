"""The example runs on a small model, prints its tables and writes its report."""

import runpy
from pathlib import Path

from typer import Typer
from typer.testing import CliRunner

EXAMPLE = Path(__file__).parents[2] / "examples" / "ioi_study.py"


def test_it_prints_the_summary_and_writes_a_report(tmp_path: Path) -> None:
    app = Typer()
    app.command()(runpy.run_path(str(EXAMPLE))["main"])
    result = CliRunner().invoke(app, ["--model", "nano-mamba", "--n", "4", "--out", str(tmp_path / "study")])
    assert result.exit_code == 0, result.output
    for heading in ("Summary", "Where two tools disagree", "Layers removed one after the other", "Strongest paths"):
        assert heading in result.output
    assert {path.name for path in (tmp_path / "study").iterdir()} == {"index.html", "plotly.min.js"}
