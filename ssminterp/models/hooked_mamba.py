"""HookedMamba: a Hugging Face Mamba whose named quantities can be read and replaced."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicCache

from ssminterp.models.cache import ActivationCache
from ssminterp.models.config import ModelConfig
from ssminterp.models.fingerprint import Fingerprint
from ssminterp.models.follow import Recording, following
from ssminterp.models.generation import check_options, check_padding, check_recordable, generate
from ssminterp.models.hook_names import NamesFilter, match_names, nearest
from ssminterp.models.hook_points import HookFunction, HookPoint, HookSpec, Recorder, Registered, attached
from ssminterp.models.install import causal_lm, hook_specs, input_device, install_hooks, layer_devices
from ssminterp.models.loading import load_hf
from ssminterp.models.memory import check_recording_fits
from ssminterp.models.reading import in_chunks, read_chunks, tokens_in_pieces
from ssminterp.models.state import ModelState
from ssminterp.models.timeline import ApplyTo, Timeline
from ssminterp.models.tokens import Text, check_tokens, decode_each, encode, excerpt, padded_left
from ssminterp.models.tracing.access import Tracing, apart, traceable
from ssminterp.models.verify import check_parity, logits_of
from ssminterp.positions import Positions, resolve_positions

if TYPE_CHECKING:
    from ssminterp.models.tracing.envoys import MambaEnvoy

# (names, function) or (names, function, positions)
FwdHook: TypeAlias = tuple[NamesFilter, HookFunction] | tuple[NamesFilter, HookFunction, Positions]
Input: TypeAlias = Text | Tensor


@runtime_checkable
class Intervention(Protocol):
    """Anything that can say which hook functions carry it out."""

    def fwd_hooks(self, model: HookedMamba, roles: Mapping[str, Tensor] | None = None) -> Sequence[FwdHook]:
        """The hook functions. Raises ValueError if the intervention does not fit the model or the roles."""
        ...


class HookedMamba(nn.Module):
    """A Mamba or Falcon-Mamba language model with hook points, around the Hugging Face model it was made from.

    >>> model = HookedMamba.from_pretrained("tiny-mamba")
    >>> logits, cache = model.run_with_cache("Shelby gave an apple to", names_filter="*hook_delta")
    >>> cache["delta", 0].shape == (1, logits.shape[1], model.cfg.d_inner)
    True

    The Hugging Face model stays whole in `hf_model`: its mixers are taken over, with the same submodules and
    parameters, so `state_dict`, `save_pretrained`, PEFT, `device_map` and `generate` go on working.
    """

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
                check_parity(plain, logits_of(lm), self.cfg.dtype, model_name)
            undo.pop_all()

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

    # --- text --------------------------------------------------------------------------------------------------------

    def to_tokens(self, text: Text) -> Int[Tensor, "batch pos"]:
        """Tokens of a text or several, without special tokens, padded on the right.

        Raises ValueError for an empty text and for words out of the vocabulary.
        """
        return encode(self._tokenizer(), text)[0].to(self.device)

    def to_str_tokens(self, text: str | Tensor) -> list[str]:
        """The text of each token of one sequence."""
        tokens = self.to_tokens(text) if isinstance(text, str) else check_tokens(text, self.cfg.vocab)
        if tokens.shape[0] != 1:
            raise ValueError(f"to_str_tokens takes one sequence, got a batch of {tokens.shape[0]}")
        return decode_each(self._tokenizer(), tokens[0])

    def _tokenizer(self) -> PreTrainedTokenizerBase:
        if self.tokenizer is None:
            raise ValueError("this model has no tokenizer: pass tokens, or give one to from_hf(hf_model, tokenizer)")
        return self.tokenizer

    def prepare(self, text: Input, attention_mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Checked tokens [batch, pos] on the model's device, and their mask if some of them are padding."""
        if isinstance(text, Tensor):
            tokens = check_tokens(text, self.cfg.vocab)
        else:
            tokens, padding = encode(self._tokenizer(), text)
            attention_mask = padding if attention_mask is None else attention_mask
        if attention_mask is not None:
            if attention_mask.shape != tokens.shape:
                raise ValueError(
                    f"attention_mask has shape {list(attention_mask.shape)}, the tokens {list(tokens.shape)}"
                )
            attention_mask = attention_mask.to(self.device)
        return tokens.to(self.device), attention_mask

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
        timeline = _timeline(state, tokens.shape[1])
        cache = self._cache_of(state, tokens.shape[0])
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
        hooks = self._hooks_to_record(names_filter, layers)
        timeline = _timeline(forward_arguments.get("state"), tokens.shape[1])
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

    def _hooks_to_record(self, names_filter: NamesFilter | None, layers: Sequence[int] | None) -> list[HookPoint]:
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

    @traceable
    def generate(
        self,
        text: Input,
        max_new_tokens: int = 20,
        *,
        state: ModelState | None = None,
        apply_to: ApplyTo = "both",
        seed: int | None = None,
        **options: Any,
    ) -> Any:
        """Text for text, tokens [batch, prompt + new] for tokens, while the hooks and interventions attached act.

        `with model.generate(…) as tracer:` is an nnsight trace of it; see `trace`.

        Positions count from the first token of the whole text, what `state` has read included; negative ones from the
        end of the prompt. So what acts at a position of a finished text acts in the same way while it is generated.
        Functions without positions get the prompt's tensor, then one of length 1 for every new token. The last new
        token is chosen, but never run. Memory does not grow with the number of tokens.

        state: what to go on from, as if its text stood before the prompt.
        apply_to: where hooks act, on the "prompt", the "new" tokens, or "both". The first new token is chosen at the
            prompt's last position.
        seed: of sampling; torch's own random state is left as it was.
        options: those of Hugging Face's `generate`: do_sample, temperature, top_k, top_p, eos_token_id, num_beams, …

        Several texts of different length are padded on the left. Raises ValueError for hooks whose positions are never
        run, are not where `apply_to` lets them act, or lie in such texts, and for options that cannot take effect.

        >>> from ssminterp import HookedMamba, steer
        >>> model = HookedMamba.from_pretrained("tiny-mamba", device="cpu")
        >>> emma = model.lm.get_input_embeddings().weight[model.to_tokens("Emma")[0, 0]].detach()
        >>> with model.intervene(steer("blocks.5.hook_resid_post", emma, 50.0)):
        ...     model.generate("Shelby gave an apple to", 3, apply_to="new")
        'Shelby gave an apple to cliff Emma Emma'
        """
        return self._generate(text, max_new_tokens, state, apply_to, seed, None, options)[0]

    @apart
    def generate_with_cache(
        self,
        text: Input,
        names_filter: NamesFilter | None = None,
        *,
        max_new_tokens: int = 20,
        positions: Positions | None = None,
        layers: Sequence[int] | None = None,
        offload: torch.device | str | None = None,
        state: ModelState | None = None,
        apply_to: ApplyTo = "both",
        seed: int | None = None,
        **options: Any,
    ) -> tuple[Any, ActivationCache]:
        """What `generate` returns, and what the hooks saw of the prompt and at every decoding step.

        names_filter, layers, offload: as in `run_with_cache`. positions: record only these, absolute as in `generate`;
        those after the end of a generation that stopped early are left out. The cache's `tokens` are those that were
        run: all but the last new one.

        Raises ValueError as `generate` and `run_with_cache` do, and for beam search.
        """
        check_recordable(options)
        hooks = self._hooks_to_record(names_filter, layers)
        wanted = (hooks, positions, offload)
        return self._generate(text, max_new_tokens, state, apply_to, seed, wanted, options)

    def _generate(
        self,
        text: Input,
        max_new_tokens: int,
        state: ModelState | None,
        apply_to: ApplyTo,
        seed: int | None,
        wanted: tuple[list[HookPoint], Positions | None, torch.device | str | None] | None,
        options: dict[str, Any],
    ) -> tuple[Any, ActivationCache]:
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        tokens, mask = self._to_continue(text, options.pop("attention_mask", None))
        copies = max(options.get("num_beams") or 1, options.get("num_return_sequences") or 1)
        timeline = _timeline(state, tokens.shape[1], max_new_tokens - 1, apply_to)
        cache = None if state is None else self._cache_of(state.repeat(copies), copies * tokens.shape[0])
        points = list(self.hook_points.values())
        check_options(self.lm, points, timeline, seed, options)
        recording = None
        if wanted is not None:
            hooks, positions, offload = wanted
            recording = Recording(hooks, timeline, positions, offload)
            n_positions = tokens.shape[1] + max_new_tokens - 1 if recording.wanted is None else len(recording.wanted)
            target = self.device if offload is None else torch.device(offload)
            check_recording_fits(hooks, self.cfg, copies * tokens.shape[0], n_positions, target)
        check_padding(mask, points, recording, from_texts=not isinstance(text, Tensor))
        options["max_new_tokens"] = max_new_tokens
        output = generate(self.lm, points, tokens, mask, timeline, cache, recording, seed, options)
        activations, seen = ({}, None) if recording is None else recording.activations()
        sequences = output if isinstance(output, Tensor) else output.sequences
        recorded = ActivationCache(activations, sequences[:, :-1], self.cfg.model_name, seen, timeline.start)
        if isinstance(text, Tensor) or not isinstance(output, Tensor):
            return output, recorded
        texts = self._tokenizer().batch_decode(output, skip_special_tokens=True)
        return texts[0] if isinstance(text, str) and len(texts) == 1 else texts, recorded

    def _to_continue(self, text: Input, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Tokens that all end where new ones begin, and their mask."""
        if isinstance(text, Tensor):
            tokens, mask = self.prepare(text, mask)
            return tokens, torch.ones_like(tokens) if mask is None else mask
        tokens, mask = padded_left(*encode(self._tokenizer(), text))
        return tokens.to(self.device), mask.to(self.device)

    @apart
    def read(
        self,
        text: Input | Iterator[str],
        *,
        state: ModelState | None = None,
        chunk: int = 2048,
        progress: bool = True,
    ) -> ModelState:
        """The state after reading a text, to go on from: `model(tokens, state=state)`, `generate(…, state=state)`.

        Memory does not grow with the length of the text. Hooks act as in one run of the whole text; their positions
        count from the first token that was ever read, `state` included.

        text: a text, texts of the same length, tokens [batch, pos], or the parts of one text as an iterator of
            strings: an open file will do. A long text is tokenized in pieces, cut where that changes no token.
        state: one to start from. chunk: how many tokens are read at once; the state is the same up to rounding.
        progress: show a bar, if it takes over a second.

        Raises ValueError for texts of different length, and for a state of another model or batch size.
        """
        if chunk < 1:
            raise ValueError(f"chunk must be at least 1 token, got {chunk}")
        batch, total, pieces, written = self._to_read(text)
        timeline = _timeline(state, total)
        cache = None if state is None else self._cache_of(state, batch)
        with following(self.lm, list(self.hook_points.values()), timeline):
            chunks, keep = in_chunks(pieces, chunk), 0 if self.hook_points["hook_logits"].is_listened_to else 1
            cache, n_tokens = read_chunks(self.hf_model, chunks, self.device, cache, total, keep, progress)
        before = (0, ()) if state is None else (state.n_tokens, state.history)
        step = f"read {n_tokens:,} tokens{written}"
        n_tokens += before[0]
        return ModelState.from_cache(cache, n_tokens, self.cfg.model_name, self.fingerprint(), (*before[1], step))

    def _to_read(self, text: Input | Iterator[str]) -> tuple[int, int | None, Iterable[Tensor], str]:
        """The batch size, the number of tokens if it is known, the tokens in pieces, and how the text begins."""
        if isinstance(text, str | Iterator):
            texts = iter([text]) if isinstance(text, str) else text
            first = next(texts, "")
            pieces = tokens_in_pieces(self._tokenizer(), chain([first], texts))
            return 1, None, pieces, f": {excerpt(first)!r}"
        if isinstance(text, Tensor):
            tokens = check_tokens(text, self.cfg.vocab)
            return tokens.shape[0], tokens.shape[1], [tokens], ""
        tokens, mask = encode(self._tokenizer(), text)
        if mask is not None:
            raise ValueError("texts of different length end at different positions: read them one by one")
        return (
            tokens.shape[0],
            tokens.shape[1],
            [tokens],
            f" of each of {len(text)} texts, the first {excerpt(text[0])!r}",
        )

    def load_state(self, path: str | Path) -> ModelState:
        """A state that was saved, checked to be this model's, on this model's device.

        Raises ValueError if the file is missing, truncated or no state, or if another model read it.
        """
        state = ModelState.load(path)
        state.check_model(self.cfg, self.fingerprint())
        return state.to(self.device)

    def fingerprint(self) -> str:
        """A hash of the architecture and the weights, by which states know their model. See `Fingerprint`."""
        return self._fingerprint.of(self.lm)

    def _cache_of(self, state: ModelState, batch: int) -> DynamicCache:
        """Raises ValueError if a batch of that size cannot go on from the state."""
        state.check_fits(self.cfg, self.fingerprint(), batch)
        return state.to_cache(self.lm.config, layer_devices(self.lm), self.lm.dtype)

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


def _timeline(
    state: ModelState | None, length: int | None, new_tokens: int = 0, apply_to: ApplyTo = "both"
) -> Timeline:
    """The positions of a prompt, and of new tokens after it, that come after what a state has read.

    Raises ValueError for what is no state.
    """
    if state is not None and not isinstance(state, ModelState):
        raise ValueError(f"state= takes a ModelState, which read returns, got {type(state).__name__}")
    start = 0 if state is None else state.n_tokens
    end = None if length is None else start + length
    return Timeline(start, end, None if end is None else end + new_tokens, apply_to)


def _registered(fwd_hook: FwdHook) -> tuple[NamesFilter, Registered]:
    """The names and the function with its positions. Raises ValueError for what is no hook."""
    if not isinstance(fwd_hook, tuple | list) or len(fwd_hook) not in (2, 3) or not callable(fwd_hook[1]):
        raise ValueError(f"a hook is (names, function) or (names, function, positions), got {fwd_hook!r}")
    names, function, *positions = fwd_hook
    return names, Registered(function, positions[0] if positions else None)
