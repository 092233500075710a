"""The example goes from the map down to coordinates, and finds the state that the name is known to be in."""

import runpy
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "patch_sweep.py"


def test_it_drills_down_into_the_state_that_carries_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    found = runpy.run_path(str(EXAMPLE))
    assert "strongest channels together" in capsys.readouterr().out
    assert (found["layer"], found["role"]) == (2, "S2")
    together = found["by_size"].values
    assert together[0] < 0.1
    assert together[-3:].min() > 0.9, "a third of the channels carry nearly all"
    assert float(found["by_coordinate"].sel(channel="all channels")[0]) > 0.5
    assert (tmp_path / "out" / "patch_sweep" / "index.html").stat().st_size > 10_000
