"""HookedMamba: a Hugging Face Mamba whose named quantities can be read and replaced."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ssminterp.models.cache import ActivationCache
from ssminterp.models.continuing import ContinuingModel, timeline_after
from ssminterp.models.follow import following
from ssminterp.models.hook_names import NamesFilter
from ssminterp.models.hook_points import HookFunction, HookPoint, Recorder, Registered, attached
from ssminterp.models.hooked_model import Input
from ssminterp.models.install import causal_lm
from ssminterp.models.loading import load_hf
from ssminterp.models.memory import check_recording_fits
from ssminterp.models.state import ModelState
from ssminterp.models.tracing.access import apart
from ssminterp.positions import Positions, resolve_positions

if TYPE_CHECKING:
    from ssminterp.models.tracing.root import MambaEnvoy

# (names, function) or (names, function, positions)
FwdHook: TypeAlias = tuple[NamesFilter, HookFunction] | tuple[NamesFilter, HookFunction, Positions]


@runtime_checkable
class Intervention(Protocol):
    """Anything that can say which hook functions carry it out."""

    def fwd_hooks(self, model: HookedMamba, roles: Mapping[str, Tensor] | None = None) -> Sequence[FwdHook]:
        """The hook functions. Raises ValueError if the intervention does not fit the model or the roles."""
        ...


class HookedMamba(ContinuingModel):
    """A Mamba or Falcon-Mamba language model with hook points, around the Hugging Face model it was made from.

    >>> model = HookedMamba.from_pretrained("tiny-mamba")
    >>> logits, cache = model.run_with_cache("Shelby gave an apple to", names_filter="*hook_delta")
    >>> cache["delta", 0].shape == (1, logits.shape[1], model.cfg.d_inner)
    True

    The Hugging Face model stays whole in `hf_model`: its mixers and norms are taken over, with the same submodules and
    parameters, so `state_dict`, `save_pretrained`, PEFT, `device_map` and `generate` go on working.
    """

    # --- loading ---------------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        revision: str | None = None,
        device: torch.device | str | None = None,
        device_map: str | Mapping[str, Any] | None = None,
        max_memory: Mapping[int | str, int | str] | None = None,
        offload_folder: str | Path | None = None,
        dtype: torch.dtype | str = torch.float32,
        tokenizer: PreTrainedTokenizerBase | str | Path | None = None,
        verify: bool = True,
        trust_remote_code: bool = False,
    ) -> HookedMamba:
        """Load a bundled model, a local folder or a hub name, in eval mode.

        Formats: transformers' (safetensors or .bin, whole or in shards), the original one of mamba_ssm
        (`state-spaces/mamba-130m`), and PEFT adapters of either, whose base is loaded too.

        revision: branch, tag or commit of a hub name. device: where to put it; CUDA if there is one by default.
        device_map, max_memory, offload_folder: transformers' options to spread a model over devices, host memory and
        disk ("auto"). dtype: a torch type or its name, "auto" for the one that it was saved in. tokenizer: one to use
        instead of the checkpoint's: its folder, its hub name, or itself. verify: compare with plain transformers once,
        on a short random input.

        Raises ValueError if the checkpoint is missing, damaged, incomplete or no Mamba, or cannot be fetched.
        """
        hf_model, tokenizer = load_hf(
            name,
            revision=revision,
            device=device,
            device_map=device_map,
            max_memory=max_memory,
            offload_folder=offload_folder,
            dtype=dtype,
            tokenizer=tokenizer,
            trust_remote_code=trust_remote_code,
        )
        return cls(hf_model, tokenizer, str(name), verify)

    @classmethod
    def from_hf(
        cls, hf_model: nn.Module, tokenizer: PreTrainedTokenizerBase | None = None, *, verify: bool = True
    ) -> HookedMamba:
        """Hook a Hugging Face model that is in memory, in place. PEFT wrappers are looked through.

        Raises ValueError for a model that is no Mamba.
        """
        name = getattr(causal_lm(hf_model).config, "_name_or_path", "") or type(hf_model).__name__
        return cls(hf_model, tokenizer, name, verify)

    # --- running -----------------------------------------------------------------------------------------------------

    @apart
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, **kwargs)

    def forward(
        self,
        text: Input,
        *,
        attention_mask: Int[Tensor, "batch pos"] | None = None,
        state: ModelState | None = None,
    ) -> Float[Tensor, "batch pos vocab"]:
        """Logits, float32. `state` (from `read`) is what to go on from instead of an empty memory; positions of hooks
        then count from the first token that the state has read, negative ones from the end.

        Raises ValueError for tokens out of the vocabulary and for a state of another model or batch size.
        """
        tokens, attention_mask = self.prepare(text, attention_mask)
        if state is None:
            return self.hf_model(input_ids=tokens, attention_mask=attention_mask, use_cache=False).logits
        timeline = timeline_after(state, tokens.shape[1])
        cache = self.cache_of(state, tokens.shape[0])
        with following(self.lm, list(self.hook_points.values()), timeline):
            return self.hf_model(
                input_ids=tokens, attention_mask=attention_mask, cache_params=cache, use_cache=True
            ).logits

    def run_with_cache(
        self,
        text: Input,
        names_filter: NamesFilter | None = None,
        *,
        positions: Positions | None = None,
        layers: Sequence[int] | None = None,
        offload: torch.device | str | None = None,
        detach: bool = True,
        **forward_arguments: Any,
    ) -> tuple[Float[Tensor, "batch pos vocab"], ActivationCache]:
        """Logits and what the hooks saw.

        names_filter: which hooks; None means all but those computed on demand (states, A_bar, B_bar, conv taps).
        positions: record only these, in the order given; of states, only these are ever written to memory. After a
            `state`, they count from the first token that the state has read.
        layers: record only these layers' hooks. offload: a device to move recordings to as they come.
        detach: False keeps the autograd graph.

        Raises ValueError if no hook matches, a position is out of range, or the recording would not fit in memory.
        """
        tokens, attention_mask = self.prepare(text, forward_arguments.pop("attention_mask", None))
        hooks = self.hooks_to_record(names_filter, layers)
        timeline = timeline_after(forward_arguments.get("state"), tokens.shape[1])
        if timeline.start == 0 or positions is None:
            recorded = resolve_positions(positions, tokens.shape[1])
        else:
            recorded = tuple(timeline.resolve(positions))
        n_positions = tokens.shape[1] if recorded is None else len(recorded)
        target = self.device if offload is None else torch.device(offload)
        check_recording_fits(hooks, self.cfg, tokens.shape[0], n_positions, target)
        store: dict[str, Tensor] = {}
        local = None if recorded is None else [p - timeline.start for p in recorded]
        recorder = Recorder(store, local, offload, detach)
        with attached([(hook, recorder) for hook in hooks]):
            logits = self(tokens, attention_mask=attention_mask, **forward_arguments)
        activations = {hook.name: store[hook.name] for hook in hooks}
        return logits, ActivationCache(activations, tokens, self.cfg.model_name, recorded, timeline.start)

    def run_with_hooks(
        self, text: Input, fwd_hooks: Sequence[FwdHook], **forward_arguments: Any
    ) -> Float[Tensor, "batch pos vocab"]:
        """Logits of a run in which hook functions are called. See `hooks`."""
        with self.hooks(fwd_hooks):
            return self(text, **forward_arguments)

    @contextmanager
    def hooks(self, fwd_hooks: Sequence[FwdHook]) -> Iterator[HookedMamba]:
        """A context in which hook functions are called in every run; they leave no trace after it.

        Each is `(names, function)` or `(names, function, positions)`. The function gets `(tensor, hook)` and returns
        a tensor or None; with positions it is called once per position, in order, with [batch, …]. Functions that
        change `hook_state` need positions: later states are recomputed from what they return.

        Raises ValueError, before any run, if a name matches no hook.
        """
        added: list[tuple[HookPoint, Registered]] = []
        for fwd_hook in fwd_hooks:
            names, registered = _registered(fwd_hook)
            added += [(self.hook_points[name], registered) for name in self.hook_names(names)]
        with attached(added):
            yield self

    @contextmanager
    def intervene(
        self, *interventions: Intervention, roles: Mapping[str, Tensor] | None = None
    ) -> Iterator[HookedMamba]:
        """A context in which interventions hold, in the order given where they meet at one hook.

        roles: positions [batch] by name, like `TaskBatch.roles`, for interventions whose positions are a role's name.

        Raises ValueError, before any run, if a name matches no hook or a value does not fit the hook's axes.
        """
        with self.hooks([hook for intervention in interventions for hook in intervention.fwd_hooks(self, roles)]):
            yield self

    # --- nnsight -----------------------------------------------------------------------------------------------------

    @property
    def envoy(self) -> MambaEnvoy:
        """The root of the model's nnsight envoys, which also has `edit`, `session`, and every module of the model.

        Raises ImportError if nnsight is missing.
        """
        return self.tracing.envoy_of(self)

    def trace(self, *text: Input, states: Positions | None = None, **arguments: Any) -> Any:
        """`with model.trace("…"):`, an nnsight trace in which every hook point is an envoy under its own name.

            with model.trace("Shelby gave an apple to", states=[2, -1]):
                delta = model.blocks[3].mixer.hook_delta.output.save()  # [batch, pos, d_inner], read
                model.blocks[3].mixer.hook_B.output *= 0.5  # replaced
                model.blocks[3].mixer.hook_state.at[2].output[:] = 0  # [batch, d_inner, d_state]; later states follow
                states = model.blocks[4].mixer.hook_state.output.save()  # [batch, len(states), d_inner, d_state]
                logits = model.hook_logits.output.save()

        With no text, each `with tracer.invoke("…"):` in it is an input; all run as one batch, and each sees its own
        rows and positions. states: the positions that `hook_state.output` holds, None for all; `hook_state.at[p]`
        needs none. arguments: those of `forward`.

        The code runs along with the model, so it asks in the model's order. Raises ImportError if nnsight is missing.
        """
        if states is not None:
            arguments["states"] = states
        return self.envoy.trace(*text, **arguments)


def _registered(fwd_hook: FwdHook) -> tuple[NamesFilter, Registered]:
    """The names and the function with its positions. Raises ValueError for what is no hook."""
    if not isinstance(fwd_hook, tuple | list) or len(fwd_hook) not in (2, 3) or not callable(fwd_hook[1]):
        raise ValueError(f"a hook is (names, function) or (names, function, positions), got {fwd_hook!r}")
    names, function, *positions = fwd_hook
    return names, Registered(function, positions[0] if positions else None)
