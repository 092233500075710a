"""The envoys of a hooked model's parts: nnsight's, under the design's names, with its positions and errors."""

from __future__ import annotations

from numbers import Integral
from typing import Any

import torch
from nnsight.intervention.envoy import Envoy
from nnsight.intervention.eproperty import eproperty
from nnsight.intervention.interleaver import Mediator
from torch import Tensor, nn

from ssminterp.models.hook_names import nearest
from ssminterp.models.hook_points import HookPoint
from ssminterp.models.mixers.state_hook import StateHookPoint, StatePosition, StatePositions
from ssminterp.models.tracing.naming import design_name


class ModuleEnvoy(Envoy):
    """The envoy of any module. A hook that does not exist is an error that lists the nearest names."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if not name.startswith("hook_") or "_module" not in self.__dict__:
                raise
        wanted = design_name(f"{self.path}.{name}")
        near = nearest(wanted, self.root._module.hook_names())
        raise AttributeError(f"no hook is called {wanted!r}. Nearest names: {', '.join(near)}")


class BlocksEnvoy(ModuleEnvoy):
    """The envoy of the layers."""

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, int) and not -len(self) <= key < len(self):
            raise IndexError(f"layer {key} does not exist: the model has {len(self)} (0 to {len(self) - 1})")
        return super().__getitem__(key)


class HookEnvoy(ModuleEnvoy):
    """The envoy of a hook point: `output` is its tensor [batch, pos, …], to read, replace, or edit in place.

    An invoke among others sees its own rows and, where shorter inputs were padded, its own positions.
    """

    has_positions = True

    @eproperty
    def output(self, value: Tensor) -> Tensor:
        """What the hook point holds, as the model goes on with it."""
        return self._own(value)

    @output.postprocess  # type: ignore[no-redef]
    def output(self, value: Tensor) -> Tensor:
        whole = Mediator.value(f"{self.path}.output")
        own = self._own(whole)
        if not isinstance(value, Tensor):
            raise ValueError(f"{self.name} must be set to a tensor, got {type(value).__name__}")
        if value.shape != own.shape:
            raise ValueError(
                f"{self.name} was set to shape {list(value.shape)}, but the tensor there has shape {list(own.shape)}"
            )
        value = value.to(own.dtype)
        if own is whole:
            return value
        span = self._span()
        return torch.cat([whole[:, : span.start], value, whole[:, span.stop :]], dim=1)

    @eproperty
    def input(self, value: Any) -> Tensor:
        """What the hook point holds before hook functions that are attached to it."""
        return self._own(value[0][0])

    @input.postprocess  # type: ignore[no-redef]
    def input(self, value: Tensor) -> Tensor:
        raise ValueError(f"{self.name} is changed by setting its output, not its input")

    @property
    def name(self) -> str:
        return design_name(self.path)

    def _span(self) -> slice:
        return self.root.own_positions()

    def _own(self, value: Tensor) -> Tensor:
        batch = self.root.batch
        if not self.has_positions or batch is None or value.shape[1] != batch.width:
            return value
        span = self._span()
        if span == slice(0, batch.width):
            return value
        own = value[:, span]
        # nnsight finds the gradient of a part of the batch by this mark.
        own._nnsight_batch = getattr(value, "_nnsight_batch", False)  # type: ignore[attr-defined]
        return own


class StateEnvoy(HookEnvoy):
    """The envoy of a state trajectory.

    output: to read only, [batch, len(states), d_inner, d_state], all positions if the trace names no `states`.
    at: `at[5]` is the state after position 5, [batch, d_inner, d_state], to read or change; later states follow.
    """

    @eproperty
    def output(self, value: Tensor) -> Tensor:
        """The states at the positions named by `states=`, after all changes."""
        return self.root.own_states(value)

    @output.postprocess  # type: ignore[no-redef]
    def output(self, value: Tensor) -> Tensor:
        raise ValueError(
            f"{self.name}.output is to be read only: a changed trajectory would not say which later states follow from "
            f"the change. Set {self.name}.at[position].output; states after it are then recomputed"
        )


class PositionsEnvoy(ModuleEnvoy):
    """The states of one layer at single positions: `at[5]`, `at[-1]`. Ask for them in ascending order.

    Positions are those of the whole text, what `state=` has read included; from the end, in `generate`, those of
    each pass: `at[-1]` in `tracer.iter` is the newest token.
    """

    def __getitem__(self, key: Any) -> Any:
        if not isinstance(key, Integral) or isinstance(key, bool):
            raise ValueError(f"{design_name(self.path)} takes one position at a time, got {key!r}")
        position = self.root.position(int(key))
        # `getattr`, because the base class counts a negative index from the number of entries.
        return getattr(self, str(position))


class PositionEnvoy(HookEnvoy):
    """The state of one layer after one position, [batch, d_inner, d_state]."""

    has_positions = False


ENVOYS = {
    StateHookPoint: StateEnvoy,
    StatePositions: PositionsEnvoy,
    StatePosition: PositionEnvoy,
    HookPoint: HookEnvoy,
    nn.ModuleList: BlocksEnvoy,
    nn.Module: ModuleEnvoy,
}
