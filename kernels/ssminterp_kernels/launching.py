"""Launching Triton kernels again as they were launched before, without working out anew how.

What a function that allocates tensors and launches kernels does depends on the shapes, strides and dtypes of its
arguments alone. To find it out (tiles, strides, what Triton specialises on) takes the host longer than a GPU takes for
a short sequence. So a function marked with `repeated` is watched when it first sees arguments of some layout; later
calls only allocate what it allocated and launch the compiled kernels that it launched. They are launched as torch's
compiler launches its own, unless a profiler wants to hear of it: then as in Triton's tutorial on fused softmax.
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

from ssminterp_kernels.first_launches import tell_of_first_launch

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


def can_be_repeated(*tensors: Tensor | None) -> bool:
    """Whether a call with these tensors, of which the first is no None, is but a matter of launches on a GPU: no
    compiler is looking on, and no gradients are asked for."""
    if torch.compiler.is_compiling() or not cast("Tensor", tensors[0]).is_cuda:
        return False
    return not torch.is_grad_enabled() or not any(t is not None and t.requires_grad for t in tensors)


def repeated(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Marks a function of tensors of one device (or None) and hashable flags, given by position, that checks them,
    allocates tensors, makes views and launches kernels with `launch`. It returns a tensor, or a tuple of tensors and
    None, all of its own making.

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
                layout += (argument.shape, argument.stride(), argument.dtype, argument.get_device(), pointer % 16 == 0)
            else:
                layout.append(argument)
        if len(set(pointers)) < len(pointers):
            layout += map(pointers.index, pointers)
        key = tuple(layout)
        try:
            recipe = known.get(key, _UNKNOWN)
        except TypeError:
            # A flag that cannot be hashed is none that the function knows, which will say so.
            return function(*arguments)  # type: ignore[call-arg]
        if recipe is _UNKNOWN:
            if len(known) >= MOST_LAYOUTS:
                known.clear()
            tell_of_first_launch(function.__name__)
            device = next(argument.device for argument in arguments if isinstance(argument, Tensor))
            result, known[key] = _watched(function, arguments, _Recording(pointers, device))
            return result
        if recipe is None:
            return function(*arguments)  # type: ignore[call-arg]
        return cast("_Recipe", recipe).repeat(pointers)

    wrapper.known = known  # type: ignore[attr-defined]
    return cast("Callable[Arguments, Result]", wrapper)


_kept_zeros: dict[tuple[tuple[int, ...], torch.dtype, torch.device], Tensor] = {}


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """One zero, expanded; kept, because to fill it is a launch."""
    key = (shape, dtype, device)
    kept = _kept_zeros.get(key)
    if kept is None:
        with torch.inference_mode(False):
            kept = torch.zeros((), dtype=dtype, device=device).expand(shape)
        # What is filled while a graph is captured is filled when the graph runs, and lies in its memory.
        if device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
            if len(_kept_zeros) >= MOST_LAYOUTS:
                _kept_zeros.clear()
            _kept_zeros[key] = kept
    return kept


_UNKNOWN: Final[Any] = object()


class _Watching(threading.local):
    """The recording under way in this thread: autograd's backward passes have threads of their own."""

    recording: _Recording | None = None


_watching = _Watching()


def _watched(
    function: Callable[..., Any], arguments: Sequence[Any], recording: _Recording
) -> tuple[Any, _Recipe | None]:
    """The function's result, and how to get it again from arguments of the same layout; None if that is not known."""
    _watching.recording = recording
    try:
        with recording:
            result = function(*arguments)
    finally:
        _watching.recording = None
    return result, recording.recipe(result)


class _Launched(NamedTuple):
    """A launch as it was seen: all of the kernel's parameters in order."""

    compiled: Any
    grid: tuple[int, int, int]
    arguments: list[Any]


class _Recording(TorchDispatchMode):
    """What a function does: its allocations and launches, and whether that is all.

    pointers: those of its arguments. device: where they are, and everything is launched.
    """

    def __init__(self, pointers: list[int], device: torch.device) -> None:
        super().__init__()
        self.pointers = pointers
        self.device = device
        self.buffers: list[Tensor] = []
        self.launches: list[_Launched] = []
        self.is_all = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__.startswith(("empty", "new_empty")):
            self.buffers.append(result)
        else:
            self.is_all &= func.is_view
        return result

    def add_launch(
        self, kernel: Any, grid: tuple[int, ...], arguments: Any, options: dict[str, Any], compiled: Any
    ) -> None:
        # The interpreter compiles nothing.
        if not hasattr(compiled, "packed_metadata"):
            self.is_all = False
            return
        signature = inspect.signature(kernel.fn)
        named = {name: value for name, value in options.items() if name in signature.parameters}
        bound = signature.bind(*arguments, **named)
        bound.apply_defaults()
        x, y, z = (*grid, 1, 1)[:3]
        self.launches.append(_Launched(compiled, (x, y, z), list(bound.arguments.values())))

    def recipe(self, result: Any) -> _Recipe | None:
        try:
            return _Recipe(self, result) if self.is_all else None
        except _NotOfItsOwn:
            return None


class _NotOfItsOwn(Exception):
    """A tensor that is neither an argument nor lies in what the function allocated."""


class _Launch(NamedTuple):
    """A launch to be repeated; `places` are the arguments that are pointers, or tuples that begin with one: (index,
    which pointer, the rest of the tuple or None)."""

    compiled: Any
    grid: tuple[int, int, int]
    arguments: list[Any]
    places: list[tuple[int, int, tuple[Any, ...] | None]]

    @classmethod
    def of(cls, launched: _Launched, pointers: list[int]) -> _Launch:
        values: list[Any] = []
        places = []
        for index, argument in enumerate(launched.arguments):
            first, others = (
                (argument[0], argument[1:]) if isinstance(argument, tuple) and argument else (argument, None)
            )
            if isinstance(first, Tensor):
                if first.data_ptr() not in pointers:
                    raise _NotOfItsOwn
                places.append((index, pointers.index(first.data_ptr()), others))
                argument = None
            values.append(argument)
        return cls(launched.compiled, launched.grid, values, places)


class _Recipe:
    """Allocations and launches to be repeated.

    Pointers are those of the arguments, then those of the tensors that are returned or have parts that are, then those
    of the rest, which share one allocation.
    """

    def __init__(self, recording: _Recording, result: Any) -> None:
        self.device = recording.device
        self.is_tuple = isinstance(result, tuple)
        results = list(result) if self.is_tuple else [result]
        buffers = recording.buffers
        owners = [None if part is None else _owner(part, buffers) for part in results]
        kept = sorted({owner for owner in owners if owner is not None})
        rest = [i for i in range(len(buffers)) if i not in kept]
        self.allocations = [(tuple(buffers[i].shape), buffers[i].stride(), buffers[i].dtype) for i in kept]
        self.offsets: list[int] = []
        self.n_bytes = 0
        for i in rest:
            self.offsets.append(self.n_bytes)
            self.n_bytes += -(-buffers[i].untyped_storage().nbytes() // _ALIGNMENT) * _ALIGNMENT
        pointers = [*recording.pointers, *(buffers[i].data_ptr() for i in (*kept, *rest))]
        self.launches = [_Launch.of(launched, pointers) for launched in recording.launches]
        self.results = [
            None if owner is None else (kept.index(owner), _part(part, buffers[owner]))
            for part, owner in zip(results, owners, strict=True)
        ]
        self.current_stream = stream_getter(self.device.index) if self.launches else None

    def repeat(self, arguments: list[int]) -> Any:
        """What the function returns for arguments that lie there."""
        # Compiled kernels go to the current GPU too, and the function chose its own.
        if self.device.type == "cuda" and torch.cuda.current_device() != self.device.index:
            with torch.cuda.device(self.device):
                return self._repeat(arguments)
        return self._repeat(arguments)

    def _repeat(self, arguments: list[int]) -> Any:
        device = self.device
        kept = [
            torch.empty_strided(shape, stride, dtype=dtype, device=device) for shape, stride, dtype in self.allocations
        ]
        pointers = arguments + [tensor.data_ptr() for tensor in kept]
        if self.n_bytes:
            shared = torch.empty(self.n_bytes, dtype=torch.uint8, device=device)
            begin = shared.data_ptr()
            pointers += [begin + offset for offset in self.offsets]
        if self.current_stream is not None:
            self._launch(pointers, self.current_stream())
        parts = [
            None if part is None else kept[part[0]] if part[1] is None else kept[part[0]].as_strided(*part[1])
            for part in self.results
        ]
        return tuple(parts) if self.is_tuple else parts[0]

    def _launch(self, pointers: list[int], stream: int) -> None:
        is_heard_of = launches_are_heard_of()
        for compiled, (x, y, z), arguments, places in self.launches:
            values = arguments.copy()
            for index, which, others in places:
                values[index] = pointers[which] if others is None else (pointers[which], *others)
            if is_heard_of:
                compiled[x, y, z](*values)
            else:
                compiled.run(x, y, z, stream, compiled.function, compiled.packed_metadata, None, None, None, *values)


@functools.cache
def stream_getter(device: int | None) -> Callable[[], int]:
    """What tells the stream that is current on a GPU."""
    from triton.runtime import driver

    return functools.partial(driver.active.get_current_stream, device)


@functools.cache
def _runtime() -> Any:
    from triton import knobs

    return knobs.runtime


def launches_are_heard_of() -> bool:
    """Whether a profiler has put hooks around Triton's launches."""
    runtime = _runtime()
    before, after = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(getattr(before, "calls", before) or getattr(after, "calls", after))


def _owner(part: Tensor, buffers: list[Tensor]) -> int:
    """In which buffer a tensor lies."""
    storage = part.untyped_storage().data_ptr()
    for i, buffer in enumerate(buffers):
        if buffer.untyped_storage().data_ptr() == storage:
            return i
    raise _NotOfItsOwn


def _part(part: Tensor, buffer: Tensor) -> tuple[Any, ...] | None:
    """A tensor's shape, strides and offset in a buffer; None if it is the whole of it."""
    if part.dtype != buffer.dtype:
        raise _NotOfItsOwn
    layout = (tuple(part.shape), part.stride(), part.storage_offset())
    return None if layout == (tuple(buffer.shape), buffer.stride(), 0) else layout
