"""Generating text while hooks act on the prompt, on the new tokens, or on both, and recorders listen."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from ssminterp.models.follow import Recording, following
from ssminterp.models.hook_points import HookPoint
from ssminterp.models.timeline import Timeline
from ssminterp.models.tracing.requests import is_in_a_trace

# Options that choose among tokens at random, and so change nothing without do_sample.
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "typical_p")


def check_options(
    lm: PreTrainedModel, points: Sequence[HookPoint], timeline: Timeline, seed: int | None, options: Mapping[str, Any]
) -> None:
    """Raises ValueError for options that could not take effect, or that hooks could not follow."""
    config = options.get("generation_config") or lm.generation_config
    given = [name for name in SAMPLING if options.get(name) is not None] + ([] if seed is None else ["seed"])
    if given and not options.get("do_sample", config.do_sample):
        raise ValueError(f"{', '.join(given)} cannot take effect without do_sample=True: the likeliest token is taken")
    if timeline.apply_to not in ("prompt", "new", "both"):
        raise ValueError(f"apply_to must be 'prompt', 'new' or 'both', got {timeline.apply_to!r}")
    listening = any(point.functions for point in points)
    if timeline.apply_to != "both" and not listening:
        raise ValueError(f"apply_to={timeline.apply_to!r} cannot take effect: no hooks or interventions are attached")
    if timeline.apply_to != "both" and options.get("use_cache") is False:
        raise ValueError("with use_cache=False every run holds the prompt and new tokens together: use apply_to='both'")
    unfollowed = [name for name in ("assistant_model", "prompt_lookup_num_tokens") if options.get(name) is not None]
    if unfollowed and listening:
        raise ValueError(f"{unfollowed[0]} runs tokens that may be taken back, which hooks cannot follow: leave it out")


def check_recordable(options: Mapping[str, Any]) -> None:
    """Raises ValueError for ways of generating in which the rows of a recording would not stay the same texts."""
    if (options.get("num_beams") or 1) > 1:
        raise ValueError("beams change places while they are generated: record with num_beams=1")
    if options.get("use_cache") is False:
        raise ValueError("with use_cache=False every token is run many times: record with the cache")
    if options.get("return_dict_in_generate"):
        raise ValueError("the recording is returned beside the tokens or texts: leave return_dict_in_generate out")


def check_padding(
    mask: Int[Tensor, "batch pos"], points: Sequence[HookPoint], recording: Recording | None, from_texts: bool
) -> None:
    """Raises ValueError if positions were to mean different tokens in texts of different length."""
    if not from_texts or bool(mask.all()):
        return
    named = any(_names_positions(registered) for point in points for registered in point.functions)
    if named or (recording is not None and recording.wanted is not None):
        raise ValueError(
            "texts of different length are padded on the left, so a position is another token in each: generate from "
            "them one by one, or from texts of one length"
        )


def _names_positions(registered: Any) -> bool:
    where = getattr(registered.function, "where", None)
    return registered.positions is not None or getattr(where, "positions", None) is not None


def generate(
    lm: PreTrainedModel,
    points: Sequence[HookPoint],
    tokens: Int[Tensor, "batch pos"],
    mask: Int[Tensor, "batch pos"],
    timeline: Timeline,
    cache: Cache | None,
    recording: Recording | None,
    seed: int | None,
    options: Mapping[str, Any],
) -> Any:
    """Hugging Face's `generate`, in which each run is a window of the timeline. Its output.

    Warns if it ended before a position at which a hook was to act.
    """
    given: dict[str, Any] = {} if cache is None else {"cache_params": cache}
    recorded = [] if recording is None else recording.hooks
    (logits,) = (point for point in points if point.spec.short == "logits")
    if logits.is_listened_to or logits in recorded or is_in_a_trace(logits):
        given["logits_to_keep"] = 0  # all positions of the prompt, where one would be enough to go on from
    anew = options.get("use_cache") is False
    with following(lm, points, timeline, recording, anew), _seeded(seed):
        output = lm.generate(input_ids=tokens, attention_mask=mask, **given, **options)
    sequences = output if isinstance(output, Tensor) else output.sequences
    reached = timeline.start + sequences.shape[1] - 1
    missed = sorted({p for point in points for r in point.functions for p in _listed(r.positions, timeline)})
    missed = [p for p in missed if p >= reached]
    if missed:
        warnings.warn(
            f"generation ended before position {reached}: hooks at positions {missed} never acted", stacklevel=3
        )
    return output


def _listed(positions: Any, timeline: Timeline) -> Sequence[int]:
    return [] if positions is None or isinstance(positions, slice) else timeline.resolve(positions)


@contextmanager
def _seeded(seed: int | None) -> Iterator[None]:
    """Random numbers from a seed; the state of torch's generators is as before afterwards."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield
