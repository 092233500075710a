"""Datasets of activations: what chosen hooks see in many texts, on disk, for probes and sparse autoencoders."""

from ssminterp.activations.collect import collect_activations
from ssminterp.activations.dataset import ActivationDataset

__all__ = ["ActivationDataset", "collect_activations"]
