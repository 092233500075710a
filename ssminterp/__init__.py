"""ssminterp: see how a state space model thinks.

Hook, record, patch and trace the hidden states of Mamba. Start with `HookedMamba.from_pretrained("tiny-mamba")`.
"""

from ssminterp.interventions import ablate, freeze, knockout, patch, scale, steer
from ssminterp.models import ActivationCache, HookedMamba, HookPoint, ModelState

__all__ = [
    "ActivationCache",
    "HookPoint",
    "HookedMamba",
    "ModelState",
    "ablate",
    "freeze",
    "knockout",
    "patch",
    "scale",
    "steer",
]
