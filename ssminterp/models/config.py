"""The numbers of a model, under the names of the axes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of a hooked model; the attribute names are the axis names used everywhere."""

    model_name: str
    architecture: str
    n_layers: int
    d_model: int
    d_inner: int
    d_state: int
    d_conv: int
    dt_rank: int
    vocab: int
    dtype: torch.dtype
    residual_in_fp32: bool

    @classmethod
    def of(cls, hf_model: PreTrainedModel, model_name: str) -> ModelConfig:
        config = hf_model.config
        return cls(
            model_name=model_name,
            architecture=type(hf_model).__name__,
            n_layers=config.num_hidden_layers,
            d_model=config.hidden_size,
            d_inner=config.intermediate_size,
            d_state=config.state_size,
            d_conv=config.conv_kernel,
            dt_rank=int(config.time_step_rank),
            vocab=config.vocab_size,
            dtype=hf_model.dtype,
            residual_in_fp32=config.residual_in_fp32,
        )

    def axis_size(self, axis: str) -> int:
        """The size of a feature axis ("d_model", "d_inner", "d_state", "d_conv", "vocab")."""
        return int(getattr(self, axis))
