"""Attribution of states on a GPU without autograd: two runs of the layers' stages forwards, one of them backwards.

A short run takes the time of its launches, and autograd, which also has to be told of every view, takes longer to be
asked than a GPU to compute. So the backward of a Mamba-1 layer stands here as it is derived:

    resid' = resid + out_proj(scan(x, Δ, B, C) · SiLU(gate)),  x = SiLU(conv(in_x)),  in_x, gate = in_proj(norm(resid))

Of the base run alone, which is the second half of the batch. Parameters get no gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ssminterp.models import HookedMamba
from ssminterp.models.install import is_watched
from ssminterp.models.mixers.mamba1 import SILU, HookedMambaMixer, is_plain_conv
from ssminterp.models.mixers.scans import SelectiveScan, Step
from ssminterp.models.norm import FusedRMSNorm
from ssminterp.patching.contraction import AttributionTask, Contraction
from ssminterp.patching.gradients import Run, check_differentiable
from ssminterp.patching.metrics import checked
from ssminterp.patching.products import is_plain, linear
from ssminterp.patching.results import Baselines
from ssminterp.patching.stages import embedded, every_A
from ssminterp_kernels.causal_conv.triton_conv import conv_backward, conv_forward
from ssminterp_kernels.residual import add_and_norm, norm, norm_backward
from ssminterp_kernels.selective_scan.triton_gradients import scan_backward
from ssminterp_kernels.selective_scan.triton_scan import scan_forward
from ssminterp_kernels.selective_scan.triton_tensors import ScanTensors


def suits_stages(model: HookedMamba) -> bool:
    """Whether a model is layers of Mamba-1 as they came, on one device, and nobody but us watches a module of it."""
    backbone: Any = model.lm.backbone
    if model.hf_model is not model.lm or any(map(is_watched, (model.lm, backbone, backbone.embeddings))):
        return False
    blocks = list(model.blocks)
    return len({block.mixer.A_log.device for block in blocks}) == 1 and all(map(_is_plain_layer, blocks))


def _is_plain_layer(block: Any) -> bool:
    mixer, norm_before = block.mixer, block.norm
    if type(mixer) is not HookedMambaMixer or type(norm_before) is not FusedRMSNorm:
        return False
    linears = (mixer.in_proj, mixer.x_proj, mixer.dt_proj, mixer.out_proj)
    if not (mixer.config.hidden_act in SILU and is_plain_conv(mixer.conv1d) and all(map(is_plain, linears))):
        return False
    dtypes = {module.weight.dtype for module in (norm_before, mixer.conv1d, *linears)}
    return len(dtypes) == 1 and not any(map(is_watched, (block, mixer, norm_before)))


class _Layer(NamedTuple):
    """What a layer's forward leaves to its backward. Pairs are of the source and of the base run, [batch, pos, …]; the
    others are the base run's. boundaries: the states before segments of the scan; None if it has one."""

    block: Any
    resid: Float[Tensor, "tokens d_model"]
    in_x: Float[Tensor, "batch pos d_inner"]
    scans: tuple[SelectiveScan, SelectiveScan]
    boundaries: Tensor | None


def attribute_by_stages(task: AttributionTask, layers: Sequence[int], found: dict[str, Tensor]) -> Baselines:
    """Put the attributions of the states of some layers into `found`, by name. Returns the metric of both runs.

    Raises ValueError as `gradient_run` does for metrics.
    """
    with torch.inference_mode(False), torch.no_grad():
        lowest = min(layers)
        resid, passed = _forward(task, lowest)
        (of_source, of_base), gradient = _metrics(task, resid)
        (spec,) = task.sweep.specs
        points = {layer: task.sweep.point(spec, layer) for layer in layers}
        source, base = (
            Run(metric, {}, {}, {point.name: passed[layer].scans[i] for layer, point in points.items()})
            for i, metric in enumerate((of_source, of_base))
        )
        contraction = Contraction(task, source, base, found)
        gradient = gradient.float()
        rounded = gradient.to(passed[lowest].block.norm.weight.dtype)
        for layer, one in reversed(passed.items()):
            dgated = (rounded @ one.block.mixer.out_proj.weight).view(one.in_x.shape)
            if layer in points:
                contraction(points[layer], dgated)
            if layer > lowest:
                gradient, rounded = _backward(one, gradient, dgated)
        contraction.finish()
    return {"source": of_source, "base": of_base}


class _Room:
    """Where the products and residual streams of some layers of both runs stand, and views of it, layer by layer.

    Views are made of all layers at once: one by one they would take as long as what is computed of them. `gate`, `B`,
    `C` and `delta` are [two_batch, pos, …]; `runs` has them of each layer's source and base run in turn.
    """

    def __init__(self, task: AttributionTask, embeddings: Float[Tensor, "tokens d_model"], n_layers: int) -> None:
        mixer = task.sweep.model.blocks[0].mixer
        n, length, tokens = task.sweep.batch, task.sweep.length, len(embeddings)
        dtype, device = mixer.in_proj.weight.dtype, embeddings.device
        widths = (2 * mixer.d_inner, mixer.dt_rank + 2 * mixer.d_state, mixer.d_inner)
        projected, parts, deltas = (
            torch.empty(n_layers, tokens, width, dtype=dtype, device=device) for width in widths
        )
        in_x, gate = projected.split(mixer.d_inner, -1)
        dt, B, C = parts.split([mixer.dt_rank, mixer.d_state, mixer.d_state], -1)
        shape = (n_layers, 2 * n, length, -1)
        self.projected, self.parts, self.deltas, self.dt = (one.unbind() for one in (projected, parts, deltas, dt))
        self.in_x, self.gate, self.B, self.C, self.delta = (
            one.view(shape).unbind() for one in (in_x, gate, B, C, deltas)
        )
        runs = (one.view(2 * n_layers, n, length, -1).unbind() for one in (in_x, deltas, B, C, gate))
        self.runs = list(zip(*runs, strict=True))
        resid = torch.empty(n_layers + 1, *embeddings.shape, dtype=embeddings.dtype, device=device)
        resid[0] = embeddings
        self.resid, self.base_resid = resid.unbind(), resid[:, tokens // 2 :].unbind()


def _forward(task: AttributionTask, lowest: int) -> tuple[Float[Tensor, "two_batch pos d_model"], dict[int, _Layer]]:
    """The residual stream of the source and the base runs behind the last layer, and what layers leave from the lowest
    on that the backward comes to; those below it use its room before it does."""
    model, n, length = task.sweep.model, task.sweep.batch, task.sweep.length
    blocks = list(model.blocks)
    embeddings = embedded(model, torch.cat([task.sweep.source, task.sweep.base]).flatten())
    room = _Room(task, embeddings, len(blocks) - lowest)
    decays = every_A(model)
    passed = {}
    normed = norm(embeddings, blocks[0].norm.weight, blocks[0].norm.variance_epsilon)
    for layer, block in enumerate(blocks):
        i, behind = max(layer - lowest, 0), max(layer + 1 - lowest, 0)
        mixer = block.mixer
        decay, bias = decays[layer], mixer.dt_proj.bias
        A = mixer.A() if decay is None else decay
        _product(mixer.in_proj, normed, room.projected[i])
        x = conv_forward(room.in_x[i], mixer.conv1d.weight[:, 0], mixer.conv1d.bias, None, True)
        _product(mixer.x_proj, x.view(-1, mixer.d_inner), room.parts[i])
        torch.mm(room.dt[i], mixer.dt_proj.weight.t(), out=room.deltas[i])
        step = Step(room.delta[i], bias, softplus=True)
        whole = SelectiveScan(x, step, A, room.B[i], room.C[i], mixer.D, room.gate[i])
        gated, _, _, boundaries = scan_forward(_tensors(whole), save=True, batch=n)
        added = linear(mixer.out_proj, gated.view(-1, mixer.d_inner))
        if layer + 1 < len(blocks):
            after = blocks[layer + 1].norm
            normed = add_and_norm(room.resid[i], added, after.weight, after.variance_epsilon, room.resid[behind])
        else:
            torch.add(room.resid[i], added, out=room.resid[behind])
        if layer < lowest:
            continue
        source, base = (
            SelectiveScan(x_of, Step(delta, bias, softplus=True), A, B, C, mixer.D, gate)
            for x_of, (_, delta, B, C, gate) in zip(
                x.view(2, n, length, -1).unbind(), room.runs[2 * i : 2 * i + 2], strict=True
            )
        )
        kept = None if boundaries is None else boundaries[n:]
        passed[layer] = _Layer(block, room.base_resid[i], room.runs[2 * i + 1][0], (source, base), kept)
    return room.resid[-1].view(2 * n, length, -1), passed


def _tensors(scan: SelectiveScan) -> ScanTensors:
    """As the kernels take it."""
    step, nothing = scan.step, (None, None, None, None, None)
    return ScanTensors(
        *(scan.x, step.delta, scan.A, scan.B, scan.C, scan.D, scan.z, step.bias, *nothing),
        softplus=True,
        record_all=False,
        states_dtype=torch.float32,
    )


def _product(module: Any, x: Float[Tensor, "tokens d_in"], out: Float[Tensor, "tokens d_out"]) -> None:
    if module.bias is None:
        torch.mm(x, module.weight.t(), out=out)
    else:
        torch.addmm(module.bias, x, module.weight.t(), out=out)


def _metrics(
    task: AttributionTask, resid: Float[Tensor, "two_batch pos d_model"]
) -> tuple[tuple[Tensor, Tensor], Float[Tensor, "tokens d_model"]]:
    """The metric of both runs, and the gradient of the base run's residual stream behind the last layer."""
    lm: Any = task.sweep.model.lm

    def metric(residual: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, " batch"]:
        logits = lm.lm_head(lm.backbone.norm_f(residual).to(lm.lm_head.weight.dtype)).float()
        return checked(task.metric_name, task.metric(logits), len(residual))

    source, base = resid.chunk(2)
    of_source = metric(source)
    with torch.enable_grad():
        of_base = metric(leaf := base.detach().requires_grad_())
        check_differentiable(task.metric_name, of_base)
        (gradient,) = torch.autograd.grad(of_base.sum(), leaf)
    return (of_source, of_base.detach()), gradient.flatten(0, 1)


def _backward(
    layer: _Layer, later: Float[Tensor, "tokens d_model"], dgated: Float[Tensor, "batch pos d_inner"]
) -> tuple[Float[Tensor, "tokens d_model"], Float[Tensor, "tokens d_model"]]:
    """The gradient of the residual stream before a layer, from those behind it and of its gated output; in float32 and
    in the dtype of the weights."""
    mixer, norm_before, scan = layer.block.mixer, layer.block.norm, layer.scans[1]
    of = scan_backward(_tensors(scan), layer.boundaries, dgated, None, None, of_channels=False)
    dx, ddelta, dB, dC, dgate = (_matrix(of[name]) for name in ("x", "delta", "B", "C", "z"))
    dx.addmm_(torch.cat([ddelta @ mixer.dt_proj.weight, dB, dC], 1), mixer.x_proj.weight)
    weight, bias = mixer.conv1d.weight[:, 0], mixer.conv1d.bias
    din_x = conv_backward(layer.in_x, weight, bias, None, True, dx.view(dgated.shape), of_weights=False)[0]
    of_x, of_gate = mixer.in_proj.weight.chunk(2)
    dnormed = torch.mm(_matrix(din_x), of_x).addmm_(dgate, of_gate)
    return norm_backward(later, dnormed, layer.resid, norm_before.weight, norm_before.variance_epsilon)


def _matrix(tensor: Tensor | None) -> Float[Tensor, "tokens width"]:
    assert tensor is not None
    return tensor.view(-1, tensor.shape[-1])
