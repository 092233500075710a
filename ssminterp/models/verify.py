"""The check at load time that a hooked model computes what the plain one does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

from ssminterp.models.install import input_device

# Largest difference of logits allowed, relative to max(1, largest logit). Plain transformers computes norms, B · x and
# A in float32 even for a float64 model. Of rounding alone, 48 layers with random weights make 3e-3 in float32: weights
# moved by one rounding move plain transformers' own logits by 1e-3. A mixer that is computed differently makes more.
TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-2, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def probe_tokens(hf_model: PreTrainedModel) -> Tensor:
    """A short random input, the same for every call."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(hf_model.config.vocab_size, (2, 9), generator=generator)
    return tokens.to(input_device(hf_model))


@contextmanager
def whole_float32() -> Iterator[None]:
    """Without TF32, which cuDNN's convolutions use unless told not to, and the hooked model never does."""
    cudnn, cublas = torch.backends.cudnn, torch.backends.cuda.matmul
    allowed = cudnn.allow_tf32, cublas.allow_tf32
    try:
        cudnn.allow_tf32 = cublas.allow_tf32 = False
        yield
    finally:
        cudnn.allow_tf32, cublas.allow_tf32 = allowed


@torch.no_grad()
def logits_of(hf_model: PreTrainedModel) -> Tensor:
    """The probe's logits in eval mode, whatever mode the model is in."""
    modes = {module: module.training for module in hf_model.modules()}
    verbosity = logging.get_verbosity()
    try:
        # The plain mixers warn that they lack kernels which nothing after this check would use.
        logging.set_verbosity_error()
        with whole_float32():
            return hf_model.eval()(probe_tokens(hf_model), use_cache=False).logits
    finally:
        logging.set_verbosity(verbosity)
        for module, training in modes.items():
            module.training = training


def check_parity(plain: Tensor, hooked: Tensor, hf_model: PreTrainedModel, name: str) -> None:
    """Raises ValueError, with both sides and a likely reason, if the hooked logits are not the plain ones."""
    difference = (plain - hooked).abs().max().item()
    tolerance = TOLERANCE[hf_model.dtype] * max(1.0, plain.abs().max().item())
    if not difference <= tolerance:
        raise ValueError(
            f"hooked logits of {name} differ from plain transformers' by {difference:.3g} "
            f"(allowed {tolerance:.3g}, {hf_model.dtype}): "
            f"plain {plain.flatten()[:3].tolist()}, hooked {hooked.flatten()[:3].tolist()}. {_reason(hf_model)}; "
            "verify=False loads the model all the same"
        )


def _reason(hf_model: PreTrainedModel) -> str:
    """Plain transformers takes dt_proj's and conv1d's weights instead of calling them, and so passes adapters by."""
    plain = {"dt_proj": nn.Linear, "conv1d": nn.Conv1d}
    mixers = [block.mixer for block in hf_model.backbone.layers]
    adapted = [name for name, kind in plain.items() if any(type(getattr(mixer, name)) is not kind for mixer in mixers)]
    if adapted:
        return (
            f"An adapter changes {' and '.join(adapted)}. It acts in a hooked model, but plain transformers goes past "
            "it: merge it (merge_and_unload), and it acts in both"
        )
    return "This transformers release may compute its mixer differently"
