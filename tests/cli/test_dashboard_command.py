"""`ssminterp dashboard`: what it starts, and what it refuses before it starts anything."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from ssminterp.cli import app
from ssminterp_dashboards import launch


def test_it_serves_the_model_that_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[tuple[str, int]] = []
    monkeypatch.setattr(launch, "launch", lambda model, port: started.append((model, port)) or 0)
    result = CliRunner().invoke(app, ["dashboard", "--model", "nano-mamba", "--port", "8612"])
    assert result.exit_code == 0, result.output
    assert started == [("nano-mamba", 8612)]


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--model", "./nowhere"], "there is no folder"), (["--port", "70000"], "--port"), (["--port", "x"], "--port")],
)
def test_bad_options_are_named(options: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["dashboard", *options])
    assert result.exit_code == 2
    assert message in " ".join(result.output.replace("│", " ").split())


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["dashboard", "--model", str(tmp_path)])
    assert result.exit_code == 2
    assert "no checkpoint" in " ".join(result.output.replace("│", " ").split())
