"""How a `HookedMamba` gets its nnsight side: made when it is first asked for, and only then is nnsight imported."""

from __future__ import annotations

import dis
import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar, no_type_check

if TYPE_CHECKING:
    from ssminterp.models.tracing.root import MambaEnvoy

# 0.7 leaves each module's forward replaced after a trace, bound to that very module: a copy of the model then computes
# with the weights of the model it was copied from, and cannot be pickled.
OLDEST = (0, 8)

Method = TypeVar("Method", bound=Callable[..., Any])


class Tracing:
    """The nnsight side of one model. A copy of the model begins without one."""

    def __init__(self) -> None:
        self.envoy: MambaEnvoy | None = None
        self.running = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> Tracing:
        return Tracing()

    def __reduce__(self) -> tuple[type[Tracing], tuple[()]]:
        return Tracing, ()

    def envoy_of(self, model: Any) -> MambaEnvoy:
        """The model's root envoy. Raises ImportError if nnsight is missing or too old."""
        if self.envoy is None or not self.envoy.is_current():
            check_nnsight()
            from ssminterp.models.tracing.root import MambaEnvoy

            self.envoy = MambaEnvoy(model)
        return self.envoy

    def seen(self, name: str, outside: Any) -> Any:
        """A part of the model by its design name: in the code of a trace its envoy, else the part itself."""
        return getattr(self.envoy, name) if self.running else outside

    @contextmanager
    def run(self) -> Iterator[None]:
        """While a trace collects its invokes and runs."""
        self.running += 1
        try:
            yield
        finally:
            self.running -= 1

    @contextmanager
    def aside(self) -> Iterator[None]:
        """A run of the model by the code of a trace itself is no part of the traced run."""
        if not (self.running and in_code_of_a_trace()):
            yield
            return
        assert self.envoy is not None
        interleaver, running = self.envoy.interleaver, self.running
        interleaving, interleaver.interleaving, self.running = interleaver.interleaving, False, 0
        points = self.envoy._module.hook_points.values()
        windows = [point.window for point in points]
        for point in points:
            point.window = None
        try:
            yield
        finally:
            interleaver.interleaving, self.running = interleaving, running
            for point, window in zip(points, windows, strict=True):
                point.window = window


def check_nnsight() -> None:
    """Raises ImportError, naming the extra to install, if nnsight is missing or too old."""
    install = "pip install 'ssminterp[nnsight]'"
    try:
        import nnsight  # noqa: F401
    except ImportError as error:
        raise ImportError(f"traces need nnsight, which is not installed: {install}") from error
    installed = version("nnsight")
    if tuple(int(part) for part in installed.split(".")[:2]) < OLDEST:
        raise ImportError(f"traces need nnsight ≥ {'.'.join(map(str, OLDEST))}, {installed} is installed: {install}")


def in_code_of_a_trace() -> bool:
    """Whether this is called by the code of a trace, which runs in a greenlet of its own, and not by the model."""
    greenlets: Any = sys.modules.get("greenlet")
    return greenlets is not None and getattr(greenlets.getcurrent(), "mediator", None) is not None


def apart(method: Method) -> Method:
    """A method whose runs, where the code of a trace calls it, are no part of the traced run."""

    @no_type_check
    @functools.wraps(method)
    def wrapper(self, *args, **kwargs):
        with self.tracing.aside():
            return method(self, *args, **kwargs)

    return wrapper


def traceable(method: Method) -> Method:
    """`with model.method(…):` is a trace of the method; called any other way it is just the method."""

    @no_type_check
    @functools.wraps(method)
    def wrapper(self, *args, **kwargs):
        if _opens_a_with_block(sys._getframe(1)):
            return getattr(self.tracing.envoy_of(self), method.__name__)(*args, **kwargs)
        with self.tracing.aside():
            return method(self, *args, **kwargs)

    return wrapper


def _opens_a_with_block(caller: FrameType) -> bool:
    """Whether the call that `caller` is at is the expression of a `with` statement."""
    code = caller.f_code.co_code
    following = (dis.opname[op] for op in code[caller.f_lasti + 2 :: 2])
    names = (name for name in following if name not in ("CACHE", "EXTENDED_ARG"))
    first = next(names, None)
    # 3.10; 3.11 to 3.13; from 3.14 on the manager is copied and its __exit__ looked up.
    return first in ("SETUP_WITH", "BEFORE_WITH") or (first == "COPY" and next(names, None) == "LOAD_SPECIAL")
