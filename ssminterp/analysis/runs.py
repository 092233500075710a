"""What every analysis needs of a run: its tokens, and the quantities of one layer's scan as the hooks saw them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ssminterp.models import ActivationCache, HookedMamba
from ssminterp.models.hooked_mamba import Input
from ssminterp.models.mixers import HookedMambaMixer
from ssminterp_kernels.selective_scan import selective_scan

# A text, several, tokens, or what a run recorded.
Run: TypeAlias = Input | ActivationCache


@dataclass(frozen=True, eq=False)
class LayerScan:
    """The quantities of one layer's scan, in float32 or better, on the layer's device."""

    x: Float[Tensor, "batch pos d_inner"]
    delta: Float[Tensor, "batch pos d_inner"]
    gate: Float[Tensor, "batch pos d_inner"]
    A: Float[Tensor, "d_inner d_state"]
    B: Float[Tensor, "batch pos d_state"]
    C: Float[Tensor, "batch pos d_state"]
    D: Float[Tensor, " d_inner"]
    out_weight: Float[Tensor, "d_model d_inner"]


SCAN_HOOKS = ("x", "delta", "gate", "B", "C")
# A hook function at one of these makes the outputs something else than the scan of x, Δ, B and C.
BEYOND_THE_SCAN = ("A_bar", "B_bar", "state", "y", "ssm_out", "gated", "mixer_out")


@torch.no_grad()
def recorded(model: HookedMamba, run: Run, names: Sequence[str]) -> ActivationCache:
    """The run with the hooks `names` at every position: a cache that has them as it is, anything else is run now.

    Raises ValueError if a cache is of another model, lacks one of the hooks, or holds only some positions.
    """
    if not isinstance(run, ActivationCache):
        return model.run_with_cache(run, list(names))[1]
    if run.model_name != model.cfg.model_name:
        raise ValueError(f"the cache was recorded from {run.model_name}, the model is {model.cfg.model_name}")
    missing = [name for name in names if name not in run]
    if missing:
        raise ValueError(f"the cache lacks {', '.join(missing)}: record them too, or pass the text or tokens")
    if run.positions is not None:
        raise ValueError(
            f"the cache holds positions {list(run.positions)} of {run.tokens.shape[1]}: every position is needed, "
            "record without positions="
        )
    return run


def scan_hook_names(layers: Iterable[int], shorts: Iterable[str] = SCAN_HOOKS) -> list[str]:
    """The hooks `shorts` of the mixers of `layers`."""
    shorts = list(shorts)
    return [f"blocks.{layer}.mixer.hook_{short}" for layer in layers for short in shorts]


def layer_scan(model: HookedMamba, run: Run, layer: int) -> tuple[LayerScan, ActivationCache]:
    """One layer's scan, and the cache it was taken from.

    Raises ValueError for a layer that does not exist, a cache that does not fit (see `recorded`), and if hooks
    attached to the model would change what lies beyond the scan's inputs.
    """
    model.check_layers([layer])
    if not isinstance(run, ActivationCache):
        check_unchanged(model, [layer])
    cache = recorded(model, run, scan_hook_names([layer]))
    return scan_of(model, cache, layer), cache


def check_unchanged(model: HookedMamba, layers: Iterable[int]) -> None:
    """Raises ValueError if an attached hook function makes a layer's output differ from the scan of its inputs."""
    layers = set(layers)
    changed = [
        hook.name
        for hook in model.hook_points.values()
        if hook.layer in layers and hook.spec.short in BEYOND_THE_SCAN and hook.functions
    ]
    if changed:
        raise ValueError(
            f"hook functions change {', '.join(changed)}, so the output is not what x, Δ, B and C make of it: "
            "leave them out for this analysis"
        )


@torch.no_grad()
def scan_of(model: HookedMamba, cache: ActivationCache, layer: int) -> LayerScan:
    """One layer's scan from a cache that has its hooks."""
    mixer = mixer_of(model, layer)
    x, delta, gate, B, C = (_at_least_float32(cache[short, layer]) for short in SCAN_HOOKS)
    weight = effective_weight(mixer.out_proj, cache["x", layer])
    return LayerScan(x, delta.to(x), gate, mixer.A().to(x), B, C, mixer.D.to(x), weight.to(x))


def states_of(scan: LayerScan, at: Sequence[int]) -> Float[Tensor, "batch n_positions d_inner d_state"]:
    """The states after the tokens at positions in any order."""
    ascending = sorted(at)
    states = selective_scan(scan.x, scan.delta, scan.A, scan.B, scan.C, states=ascending).states
    assert states is not None
    return states[:, [ascending.index(p) for p in at]]


def mixer_of(model: HookedMamba, layer: int) -> HookedMambaMixer:
    """The hooked mixer of a layer."""
    mixer = model.blocks[layer].mixer
    assert isinstance(mixer, HookedMambaMixer)
    return mixer


@torch.no_grad()
def effective_weight(linear: nn.Module, like: Tensor) -> Float[Tensor, "out in"]:
    """The matrix that a linear module applies, adapters and offloading included, on the device of its input `like`."""
    if type(linear) is nn.Linear and not hasattr(linear, "_hf_hook"):
        return linear.weight.detach().to(like.device)
    eye = torch.eye(like.shape[-1], device=like.device, dtype=like.dtype)
    return (linear(eye) - linear(torch.zeros_like(eye[:1]))).T


def _at_least_float32(values: Tensor) -> Tensor:
    return values.detach().to(torch.promote_types(values.dtype, torch.float32))
