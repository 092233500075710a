"""What every backend of the selective scan receives: one tuple of arguments, checked and in one canonical form."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple, cast

import torch
from jaxtyping import Float
from torch import Tensor

from ssminterp_kernels.checks import once_per_layout
from ssminterp_kernels.selective_scan.edits import StateEdits


class ScanArguments(NamedTuple):
    """The arguments of `selective_scan`, as the user gave them or, after `check_arguments`, normalised.

    Normalised: B and C are [batch, pos, n_groups, d_state]; states is None, "all" or a tuple of ints; edits is None
    or holds at least one edit, with keep and add of four axes, each of size 1 or that of
    [batch, n_edits, d_inner, d_state], on the scan's device. Dtypes and strides are as given.
    """

    x: Float[Tensor, "batch pos d_inner"]
    delta: Float[Tensor, "batch pos d_inner"]
    A: Float[Tensor, "d_inner d_state"]
    B: Float[Tensor, "batch pos *n_groups d_state"]
    C: Float[Tensor, "batch pos *n_groups d_state"]
    D: Float[Tensor, " d_inner"] | None = None
    z: Float[Tensor, "batch pos d_inner"] | None = None
    delta_bias: Float[Tensor, " d_inner"] | None = None
    delta_softplus: bool = False
    initial_state: Float[Tensor, "batch d_inner d_state"] | None = None
    states: Literal["all"] | Sequence[int] | None = None
    edits: StateEdits | None = None
    states_dtype: torch.dtype | None = None

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """batch, pos, d_inner, d_state."""
        batch, length, d_inner = self.x.shape
        return batch, length, d_inner, self.A.shape[1]

    @property
    def state_dtype(self) -> torch.dtype:
        """float64 if x is, else float32."""
        return torch.float64 if self.x.dtype == torch.float64 else torch.float32

    @property
    def recorded_dtype(self) -> torch.dtype:
        """The dtype of the states that are returned."""
        return self.state_dtype if self.states_dtype is None else self.states_dtype

    @property
    def recorded_positions(self) -> Sequence[int]:
        """The positions whose states are asked for; meant for normalised arguments."""
        if self.states is None:
            return ()
        return range(self.x.shape[1]) if self.states == "all" else cast("tuple[int, ...]", self.states)

    @property
    def needs_graph(self) -> bool:
        """Whether autograd is recording and a tensor among the arguments requires a gradient."""
        if not torch.is_grad_enabled():
            return False
        tensors: tuple[object, ...] = tuple(self)
        if self.edits is not None:
            tensors += (self.edits.keep, self.edits.add)
        return any(isinstance(t, Tensor) and t.requires_grad for t in tensors)


def check_arguments(arguments: ScanArguments, groups_axis: bool = True) -> ScanArguments:
    """The arguments in the form that backends expect (see `ScanArguments`).

    Raises ValueError, naming the argument, what was received and what was expected, for shapes that do not agree,
    tensors on another device than x, inputs that are not real floating point, an initial state that is not float32
    (or float64 when x is), a dtype of states that is neither the state's own nor bfloat16, positions that are out of
    range, duplicate or unsorted (negative ones are out of range), and edits that do not broadcast. NaN and infinity
    are values like any other.
    """
    x, delta, A, B, C, D, z, delta_bias, _, initial_state, *_ = arguments
    _check_tensors(x, delta, A, B, C, D, z, delta_bias, initial_state)
    states = _checked_states(arguments.states, x.shape[1])
    _check_states_dtype(arguments)
    edits = _checked_edits(arguments.edits, x, A.shape[1])
    arguments = arguments._replace(states=states, edits=edits)
    return with_groups_axis(arguments) if groups_axis else arguments


def with_groups_axis(arguments: ScanArguments) -> ScanArguments:
    """With B and C as [batch, pos, n_groups, d_state]."""
    B, C = (weights.unsqueeze(2) if weights.dim() == 3 else weights for weights in (arguments.B, arguments.C))
    return arguments._replace(B=B, C=C)


@once_per_layout
def _check_tensors(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
) -> None:
    """Raises ValueError for shapes, dtypes and devices that do not agree."""
    _check_rank("x", x, "[batch, pos, d_inner]", 3)
    _check_rank("A", A, "[d_inner, d_state]", 2)
    if 0 in x.shape or 0 in A.shape:
        raise ValueError(f"no axis may be empty, got x of shape {_shape(x)} and A of shape {_shape(A)}")
    batch, _, d_inner = x.shape
    per_channel = (("D", D), ("delta_bias", delta_bias))
    per_position = (("delta", delta), ("z", z))
    state_shape = (batch, d_inner, A.shape[1])
    _check_shape("A", A, "[d_inner, d_state]", (d_inner, A.shape[1]), x)
    for name, tensor in per_position:
        _check_shape(name, tensor, "[batch, pos, d_inner]", x.shape, x)
    for name, tensor in per_channel:
        _check_shape(name, tensor, "[d_inner]", (d_inner,), x)
    _check_shape("initial_state", initial_state, "[batch, d_inner, d_state]", state_shape, x)
    for name, tensor in (("x", x), ("A", A), ("B", B), ("C", C), *per_position, *per_channel):
        _check_kind(name, tensor, x)
    _check_initial_state_kind(initial_state, x)
    if _n_groups("B", B, x, A) != _n_groups("C", C, x, A):
        raise ValueError(f"B and C must have the same number of groups, got B {_shape(B)} and C {_shape(C)}")


def _shape(tensor: Tensor) -> list[int]:
    return list(tensor.shape)


def _check_rank(name: str, tensor: Tensor, axes: str, rank: int) -> None:
    if tensor.dim() != rank:
        raise ValueError(f"{name} must have the axes {axes}, got shape {_shape(tensor)}")


def _check_shape(name: str, tensor: Tensor | None, axes: str, expected: Sequence[int], x: Tensor) -> None:
    if tensor is not None and tensor.shape != torch.Size(expected):
        raise ValueError(
            f"{name} must have the axes {axes} = {list(expected)} to go with x of shape {_shape(x)}, "
            f"got shape {_shape(tensor)}"
        )


def _check_kind(name: str, tensor: Tensor | None, x: Tensor) -> None:
    if tensor is None:
        return
    if not tensor.is_floating_point():
        raise ValueError(f"{name} must be real floating point, got {tensor.dtype} of shape {_shape(tensor)}")
    if tensor.device != x.device:
        raise ValueError(
            f"{name} (shape {_shape(tensor)}) is on {tensor.device} but x (shape {_shape(x)}) is on {x.device}: "
            f"move one of them"
        )


def _check_initial_state_kind(initial_state: Tensor | None, x: Tensor) -> None:
    if initial_state is None:
        return
    allowed = (torch.float32, torch.float64) if x.dtype == torch.float64 else (torch.float32,)
    if initial_state.dtype not in allowed:
        raise ValueError(
            f"initial_state must be {' or '.join(map(str, allowed))} when x is {x.dtype}, got {initial_state.dtype} "
            f"of shape {_shape(initial_state)}: states are kept in float32 whatever the dtype of the inputs"
        )
    _check_kind("initial_state", initial_state, x)


def _n_groups(name: str, weights: Tensor, x: Tensor, A: Tensor) -> int:
    """How many groups B or C has."""
    (batch, length, d_inner), d_state = x.shape, A.shape[1]
    if weights.dim() not in (3, 4) or weights.shape[:2] != x.shape[:2] or weights.shape[-1] != d_state:
        raise ValueError(
            f"{name} must have the axes [batch, pos, d_state] = {[batch, length, d_state]} or [batch, pos, n_groups, "
            f"d_state] to go with x of shape {_shape(x)} and A of shape {_shape(A)}, got shape {_shape(weights)}"
        )
    n_groups = 1 if weights.dim() == 3 else weights.shape[2]
    if n_groups == 0 or d_inner % n_groups:
        raise ValueError(
            f"{name} of shape {_shape(weights)} has n_groups = {n_groups}, which must divide d_inner = {d_inner} "
            f"of x of shape {_shape(x)}"
        )
    return n_groups


def _checked_states(
    states: Literal["all"] | Sequence[int] | None, length: int
) -> Literal["all"] | Sequence[int] | None:
    if states is None:
        return None
    if isinstance(states, str):
        if states != "all":
            raise ValueError(f"states must be None, 'all' or a list of positions, got {states!r}")
        return "all"
    return _checked_positions("states", states, length)


def _check_states_dtype(arguments: ScanArguments) -> None:
    wanted, own = arguments.states_dtype, arguments.state_dtype
    if wanted not in (None, own, torch.bfloat16):
        raise ValueError(f"states_dtype must be {own} or torch.bfloat16 when x is {arguments.x.dtype}, got {wanted}")
    if wanted is not None and arguments.states is None:
        raise ValueError(f"states_dtype is {wanted} but no states are asked for: pass states='all' or positions")


def _checked_positions(name: str, positions: Iterable[int], length: int) -> tuple[int, ...]:
    """Strictly ascending positions within [0, length), as a tuple of Python ints."""
    try:
        checked = tuple(operator.index(p) for p in positions)
    except TypeError as error:
        raise ValueError(f"{name} must be integers, got {positions!r}") from error
    for i, position in enumerate(checked):
        if not 0 <= position < length:
            raise ValueError(f"{name} must be within 0 and {length - 1} (pos = {length}), got {position} in {checked}")
        if i and position <= checked[i - 1]:
            raise ValueError(f"{name} must be strictly ascending, got {position} after {checked[i - 1]} in {checked}")
    return checked


def _checked_edits(edits: StateEdits | None, x: Tensor, d_state: int) -> StateEdits | None:
    if edits is None or edits.n_edits == 0:
        return None
    batch, length, d_inner = x.shape
    if isinstance(edits.positions, Tensor):
        positions: tuple[int, ...] | Tensor = _checked_positions_per_element(edits.positions, x)
    else:
        positions = _checked_positions("edits.positions", edits.positions, length)
    full_shape = (batch, edits.n_edits, d_inner, d_state)
    keep = _checked_edit_values("edits.keep", edits.keep, full_shape, x)
    add = _checked_edit_values("edits.add", edits.add, full_shape, x)
    return StateEdits(positions, keep, add)


def _checked_positions_per_element(positions: Tensor, x: Tensor) -> Tensor:
    """Integer positions [batch, n_edits], each row strictly ascending and within the sequence."""
    batch, length = x.shape[:2]
    if positions.dim() != 2 or positions.shape[0] != batch:
        raise ValueError(
            f"edits.positions as a tensor must have the axes [batch = {batch}, n_edits] to go with x of shape "
            f"{_shape(x)}, got shape {_shape(positions)}; pass a tuple of ints for positions that the batch shares"
        )
    if positions.is_floating_point() or positions.is_complex() or positions.dtype == torch.bool:
        raise ValueError(f"edits.positions must be integers, got {positions.dtype} of shape {_shape(positions)}")
    if positions.device not in (x.device, torch.device("cpu")):
        raise ValueError(
            f"edits.positions is on {positions.device} but x is on {x.device}: move it there or to the CPU"
        )
    for row in positions.tolist():
        _checked_positions("edits.positions of a batch element", row, length)
    return positions


def _checked_edit_values(name: str, values: Tensor, full_shape: tuple[int, int, int, int], x: Tensor) -> Tensor:
    """keep or add with exactly four axes, on the scan's device."""
    fits = values.dim() <= 4 and all(
        have in (1, want) for have, want in zip(reversed(values.shape), reversed(full_shape), strict=False)
    )
    if not fits:
        raise ValueError(
            f"{name} must broadcast to [batch, n_edits, d_inner, d_state] = {list(full_shape)}, "
            f"got shape {_shape(values)}"
        )
    values = values.reshape((1,) * (4 - values.dim()) + values.shape)
    one_number_per_edit = values.shape[0] == values.shape[2] == values.shape[3] == 1
    if one_number_per_edit and values.device.type == "cpu" and not values.requires_grad:
        # Plain numbers, which StateEdits.at turns into CPU tensors because it cannot know the scan's device.
        values = values.to(x.device)
    _check_kind(name, values, x)
    return values
