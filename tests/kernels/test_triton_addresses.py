"""Places more than 2**31 elements apart: positions far from one another here, a million of them on a GPU."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"

pytest.importorskip("triton")

from scan_cases import ScanCase, outputs_and_gradients, random_scan_inputs, relative_error, with_backend  # noqa: E402
from torch import Tensor  # noqa: E402

from ssminterp_kernels.selective_scan import selective_scan, triton_adjoint_states, triton_scan  # noqa: E402
from ssminterp_kernels.selective_scan.adjoint import adjoint_states  # noqa: E402

APART = 2**28 + 8  # elements between positions
GPU_BYTES = 60 * 2**30

Inputs = dict[str, Any]


def far_apart(values: Tensor, file: Path) -> Tensor:
    """The same values [batch = 1, pos, ...], positions APART from one another in a file that is mostly a hole."""
    size = APART * values.shape[1]
    stored = torch.from_file(str(file), shared=True, size=size, dtype=values.dtype)
    file.unlink()
    return stored.as_strided(values.shape, (size, APART, *values.stride()[2:])).copy_(values.detach()).requires_grad_()


@pytest.fixture
def near_and_far(tmp_path: Path) -> tuple[Inputs, Inputs]:
    near = random_scan_inputs(ScanCase(batch=1, length=11, d_inner=3, d_state=4, edit_positions=(2, 10)))
    far = near | {name: far_apart(near[name], tmp_path / name) for name in ("x", "delta", "z", "B", "C")}
    assert far["x"].stride(1) * 10 > 2**31
    return near, far


@pytest.fixture
def far_states(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Tensor]:
    """All trajectories that scans allocate, positions APART from one another."""
    made: list[Tensor] = []
    names = map(str, itertools.count())
    for module in (triton_scan, triton_adjoint_states):

        def allocate(*sizes: Any, new_states: Any = module.new_states, **options: Any) -> Tensor:
            states = new_states(*sizes, **options)
            if states.dim() < 4:
                return states
            made.append(far_apart(states, tmp_path / next(names)).detach())
            return made[-1]

        monkeypatch.setattr(module, "new_states", allocate)
    return made


def adjoints_of(inputs: Inputs, states: Any, backend: Any = "triton") -> Tensor:
    names = ("delta", "A", "C", "z", "delta_bias", "delta_softplus", "edits")
    given = {name: inputs[name] for name in names if name in inputs}
    return adjoint_states(inputs["x"], **given, states=states, backend=backend)


@pytest.mark.skipif(HAS_GPU, reason="a GPU does not read files")
@pytest.mark.parametrize("states", ["all", (0, 9)])
def test_positions_far_apart_change_nothing(states: Any, near_and_far: tuple[Inputs, Inputs]) -> None:
    near, far = (outputs_and_gradients(with_backend("triton"), each | {"states": states}) for each in near_and_far)
    for name, value in near.items():
        assert torch.equal(far[name], value), name


@pytest.mark.skipif(HAS_GPU, reason="a GPU does not read files")
def test_adjoints_of_positions_far_apart(near_and_far: tuple[Inputs, Inputs]) -> None:
    for states in ("all", (0, 9)):
        near, far = (adjoints_of(each, states) for each in near_and_far)
        assert torch.equal(far, near)


@pytest.mark.skipif(HAS_GPU, reason="a GPU does not write files")
def test_states_far_apart(near_and_far: tuple[Inputs, Inputs], far_states: list[Tensor]) -> None:
    near, _ = near_and_far
    for states in ("all", tuple(range(11))):
        inputs = near | {"states": states}
        with torch.no_grad():
            ours = selective_scan(**inputs, backend="triton").states
            assert ours is far_states[-1]
            assert relative_error(ours, selective_scan(**inputs, backend="torch").states) <= 1e-6
        adjoints = adjoints_of(near, states)
        assert adjoints is far_states[-1]
        assert relative_error(adjoints, adjoints_of(near, states, "torch")) <= 1e-6


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU or torch.cuda.mem_get_info()[0] < GPU_BYTES, reason=f"needs {GPU_BYTES >> 30} GB")
@pytest.mark.parametrize("d_inner", [130, 2050], ids=["of states", "of inputs"])
def test_more_than_a_million_positions(d_inner: int) -> None:
    """Their end by itself, from the state that they leave before it, is the same."""
    length, end = 2**20 + 37, 1037

    def draw(*sizes: int) -> Tensor:
        return torch.randn(*sizes, device="cuda")

    long: Inputs = {"x": draw(1, length, d_inner), "delta": draw(1, length, d_inner), "A": -draw(d_inner, 16).abs()}
    long |= {"B": draw(1, length, 16), "C": draw(1, length, 16), "delta_bias": draw(d_inner), "delta_softplus": True}
    short = long | {name: long[name][:, -end:] for name in ("x", "delta", "B", "C")}
    states: Any = "all" if d_inner == 130 else (length - end - 1, length - 3)
    with torch.no_grad():
        whole = selective_scan(**long, states=states, backend="triton")
        assert max(whole.states.numel(), whole.y.numel()) > 2**31
        before = whole.states[:, -end - 1 if states == "all" else 0]
        last = selective_scan(**short, initial_state=before, states=(end - 3,), backend="triton")
    assert relative_error(whole.y[:, -end:], last.y) <= 1e-5
    assert relative_error(whole.final_state, last.final_state) <= 1e-5
    assert relative_error(whole.states[:, -3 if states == "all" else 1], last.states[:, 0]) <= 1e-5
    del whole
    adjoints = adjoints_of(long, states if states == "all" else (length - 2, length - 1))
    assert relative_error(adjoints[:, -2], adjoints_of(short, (end - 2,))[:, 0]) <= 1e-5
