"""ModelState: everything a Mamba has kept of the text it read, so that a run can go on from there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PretrainedConfig
from transformers.cache_utils import Cache, DynamicCache

from ssminterp.models.config import ModelConfig
from ssminterp.models.state_files import read_state_file, write_state_file
from ssminterp.positions import listed_positions

PARTS = ("conv", "ssm")


@dataclass(frozen=True, eq=False)
class ModelState:
    """The conv windows and SSM states of all layers after `n_tokens` tokens: a memory of a fixed size.

    conv: the last d_conv inputs of each layer's conv, [n_layers, batch, d_inner, d_conv], in the model's dtype.
    ssm: hidden states h_t, [n_layers, batch, d_inner, d_state], float32.
    n_tokens: how many tokens were read; positions of what comes next count on from there.
    model_name: the name of the model that read them. fingerprint: of its weights (`HookedMamba.fingerprint`); the
        state is refused by a model that has another. `dataclasses.replace(state, fingerprint=other.fingerprint())`
        is the way to try it all the same, for instance with a fine-tune of the model.
    history: where the state comes from, step by step.
    """

    conv: Float[Tensor, "n_layers batch d_inner d_conv"]
    ssm: Float[Tensor, "n_layers batch d_inner d_state"]
    n_tokens: int
    model_name: str
    fingerprint: str
    history: tuple[str, ...] = ()

    # --- to and from a run -----------------------------------------------------------------------------------------

    @classmethod
    def from_cache(
        cls, cache: Cache, n_tokens: int, model_name: str, fingerprint: str, history: tuple[str, ...] = ()
    ) -> ModelState:
        """From a Hugging Face cache. Layers that lie on several devices come together on the first one's."""
        device = cache.layers[0].conv_states[0].device
        conv = torch.stack([layer.conv_states[0].to(device) for layer in cache.layers])
        ssm = torch.stack([layer.recurrent_states[0].to(device) for layer in cache.layers])
        return cls(conv, ssm, n_tokens, model_name, fingerprint, history)

    def to_cache(
        self, config: PretrainedConfig, devices: Sequence[torch.device], dtype: torch.dtype | None = None
    ) -> DynamicCache:
        """A fresh Hugging Face cache with copies of these states; the run that uses it leaves `self` as it is.

        devices: where each layer computes. dtype: of the conv windows; the state's own by default.
        """
        cache = DynamicCache(config=config)
        for layer, device in enumerate(devices):
            conv = self.conv[layer].to(device, dtype or self.conv.dtype)
            cache.update_conv_state(conv, layer, conv_kernel_size=conv.shape[-1])
            cache.update_recurrent_state(self.ssm[layer].to(device), layer)
        return cache

    def check_fits(self, cfg: ModelConfig, fingerprint: str, batch: int) -> None:
        """Raises ValueError if a batch of that size of that model cannot go on from this state."""
        self.check_model(cfg, fingerprint)
        if self.batch != batch:
            remedy = f"; state.expand({batch}) repeats it" if self.batch == 1 else ""
            raise ValueError(f"the state holds a batch of {self.batch}, the tokens are a batch of {batch}{remedy}")

    def check_model(self, cfg: ModelConfig, fingerprint: str) -> None:
        """Raises ValueError if a model is not the one that read this state."""
        own = (self.n_layers, self.ssm.shape[2], self.conv.shape[3], self.ssm.shape[3], self.fingerprint)
        wanted = (cfg.n_layers, cfg.d_inner, cfg.d_conv, cfg.d_state, fingerprint)
        if own != wanted:
            raise ValueError(
                f"this state was read by {_described(self.model_name, *own)}: it cannot be continued by "
                f"{_described(cfg.model_name, *wanted)}. Read the text again with this model"
            )

    # --- what is in it, and parts of it ------------------------------------------------------------------------------

    @property
    def n_layers(self) -> int:
        return self.conv.shape[0]

    @property
    def batch(self) -> int:
        """How many examples it holds."""
        return self.conv.shape[1]

    def __repr__(self) -> str:
        megabytes = (self.conv.nbytes + self.ssm.nbytes) / 1e6
        origin = self.history[-1] if self.history else "of unknown origin"
        return (
            f"ModelState({self.model_name}, {self.n_tokens} tokens, batch {self.batch}, {megabytes:.2f} MB, {origin})"
        )

    def __getitem__(self, examples: int | slice | Sequence[int]) -> ModelState:
        """Some examples of the batch; one as a batch of one. Raises ValueError for those that there are not."""
        wanted = range(self.batch)[examples] if isinstance(examples, slice) else listed_positions(examples)
        outside = [i for i in wanted if not -self.batch <= i < self.batch]
        if outside or not len(wanted):
            raise ValueError(f"the state has no examples {outside or examples!r}: it holds a batch of {self.batch}")
        rows = list(wanted)
        return replace(self, conv=self.conv[:, rows], ssm=self.ssm[:, rows])

    def expand(self, batch: int) -> ModelState:
        """The state of one text for each of `batch` examples. Raises ValueError if it holds several already."""
        if self.batch != 1 or batch < 1:
            raise ValueError(f"only one example can be expanded to a batch, got a batch of {self.batch} to {batch}")
        return replace(self, conv=self.conv.expand(-1, batch, -1, -1), ssm=self.ssm.expand(-1, batch, -1, -1))

    def repeat(self, copies: int) -> ModelState:
        """Every example so many times, one beside the other, as beam search and several samples of one prompt need."""
        repeated = {part: getattr(self, part).repeat_interleave(copies, dim=1) for part in PARTS}
        return self if copies == 1 else replace(self, **repeated)

    def to(self, device: torch.device | str) -> ModelState:
        """The same state on another device."""
        return replace(self, conv=self.conv.to(device), ssm=self.ssm.to(device))

    def swap(
        self,
        other: ModelState,
        layers: int | Sequence[int] | None = None,
        channels: int | Sequence[int] | None = None,
        parts: str | Sequence[str] = PARTS,
    ) -> ModelState:
        """This state with some layers, or some channels of them, taken from another state of the same model.

        layers, channels (of d_inner): all by default. parts: "conv", "ssm" or both.

        >>> from ssminterp import HookedMamba
        >>> model = HookedMamba.from_pretrained("nano-mamba", device="cpu")
        >>> lamp, coat = (model.read(f"Given red: {thing}.") for thing in ("lamp", "coat"))
        >>> mixed = lamp.swap(coat, layers=[0])
        >>> bool((mixed.ssm[0] == coat.ssm[0]).all()), bool((mixed.ssm[1] == lamp.ssm[1]).all())
        (True, True)

        Raises ValueError for a state of another model or batch size, and for layers, channels or parts there are not.
        """
        check_alike(self, other)
        parts = [parts] if isinstance(parts, str) else list(parts)
        unknown = [part for part in parts if part not in PARTS]
        if unknown or not parts:
            raise ValueError(f"parts must be 'conv', 'ssm' or both, got {unknown or parts}")
        rows = _indices("layers", layers, self.n_layers)
        columns = _indices("channels", channels, self.ssm.shape[2])
        mixed = {part: getattr(self, part).clone() for part in PARTS}
        for part in parts:
            theirs = getattr(other, part).to(mixed[part])
            mixed[part][rows[:, None], :, columns] = theirs[rows[:, None], :, columns]
        count = f"layers {rows.tolist()}" + ("" if channels is None else f", {len(columns)} channels")
        step = f"{' and '.join(parts)} of {count} swapped with [{_origin(other)}]"
        return replace(self, **mixed, history=(*self.history, step))

    # --- files -------------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write a safetensors file: written beside and renamed, so that no half of it is ever read as whole.

        Raises ValueError if it cannot be written.
        """
        described = {"n_tokens": self.n_tokens, "model_name": self.model_name, "history": list(self.history)}
        write_state_file(path, {"conv": self.conv, "ssm": self.ssm}, described | {"fingerprint": self.fingerprint})

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> ModelState:
        """A state that `save` wrote. `model.load_state(path)` checks as well that it is that model's.

        Raises ValueError if the file is missing, truncated or no state.
        """
        tensors, described = read_state_file(path, device)
        return cls(
            tensors["conv"],
            tensors["ssm"],
            described["n_tokens"],
            described["model_name"],
            described["fingerprint"],
            tuple(described["history"]),
        )


def check_alike(state: ModelState, *others: ModelState) -> None:
    """Raises ValueError for what are no states of one model and batch size."""
    for other in others:
        if not isinstance(other, ModelState):
            raise ValueError(f"a ModelState is needed, got {type(other).__name__}")
        if (other.fingerprint, other.ssm.shape[0], other.ssm.shape[2:]) != (
            state.fingerprint,
            state.ssm.shape[0],
            state.ssm.shape[2:],
        ):
            raise ValueError(
                f"the states are of two models: {state.model_name} [{state.fingerprint}] and {other.model_name} "
                f"[{other.fingerprint}]"
            )
        if other.batch != state.batch:
            raise ValueError(
                f"the states hold batches of {state.batch} and {other.batch}: state.expand(n) repeats one, state[i] "
                "picks an example"
            )


def _origin(state: ModelState) -> str:
    return "; ".join(state.history)


def _indices(axis: str, wanted: int | Sequence[int] | None, size: int) -> Tensor:
    listed = list(range(size)) if wanted is None else listed_positions(wanted)
    outside = [i for i in listed if not 0 <= i < size]
    if outside:
        raise ValueError(f"{axis} {outside} do not exist: the state has {size} (0 to {size - 1})")
    return torch.tensor(listed, dtype=torch.long)


def _described(name: str, n_layers: int, d_inner: int, d_conv: int, d_state: int, fingerprint: str) -> str:
    return (
        f"{name} ({n_layers} layers, d_inner {d_inner}, d_conv {d_conv}, d_state {d_state}, fingerprint {fingerprint})"
    )
