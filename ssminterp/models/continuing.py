"""Going on: reading texts into states, and generating from them while hooks act."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from ssminterp.models.cache import ActivationCache
from ssminterp.models.follow import Recording, following
from ssminterp.models.generation import check_options, check_padding, check_recordable, generate
from ssminterp.models.hook_names import NamesFilter
from ssminterp.models.hook_points import HookPoint
from ssminterp.models.hooked_model import HookedModel, Input
from ssminterp.models.install import layer_devices
from ssminterp.models.memory import check_recording_fits
from ssminterp.models.reading import in_chunks, read_chunks, tokens_in_pieces
from ssminterp.models.state import ModelState
from ssminterp.models.timeline import ApplyTo, Timeline
from ssminterp.models.tokens import check_tokens, encode, excerpt, padded_left
from ssminterp.models.tracing.access import apart, traceable
from ssminterp.positions import Positions


class ContinuingModel(HookedModel):
    """A hooked model that reads into states, and generates."""

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
        hooks = self.hooks_to_record(names_filter, layers)
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
        timeline = timeline_after(state, tokens.shape[1], max_new_tokens - 1, apply_to)
        cache = None if state is None else self.cache_of(state.repeat(copies), copies * tokens.shape[0])
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
        texts = self.known_tokenizer().batch_decode(output, skip_special_tokens=True)
        return texts[0] if isinstance(text, str) and len(texts) == 1 else texts, recorded

    def _to_continue(self, text: Input, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Tokens that all end where new ones begin, and their mask."""
        if isinstance(text, Tensor):
            tokens, mask = self.prepare(text, mask)
            return tokens, torch.ones_like(tokens) if mask is None else mask
        tokens, mask = padded_left(*encode(self.known_tokenizer(), text))
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
        timeline = timeline_after(state, total)
        cache = None if state is None else self.cache_of(state, batch)
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
            pieces = tokens_in_pieces(self.known_tokenizer(), chain([first], texts))
            return 1, None, pieces, f": {excerpt(first)!r}"
        if isinstance(text, Tensor):
            tokens = check_tokens(text, self.cfg.vocab)
            return tokens.shape[0], tokens.shape[1], [tokens], ""
        tokens, mask = encode(self.known_tokenizer(), text)
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

    def cache_of(self, state: ModelState, batch: int) -> DynamicCache:
        """What Hugging Face's model goes on from. Raises ValueError if a batch of that size cannot."""
        state.check_fits(self.cfg, self.fingerprint(), batch)
        return state.to_cache(self.lm.config, layer_devices(self.lm), self.lm.dtype)


def timeline_after(
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
