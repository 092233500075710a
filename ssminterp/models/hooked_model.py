"""What a hooked model is made of: the Hugging Face model, its hook points, its tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ssminterp.models.config import ModelConfig
from ssminterp.models.fingerprint import Fingerprint
from ssminterp.models.hook_names import NamesFilter, match_names, nearest
from ssminterp.models.hook_points import HookPoint, HookSpec
from ssminterp.models.install import causal_lm, hook_specs, input_device, install_hooks
from ssminterp.models.tokens import Text, check_tokens, decode_each, encode
from ssminterp.models.tracing.access import Tracing
from ssminterp.models.verify import check_parity, logits_of

Input: TypeAlias = Text | Tensor


class HookedModel(nn.Module):
    """A Hugging Face model with hook points and a tokenizer; how it is run is in its subclasses."""

    def __init__(
        self, hf_model: nn.Module, tokenizer: PreTrainedTokenizerBase | None, model_name: str, verify: bool
    ) -> None:
        super().__init__()
        lm = causal_lm(hf_model)
        plain = logits_of(lm) if verify else None
        self.hf_model = hf_model
        self.tokenizer = tokenizer
        self.training = hf_model.training
        self.cfg = ModelConfig.of(lm, model_name)
        self._fingerprint = Fingerprint()
        self.tracing = Tracing()
        self.hook_points: dict[str, HookPoint]
        self.hook_points, undo = install_hooks(lm)
        with undo:
            if plain is not None:
                check_parity(plain, logits_of(lm), lm, model_name)
            undo.pop_all()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # What `to`, `half` and the like come to; cfg says which dtype the weights have then.
        moved = super()._apply(fn, recurse)
        self.cfg = replace(self.cfg, dtype=self.lm.dtype)
        return moved

    # --- what there is -----------------------------------------------------------------------------------------------

    @property
    def lm(self) -> PreTrainedModel:
        """The Hugging Face causal LM, without a PEFT wrapper."""
        return causal_lm(self.hf_model)

    @property
    def blocks(self) -> Any:
        """The layers: `model.blocks[3].mixer.hook_delta` is the hook point of that name, in a trace its envoy."""
        return self.tracing.seen("blocks", self.lm.backbone.layers)

    def __getattr__(self, name: str) -> Any:
        """The hook points that belong to no layer, `model.hook_embed` among them."""
        points = self.__dict__.get("hook_points", {})
        if name in points:
            return self.tracing.seen(name, points[name])
        if name.startswith("hook_") and points:
            raise AttributeError(f"no hook is called {name!r}. Nearest names: {', '.join(nearest(name, list(points)))}")
        return super().__getattr__(name)

    @property
    def hook_specs(self) -> tuple[HookSpec, ...]:
        """The kinds of hook this architecture has: short name, axes, meaning."""
        return hook_specs(self.lm)

    @property
    def device(self) -> torch.device:
        """Where tokens go in."""
        return input_device(self.lm)

    def hook_names(self, names_filter: NamesFilter | None = None) -> list[str]:
        """All hook names in the order of the model, or those that a filter means. Raises ValueError if none does."""
        names = list(self.hook_points)
        return names if names_filter is None else match_names(names_filter, names)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The Hugging Face model's state dict, under its names."""
        return self.hf_model.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Loads into the Hugging Face model."""
        return self.hf_model.load_state_dict(*args, **kwargs)

    def hooks_to_record(self, names_filter: NamesFilter | None, layers: Sequence[int] | None) -> list[HookPoint]:
        """The hook points that a filter means in these layers; None means all but those computed on demand, and all
        layers. Raises ValueError if there are none."""
        if names_filter is None:
            hooks = [hook for hook in self.hook_points.values() if not hook.spec.on_demand]
        else:
            hooks = [self.hook_points[name] for name in self.hook_names(names_filter)]
        if layers is None:
            return hooks
        self.check_layers(layers)
        chosen = [hook for hook in hooks if hook.layer in layers]
        if not chosen:
            raise ValueError(f"names_filter={names_filter!r} has no hook in layers {list(layers)}")
        return chosen

    def check_layers(self, layers: Sequence[int]) -> None:
        """Raises ValueError for layers that the model does not have."""
        unknown = [layer for layer in layers if not 0 <= layer < self.cfg.n_layers]
        if unknown:
            raise ValueError(
                f"layers {unknown} do not exist: the model has {self.cfg.n_layers} (0 to {self.cfg.n_layers - 1})"
            )

    # --- text --------------------------------------------------------------------------------------------------------

    def to_tokens(self, text: Text) -> Int[Tensor, "batch pos"]:
        """Tokens of a text or several, without special tokens, padded on the right.

        Raises ValueError for an empty text and for words out of the vocabulary.
        """
        return encode(self.known_tokenizer(), text)[0].to(self.device)

    def to_str_tokens(self, text: str | Tensor) -> list[str]:
        """The text of each token of one sequence."""
        tokens = self.to_tokens(text) if isinstance(text, str) else check_tokens(text, self.cfg.vocab)
        if tokens.shape[0] != 1:
            raise ValueError(f"to_str_tokens takes one sequence, got a batch of {tokens.shape[0]}")
        return decode_each(self.known_tokenizer(), tokens[0])

    def known_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer. Raises ValueError if there is none."""
        if self.tokenizer is None:
            raise ValueError("this model has no tokenizer: pass tokens, or give one to from_hf(hf_model, tokenizer)")
        return self.tokenizer

    def prepare(self, text: Input, attention_mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Checked tokens [batch, pos] on the model's device, and their mask if some of them are padding."""
        if isinstance(text, Tensor):
            tokens = check_tokens(text, self.cfg.vocab)
        else:
            tokens, padding = encode(self.known_tokenizer(), text)
            attention_mask = padding if attention_mask is None else attention_mask
        if attention_mask is not None:
            if attention_mask.shape != tokens.shape:
                raise ValueError(
                    f"attention_mask has shape {list(attention_mask.shape)}, the tokens {list(tokens.shape)}"
                )
            attention_mask = attention_mask.to(self.device)
        return tokens.to(self.device), attention_mask
