"""How much of an answer takes which way: every edge of a graph of tokens × layers, weighted exactly.

    residual   token t before layer l    → token t after it      the residual stream itself
    conv       token t-b before layer l  → x of layer l at t     tap b of the conv: b tokens back
    state      x of layer l at s         → token t after it      what s wrote and t read, s ≤ t
    skip       x of layer l at t         → token t after it      D · x, which goes round the state

With what selects held at what it was in the run (norm scales, Δ, B, C, gates, and SiLU as the factor that it is), the
model is linear in what flows, so a logit (difference) splits into edges without remainder: what enters a node leaves
it, but for what biases add. Selection itself is not followed: if a token only sets a Δ or opens a gate, no edge shows
it; patches do (see `flow_patches`).

Source: the graph is that of Ferrando & Voita 2024, arXiv:2403.00824, section 2, for Mamba; what is held follows Rezaei
Jafari et al. 2024, "MambaLRP", arXiv:2406.07592 (who give a gate half of its product, where here all goes to x); the
state's edges are the hidden attention of Ali et al. 2024, arXiv:2403.01590.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor, nn

from ssminterp.analysis.arrays import Coords, labelled, position_labels
from ssminterp.analysis.contributions import contribution_values, read_weights
from ssminterp.analysis.direct import described, logit_direction
from ssminterp.analysis.runs import LayerScan, Run, effective_weight, mixer_of, recorded, scan_hook_names, scan_of
from ssminterp.analysis.unembedding import Token
from ssminterp.models import ActivationCache, HookedMamba
from ssminterp.positions import resolve_positions
from ssminterp_kernels.selective_scan import selective_scan


@torch.no_grad()
def flow_contributions(
    model: HookedMamba, run: Run, answer: Token, instead: Token | None = None, *, position: int = -1
) -> xr.Dataset:
    """What each edge carries of a logit, or of a logit difference, at one position.

    Returns, in logits:

        residual (batch, layer, position)         conv (batch, layer, position, back), position being that of x
        state (batch, layer, target, source)      skip (batch, layer, position)
        bias (batch, layer, position): what the layer's biases add there
        node (batch, depth, position): what the residual stream carries after `depth` layers
        total (batch): the logit (difference)

    where, up to rounding,

        node[l, t]   = residual[l, t] + Σ_b conv[l, t+b, b]                   what leaves a token
        node[l+1, t] = residual[l, t] + Σ_s state[l, t, s] + skip[l, t]       what enters it, and out_proj's bias
        Σ_t state[l, t, s] + skip[l, s] = Σ_b conv[l, s, b]                   through x, and the other biases
        total        = Σ_t node[n_layers, t] = Σ_t node[0, t] + Σ bias

    and the last layer's state is what `attribute_to_sources` gives. `flow_graph` makes a graph of it.

    run: a text, several, tokens, or a cache with every hook_resid_pre, the last hook_resid_post, and every layer's x,
        delta, gate, B, C and conv.
    answer, instead: an id, the text of one token, or a list with one for each example.
    position: where the logits are read.

    Raises ValueError for tokens that do not exist, a position out of range, and a run in which hooks changed something
    between what is recorded, so that the edges do not add up.

    >>> from ssminterp import HookedMamba
    >>> model = HookedMamba.from_pretrained("tiny-mamba")
    >>> text = "Soon Adam and Vanessa were alone in the garden. Then Adam showed a gift to"
    >>> flow = flow_contributions(model, text, "Vanessa", "Adam")
    >>> round(flow["total"].item()), flow["state"].sel(layer=2, target="15 to").idxmax("source").item()
    (19, '3 Vanessa')
    """
    layers = range(model.cfg.n_layers)
    residuals = [*(f"blocks.{layer}.hook_resid_pre" for layer in layers), f"blocks.{layers[-1]}.hook_resid_post"]
    cache = recorded(model, run, [*residuals, *scan_hook_names(layers, ("x", "delta", "gate", "B", "C", "conv"))])
    (at,) = resolve_positions(position, cache.tokens.shape[1]) or ()
    streams = [cache[name].to(torch.promote_types(cache[name].dtype, torch.float32)) for name in residuals]
    wanted = torch.zeros_like(streams[-1])
    wanted[:, at] = logit_direction(model, cache, answer, instead, at)[:, 0].to(wanted)
    parts: list[LayerFlow] = []
    nodes = [(wanted * streams[-1]).sum(-1)]
    for layer in reversed(layers):
        part, wanted = _layer_flow(model, cache, layer, streams[layer], wanted.to(streams[layer]))
        parts.insert(0, part)
        nodes.insert(0, (wanted * streams[layer]).sum(-1))
    total = nodes[-1].sum(-1)
    _check_adds_up(nodes[0].sum(-1), parts, total, model.cfg.dtype)
    values = {name: torch.stack([getattr(part, name).cpu() for part in parts], dim=1) for name in EDGES_AND_BIAS}
    values |= {"node": torch.stack([node.cpu() for node in nodes], dim=1), "total": total}
    labels = position_labels(model, cache.tokens)
    of = {"of": described(model, answer, instead), "end": labels[at], "weights": "contribution"}
    return flow_dataset(model, values, labels, **of)


# The kinds of edges, and where nothing but a bias enters.
EDGES_AND_BIAS = ("residual", "conv", "state", "skip", "bias")


def flow_dataset(model: HookedMamba, values: dict[str, Tensor], labels: Sequence[str], **attributes: str) -> xr.Dataset:
    """The variables of a flow under their labels.

    labels: of all positions. attributes: what the numbers are, beside the provenance.
    """
    layered: Coords = {"batch": len(values["total"]), "layer": model.cfg.n_layers}
    by_position: Coords = {**layered, "position": labels}
    coords: dict[str, Coords] = {
        "residual": by_position,
        "conv": {**by_position, "back": model.cfg.d_conv},
        "state": {**layered, "target": labels, "source": labels},
        "skip": by_position,
        "bias": by_position,
        "node": {"batch": len(values["total"]), "depth": model.cfg.n_layers + 1, "position": labels},
        "total": {"batch": len(values["total"])},
    }
    arrays = {name: labelled(value, model, coords[name], name) for name, value in values.items()}
    return xr.Dataset(arrays, attrs={**attributes, **arrays["total"].attrs})


@dataclass(frozen=True, eq=False)
class LayerFlow:
    """What the edges of one layer carry, and what its biases add."""

    residual: Float[Tensor, "batch pos"]
    conv: Float[Tensor, "batch pos d_conv"]
    state: Float[Tensor, "batch n_targets n_sources"]
    skip: Float[Tensor, "batch pos"]
    bias: Float[Tensor, "batch pos"]


def _layer_flow(
    model: HookedMamba,
    cache: ActivationCache,
    layer: int,
    resid: Float[Tensor, "batch pos d_model"],
    wanted: Float[Tensor, "batch pos d_model"],
) -> tuple[LayerFlow, Float[Tensor, "batch pos d_model"]]:
    """One layer's edges, and what is wanted of the residual stream before it.

    resid: before the layer. wanted: the direction of the residual stream after it, whose product with it is split.
    """
    scan, mixer = scan_of(model, cache, layer), mixer_of(model, layer)
    every = range(scan.x.shape[1])
    state = contribution_values(scan, wanted, range(model.cfg.d_inner), every, every, skip=False)
    read = read_weights(scan, every, wanted)
    wanted_x = _wanted_through_state(scan, read) + scan.D * read
    # SiLU as the factor that it was in the run.
    wanted_conv = wanted_x * torch.sigmoid(cache["conv", layer].to(scan.x))
    conv, through_conv, wanted_next = _through_conv(model, layer, resid, wanted_conv)
    bias = through_conv + wanted @ _bias_of(mixer.out_proj, wanted)
    skip = (scan.D * read * scan.x).sum(-1)
    return LayerFlow((wanted * resid).sum(-1), conv, state, skip, bias), wanted + wanted_next


def _wanted_through_state(
    scan: LayerScan, read: Float[Tensor, "batch pos d_inner"]
) -> Float[Tensor, "batch pos d_inner"]:
    """The adjoint of the scan in x, with Δ, B and C held: what is wanted of x for the sake of `read` times y."""
    with torch.inference_mode(False), torch.enable_grad():
        x, delta, B, C, A, read = (t.detach().clone() for t in (scan.x, scan.delta, scan.B, scan.C, scan.A, read))
        y = selective_scan(x.requires_grad_(), delta, A, B, C).y
        return torch.autograd.grad(y, x, read)[0]


def _through_conv(
    model: HookedMamba,
    layer: int,
    resid: Float[Tensor, "batch pos d_model"],
    wanted_conv: Float[Tensor, "batch pos d_inner"],
) -> tuple[Float[Tensor, "batch pos d_conv"], Float[Tensor, "batch pos"], Float[Tensor, "batch pos d_model"]]:
    """The conv's edges, what its bias and in_proj's add, and what is wanted of the residual stream before the norm."""
    block: Any = model.blocks[layer]
    mixer, length = mixer_of(model, layer), resid.shape[1]
    scale = torch.rsqrt(resid.pow(2).mean(-1, keepdim=True) + block.norm.variance_epsilon)
    scale = scale * block.norm.weight.detach().to(resid)
    weight = effective_weight(mixer.in_proj, resid.to(model.cfg.dtype))[: mixer.d_inner].to(resid)
    in_x, taps = (resid * scale) @ weight.mT, mixer.conv1d.weight[:, 0].detach().to(resid)
    edges, wanted_in_x = resid.new_zeros(*resid.shape[:2], mixer.d_conv), torch.zeros_like(in_x)
    for back in range(min(mixer.d_conv, length)):
        through_tap = wanted_conv[:, back:] * taps[:, -1 - back]
        edges[:, back:, back] = (through_tap * in_x[:, : length - back]).sum(-1)
        wanted_in_x[:, : length - back] += through_tap
    bias = wanted_in_x @ _bias_of(mixer.in_proj, resid)[: mixer.d_inner]
    if mixer.conv1d.bias is not None:
        bias = bias + wanted_conv @ mixer.conv1d.bias.detach().to(resid)
    return edges, bias, (wanted_in_x @ weight) * scale


def _bias_of(linear: nn.Module, like: Tensor) -> Float[Tensor, " out"]:
    """What a linear module gives for nothing, adapters and offloading included."""
    weight: Any = linear.weight
    return linear(like.new_zeros(weight.shape[1], dtype=weight.dtype)).to(like)


def _check_adds_up(start: Tensor, parts: Sequence[LayerFlow], total: Tensor, dtype: torch.dtype) -> None:
    """Raises ValueError if what tokens and biases bring is not the total, beyond rounding."""
    found = start.cpu() + torch.stack([part.bias.cpu().sum(-1) for part in parts]).sum(0)
    size = torch.stack([part.residual.cpu().abs().sum(-1) for part in parts]).amax(0) + total.cpu().abs()
    off = (found - total.cpu()).abs() / size.clamp(min=1e-12)
    if float(off.max()) > (1e-3 if dtype.itemsize >= 4 else 1e-1):
        raise ValueError(
            f"tokens and biases bring {found.tolist()}, the logits are {total.tolist()}: hook functions changed "
            "something between what was recorded, follow a run without them"
        )
