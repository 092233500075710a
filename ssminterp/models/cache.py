"""ActivationCache: what a run recorded, by hook name."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from jaxtyping import Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ssminterp.files import written_whole
from ssminterp.models.hook_names import BLOCK_HOOKS, NamesFilter, match_names, nearest
from ssminterp.positions import Positions, resolve_positions


class ActivationCache(Mapping[str, Tensor]):
    """Recorded activations: `cache["blocks.3.mixer.hook_delta"]`, or short: `cache["delta", 3]`, `cache["embed"]`.

    Every tensor is [batch, pos, …] where axis 1 holds `positions` in the order they were asked for (all if None).

    tokens: the run's input, [batch, pos]. model_name: the model that made it.
    start: the position of the first of these tokens; not 0 if a state had read others before.
    """

    def __init__(
        self,
        activations: Mapping[str, Tensor],
        tokens: Int[Tensor, "batch pos"],
        model_name: str,
        positions: Sequence[int] | None = None,
        start: int = 0,
    ) -> None:
        self._activations = dict(activations)
        self.tokens = tokens
        self.model_name = model_name
        self.positions = None if positions is None else tuple(positions)
        self.start = start

    def __getitem__(self, key: str | tuple[str, int]) -> Tensor:
        name = _full_name(key)
        if name is None:
            raise KeyError(f"{key!r} is no key: name an activation by a hook name or (short name, layer)")
        if name not in self._activations:
            raise KeyError(
                f"{name!r} was not recorded: name it in names_filter. Nearest recorded: "
                f"{', '.join(nearest(name, list(self._activations))) or 'nothing was'}"
            )
        return self._activations[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._activations)

    def __len__(self) -> int:
        return len(self._activations)

    def __contains__(self, key: object) -> bool:
        return _full_name(key) in self._activations

    def __repr__(self) -> str:
        gigabytes = sum(t.nbytes for t in self.values()) / 1e9
        where = "all positions" if self.positions is None else f"positions {list(self.positions)}"
        return f"ActivationCache({len(self)} activations of {self.model_name}, {where}, {gigabytes:.3f} GB)"

    def stack(self, pattern: NamesFilter) -> Tensor:
        """The activations that match, stacked on a new first axis in the model's order: [layer, batch, pos, …].

        Raises ValueError if none matches or their shapes differ.
        """
        names = match_names(pattern, list(self))
        shapes = {tuple(self[name].shape) for name in names}
        if len(shapes) > 1:
            raise ValueError(
                f"{pattern!r} matches activations of different shapes {sorted(shapes)}: stack one kind at a time"
            )
        return torch.stack([self[name] for name in names])

    def at(self, positions: Positions) -> ActivationCache:
        """The cache restricted to token positions (of the text, not of the recorded axis). Raises ValueError if one
        was not recorded."""
        stop = self.start + self.tokens.shape[1]
        wanted = resolve_positions(positions, stop)
        assert wanted is not None
        recorded = self.positions if self.positions is not None else tuple(range(self.start, stop))
        missing = [p for p in wanted if p not in recorded]
        if missing:
            raise ValueError(f"positions {missing} were not recorded; recorded are {list(recorded)}")
        rows = [recorded.index(p) for p in wanted]
        return ActivationCache(
            {n: t[:, rows] for n, t in self.items()}, self.tokens, self.model_name, wanted, self.start
        )

    def to(self, device: torch.device | str) -> ActivationCache:
        """The same cache on another device."""
        moved = {name: tensor.to(device) for name, tensor in self.items()}
        return ActivationCache(moved, self.tokens.to(device), self.model_name, self.positions, self.start)

    def save(self, path: str | Path) -> None:
        """Write a safetensors file; tokens, positions and the model's name travel with it.

        Raises ValueError if the file cannot be written.
        """
        tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in self.items()}
        tensors["tokens"] = self.tokens.cpu().contiguous()
        metadata = {
            "model_name": self.model_name,
            "positions": json.dumps(self.positions),
            "start": str(self.start),
            "names": json.dumps(list(self)),
        }
        with written_whole(Path(path)) as beside:
            save_file(tensors, beside, metadata)

    @classmethod
    def load(cls, path: str | Path, device: str = "cpu") -> ActivationCache:
        """Read a cache written by `save`. Raises ValueError if the file is missing, truncated or no cache."""
        try:
            with safe_open(path, framework="pt", device=device) as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} cannot be read as an activation cache: {error}") from error
        try:
            names, positions = json.loads(metadata["names"]), json.loads(metadata["positions"])
            activations, start = {name: tensors[name] for name in names}, int(metadata.get("start", "0"))
            return cls(activations, tensors["tokens"], metadata["model_name"], positions, start)
        except (KeyError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is a safetensors file, but not one that ActivationCache.save wrote") from error


def _full_name(key: object) -> str | None:
    """The hook name that a key means, None for what is no key."""
    match key:
        case str():
            return key if "hook_" in key else f"hook_{key}"
        case (str(short), int(layer)):
            in_block = any(spec.short == short for spec in BLOCK_HOOKS)
            return f"blocks.{layer}.hook_{short}" if in_block else f"blocks.{layer}.mixer.hook_{short}"
        case _:
            return None
