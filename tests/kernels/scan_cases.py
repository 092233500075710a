"""Random inputs for selective scans, and the comparison of a scan's outputs and gradients with the reference's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from ssminterp_kernels.selective_scan import StateEdits, selective_scan, selective_scan_reference

# Relative errors by the dtype of what is compared: one rounding at the end. Triton's interpreter cuts bfloat16 off.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-11}
OPTIONAL = ("D", "z", "delta_bias", "initial_state")


@dataclass(frozen=True)
class ScanCase:
    """One configuration of the scan; `optional` names those of the optional tensors that are given."""

    batch: int = 2
    length: int = 7
    d_inner: int = 6
    d_state: int = 4
    n_groups: int | None = None
    dtype: torch.dtype = torch.float32
    optional: tuple[str, ...] = OPTIONAL
    delta_softplus: bool = True
    strided: bool = False
    states: Literal["all"] | tuple[int, ...] | None = "all"
    edit_positions: tuple[int, ...] | tuple[tuple[int, ...], ...] = ()

    def but(self, **changes: Any) -> ScanCase:
        return replace(self, **changes)

    def __str__(self) -> str:
        default = ScanCase()
        different = {k: v for k, v in vars(self).items() if v != getattr(default, k)}
        return ",".join(f"{k}={v}".replace("torch.", "").replace(" ", "") for k, v in different.items()) or "default"


# What every backend must get right on top of its own peculiarities.
CASES = (
    *(ScanCase(length=length, strided=strided) for length in (1, 7, 63, 200) for strided in (False, True)),
    *(ScanCase(length=40, optional=(name,), delta_softplus=False) for name in OPTIONAL),
    ScanCase(length=40, optional=(), delta_softplus=False, states=None),
    ScanCase(length=40, optional=(), delta_softplus=True, states=(0, 31, 32, 39)),
    ScanCase(batch=1, length=33, d_inner=5, d_state=1),
    ScanCase(batch=3, length=9, d_inner=1, d_state=17),
    ScanCase(length=20, d_inner=37, d_state=16, states=()),
    ScanCase(length=21, n_groups=1),
    ScanCase(length=21, n_groups=3, strided=True),
    ScanCase(length=21, d_inner=4, n_groups=4, states=(20,)),
    ScanCase(length=70, edit_positions=(0, 31, 32, 33, 69)),
    ScanCase(length=70, edit_positions=(69,), states=(3, 69), strided=True),
    ScanCase(length=70, edit_positions=((0, 5, 33), (5, 32, 69)), n_groups=2),
    ScanCase(length=1, edit_positions=((0,), (0,))),
    *(ScanCase(length=length, dtype=torch.bfloat16, strided=True) for length in (7, 63)),
    ScanCase(length=40, dtype=torch.bfloat16, edit_positions=(0, 7, 8), states=(7, 39)),
    ScanCase(length=63, dtype=torch.float16, n_groups=2),
    ScanCase(length=63, dtype=torch.float64, strided=True),
    ScanCase(length=40, dtype=torch.float64, edit_positions=((0, 5), (5, 39))),
)


def relative_error(out: Tensor, ref: Tensor) -> float:
    """‖out − ref‖ / ‖ref‖ in float64; 0 if both are zero."""
    assert out.shape == ref.shape, f"{out.shape} is not {ref.shape}"
    if ref.numel() == 0:
        return 0.0
    difference = (out.detach().double().cpu() - ref.detach().double().cpu()).norm()
    return float(difference if difference == 0 else difference / ref.detach().double().norm().cpu())


def random_scan_inputs(case: ScanCase, seed: int | None = None, device: str = "cpu") -> dict[str, Any]:
    """Keyword arguments of `selective_scan`: tensors that require gradients, flags, states and edits.

    A and the states are float32 (float64 in a float64 case) as they are in models; the rest has the case's dtype.
    """
    generator = torch.Generator().manual_seed(int(torch.randint(2**31, ())) if seed is None else seed)
    wide = torch.float64 if case.dtype == torch.float64 else torch.float32

    def draw(*shape: int, dtype: torch.dtype = case.dtype) -> Tensor:
        values = torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)
        return (_scattered(values) if case.strided else values).requires_grad_()

    batch, length, d_inner, d_state = case.batch, case.length, case.d_inner, case.d_state
    groups = () if case.n_groups is None else (case.n_groups,)
    A = -torch.rand(d_inner, d_state, generator=generator, dtype=torch.float64) * 2
    delta = draw(batch, length, d_inner)
    if not case.delta_softplus:
        delta = delta.detach().abs().requires_grad_()
    inputs: dict[str, Any] = {
        "x": draw(batch, length, d_inner),
        "delta": delta,
        "A": A.to(device, wide).requires_grad_(),
        "B": draw(batch, length, *groups, d_state),
        "C": draw(batch, length, *groups, d_state),
        "D": draw(d_inner),
        "z": draw(batch, length, d_inner),
        "delta_bias": draw(d_inner),
        "initial_state": draw(batch, d_inner, d_state, dtype=wide),
    }
    inputs = {name: value for name, value in inputs.items() if name not in OPTIONAL or name in case.optional}
    inputs |= {"delta_softplus": case.delta_softplus, "states": case.states}
    if case.edit_positions:
        inputs["edits"] = _random_edits(case, draw)
    return inputs


def _scattered(values: Tensor) -> Tensor:
    """The same values with the axes stored in reverse order and a gap between neighbours."""
    reversed_axes = list(reversed(range(values.dim())))
    padded = values.permute(reversed_axes)[..., None].repeat(*(1,) * values.dim(), 2)
    return padded[..., 0].permute(reversed_axes)


def _random_edits(case: ScanCase, draw: Callable[..., Tensor]) -> StateEdits:
    first = case.edit_positions[0]
    if isinstance(first, int):
        n_edits = len(case.edit_positions)
        return StateEdits(case.edit_positions, draw(n_edits, case.d_inner, 1), draw(1, n_edits, 1, case.d_state))  # type: ignore[arg-type]
    keep = draw(case.batch, len(first), case.d_inner, case.d_state)
    return StateEdits(torch.tensor(case.edit_positions), keep, draw(case.batch, 1, 1, case.d_state))


def in_float64(inputs: dict[str, Any]) -> dict[str, Any]:
    """The same numbers as float64 leaves on the CPU."""

    def convert(value: Any) -> Any:
        if isinstance(value, StateEdits):
            return StateEdits(value.positions, convert(value.keep), convert(value.add))
        return value.detach().double().cpu().requires_grad_() if isinstance(value, Tensor) else value

    return {name: convert(value) for name, value in inputs.items()}


def reference(**inputs: Any) -> dict[str, Tensor]:
    states = inputs.pop("states")
    y, trajectory = selective_scan_reference(**inputs)
    recorded = trajectory[:, list(states)] if isinstance(states, Sequence) and states != "all" else trajectory
    return _named_outputs(y, None if states is None else recorded, trajectory[:, -1])


def with_backend(backend: str) -> Callable[..., dict[str, Tensor]]:
    return lambda **inputs: _named_outputs(*selective_scan(**inputs, backend=backend))  # type: ignore[arg-type]


def _named_outputs(y: Tensor, states: Tensor | None, final_state: Tensor) -> dict[str, Tensor]:
    recorded = {} if states is None else {"states": states}
    return {"y": y, **recorded, "final_state": final_state}


def outputs_and_gradients(
    scan: Callable[..., dict[str, Tensor]],
    inputs: dict[str, Any],
    wanted_outputs: Sequence[str] = ("y", "states", "final_state"),
    seed: int = 0,
) -> dict[str, Tensor]:
    """What a scan returns, and the gradient of a random linear function of `wanted_outputs` by "grad NAME"."""
    outputs = scan(**inputs)
    generator = torch.Generator().manual_seed(seed)
    loss = torch.zeros((), dtype=torch.float64)
    for name, output in outputs.items():
        # Of a precision that every dtype has: what comes back through a bfloat16 output is the same everywhere.
        weights = torch.randn(output.shape, generator=generator).to(torch.bfloat16).double()
        if name in wanted_outputs:
            loss = loss + (output.double().cpu() * weights).sum()
    leaves = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
    if inputs.get("edits") is not None:
        leaves |= {"keep": inputs["edits"].keep, "add": inputs["edits"].add}
    gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    zeros_for_unused = zip(leaves.items(), gradients, strict=True)
    return outputs | {
        f"grad {name}": torch.zeros_like(leaf) if gradient is None else gradient
        for (name, leaf), gradient in zeros_for_unused
    }


def check_against_reference(
    case: ScanCase,
    backend: str,
    wanted_outputs: Sequence[str] = ("y", "states", "final_state"),
    seed: int | None = None,
    device: str = "cpu",
) -> dict[str, float]:
    """Assert that outputs and all gradients agree with the float64 reference; returns the relative errors by name."""
    return check_inputs_against_reference(random_scan_inputs(case, seed, device), backend, wanted_outputs)


def check_inputs_against_reference(
    inputs: dict[str, Any], backend: str, wanted_outputs: Sequence[str] = ("y", "states", "final_state")
) -> dict[str, float]:
    """`check_against_reference` of these inputs."""
    ours = outputs_and_gradients(with_backend(backend), inputs, wanted_outputs)
    expected = outputs_and_gradients(reference, in_float64(inputs), wanted_outputs)
    assert ours.keys() == expected.keys()
    errors = {name: relative_error(ours[name], expected[name]) for name in expected}
    too_large = {name: error for name, error in errors.items() if not error <= TOLERANCE[ours[name].dtype]}
    assert not too_large, f"relative errors over {TOLERANCE}: {too_large}"
    return errors
