"""Checkpoints as the mamba_ssm package writes them, without transformers' config: `state-spaces/mamba-130m` and kin.

Their weights have transformers' names but for the embedding; their config has names of its own, and a vocabulary
smaller than the embedding, which is padded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import MambaConfig

# What transformers' `key_mapping` is to rename.
RENAMED = {r"^backbone\.embedding\.": "backbone.embeddings."}

# These checkpoints come without one: all that state-spaces published were trained on GPT-NeoX's.
TOKENIZER = "EleutherAI/gpt-neox-20b"

# Names in `ssm_cfg` (the arguments of mamba_ssm's `Mamba`) and in transformers. The names below change nothing that a
# trained model computes: how weights were initialised and which kernel runs.
_SSM = {
    "d_state": "state_size",
    "d_conv": "conv_kernel",
    "expand": "expand",
    "dt_rank": "time_step_rank",
    "conv_bias": "use_conv_bias",
    "bias": "use_bias",
}
_WITHOUT_EFFECT = {"layer", "dt_min", "dt_max", "dt_init", "dt_scale", "dt_init_floor", "use_fast_path"}


def is_original(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is one of mamba_ssm."""
    return "model_type" not in config and {"d_model", "n_layer", "vocab_size"} <= config.keys()


def to_transformers_config(config: Mapping[str, Any]) -> MambaConfig:
    """The same model in transformers' words.

    Raises ValueError for what transformers' Mamba cannot be: Mamba-2, attention layers, MLPs, layer norms, options
    that are not known.
    """
    ssm = dict(config.get("ssm_cfg") or {})
    refused = {
        f"layers of the kind {ssm.get('layer')!r}": ssm.get("layer", "Mamba1") != "Mamba1",
        "attention layers (attn_layer_idx)": bool(config.get("attn_layer_idx")),
        "MLP layers (d_intermediate)": bool(config.get("d_intermediate")),
        "LayerNorm instead of RMSNorm (rms_norm: false)": not config.get("rms_norm", True),
    }
    found = [problem for problem, is_there in refused.items() if is_there]
    found += [f"the option ssm_cfg.{key}" for key in sorted(ssm.keys() - _SSM.keys() - _WITHOUT_EFFECT)]
    if found:
        raise ValueError(
            f"the checkpoint is in mamba_ssm's format, with {', '.join(found)}; supported is Mamba-1 alone"
        )
    return MambaConfig(
        architectures=["MambaForCausalLM"],
        hidden_size=config["d_model"],
        num_hidden_layers=config["n_layer"],
        vocab_size=padded_vocab(config["vocab_size"], config.get("pad_vocab_size_multiple", 8)),
        residual_in_fp32=config.get("residual_in_fp32", True),
        tie_word_embeddings=config.get("tie_embeddings", True),
        **{_SSM[key]: value for key, value in ssm.items() if key in _SSM},
    )


def padded_vocab(vocab_size: int, multiple: int) -> int:
    """The rows of the embedding: the vocabulary rounded up. GPT-NeoX's 50,277 tokens become 50,280."""
    return -(-vocab_size // multiple) * multiple
