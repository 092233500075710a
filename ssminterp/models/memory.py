"""Refusing a recording that will not fit, before the run."""

from __future__ import annotations

import math
from collections.abc import Sequence

import psutil
import torch

from ssminterp.models.config import ModelConfig
from ssminterp.models.hook_points import HookPoint, HookSpec

# What a model of reduced precision keeps in float32; the residual stream only if its config says so.
FLOAT32_HOOKS = {"delta", "A_bar", "B_bar", "state", "ssm_out", "gated", "logits"}
RESIDUAL_HOOKS = {"resid_pre", "resid_post", "final_norm"}


def value_bytes(spec: HookSpec, cfg: ModelConfig) -> int:
    """The size of what a hook holds for one example at one position, at most."""
    in_float32 = spec.short in FLOAT32_HOOKS or (cfg.residual_in_fp32 and spec.short in RESIDUAL_HOOKS)
    return math.prod(cfg.axis_size(axis) for axis in spec.axes[2:]) * (4 if in_float32 else cfg.dtype.itemsize)


def recording_bytes(hooks: Sequence[HookPoint], cfg: ModelConfig, batch: int, n_positions: int) -> int:
    """The size of the recorded tensors."""
    return batch * n_positions * sum(value_bytes(hook.spec, cfg) for hook in hooks)


def free_bytes(device: torch.device) -> int:
    """Memory that a new tensor on `device` could take."""
    if device.type != "cuda":
        return psutil.virtual_memory().available
    free, _ = torch.cuda.mem_get_info(device)
    # Nested, because to flatten all statistics takes longer than to get them.
    held = torch.cuda.memory_stats_as_nested_dict(device)
    reserved, allocated = (held[kind]["all"]["current"] for kind in ("reserved_bytes", "allocated_bytes"))
    return free + reserved - allocated


def check_recording_fits(
    hooks: Sequence[HookPoint], cfg: ModelConfig, batch: int, n_positions: int, device: torch.device
) -> None:
    """Raises ValueError with the estimate and the remedies if recording `hooks` would not fit on `device`."""
    needed, free = recording_bytes(hooks, cfg, batch, n_positions), free_bytes(device)
    if needed > free:
        remedies = "positions= or layers=" if device.type == "cpu" else "positions=, layers= or offload='cpu'"
        raise ValueError(
            f"recording {len(hooks)} hooks × batch {batch} × {n_positions} positions needs {needed / 1e9:.1f} GB, "
            f"{free / 1e9:.1f} GB are free on {device}: pass {remedies}"
        )
