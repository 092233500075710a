"""Launching Triton kernels again as they were launched before, without working out anew how.

What a function that allocates tensors and launches kernels does depends on the shapes, strides and dtypes of its
arguments alone. To find it out (tiles, strides, what Triton specialises on) takes the host longer than a GPU takes for
a short sequence. So a function marked with `repeated` is watched when it first sees arguments of some layout; later
calls only allocate what it allocated and launch the compiled kernels that it launched. Triton's tutorial on fused
softmax launches compiled kernels in this way.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple, ParamSpec, TypeVar, cast

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ssminterp_kernels.backends import on_device_of

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

# Of one function; more layouts than these are forgotten and watched anew, so that memory does not grow for ever.
MOST_LAYOUTS = 2048
_ALIGNMENT: Final = 512  # bytes between tensors that share an allocation, as torch's own allocations on a GPU have


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """`kernel[grid](*arguments, **options)`, which a function marked with `repeated` must call for all its launches."""
    compiled = kernel[grid](*arguments, **options)
    if _watching.recording is not None:
        _watching.recording.add_launch(kernel, grid, arguments, options, compiled)


def repeated(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Marks a function of tensors of one device (or None) and hashable flags, given by position, that allocates
    tensors, makes views and launches kernels with `launch`. It returns a tensor, or a tuple of tensors and None, all of
    its own making.

    Its first call with arguments of a layout runs it, later ones repeat what it did. Calls in which it did anything
    else, changed a tensor in place say, are never repeated; neither are those of Triton's interpreter. Two layouts are
    the same if shapes, strides, dtypes, devices and flags are, if Triton would specialise on the same pointers, and if
    the same arguments are one tensor. The function must not take parts of its arguments.
    """
    known: dict[Any, _Recipe | None] = {}

    @functools.wraps(function)
    def wrapper(*arguments: Any) -> Any:
        if _watching.recording is not None:
            return function(*arguments)  # type: ignore[call-arg]
        pointers: list[int] = []
        layout: list[Any] = []
        for argument in arguments:
            if isinstance(argument, Tensor):
                pointer = argument.data_ptr()
                pointers.append(pointer)
                layout += (argument.shape, argument.stride(), argument.dtype, argument.device, pointer % 16 == 0)
            else:
                layout.append(argument)
        if len(set(pointers)) < len(pointers):
            layout += map(pointers.index, pointers)
        key = tuple(layout)
        recipe = known.get(key, _UNKNOWN)
        if recipe is _UNKNOWN:
            if len(known) >= MOST_LAYOUTS:
                known.clear()
            result, known[key] = _watched(function, arguments, pointers)
            return result
        if recipe is None:
            return function(*arguments)  # type: ignore[call-arg]
        # Compiled kernels go to the current GPU too, and the function chose its own.
        with on_device_of(next(argument for argument in arguments if isinstance(argument, Tensor))):
            return cast("_Recipe", recipe).repeat(pointers)

    wrapper.known = known  # type: ignore[attr-defined]
    return cast("Callable[Arguments, Result]", wrapper)


_UNKNOWN: Final[Any] = object()


class _Watching(threading.local):
    """The recording under way in this thread: autograd's backward passes have threads of their own."""

    recording: _Recording | None = None


_watching = _Watching()


def _watched(function: Callable[..., Any], arguments: Sequence[Any], pointers: list[int]) -> tuple[Any, _Recipe | None]:
    """The function's result, and how to get it again from arguments of the same layout; None if that is not known."""
    _watching.recording = recording = _Recording(pointers)
    try:
        with recording:
            result = function(*arguments)
    finally:
        _watching.recording = None
    return result, recording.recipe(result)


class _Buffer(NamedTuple):
    """An allocation: its tensor, and how to make another."""

    tensor: Tensor
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class _Launch(NamedTuple):
    """A launch of a compiled kernel; `places` are the arguments that are pointers, or tuples that begin with one:
    (index, which pointer, the rest of the tuple or None)."""

    compiled: Any
    grid: tuple[int, int, int]
    arguments: list[Any]
    places: list[tuple[int, int, tuple[Any, ...] | None]]


class _Recording(TorchDispatchMode):
    """What a function does: its allocations and launches, and whether that is all."""

    def __init__(self, pointers: list[int]) -> None:
        super().__init__()
        self.pointers = pointers
        self.buffers: list[_Buffer] = []
        self.launches: list[tuple[Any, tuple[int, ...], list[Any]]] = []
        self.is_all = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__.startswith(("empty", "new_empty")):
            self.buffers.append(_Buffer(result, tuple(result.shape), result.stride()))
        else:
            self.is_all &= func.is_view
        return result

    def add_launch(
        self, kernel: Any, grid: tuple[int, ...], arguments: Any, options: dict[str, Any], compiled: Any
    ) -> None:
        # The interpreter compiles nothing.
        if not hasattr(compiled, "launch_metadata"):
            self.is_all = False
            return
        signature = inspect.signature(kernel.fn)
        named = {name: value for name, value in options.items() if name in signature.parameters}
        bound = signature.bind(*arguments, **named)
        bound.apply_defaults()
        self.launches.append((compiled, grid, list(bound.arguments.values())))

    def recipe(self, result: Any) -> _Recipe | None:
        if not self.is_all:
            return None
        try:
            return _Recipe(self, result)
        except _NotOfItsOwn:
            return None


class _NotOfItsOwn(Exception):
    """A tensor that is neither an argument nor lies in what the function allocated."""


class _Recipe:
    """Allocations and launches to be repeated.

    Pointers are those of the arguments, then those of the tensors that are returned or have parts that are, then those
    of the rest, which share one allocation.
    """

    def __init__(self, recording: _Recording, result: Any) -> None:
        self.is_tuple = isinstance(result, tuple)
        results = list(result) if self.is_tuple else [result]
        owners = [None if part is None else _owner(part, recording.buffers) for part in results]
        kept = sorted({owner for owner in owners if owner is not None})
        rest = [i for i in range(len(recording.buffers)) if i not in kept]
        self.allocations = [
            (buffer.shape, buffer.stride, buffer.tensor.dtype, buffer.tensor.device)
            for buffer in (recording.buffers[i] for i in kept)
        ]
        self.offsets: list[int] = []
        self.n_bytes = 0
        for i in rest:
            self.offsets.append(self.n_bytes)
            n_bytes = recording.buffers[i].tensor.untyped_storage().nbytes()
            self.n_bytes += -(-n_bytes // _ALIGNMENT) * _ALIGNMENT
            self.device = recording.buffers[i].tensor.device
        pointers = [*recording.pointers, *(recording.buffers[i].tensor.data_ptr() for i in (*kept, *rest))]
        self.launches = [_launch_of(*one, pointers) for one in recording.launches]
        self.results = [
            None if owner is None else (kept.index(owner), _part(part, recording.buffers[owner]))
            for part, owner in zip(results, owners, strict=True)
        ]

    def repeat(self, arguments: list[int]) -> Any:
        """What the function returns for arguments that lie there."""
        kept = [
            torch.empty_strided(shape, stride, dtype=dtype, device=device)
            for shape, stride, dtype, device in self.allocations
        ]
        pointers = arguments + [tensor.data_ptr() for tensor in kept]
        if self.n_bytes:
            shared = torch.empty(self.n_bytes, dtype=torch.uint8, device=self.device)
            begin = shared.data_ptr()
            pointers += [begin + offset for offset in self.offsets]
        for compiled, grid, arguments_of_launch, places in self.launches:
            values = arguments_of_launch.copy()
            for index, which, others in places:
                values[index] = pointers[which] if others is None else (pointers[which], *others)
            compiled[grid](*values)
        parts = [
            None if part is None else kept[part[0]] if part[1] is None else kept[part[0]].as_strided(*part[1])
            for part in self.results
        ]
        return tuple(parts) if self.is_tuple else parts[0]


def _owner(part: Tensor, buffers: list[_Buffer]) -> int:
    """In which buffer a tensor lies."""
    storage = part.untyped_storage().data_ptr()
    for i, buffer in enumerate(buffers):
        if buffer.tensor.untyped_storage().data_ptr() == storage:
            return i
    raise _NotOfItsOwn


def _part(part: Tensor, buffer: _Buffer) -> tuple[Any, ...] | None:
    """A tensor's shape, strides and offset in a buffer; None if it is the whole of it."""
    if part.dtype != buffer.tensor.dtype:
        raise _NotOfItsOwn
    layout = (tuple(part.shape), part.stride(), part.storage_offset())
    return None if layout == (buffer.shape, buffer.stride, 0) else layout


def _launch_of(compiled: Any, grid: tuple[int, ...], arguments: list[Any], pointers: list[int]) -> _Launch:
    values, places = list(arguments), []
    for index, argument in enumerate(arguments):
        first, others = (argument[0], argument[1:]) if isinstance(argument, tuple) and argument else (argument, None)
        if isinstance(first, Tensor):
            if first.data_ptr() not in pointers or any(isinstance(other, Tensor) for other in others or ()):
                raise _NotOfItsOwn
            places.append((index, pointers.index(first.data_ptr()), others))
            values[index] = None
    x, y, z = (*grid, 1, 1)[:3]
    return _Launch(compiled, (x, y, z), values, places)
