"""Attribution of states from what their scans take in, so that no trajectory of states or adjoints is held."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor

from ssminterp.models import HookedMamba, HookPoint
from ssminterp_kernels.selective_scan.contract import ScanRun, contract_with_adjoint


def scan_suffices(model: HookedMamba) -> bool:
    """Whether states are what their scans make of x, Δ, B and y is what C reads there: nothing attached changes it."""
    points = model.hook_points.values()
    if any(point.functions for point in points if point.spec.short == "y"):
        return False
    return not any(point.is_listened_to for point in points if point.spec.short in ("state", "A_bar", "B_bar"))


def scan_inputs(model: HookedMamba, layers: Sequence[int]) -> list[HookPoint]:
    """The hooks that tell what the scans of these layers take in."""
    return [model.hook_points[_name(layer, short)] for layer in layers for short in ("x", "delta", "B", "C")]


def scan_outputs(model: HookedMamba, layers: Sequence[int]) -> list[HookPoint]:
    """The hooks whose gradients the adjoints of these layers' states come from."""
    return [model.hook_points[_name(layer, "y")] for layer in layers]


def attributed_states(
    model: HookedMamba,
    layer: int,
    source: Mapping[str, Tensor],
    base: Mapping[str, Tensor],
    gradient_of_y: Float[Tensor, "batch pos d_inner"],
    sum_d_inner: bool,
) -> Float[Tensor, "batch pos *d_inner"]:
    """Σ over d_state (and d_inner, if asked) of adjoint · (state of the source run − state of the base run).

    source, base: what the hooks of `scan_inputs` held in both runs. gradient_of_y: of the base run.
    """
    of_source, of_base = (
        ScanRun(held[_name(layer, "x")], held[_name(layer, "delta")], held[_name(layer, "B")])
        for held in (source, base)
    )
    block: Any = model.blocks[layer]
    return contract_with_adjoint(
        of_source, of_base, gradient_of_y, block.mixer.A(), base[_name(layer, "C")], sum_d_inner=sum_d_inner
    )


def _name(layer: int, short: str) -> str:
    return f"blocks.{layer}.mixer.hook_{short}"
