"""Knockout: forbid tokens to read what others wrote to the state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from jaxtyping import Bool, Int
from torch import Tensor

from ssminterp.interventions.places import Places, Where, causal_masks, check_beforehand
from ssminterp.interventions.selection import Indices, Roles, Selection
from ssminterp.models import FwdHook, HookedMamba, HookPoint
from ssminterp.models.mixers.state_reads import ForbiddenReads, ReadHookPoint
from ssminterp.models.timeline import Window

Decay: TypeAlias = Literal["kept", "skipped"]


def knockout(
    layers: int | Sequence[int] | None = None,
    *,
    sources: Where | None = None,
    targets: Where | None = None,
    decay: Decay = "kept",
    channels: Indices | None = None,
    states: Indices | None = None,
    batch: list[int] | None = None,
) -> Knockout:
    """Forbid `targets` to read, from the states of `layers`, what `sources` wrote there; all other reads stay.

    The information may still go round: through the conv, through the states of other layers, and by way of tokens
    that are no targets. What a target wrote itself is forbidden to it if it is among the sources.

    layers: one, several (a window: `range(8, 13)`), or None for all.
    sources: positions as in `patch`: an int, a list, a slice, an integer tensor [batch, n] that names others in each
        example, or the name of a role or several (with `model.intervene(…, roles=batch.roles)`). None means all.
    targets: the same. None means every position after the last source.
    decay: "kept": the state goes on decaying at the sources. "skipped": to the targets it is as if the sources were
        not there, Δ = 0: neither write nor decay.
    channels, states, batch: forbid it only in these indices of d_inner, of d_state, in these examples.

    Several knockouts of a layer act as one, whatever their order: what any forbids is forbidden. With other
    interventions: the sources' writes are what x, Δ, B make of them at last, patched or not; a state that was patched
    is nobody's write, and what is done to the state is done without the sources' writes too (so a function on the
    state is called once more). On `hook_y`, where the result is put in, all act in the order given.

    It costs one more scan in each of the layers. In `generate` use `use_cache=False`, so that every new token is run
    with all before it: then positions keep their meaning, and the default targets include the new tokens.

    Source: Endy et al. 2025, "Mamba Knockout for Unraveling Factual Information Flow", arXiv:2505.24244, after
    Geva et al. 2023, "Dissecting Recall of Factual Associations", arXiv:2304.14767.

    Raises ValueError, when it meets a model, for layers, roles, channels or states that do not exist and, there or,
    where the length must be known, in the run, for positions out of range, a source after every target of its
    example, and a target before every source.

    >>> from ssminterp import HookedMamba
    >>> model = HookedMamba.from_pretrained("tiny-mamba")
    >>> with model.intervene(knockout(range(2, 5), sources=[1, 2], targets=-1)):
    ...     logits = model("Shelby gave an apple to")
    """
    if decay not in ("kept", "skipped"):
        raise ValueError(f"decay must be 'kept' or 'skipped', got {decay!r}")
    chosen = None if layers is None else tuple([layers] if isinstance(layers, int) else layers)
    if chosen is not None and not all(isinstance(layer, int) and not isinstance(layer, bool) for layer in chosen):
        raise ValueError(f"layers must be an int or a sequence of ints, got {layers!r}")
    if chosen is not None and (not chosen or len(set(chosen)) < len(chosen)):
        raise ValueError(f"layers must name at least one layer and none twice, got {list(chosen)}")
    where = Selection.of(None, channels, states, batch)
    return Knockout(chosen, Places.of(sources), Places.of(targets), decay, where)


@dataclass(frozen=True, eq=False)
class Knockout:
    """Reads that are forbidden; made by `knockout`."""

    layers: tuple[int, ...] | None
    sources: Places | None
    targets: Places | None
    decay: Decay
    where: Selection

    def __repr__(self) -> str:
        layers = None if self.layers is None else list(self.layers)
        return (
            f"knockout({layers}, sources={self.sources!r}, targets={self.targets!r}, decay={self.decay!r}"
            f"{self.where!r})"
        )

    def fwd_hooks(self, model: HookedMamba, roles: Roles | None = None) -> list[FwdHook]:
        """The hook functions on y that carry it out, checked against the model's shapes."""
        layers = range(model.cfg.n_layers) if self.layers is None else self.layers
        model.check_layers(layers)
        first = f"blocks.{layers[0]}.mixer.hook_"
        sources, targets = self._places(roles)
        check_beforehand(sources, targets, model.hook_points[first + "y"])
        state = model.hook_points[first + "state"]
        channels = Selection(channels=self.where.channels).feature_mask(state, model)
        coordinates = Selection(states=self.where.states).feature_mask(state, model)
        channels = None if channels is None else channels[:, 0]
        function = _KnockoutHook(sources, targets, channels, coordinates, self.decay, self.where)
        return [(f"blocks.{layer}.mixer.hook_y", function) for layer in layers]

    def check_fits(self, model: HookedMamba, tokens: Int[Tensor, "batch pos"], roles: Roles | None = None) -> None:
        """Raises ValueError if it does not fit the model, the roles, or a run of these tokens."""
        (name, *_), *_ = self.fwd_hooks(model, roles)
        self.where.batch_mask(len(tokens))
        causal_masks(*self._places(roles), len(tokens), tokens.shape[1], model.hook_points[str(name)])

    def _places(self, roles: Roles | None) -> tuple[Places | None, Places | None]:
        sources, targets = (None if at is None else at.at_roles(roles) for at in (self.sources, self.targets))
        return sources, targets


@dataclass(frozen=True, eq=False)
class _KnockoutHook:
    """A hook function on y."""

    sources: Places | None
    targets: Places | None
    channels: Bool[Tensor, " d_inner"] | None
    coordinates: Bool[Tensor, " d_state"] | None
    decay: Decay
    where: Selection

    def within(self, window: Window) -> _KnockoutHook:
        """The same where positions count from the first token that a state has read, which is no source.

        Raises ValueError where only a later part of what is run is seen, and for positions that the state has read.
        """
        if window.begin > window.timeline.start:
            raise ValueError(
                "a knockout must see all its sources and targets in one run: pass use_cache=False to generate, and to "
                "read a chunk as long as the text"
            )
        start = window.begin
        sources, targets = (None if at is None else at.counted_from(start) for at in (self.sources, self.targets))
        return replace(self, sources=sources, targets=targets)

    def __call__(self, y: Tensor, hook: HookPoint) -> Tensor:
        assert isinstance(hook, ReadHookPoint)
        assert hook.reads is not None
        sources, targets = causal_masks(self.sources, self.targets, len(y), y.shape[1], hook)
        examples = self.where.batch_mask(len(y))
        targets = targets if examples is None else targets & examples[:, None]
        reads = ForbiddenReads(targets, sources, self.channels, self.coordinates, self.decay == "skipped")
        return y + hook.reads.forbid(reads)
