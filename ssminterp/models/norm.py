"""The RMS norm of the residual stream as one operator."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

# Hugging Face's classes whose forward `FusedRMSNorm` computes.
REPLACES = ("MambaRMSNorm", "FalconMambaRMSNorm")


class FusedRMSNorm(nn.Module):
    """Takes over the weight of Hugging Face's RMS norm, which is six kernels on a GPU and up to eight in bfloat16.

    Torch's is one there. In half precision the weight is a second one, because Hugging Face's rounds before it: what
    was rounded otherwise would grow from layer to layer to a tenth of the logits of a deep model.
    """

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight: nn.Parameter = norm.weight
        self.variance_epsilon: float = norm.variance_epsilon
        self.training = norm.training

    def forward(self, hidden_states: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        weight = self.weight
        if hidden_states.dtype == weight.dtype == torch.float32:
            return F.rms_norm(hidden_states, weight.shape, weight, self.variance_epsilon)
        return weight * F.rms_norm(hidden_states, weight.shape, None, self.variance_epsilon)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.variance_epsilon}"
