"""The selective scan by hand: one channel, every number of every step, and the same output in three ways.

    A_bar_t = exp(Δ_t A)       B_bar_t = Δ_t B_t                              [d_state]
    h_t = A_bar_t · h_{t-1} + B_bar_t · x_t          y_t = Σ over d_state of C_t · h_t

    recurrence    one state, updated token by token
    unrolled sum  y_t = Σ_{s ≤ t} C_t · A_bar_{s+1} … A_bar_t · B_bar_s · x_s
    convolution   y_t = Σ_k K_k · x_{t-k},  K_k = Σ C · A_bar^k · B_bar:  only if Δ, B and C are the same at every token

Source: Gu & Dao 2023, arXiv:2312.00752, section 2 (the three forms) and 3 (what selection gives up and gains). Made for
learning, in float64 and with loops: for work there are `HookedMamba`, `selective_scan` and `token_contributions`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
import xarray as xr
from jaxtyping import Float

from ssminterp.analysis.arrays import position_labels, provenance, resolve_indices
from ssminterp.analysis.runs import layer_scan
from ssminterp.models import HookedMamba
from ssminterp.models.hooked_mamba import Input

# A made-up channel that listens to two names; every other word is a little noise to it.
STORY = (("Mary", 1.0), ("met", 0.2), ("John", -1.0), ("at", -0.1), ("the", 0.2), ("shop", 0.3))
NAMES = ("Mary", "John")


@dataclass(frozen=True, eq=False)
class OneChannel:
    """One channel of an SSM, and what it reads.

    labels: the tokens, "0 Mary", "1 met", …; no two the same. x: the channel's input. delta: Δ, the step size, > 0.
    A: the rates of decay, < 0, which no token changes. B, C: what is written and what is read, at each token.
    source: where the numbers come from.

    Raises ValueError if the arrays do not fit together, or for a Δ that is not positive or an A that is not negative.
    """

    labels: tuple[str, ...]
    x: Float[np.ndarray, " pos"]
    delta: Float[np.ndarray, " pos"]
    A: Float[np.ndarray, " d_state"]
    B: Float[np.ndarray, "pos d_state"]
    C: Float[np.ndarray, "pos d_state"]
    source: str = "made up"

    def __post_init__(self) -> None:
        pos, d_state = len(self.labels), self.A.size
        wanted = {"x": (pos,), "delta": (pos,), "A": (d_state,), "B": (pos, d_state), "C": (pos, d_state)}
        for name, shape in wanted.items():
            if getattr(self, name).shape != shape:
                raise ValueError(
                    f"{name} has shape {getattr(self, name).shape}, {pos} tokens and {d_state} coordinates need {shape}"
                )
        if not pos or not d_state:
            raise ValueError("a channel needs at least one token and one coordinate of the state")
        if (self.delta <= 0).any():
            raise ValueError(f"Δ is a step size and must be positive, got {self.delta.min():g}")
        if (self.A >= 0).any():
            raise ValueError(f"A is a rate of decay and must be negative, got {self.A.max():g}: the state would grow")

    @property
    def A_bar(self) -> Float[np.ndarray, "pos d_state"]:
        """The part of the state that is kept at each token."""
        return np.exp(self.delta[:, None] * self.A)

    @property
    def B_bar(self) -> Float[np.ndarray, "pos d_state"]:
        """What x is multiplied with when it is written."""
        return self.delta[:, None] * self.B

    @property
    def varies(self) -> list[str]:
        """Which of Δ, B and C differ from token to token: what is selective about it."""
        named = {"Δ": self.delta[:, None], "B": self.B, "C": self.C}
        return [name for name, values in named.items() if not np.allclose(values, values[:1], rtol=1e-6, atol=1e-12)]


def made_up(
    delta: float | Sequence[float] = 0.5,
    A: float | Sequence[float] = -0.5,
    words: Sequence[tuple[str, float]] = STORY,
) -> OneChannel:
    """A channel small enough to do by hand: its input is a number per word, B and C are 1.

    delta: one step size, or one for each word. A: one rate of decay for each coordinate of the state. words: (text, x).

    Raises ValueError for a number of step sizes that is not that of the words, and as `OneChannel`.

    >>> made_up(delta=1.0, A=-1.0).A_bar[0].round(3)
    array([0.368])
    """
    steps, rates = np.atleast_1d(np.asarray(delta, float)), np.atleast_1d(np.asarray(A, float))
    if steps.size not in (1, len(words)):
        raise ValueError(f"{steps.size} step sizes were given for {len(words)} words: give one, or one for each")
    ones = np.ones((len(words), rates.size))
    return OneChannel(
        tuple(f"{i} {word}" for i, (word, _) in enumerate(words)),
        np.array([x for _, x in words], float),
        np.broadcast_to(steps, (len(words),)).copy(),
        rates,
        ones,
        ones,
    )


def selective_story(at_names: float, elsewhere: float, A: float = -0.5) -> OneChannel:
    """The made-up channel with one step size for names and another one for all other words."""
    return made_up([at_names if word in NAMES else elsewhere for word, _ in STORY], A)


@torch.no_grad()
def channel_of(model: HookedMamba, text: Input, layer: int, channel: int) -> OneChannel:
    """One channel of one layer of a model while it reads a text, with the numbers that its hooks see.

    Raises ValueError for a layer or channel that does not exist, several texts, and a run whose state is changed by
    hooks.

    >>> one = channel_of(HookedMamba.from_pretrained("nano-mamba"), "Mary gave an apple to", layer=1, channel=3)
    >>> one.labels[0], one.B.shape
    ('0 Mary', (5, 16))
    """
    scan, cache = layer_scan(model, text, layer)
    if cache.tokens.shape[0] != 1:
        raise ValueError(f"one text is shown at a time, got {cache.tokens.shape[0]}")
    (d,) = resolve_indices("channel", channel, model.cfg.d_inner)
    arrays = (scan.x[0, :, d], scan.delta[0, :, d], scan.A[d], scan.B[0], scan.C[0])
    x, delta, A, B, C = (values.double().cpu().numpy() for values in arrays)
    made_with = provenance(model)
    source = f"{made_with['model']} ({made_with['dtype']}), layer {layer}, channel {d}"
    return OneChannel(tuple(position_labels(model, cache.tokens)), x, delta, A, B, C, source)


def recurrence(one: OneChannel) -> xr.Dataset:
    """Every number of every step: dims (position, coordinate), and (position) for x, delta and y.

    before: the state that the token finds. A_bar, kept = A_bar · before. B_bar, written = B_bar · x.
    state = kept + written. C, read = C · state. y: the sum of what is read.
    """
    A_bar, B_bar = one.A_bar, one.B_bar
    before, state = np.zeros_like(A_bar), np.zeros_like(A_bar)
    h = np.zeros_like(one.A)
    for t in range(len(one.labels)):
        before[t] = h
        h = A_bar[t] * h + B_bar[t] * one.x[t]
        state[t] = h
    by_coordinate = {
        "before": before,
        "A_bar": A_bar,
        "kept": A_bar * before,
        "B_bar": B_bar,
        "written": B_bar * one.x[:, None],
        "state": state,
        "C": one.C,
        "read": one.C * state,
    }
    by_token = {"x": one.x, "delta": one.delta, "y": (one.C * state).sum(1)}
    return xr.Dataset(
        {name: (("position", "coordinate"), values) for name, values in by_coordinate.items()}
        | {name: ("position", values) for name, values in by_token.items()},
        coords={"position": list(one.labels), "coordinate": np.arange(len(one.A)), "A": ("coordinate", one.A)},
        attrs={"source": one.source},
    )


def unrolled(one: OneChannel) -> xr.DataArray:
    """What each source token brings to y at each target: dims (target, source); their sum over sources is y.

    Multiplies every factor by itself, as it stands in the formula, and shares nothing with `recurrence`.
    """
    A_bar, B_bar, length = one.A_bar, one.B_bar, len(one.labels)
    terms = np.zeros((length, length))
    for t in range(length):
        for s in range(t + 1):
            survives = A_bar[s + 1 : t + 1].prod(0)
            terms[t, s] = (one.C[t] * survives * B_bar[s]).sum() * one.x[s]
    coords = {"target": list(one.labels), "source": list(one.labels)}
    return xr.DataArray(terms, coords, ("target", "source"), name="contribution", attrs={"source": one.source})


def kernel(one: OneChannel) -> xr.DataArray:
    """K_k, the weight of what was read k tokens ago, the same at every token: dim (age).

    Raises ValueError if Δ, B or C differ from token to token: then there is no such kernel.
    """
    if one.varies:
        raise ValueError(
            f"{', '.join(one.varies)} {'differs' if len(one.varies) == 1 else 'differ'} from token to token, so no one "
            "kernel gives the output: make it fixed with `with_fixed_steps`, or use the recurrence"
        )
    ages = np.arange(len(one.labels))
    values = (one.C[0] * one.A_bar[0] ** ages[:, None] * one.B_bar[0]).sum(1)
    return xr.DataArray(values, {"age": ages}, ("age",), name="kernel", attrs={"source": one.source})


def convolved(one: OneChannel) -> xr.DataArray:
    """y by convolution of x with the kernel: dim (position). Raises ValueError where `kernel` does."""
    y = np.convolve(one.x, kernel(one).values)[: len(one.labels)]
    return xr.DataArray(y, {"position": list(one.labels)}, ("position",), name="y", attrs={"source": one.source})


def with_fixed_steps(one: OneChannel) -> OneChannel:
    """The same channel without selection: Δ, B and C are their means over the tokens at every token."""
    delta, B, C = (np.broadcast_to(v.mean(0), v.shape).copy() for v in (one.delta, one.B, one.C))
    return replace(one, delta=delta, B=B, C=C, source=f"{one.source}, Δ, B and C at their means")


def numbers(steps: xr.Dataset, coordinate: int = 0) -> pd.DataFrame:
    """Every number of `recurrence` for one coordinate of the state, a row per token, in the order of the computation.

    Raises ValueError for a coordinate that does not exist.
    """
    _check_index(steps, "coordinate", coordinate)
    columns = ("x", "delta", "A_bar", "before", "kept", "B_bar", "written", "state", "C", "read", "y")
    one = steps.isel(coordinate=coordinate)
    return pd.DataFrame({name: one[name].values for name in columns}, index=list(steps["position"].values))


def written_out(steps: xr.Dataset, position: int, coordinate: int) -> dict[str, list[str]]:
    """One step of `recurrence` for one coordinate, as LaTeX: "A_bar", "B_bar", "state" and "y".

    Each is its name and what it is equal to, in turn: as a formula, in numbers, and its value.

    Raises ValueError for a position or coordinate that does not exist.
    """
    _check_index(steps, "position", position)
    _check_index(steps, "coordinate", coordinate)
    at = steps.isel(position=position)
    here = {str(name): float(values) for name, values in at.isel(coordinate=coordinate).data_vars.items()}
    delta, A_bar, B_bar = here["delta"], here["A_bar"], here["B_bar"]
    decay = rf"{_number(delta)} \cdot {_factor(float(at['A'][coordinate]))}"
    change = rf"{_number(A_bar)} \cdot {_factor(here['before'])} + {_factor(B_bar)} \cdot {_factor(here['x'])}"
    others = steps.sizes["coordinate"] - 1
    rest = rf" + \underbrace{{{_factor(here['y'] - here['read'])}}}_{{\text{{{others} others}}}}" if others else ""
    product = rf"{_factor(here['C'])} \cdot {_factor(here['state'])}"
    return {
        "A_bar": [r"\bar A", r"e^{\Delta A}", f"e^{{{decay}}}", _number(A_bar)],
        "B_bar": [r"\bar B", r"\Delta B", rf"{_number(delta)} \cdot {_factor(B_bar / delta)}", _number(B_bar)],
        "state": ["h", r"\bar A\, h + \bar B\, x", change, _number(here["state"])],
        "y": ["y", r"C \cdot h", product + rest, _number(here["y"])],
    }


def _check_index(steps: xr.Dataset, axis: str, index: int) -> None:
    size = steps.sizes[axis]
    if not 0 <= index < size:
        raise ValueError(f"{axis} {index} does not exist: there are {size} (0 to {size - 1})")


def _number(value: float) -> str:
    """Three significant digits as LaTeX."""
    if value == 0 or 1e-3 <= abs(value) < 1e4:
        return f"{value:.3g}"
    mantissa, exponent = f"{value:.1e}".split("e")
    return rf"{mantissa} \times 10^{{{int(exponent)}}}"


def _factor(value: float) -> str:
    """A number in a sum or product: in brackets if it is negative."""
    return f"({_number(value)})" if value < 0 else _number(value)
