"""Hook points: the named places of a model where tensors can be read and replaced."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from ssminterp.models.timeline import Window
from ssminterp.models.tracing.requests import MARK, for_a_reader, is_in_a_trace, is_requested, pass_by
from ssminterp.positions import Positions, resolve_positions

# (tensor, hook point) -> a replacement, or None to leave the tensor as it is
HookFunction: TypeAlias = Callable[[Tensor, "HookPoint"], Tensor | None]


@dataclass(frozen=True)
class HookSpec:
    """What a kind of hook point holds. `place` tells where it hangs: in the model, a block, or a block's mixer."""

    short: str
    place: Literal["model", "block", "mixer"]
    axes: tuple[str, ...]
    meaning: str
    on_demand: bool = False

    @property
    def attribute(self) -> str:
        return f"hook_{self.short}"

    def name(self, layer: int | None) -> str:
        prefix = {"model": "", "block": f"blocks.{layer}.", "mixer": f"blocks.{layer}.mixer."}[self.place]
        return prefix + self.attribute


class Registered(NamedTuple):
    """A hook function and the positions it was registered for (None: the whole tensor at once)."""

    function: HookFunction
    positions: Positions | None


class HookPoint(nn.Module):
    """One named tensor of the model: [batch, pos, …]. Identity unless functions or recorders are attached.

    A hook function gets `(tensor, hook)` and returns a replacement or None. Registered with positions it is called
    once per position, in ascending order, with that position's slice [batch, …]; `hook.position` then says which.
    Functions run in the order of registration; recorders see what the model goes on with.

    window: which part of a longer text is being run, in `generate`, `read` and after a state; positions are those of
        the whole text then. None: the run is the whole text.
    """

    # Whether it wants to know its window though no function is attached.
    always_follows = False

    def __init__(self, spec: HookSpec, layer: int | None) -> None:
        super().__init__()
        self.spec = spec
        self.layer = layer
        self.name = spec.name(layer)
        self.position: int | None = None
        self.functions: list[Registered] = []
        self.recorders: list[Recorder] = []
        self.window: Window | None = None

    @property
    def acting(self) -> list[Registered]:
        """The functions that act in the present run, with their positions in it.

        A function that knows positions of its own has a method `within(window)`: what it does there, or None.
        """
        if self.window is None:
            return self.functions
        found = []
        for function, positions in self.functions if self.window.has_acting else []:
            if positions is not None:
                local = self.window.local(positions)
                found += [Registered(function, local)] if local else []
            else:
                here = function.within(self.window) if hasattr(function, "within") else function
                found += [Registered(here, None)] if here is not None else []
        return found

    @property
    def is_read_from_outside(self) -> bool:
        """Whether torch's own hooks are registered here, or an nnsight trace that runs now waits for the tensor."""
        hooks = len(self._forward_hooks) + len(self._forward_pre_hooks)
        return hooks > 0 or is_requested(self, by_name=self.spec.on_demand)

    @property
    def is_listened_to(self) -> bool:
        """Whether anything would see the tensor: functions, recorders, torch's own hooks or an nnsight trace."""
        return not self.is_idle and self.has_listeners()

    def has_listeners(self) -> bool:
        """What `is_listened_to` says where it is not idle."""
        # Lengths, because Dynamo of torch 2.11 cannot look into bool(list).
        return len(self.recorders) > 0 or self.is_read_from_outside or len(self.acting) > 0

    @property
    def is_idle(self) -> bool:
        """Whether nobody is there who could see the tensor: the quick answer for plain runs."""
        return not (
            self.functions
            or self.recorders
            or self._forward_hooks
            or self._forward_pre_hooks
            or self._backward_hooks
            or self._backward_pre_hooks
            or (self.__dict__.get(MARK) is not None and is_in_a_trace(self))
        )

    def __call__(self, tensor: Tensor) -> Tensor:
        if self.is_idle:
            return tensor
        return super().__call__(for_a_reader(tensor) if self.is_read_from_outside else tensor)

    @property
    def output(self) -> Tensor:
        """The tensor, in nnsight traces: there the model's hook points are envoys. Raises ValueError anywhere else."""
        raise self._outside_of_a_trace()

    @output.setter
    def output(self, value: object) -> None:
        raise self._outside_of_a_trace()

    def _outside_of_a_trace(self) -> ValueError:
        return ValueError(
            f"{self.name}.output is there only in the code of `with model.trace(…):`, where the hook point must be "
            "taken from the model anew. Elsewhere use run_with_cache and run_with_hooks"
        )

    def pass_by(self) -> None:
        """Instead of a call, where nothing listens and the tensor is not computed."""
        if self.__dict__.get(MARK) is not None:
            pass_by(self)

    def forward(self, tensor: Tensor) -> Tensor:
        acting = self.acting
        if acting:
            # Another hook point may hold the same storage, and a hook function may edit in place.
            tensor = tensor.clone()
            for registered in acting:
                tensor = self._replaced(registered, tensor)
        for recorder in self.recorders:
            recorder.record(self, tensor)
        return tensor

    def _replaced(self, registered: Registered, tensor: Tensor) -> Tensor:
        positions = resolve_positions(registered.positions, tensor.shape[1])
        if positions is None:
            return self.call(registered.function, tensor)
        replaced = {p: self.call(registered.function, tensor[:, p], position=p) for p in sorted(positions)}
        return torch.stack([replaced[p] if p in replaced else tensor[:, p] for p in range(tensor.shape[1])], dim=1)

    def call(self, function: HookFunction, tensor: Tensor, position: int | None = None) -> Tensor:
        """The function's replacement for `tensor`, checked and cast to its dtype; `tensor` if it gives None."""
        self.position = position if position is None or self.window is None else self.window.begin + position
        try:
            returned = function(tensor, self)
        finally:
            self.position = None
        if returned is None:
            return tensor
        if not isinstance(returned, Tensor):
            raise ValueError(
                f"a hook function at {self.name} must return a tensor or None, got {type(returned).__name__}"
            )
        if returned.shape != tensor.shape:
            raise ValueError(
                f"a hook function at {self.name} returned shape {list(returned.shape)}, "
                f"but the tensor there has shape {list(tensor.shape)}"
            )
        return returned.to(tensor.dtype)

    def extra_repr(self) -> str:
        return f"{self.name}: {' '.join(self.spec.axes)}"


class Recorder:
    """Writes what passes a hook point into `store[name]`, only at `positions`, on `device`, detached if asked."""

    def __init__(
        self,
        store: dict[str, Tensor],
        positions: Sequence[int] | None = None,
        device: torch.device | str | None = None,
        detach: bool = True,
    ) -> None:
        self.store = store
        self.positions = None if positions is None else tuple(positions)
        self.device = device
        self.detach = detach

    def record(self, hook: HookPoint, tensor: Tensor) -> None:
        """Store a tensor that has every position on axis 1."""
        if self.positions is not None:
            tensor = tensor[:, list(self.positions)]
        self.keep(hook, tensor)

    def keep(self, hook: HookPoint, tensor: Tensor) -> None:
        """Store a tensor whose axis 1 already holds just the positions asked for."""
        tensor = tensor.detach() if self.detach else tensor
        self.store[hook.name] = tensor if self.device is None else tensor.to(self.device)


@contextmanager
def attached(pairs: Sequence[tuple[HookPoint, Registered | Recorder]]) -> Iterator[None]:
    """A context in which functions and recorders are attached to hook points, in the order given; no trace is left."""
    try:
        for hook, listener in pairs:
            if isinstance(listener, Recorder):
                hook.recorders.append(listener)
            else:
                hook.functions.append(listener)
        yield
    finally:
        for hook, listener in pairs:
            hook.functions = [kept for kept in hook.functions if kept is not listener]
            hook.recorders = [kept for kept in hook.recorders if kept is not listener]
