"""The forward scan in Triton as its tests call it: of given inputs, and in chunks of a given length."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from scan_cases import ScanCase, random_scan_inputs, relative_error
from torch import Tensor

from ssminterp_kernels.selective_scan import triton_scan
from ssminterp_kernels.selective_scan.arguments import ScanArguments, check_arguments
from ssminterp_kernels.selective_scan.triton_tensors import ScanTensors, scan_tensors


def tensors_of(inputs: dict[str, Any]) -> ScanTensors:
    return scan_tensors(check_arguments(ScanArguments(**inputs)))


def forget_launches() -> None:
    """Repeated calls do not ask for a plan again."""
    triton_scan._forward.known.clear()  # type: ignore[attr-defined]


def check_chunks(
    case: ScanCase,
    chunk_length: int,
    device: str,
    monkeypatch: pytest.MonkeyPatch,
    held: int = 0,
    every: int | None = None,
) -> None:
    """Assert that chunks give what one pass does, the states for a backward pass included; held: as of `Plan`."""
    s = tensors_of(random_scan_inputs(case, device=device))
    chosen = triton_scan.forward_plan

    def scanned(length: int, held: int) -> tuple[Tensor, ...]:
        changes = {"chunk_length": length, "n_chunks": -(-case.length // length), "held": held}
        monkeypatch.setattr(
            triton_scan, "forward_plan", lambda s, save: dataclasses.replace(chosen(s, save), **changes)
        )
        forget_launches()
        return triton_scan.scan_forward(s, save=True, every=every)  # type: ignore[return-value]

    one_pass, chunks = scanned(-(-case.length // 8) * 8, 0), scanned(chunk_length, held)
    forget_launches()
    for expected, ours in zip(one_pass, chunks, strict=True):
        assert relative_error(ours, expected) < 1e-5
