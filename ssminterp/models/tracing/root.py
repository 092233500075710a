"""The root envoy of a hooked model: how a trace of it runs, and what the code of each invoke sees of the batch."""

from __future__ import annotations

from types import CodeType
from typing import Any

import torch
from nnsight import NNsight
from nnsight.intervention.interleaver import Mediator, OutOfOrderError
from nnsight.intervention.tracer import InterleavingTracer
from torch import Tensor, nn

from ssminterp.models.mixers.state_hook import StateHookPoint
from ssminterp.models.timeline import Timeline
from ssminterp.models.tokens import padded_left
from ssminterp.models.tracing.access import in_code_of_a_trace
from ssminterp.models.tracing.batches import TraceBatch, batched, n_rows
from ssminterp.models.tracing.envoys import ENVOYS, ModuleEnvoy
from ssminterp.models.tracing.naming import explained
from ssminterp.positions import Positions, resolve_positions


class MambaTracer(InterleavingTracer):
    """A trace in whose code the model's parts are envoys."""

    def execute(self, code: CodeType) -> None:
        with self.envoy._module.tracing.run():
            try:
                super().execute(code)
            except ValueError as error:
                if "outside of interleaving" in str(error) and not self.args:
                    error.args = (
                        f"{error}: a trace without an input has values only inside its `with tracer.invoke(…):` blocks",
                    )
                raise


class MambaEnvoy(ModuleEnvoy, NNsight):
    """The root envoy of a `HookedMamba`: `envoy.blocks[3].mixer.hook_delta.output` in `with envoy.trace(…):`.

    batch: what runs now, all invokes together.
    """

    def __init__(self, model: Any) -> None:
        self.batch: TraceBatch | None = None
        self.generating = False
        self.start = 0
        self.states: Positions | None = None
        self.shown: tuple[int, ...] | None = None
        super().__init__(model, envoys=ENVOYS)
        by_module = {id(envoy._module): envoy for envoy in self.modules()}
        parts = {"blocks": model.lm.backbone.layers} | {n: h for n, h in model.hook_points.items() if h.layer is None}
        for name, module in parts.items():
            object.__setattr__(self, name, by_module[id(module)])
        self.wrapped = module_ids(model)

    def is_current(self) -> bool:
        """Whether the model still has the modules it had; adapters put in later make it another one."""
        return self.wrapped == module_ids(self._module)

    @property
    def device(self) -> torch.device:
        """Where tokens go in."""
        return self._module.device

    # --- runs --------------------------------------------------------------------------------------------------------

    def trace(self, *inputs: Any, fn: Any = None, **kwargs: Any) -> Any:
        """A trace of one forward pass. See `HookedMamba.trace`."""
        return super().trace(*inputs, fn=fn or self._forward, tracer_cls=MambaTracer, **kwargs)

    def generate(self, *inputs: Any, **kwargs: Any) -> Any:
        """A trace of a generation, to be opened by `with`. See `HookedMamba.generate`."""
        return self.trace(*inputs, fn=self._generate, **kwargs)

    def _forward(self, tokens: Tensor, *, states: Positions | None = None, **arguments: Any) -> Tensor:
        hooks: list[StateHookPoint] = [block.mixer.hook_state for block in self._module.lm.backbone.layers]
        state = arguments.get("state")
        self.states, self.start = states, 0 if state is None else state.n_tokens
        self.shown = self._positions_shown()
        for hook in hooks:
            hook.shown = self.shown
        try:
            return self._module(tokens, **arguments)
        finally:
            self.states = self.shown = None
            for hook in hooks:
                hook.shown = None

    def _generate(self, tokens: Tensor, **arguments: Any) -> Tensor:
        if "states" in arguments:
            raise ValueError("states= names positions of one forward pass: in generate, use hook_state.at[position]")
        return self._module.generate(tokens, **arguments)

    def interleave(self, fn: Any, *args: Any, **kwargs: Any) -> Any:
        self.generating = fn == self._generate
        try:
            return super().interleave(fn, *args, **kwargs)
        except OutOfOrderError as error:
            error.args = (explained(str(error), self._module.hook_names()),)
            raise
        finally:
            self.batch, self.generating = None, False

    # --- inputs ------------------------------------------------------------------------------------------------------

    def _batch_size(self, *inputs: Any, **kwargs: Any) -> int:
        return n_rows(inputs[0]) if inputs else 0

    def _batch(self, invokes: list[tuple[tuple[Any, ...], dict[str, Any]]], fn: Any) -> tuple[tuple[Any, ...], Any]:
        """All invokes as one call of `fn`."""
        generating = fn == self._generate
        prepared: list[tuple[Tensor, Tensor | None]] = []
        others: dict[str, Any] = {}
        for inputs, kwargs in invokes:
            if len(inputs) != 1:
                raise ValueError(f"a trace takes one input, a text or texts or tokens, got {len(inputs)}")
            text, mask = inputs[0], kwargs.pop("attention_mask", None)
            if kwargs and len(invokes) > 1:
                raise ValueError(f"{', '.join(kwargs)} holds for all invokes: pass it to trace or generate")
            others |= kwargs
            tokens, mask = self._module.prepare(text, mask)
            if generating and not isinstance(text, Tensor):
                tokens, mask = padded_left(tokens, mask)
            prepared.append((tokens, mask))
        if not prepared:
            return (), others
        tokenizer = self._module.tokenizer
        pad = getattr(tokenizer, "pad_token_id", None) or getattr(tokenizer, "eos_token_id", None) or 0
        self.batch = batched(prepared, pad=pad, left=generating)
        return (self.batch.tokens,), {"attention_mask": self.batch.attention_mask, **others}

    # --- what the code of a trace sees -------------------------------------------------------------------------------

    def own_positions(self) -> slice:
        """The positions of the batch that belong to the invoke whose code runs now."""
        assert self.batch is not None
        return self.batch.own(self._own_first_row())

    def _own_first_row(self) -> int | None:
        group = Mediator.current("an invoke").batch_group
        return None if group is None else group[0]

    def position(self, p: int) -> int:
        """Position p of the invoke whose code runs now, as one of the batch. Raises ValueError if it has none such."""
        if self.batch is None or not in_code_of_a_trace():
            if p < 0:
                raise ValueError(
                    f"position {p} is counted from the end of an input: write it inside its trace or invoke"
                )
            return p
        own = self.own_positions()
        if self.generating:
            if p >= 0 and own.start > 0:
                raise ValueError(
                    f"position {p} cannot be told: this input was padded on the left for generation. Count from the "
                    "end, or generate from it by itself"
                )
            mediator = Mediator.current("a state")
            if p >= 0 and mediator.iteration:
                # A position of the whole text is come to once, whichever pass that is.
                mediator.iteration = None
            return p
        (resolved,) = self._resolved(p, own)
        return self.start + resolved

    def _positions_shown(self) -> tuple[int, ...] | None:
        """The positions of the batch whose states some invoke wants to see."""
        if self.states is None or self.batch is None:
            return None
        wanted = {self._states_of(own) for own in self.batch.spans.values()}
        return wanted.pop() if len(wanted) == 1 else tuple(sorted({p for positions in wanted for p in positions}))

    def _states_of(self, own: slice) -> tuple[int, ...]:
        assert self.states is not None
        return self._resolved(self.states, own)

    def _resolved(self, positions: Positions, own: slice) -> tuple[int, ...]:
        """Positions of the whole text as those of what runs now. Raises ValueError for positions that do not run."""
        if self.start == 0:
            return tuple(own.start + p for p in resolve_positions(positions, own.stop - own.start) or ())
        timeline = Timeline(self.start, self.start + own.stop - own.start, self.start + own.stop - own.start)
        return tuple(own.start + p - self.start for p in timeline.resolve(positions))

    def own_states(self, trajectory: Tensor) -> Tensor:
        """Of the states that are shown, those at the positions of the invoke whose code runs now."""
        assert self.batch is not None
        first_row = self._own_first_row()
        own = self.batch.own(first_row)
        if self.shown is None:
            return trajectory[:, own] if trajectory.shape[1] == self.batch.width else trajectory
        wanted = self.shown if first_row is None else self._states_of(own)
        return trajectory if wanted == self.shown else trajectory[:, [self.shown.index(p) for p in wanted]]


def module_ids(model: nn.Module) -> list[int]:
    """Which modules a model consists of. Every trace asks, and `model.modules()` takes as long as a trace does."""
    ids, left = [], [model]
    while left:
        module = left.pop()
        ids.append(id(module))
        left += [child for child in module._modules.values() if child is not None]
    return ids
