"""Attribution of states from what their scans take in, so that no trajectory of states or adjoints is held."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from jaxtyping import Float
from torch import Tensor

from ssminterp.models import HookedMamba, HookPoint
from ssminterp.models.mixers.scans import SelectiveScan, Step
from ssminterp_kernels.selective_scan.contract import ScanRun, contract_with_adjoint


def scan_suffices(model: HookedMamba) -> bool:
    """Whether states are what their scans make of what they take in, and read in the scan alone: nothing attached
    changes them, or reads them once more."""
    mixers = [block.mixer for block in model.blocks]
    if any(mixer.hook_y.functions for mixer in mixers):
        return False
    points = (point for mixer in mixers for point in (mixer.hook_state, mixer.hook_A_bar, mixer.hook_B_bar))
    return not any(point.is_listened_to for point in points)


def scan_inputs(model: HookedMamba, layers: Sequence[int]) -> list[HookPoint]:
    """Hooks that hold as much as the scans of these layers take in."""
    return [
        model.hook_points[f"blocks.{layer}.mixer.hook_{short}"]
        for layer in layers
        for short in ("x", "delta", "B", "C", "gate")
    ]


def examples_of_scan(scan: SelectiveScan, rows: slice) -> SelectiveScan:
    """The scan of some examples of a batch."""
    step = scan.step._replace(delta=scan.step.delta[rows])
    z = None if scan.z is None else scan.z[rows]
    return replace(scan, x=scan.x[rows], step=step, B=scan.B[rows], C=scan.C[rows], z=z)


def attributed_states(
    source: SelectiveScan, base: SelectiveScan, gradient: Float[Tensor, "batch pos d_inner"], sum_d_inner: bool
) -> Float[Tensor, "batch pos *d_inner"]:
    """Σ over d_state (and d_inner, if asked) of adjoint · (state of the source run − state of the base run).

    source, base: the scans of one layer in both runs. gradient: of what the base run's scan gave.
    """
    step_a, step_b = source.step, base.step
    if step_a.softplus != step_b.softplus:
        # Someone looked at Δ in one of the runs.
        step_a, step_b = (Step(step.size(), None, softplus=False) for step in (step_a, step_b))
    return contract_with_adjoint(
        ScanRun(source.x, step_a.delta, source.B),
        ScanRun(base.x, step_b.delta, base.B),
        gradient,
        base.A,
        base.C,
        base.z,
        step_b.bias,
        step_b.softplus,
        sum_d_inner=sum_d_inner,
    )
