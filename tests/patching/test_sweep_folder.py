"""A sweep with out=: finished parts are kept, an interrupted sweep goes on, another sweep is refused."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ssminterp import HookedMamba, steer
from ssminterp.patching import patch_sweep, resume
from ssminterp.patching.storage import Results
from tests.patching.sweep_cases import last_logit, metric_at
from tests.tiny_models import hooked, random_tokens

ENGINES = ["resume", "naive"]


@pytest.fixture(scope="module")
def model() -> HookedMamba:
    return hooked()


def sweep(model: HookedMamba, out: Path | None, **options: Any) -> Any:
    call: dict[str, Any] = {"hooks": ["x", "state"], "metric": last_logit, "reduce": None, "progress": False} | options
    return patch_sweep(model, random_tokens(3, 5, seed=1), random_tokens(3, 5, seed=2), out=out, **call)


class Interrupted(Results):
    """Results whose owner presses Ctrl-C after two parts."""

    def put(self, *arguments: Any) -> None:
        if self._n_parts == 2:
            raise KeyboardInterrupt
        super().put(*arguments)


@pytest.mark.parametrize("engine", ENGINES)
def test_an_interrupted_sweep_goes_on_where_it_stopped(
    model: HookedMamba, tmp_path: Path, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "new" / "sweep"
    whole = sweep(model, None, engine=engine)
    monkeypatch.setattr("ssminterp.patching.sweep.Results", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        sweep(model, out, engine=engine)
    monkeypatch.undo()
    finished = {path: path.stat().st_mtime_ns for path in out.glob("part-*")}
    assert len(finished) == 2
    np.testing.assert_allclose(sweep(model, out, engine=engine).values, whole.values, atol=1e-5)
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    n_parts = len(list(out.iterdir()))
    np.testing.assert_allclose(sweep(model, out, engine=engine).values, whole.values, atol=1e-5)
    assert len(list(out.iterdir())) == n_parts
    assert not [path for path in out.iterdir() if path.name.startswith(".")]


def test_finished_cells_are_not_run_again(model: HookedMamba, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = {"early": metric_at([2, 2, 2]), "late": metric_at([4, 3, 4])}
    first = sweep(model, tmp_path, metric=metrics)

    def fails(*arguments: object) -> None:
        raise AssertionError("there is nothing left to run")

    monkeypatch.setattr(resume, "run_rows", fails)
    second = sweep(model, tmp_path, metric=metrics, max_batch=3)
    for name in metrics:
        np.testing.assert_array_equal(first[name].values, second[name].values)


@pytest.mark.parametrize(
    ("options", "differs"),
    [
        ({"hooks": ["state", "x"]}, "hooks"),
        ({"layers": [0]}, "layers"),
        ({"positions": [1, 2]}, "columns"),
        ({"positions": {"S": torch.tensor([1, 2, 3])}}, "columns"),
        ({"direction": "corrupted_to_clean"}, "direction"),
        ({"intervention": "zero"}, "intervention"),
        ({"channels": {"one": [1]}}, "selections"),
        ({"metric": lambda logits: logits[:, 0, 0]}, "baselines"),
    ],
)
def test_a_folder_of_another_sweep_is_refused_before_any_work(
    model: HookedMamba, tmp_path: Path, options: dict[str, Any], differs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep(model, tmp_path)
    monkeypatch.setattr(resume, "run_rows", None)
    with pytest.raises(ValueError, match=rf"holds another sweep: .*{differs}"):
        sweep(model, tmp_path, **options)


def test_other_weights_are_another_sweep(tmp_path: Path) -> None:
    sweep(hooked(seed=0), tmp_path)
    with pytest.raises(ValueError, match="baselines differ"):
        sweep(hooked(seed=1), tmp_path)


def test_folders_with_other_files_and_broken_parts_are_named(model: HookedMamba, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds other files"):
        sweep(model, other)
    with pytest.raises(ValueError, match="is a file"):
        sweep(model, other / "thesis.txt")
    assert [path.name for path in other.iterdir()] == ["thesis.txt"]
    out = tmp_path / "out"
    sweep(model, out)
    part = sorted(out.glob("part-*"))[1]
    part.write_bytes(part.read_bytes()[:50])
    with pytest.raises(ValueError, match=rf"{part.name} cannot be read"):
        sweep(model, out)
    part.unlink()
    np.testing.assert_allclose(sweep(model, out).values, sweep(model, None).values, atol=1e-5)
    (out / "sweep.json").write_text("{")
    with pytest.raises(ValueError, match=r"sweep\.json cannot be read"):
        sweep(model, out)


@pytest.mark.parametrize("engine", ENGINES)
def test_an_error_in_one_part_loses_nothing_else(model: HookedMamba, tmp_path: Path, engine: str) -> None:
    broken = True

    def sometimes(logits: torch.Tensor) -> torch.Tensor:
        values = logits[:, -1, 3]
        changed = (values - base).abs().max() > 1e-6
        return values * float("nan") if broken and changed and next(calls) == 7 else values

    base = model(random_tokens(3, 5, seed=2))[:, -1, 3].detach()
    calls = itertools.count(1)
    with pytest.raises(
        RuntimeError, match=r"parts of the sweep failed .* is NaN .* runs only those that failed"
    ) as error:
        sweep(model, tmp_path, metric=sometimes, engine=engine)
    assert isinstance(error.value.__cause__, ValueError)
    finished = {path: path.stat().st_mtime_ns for path in tmp_path.glob("part-*")}
    assert finished
    broken = False
    np.testing.assert_allclose(
        sweep(model, tmp_path, metric=sometimes, engine=engine).values,
        sweep(model, None, metric=sometimes, engine=engine).values,
        atol=1e-5,
    )
    assert {path: path.stat().st_mtime_ns for path in finished} == finished


def test_an_intervention_with_other_values_is_another_sweep(model: HookedMamba, tmp_path: Path) -> None:
    vectors = torch.randn(2, 1, 1, 1)
    sweep(model, tmp_path, intervention=steer("*", vectors[0]))
    with pytest.raises(ValueError, match="holds another sweep: intervention_values"):
        sweep(model, tmp_path, intervention=steer("*", vectors[1]))
