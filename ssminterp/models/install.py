"""Putting hook points into a Hugging Face model, which stays that model."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from ssminterp.models.hook_names import BLOCK_HOOKS, MODEL_HOOKS
from ssminterp.models.hook_points import HookPoint, HookSpec
from ssminterp.models.mixers import MIXERS, HookedMambaMixer
from ssminterp.models.mixers.state_matrices import StateMatricesBefore, forget_state_matrices
from ssminterp.models.norm import REPLACES, FusedRMSNorm

Taken = TypeVar("Taken", bound=nn.Module)


def causal_lm(hf_model: nn.Module) -> PreTrainedModel:
    """The Mamba inside, below a PEFT wrapper if there is one. Raises ValueError for any other architecture."""
    unwrap: Any = getattr(hf_model, "get_base_model", None)
    model: Any = hf_model if unwrap is None else unwrap()
    if type(model).__name__ not in MIXERS:
        raise ValueError(f"{type(model).__name__} is not supported; known architectures: {', '.join(MIXERS)}")
    return model


def input_device(hf_model: PreTrainedModel) -> torch.device:
    """Where tokens go in. Weights that accelerate keeps elsewhere come back to their execution device."""
    embeddings = hf_model.get_input_embeddings()
    execution_device = getattr(getattr(embeddings, "_hf_hook", None), "execution_device", None)
    return embeddings.weight.device if execution_device is None else torch.device(execution_device)


def layer_devices(hf_model: PreTrainedModel) -> list[torch.device]:
    """Where each layer computes."""
    elsewhere = [getattr(block.mixer, "_hf_hook", None) for block in hf_model.backbone.layers]
    devices = [getattr(hook, "execution_device", None) for hook in elsewhere]
    return [
        block.mixer.A_log.device if device is None else torch.device(device)
        for block, device in zip(hf_model.backbone.layers, devices, strict=True)
    ]


def hook_specs(hf_model: PreTrainedModel) -> tuple[HookSpec, ...]:
    """Every kind of hook of this architecture, in the order of the computation."""
    embed, final_norm, logits = MODEL_HOOKS
    resid_pre, mixer_in, mixer_out, resid_post = BLOCK_HOOKS
    mixer = MIXERS[type(hf_model).__name__].hook_specs
    return (embed, resid_pre, mixer_in, *mixer, mixer_out, resid_post, final_norm, logits)


def install_hooks(hf_model: PreTrainedModel) -> tuple[dict[str, HookPoint], ExitStack]:
    """Replace the mixers and norms and add the hook points; a model that has them keeps them.

    Returns the hook points by name, and what makes the model as it was when it is closed.
    """
    undo = ExitStack()
    if not hasattr(hf_model, "hook_logits"):
        backbone = hf_model.backbone
        for layer, block in enumerate(backbone.layers):
            undo.callback(setattr, block, "mixer", block.mixer)
            block.mixer = _take_over(block.mixer, MIXERS[type(hf_model).__name__])
            _take_over_norm(block, "norm", undo)
            _add_hook_points(block, BLOCK_HOOKS, layer, undo)
            for handle in (
                block.register_forward_pre_hook(_FirstArgument(block.hook_resid_pre)),
                block.mixer.register_forward_pre_hook(_FirstArgument(block.hook_mixer_in)),
                block.mixer.register_forward_hook(_Output(block.hook_mixer_out)),
                block.register_forward_hook(_Output(block.hook_resid_post)),
            ):
                undo.callback(handle.remove)
        _take_over_norm(backbone, "norm_f", undo)
        _add_hook_points(hf_model, MODEL_HOOKS, None, undo)
        for handle in (
            backbone.register_forward_pre_hook(StateMatricesBefore(HookedMambaMixer)),
            backbone.register_forward_hook(forget_state_matrices, always_call=True),
            backbone.embeddings.register_forward_hook(_Output(hf_model.hook_embed)),
            backbone.norm_f.register_forward_hook(_Output(hf_model.hook_final_norm)),
            hf_model.register_forward_hook(_Logits(hf_model.hook_logits)),
        ):
            undo.callback(handle.remove)
    return {hook.name: hook for hook in _hook_points(hf_model)}, undo


def _add_hook_points(module: nn.Module, specs: Sequence[HookSpec], layer: int | None, undo: ExitStack) -> None:
    for spec in specs:
        module.add_module(spec.attribute, HookPoint(spec, layer))
        undo.callback(delattr, module, spec.attribute)


def _hook_points(hf_model: PreTrainedModel) -> list[HookPoint]:
    specs = hook_specs(hf_model)
    blocks = hf_model.backbone.layers
    first = [getattr(hf_model, spec.attribute) for spec in specs if spec.short == "embed"]
    last = [getattr(hf_model, spec.attribute) for spec in specs if spec.short in ("final_norm", "logits")]
    inner = [
        getattr(block.mixer if spec.place == "mixer" else block, spec.attribute)
        for block in blocks
        for spec in specs
        if spec.place != "model"
    ]
    return [*first, *inner, *last]


def _take_over_norm(parent: nn.Module, name: str, undo: ExitStack) -> None:
    """Put torch's norm in the place of Hugging Face's. One that is not known, or is watched, stays."""
    norm = getattr(parent, name)
    if type(norm).__name__ in REPLACES and not (norm._forward_hooks or norm._forward_pre_hooks or norm._backward_hooks):
        undo.callback(setattr, parent, name, norm)
        setattr(parent, name, _take_over(norm, FusedRMSNorm))


def _take_over(module: nn.Module, own_class: type[Taken]) -> Taken:
    own = own_class(module)
    if hasattr(module, "_hf_hook"):
        # A model dispatched by accelerate: the hook that moves this module's weights moves along.
        accelerate_hooks = sys.modules["accelerate.hooks"]
        accelerate_hooks.add_hook_to_module(own, module._hf_hook)
    return own


class _FirstArgument:
    """A torch forward pre-hook that passes a module's first argument through a hook point."""

    def __init__(self, hook: HookPoint) -> None:
        self.hook = hook

    def __call__(self, module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if self.hook.is_idle:
            return None
        return (self.hook(arguments[0]), *arguments[1:])


class _Output:
    """A torch forward hook that passes a module's output through a hook point."""

    def __init__(self, hook: HookPoint) -> None:
        self.hook = hook

    def __call__(self, module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
        return self.hook(output)


class _Logits(_Output):
    """The same for a causal LM, whose output holds the logits among others."""

    def __call__(self, module: nn.Module, arguments: tuple[Any, ...], output: Any) -> Any:
        if isinstance(output, ModelOutput):
            output.logits = self.hook(output.logits)
        elif self.hook.is_listened_to:
            raise ValueError("hook_logits cannot fire on a tuple output: call the model with return_dict=True")
        return output


def is_watched(module: nn.Module) -> bool:
    """Whether torch hooks other than our own are called with a module, or accelerate moves its weights."""
    listeners = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    ours = (_FirstArgument, _Output, StateMatricesBefore)
    return "_hf_hook" in module.__dict__ or any(
        not isinstance(one, ours) and one is not forget_state_matrices for one in listeners
    )
