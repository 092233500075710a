"""How long a layer remembers: step sizes, decays, half-lives, and what is still held of each token.

    A_bar_t = exp(Δ_t A),  survival of s at t: Π_{k=s+1..t} A_bar_k = exp(A (Δ_{s+1} + … + Δ_t))

Source: Gu & Dao 2023, arXiv:2312.00752, section 3.2 and theorem 1 (Δ as a gate: large Δ resets, small Δ keeps).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import pandas as pd
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from ssminterp.analysis.arrays import Coords, labelled, position_labels, resolve_indices, resolve_pairs
from ssminterp.analysis.contributions import pair_coords, scan_pairs
from ssminterp.analysis.pairs import Pairs
from ssminterp.analysis.runs import Run, layer_scan, mixer_of, recorded, scan_hook_names
from ssminterp.models import ActivationCache, HookedMamba
from ssminterp.positions import Positions, resolve_positions
from ssminterp_kernels.selective_scan import selective_scan


@torch.no_grad()
def spectrum(model: HookedMamba, layers: int | Sequence[int] | None = None) -> xr.DataArray:
    """A, the rates of decay per unit of Δ, all negative: dims (layer, channel, coordinate).

    Raises ValueError for layers that do not exist.
    """
    chosen = resolve_indices("layers", layers, model.cfg.n_layers)
    A = torch.stack([mixer_of(model, layer).A().cpu() for layer in chosen])
    coords: Coords = {"layer": chosen, "channel": model.cfg.d_inner, "coordinate": model.cfg.d_state}
    return labelled(A, model, coords, "A", unit="per unit of Δ")


@torch.no_grad()
def step_sizes(model: HookedMamba, run: Run, layers: int | Sequence[int] | None = None) -> xr.Dataset:
    """How far each token moves each layer's state on: dims (batch, layer, position).

    delta, delta_max: mean and maximum over channels of the step size Δ.
    decay, decay_min: mean and minimum over channels and coordinates of A_bar = exp(Δ A), the part of the state that is
        kept across the token.

    run: a text, several, tokens, or a cache with hook_delta.

    Raises ValueError for layers that do not exist and a cache that does not fit.
    """
    chosen = resolve_indices("layers", layers, model.cfg.n_layers)
    cache = recorded(model, run, scan_hook_names(chosen, ["delta"]))
    rows: dict[str, list[Tensor]] = {name: [] for name in ("delta", "delta_max", "decay", "decay_min")}
    for layer in chosen:
        delta, A = cache["delta", layer], mixer_of(model, layer).A()
        # One coordinate at a time: A_bar itself is d_state times as large as Δ.
        means, minima = zip(*(_mean_and_min(torch.exp(delta * a)) for a in A.to(delta).unbind(1)), strict=True)
        rows["delta"].append(delta.mean(-1))
        rows["delta_max"].append(delta.amax(-1))
        rows["decay"].append(torch.stack(means).mean(0))
        rows["decay_min"].append(torch.stack(minima).amin(0))
    coords: Coords = {"batch": delta.shape[0], "layer": chosen, "position": position_labels(model, cache.tokens)}
    return xr.Dataset(
        {
            name: labelled(torch.stack([r.cpu() for r in values], dim=1), model, coords, name)
            for name, values in rows.items()
        }
    )


def _mean_and_min(decay: Tensor) -> tuple[Tensor, Tensor]:
    return decay.mean(-1), decay.amin(-1)


@torch.no_grad()
def half_lives(model: HookedMamba, run: Run, layer: int, positions: Positions | None = None) -> xr.DataArray:
    """Tokens after which half of what a coordinate of the state held is left: dims (batch, channel, coordinate).

    ln 2 / (|A| · mean Δ), the mean being over `positions` (None: all): as long as tokens go on as those do.

    run: a text, several, tokens, or a cache with the layer's hook_delta.

    Raises ValueError for layers or positions that do not exist and a cache that does not fit.
    """
    model.check_layers([layer])
    cache = recorded(model, run, scan_hook_names([layer], ["delta"]))
    chosen = resolve_positions(positions, cache.tokens.shape[1])
    delta = cache["delta", layer] if chosen is None else cache["delta", layer][:, list(chosen)]
    rates = -delta.mean(1)[..., None] * mixer_of(model, layer).A().to(delta)
    coords: Coords = {"batch": delta.shape[0], "channel": model.cfg.d_inner, "coordinate": model.cfg.d_state}
    return labelled(math.log(2) / rates, model, coords, "half_life", layer=layer, unit="tokens")


@torch.no_grad()
def survival(
    model: HookedMamba,
    run: Run,
    layer: int,
    source: int,
    *,
    channels: int | Sequence[int] | None = None,
    targets: Positions | None = None,
) -> xr.DataArray:
    """What is left at each target of what the token at `source` wrote: dims (batch, target, channel, coordinate).

    A part of 1, and 1 at the source itself.

    run: a text, several, tokens, or a cache with the layer's hook_delta.
    targets: None means the source and all positions after it.

    Raises ValueError for layers, channels or positions that do not exist, a source after a target, and a cache that
    does not fit.
    """
    model.check_layers([layer])
    cache = recorded(model, run, scan_hook_names([layer], ["delta"]))
    kept = resolve_indices("channels", channels, model.cfg.d_inner)
    to, (since,) = resolve_pairs(targets, [source], cache.tokens.shape[1])
    delta = cache["delta", layer][..., kept]
    clock = delta.cumsum(1, dtype=torch.float64)
    elapsed = (clock[:, list(to)] - clock[:, [since]]).to(delta)
    coords: Coords = {
        "batch": delta.shape[0],
        "target": position_labels(model, cache.tokens, to),
        "channel": kept,
        "coordinate": model.cfg.d_state,
    }
    values = torch.exp(elapsed[..., None] * mixer_of(model, layer).A()[kept].to(delta))
    return labelled(
        values, model, coords, "survival", layer=layer, source=position_labels(model, cache.tokens, [since])[0]
    )


@torch.no_grad()
def state_shares(
    model: HookedMamba,
    run: Run,
    layer: int,
    by: Literal["norm", "read_out"] = "norm",
    *,
    channels: int | Sequence[int] | None = None,
    targets: Positions | None = None,
) -> xr.DataArray:
    """Whose the state at each target is: dims (batch, target, source); the shares of a target's sources sum to 1.

    by="norm": ‖what s wrote, as it is left at t‖ over the sum of these norms. Never negative; says what is stored.
    by="read_out": the part of y at t that comes from s, projected on y, over ‖y‖². Negative where a token's part
        points against the whole; says what is used: C opens some coordinates of the state and shuts others.
    The two disagree where much is held that the target does not read. A target that holds or reads nothing has NaN.

    run: a text, several, tokens, or a cache with the layer's x, delta, gate, B and C.
    channels: of which the state is looked at; None means all.

    Raises ValueError for layers, channels or positions that do not exist, and a run whose state is changed by hooks.
    """
    if by not in ("norm", "read_out"):
        raise ValueError(f"by must be 'norm' or 'read_out', got {by!r}")
    scan, cache = layer_scan(model, run, layer)
    kept = resolve_indices("channels", channels, model.cfg.d_inner)
    to, since = resolve_pairs(targets, None, scan.x.shape[1])
    write = scan.delta * scan.x
    if by == "norm":
        # Squares decay twice as fast, and their sum over the state is the squared norm.
        squares = dataclasses.replace(scan, A=2 * scan.A, B=scan.B**2, C=torch.ones_like(scan.C))
        ones = torch.ones_like(scan.x[:, list(to)])
        parts = scan_pairs(squares, kept, to, since, ones, write**2, Pairs.summed).clamp(min=0).sqrt()
    else:
        y = selective_scan(scan.x, scan.delta, scan.A, scan.B, scan.C).y[:, list(to)]
        parts = scan_pairs(scan, kept, to, since, y, write, Pairs.summed)
    shares = parts / parts.sum(-1, keepdim=True)
    return labelled(shares, model, pair_coords(model, cache.tokens, to, since), f"share_by_{by}", layer=layer)


@torch.no_grad()
def horizons(model: HookedMamba, run: Run, layers: int | Sequence[int] | None = None) -> xr.DataArray:
    """The half-life of every channel's slowest coordinate in tokens: dims (layer, channel).

    ln 2 / (|A| · mean Δ), the mean being over examples and positions.

    run: a text, several, tokens, or a cache with hook_delta.

    Raises ValueError for layers that do not exist and a cache that does not fit.
    """
    chosen = resolve_indices("layers", layers, model.cfg.n_layers)
    cache = recorded(model, run, scan_hook_names(chosen, ["delta"]))
    slowest = [_rates(model, cache, layer).amin(1) for layer in chosen]
    coords: Coords = {"layer": chosen, "channel": model.cfg.d_inner}
    return labelled(math.log(2) / torch.stack(slowest), model, coords, "horizon", unit="tokens")


def _rates(model: HookedMamba, cache: ActivationCache, layer: int) -> Float[Tensor, "d_inner d_state"]:
    """The rates of decay per token at the mean Δ of examples and positions, in float64 on the CPU."""
    return -cache["delta", layer].mean((0, 1)).double().cpu()[:, None] * mixer_of(model, layer).A().double().cpu()


@torch.no_grad()
def rank_channels(
    model: HookedMamba, run: Run, layers: int | Sequence[int] | None = None, n: int | None = 20
) -> pd.DataFrame:
    """Channels by horizon, the half-life of their slowest coordinate; the farthest first.

    Columns: layer, channel, coordinate (the slowest), half_life (tokens, mean Δ over examples and positions), delta.
    n: how many; None means all.

    Raises ValueError for layers that do not exist and a cache that does not fit.
    """
    chosen = resolve_indices("layers", layers, model.cfg.n_layers)
    cache = recorded(model, run, scan_hook_names(chosen, ["delta"]))
    tables = []
    for layer in chosen:
        delta = cache["delta", layer].mean((0, 1)).double().cpu().numpy()
        rates = _rates(model, cache, layer).numpy()
        tables.append(
            pd.DataFrame(
                {
                    "layer": layer,
                    "channel": np.arange(len(delta)),
                    "coordinate": rates.argmin(1),
                    "half_life": math.log(2) / rates.min(1),
                    "delta": delta,
                }
            )
        )
    ranked = pd.concat(tables).sort_values("half_life", ascending=False, kind="stable").reset_index(drop=True)
    return ranked if n is None else ranked.head(n)


def sinks(
    model: HookedMamba, run: Run, layers: int | Sequence[int] | None = None, threshold: float = 3.5
) -> pd.DataFrame:
    """Positions at which a layer takes an outlying step: where it resets, or reads next to nothing.

    The score is the modified z-score of log mean Δ among the positions of the same example and layer,
    0.6745 · (value - median) / MAD; those beyond ± threshold are returned, the most outlying first.
    Source: Iglewicz & Hoaglin 1993, "How to detect and handle outliers", which also has the 3.5.

    Columns: batch, layer, position ("5 Mary"), delta (mean over channels), score.

    Raises ValueError for layers that do not exist, a cache that does not fit, a threshold that is not positive.
    """
    if threshold <= 0:
        raise ValueError(f"threshold must be positive, got {threshold}")
    delta = step_sizes(model, run, layers)["delta"]
    logs = xr.apply_ufunc(np.log, delta.astype(float))
    away = logs - logs.median("position")
    spread = abs(away).median("position")
    # Where most positions take the very same step, any other step is an outlier.
    scores = (0.6745 * away / spread).where(spread > 0, np.sign(away) * np.inf).where(away != 0, 0.0)
    table = xr.Dataset({"delta": delta, "score": scores}).to_dataframe().reset_index()
    found = table[table["score"].abs() > threshold].sort_values("score", key=np.abs, ascending=False, kind="stable")
    return found[["batch", "layer", "position", "delta", "score"]].reset_index(drop=True)
