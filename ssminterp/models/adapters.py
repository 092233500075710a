"""PEFT adapters: a folder that holds a change to another checkpoint, whatever else lies in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

ADAPTER_CONFIG = "adapter_config.json"


def base_of(folder: Path) -> tuple[str, str | None]:
    """The name or folder, and the revision, of the checkpoint that an adapter changes.

    Raises ValueError if the adapter does not say it.
    """
    config: dict[str, Any] = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    base = config.get("base_model_name_or_path")
    if not base:
        raise ValueError(
            f"the adapter in {folder} does not say of which model it is (base_model_name_or_path): load that model, "
            "wrap it with peft.PeftModel.from_pretrained(model, folder), and pass it to HookedMamba.from_hf"
        )
    return base, config.get("revision")


def with_adapter(base: PreTrainedModel, folder: Path) -> nn.Module:
    """The base model with the adapter's weights in it, as a `PeftModel`.

    Raises ValueError if peft is not installed, if parts of the base are offloaded, or if the adapter's weights are not
    those that its config asks for.
    """
    try:
        from peft import PeftModel, get_peft_model_state_dict
        from peft.utils import load_peft_weights
    except ImportError as error:
        raise ValueError(f"{folder} is a PEFT adapter, which needs peft: pip install 'ssminterp[peft]'") from error
    if any(parameter.is_meta for parameter in base.parameters()):
        raise ValueError(
            f"parts of the base {base.name_or_path!r} are offloaded, where peft cannot put an adapter: give it more "
            "memory, or merge the adapter once (merge_and_unload, save_pretrained) and load the merged folder"
        )
    model = PeftModel.from_pretrained(base, str(folder))
    # peft only warns of weights that are not in the file, and skips those that it has no place for.
    written, wanted = set(load_peft_weights(str(folder), device="cpu")), set(get_peft_model_state_dict(model))
    if written != wanted:
        raise ValueError(
            f"the adapter in {folder} does not fit its base {base.name_or_path!r}: missing are "
            f"{sorted(wanted - written)[:5]}, unexpected {sorted(written - wanted)[:5]}"
        )
    return model
