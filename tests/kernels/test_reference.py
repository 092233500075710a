import pytest
import torch
from own_process import run_in_own_process
from scan_cases import ScanCase, random_scan_inputs, relative_error
from torch import Tensor

from ssminterp_kernels.selective_scan import StateEdits, recurrence, selective_scan_reference

CASE = ScanCase(length=4, d_inner=2, d_state=3, dtype=torch.float64)


def by_hand(inputs: dict[str, Tensor], edits: dict[int, tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Every number of y and of the states from the equations, one scalar at a time."""
    x, B, C = inputs["x"], inputs["B"], inputs["C"]
    delta = torch.log1p(torch.exp(inputs["delta"] + inputs["delta_bias"]))
    batch, length, d_inner = x.shape
    states = torch.zeros(*x.shape, B.shape[-1], dtype=x.dtype)
    y = torch.zeros_like(x)
    for b in range(batch):
        for c in range(d_inner):
            for t in range(length):
                for n in range(B.shape[-1]):
                    before = states[b, t - 1, c, n] if t else inputs["initial_state"][b, c, n]
                    decay = torch.exp(delta[b, t, c] * inputs["A"][c, n])
                    states[b, t, c, n] = decay * before + delta[b, t, c] * B[b, t, n] * x[b, t, c]
                    if t in edits:
                        keep, add = edits[t]
                        states[b, t, c, n] = keep[b, c, n] * states[b, t, c, n] + add[b, c, n]
                    y[b, t, c] += C[b, t, n] * states[b, t, c, n]
                gate = inputs["z"][b, t, c]
                y[b, t, c] = (y[b, t, c] + inputs["D"][c] * x[b, t, c]) * gate / (1 + torch.exp(-gate))
    return y, states


@torch.no_grad()
def test_equals_the_equations_number_by_number() -> None:
    inputs = random_scan_inputs(CASE)
    inputs.pop("states")
    edits = {t: (torch.randn(2, 2, 3).double(), torch.randn(2, 2, 3).double()) for t in (0, 2)}
    expected_y, expected_states = by_hand(inputs, edits)
    y, states = selective_scan_reference(**inputs, edits=StateEdits.at(edits))  # type: ignore[arg-type]
    assert relative_error(y, expected_y) <= 1e-14
    assert relative_error(states, expected_states) <= 1e-14


@torch.no_grad()
def test_groups_share_their_rows_among_neighbouring_channels() -> None:
    inputs = random_scan_inputs(ScanCase(d_inner=6, n_groups=3, dtype=torch.float64))
    inputs.pop("states")
    grouped = selective_scan_reference(**inputs)[0]
    for group in range(3):
        channels = slice(2 * group, 2 * group + 2)
        part = {k: v[..., channels] if k in ("x", "delta", "z", "D", "delta_bias") else v for k, v in inputs.items()}
        part |= {"A": inputs["A"][channels], "initial_state": inputs["initial_state"][:, channels]}
        part |= {"B": inputs["B"][:, :, group], "C": inputs["C"][:, :, group]}
        assert relative_error(selective_scan_reference(**part)[0], grouped[..., channels]) <= 1e-14


@torch.no_grad()
def test_edits_per_batch_element_touch_only_their_element() -> None:
    inputs = random_scan_inputs(CASE)
    inputs.pop("states")
    keep, add = torch.rand(2, 1, 2, 3).double(), torch.randn(2, 1, 2, 3).double()
    both = selective_scan_reference(**inputs, edits=StateEdits(torch.tensor([[1], [3]]), keep, add))[1]
    for element, position in enumerate((1, 3)):
        alone = selective_scan_reference(**inputs, edits=StateEdits((position,), keep, add))[1]
        assert torch.equal(both[element], alone[element])


@pytest.mark.parametrize("positions", [(0, 2), torch.tensor([[0, 1], [1, 2]])], ids=["shared", "per element"])
def test_gradcheck(positions: tuple[int, ...] | Tensor) -> None:
    inputs = random_scan_inputs(CASE.but(length=3, d_inner=2, d_state=2))
    inputs.pop("states")
    names = [name for name, value in inputs.items() if isinstance(value, Tensor)]
    keep = torch.rand(2, 1, 2, dtype=torch.float64, requires_grad=True)
    add = torch.randn(2, 2, 2, 2, dtype=torch.float64, requires_grad=True)

    def run(keep: Tensor, add: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        named = dict(zip(names, tensors, strict=True))
        return selective_scan_reference(**named, delta_softplus=True, edits=StateEdits(positions, keep, add))  # type: ignore[arg-type]

    assert torch.autograd.gradcheck(run, (keep, add, *(inputs[name] for name in names)))


def test_recurrence_without_input_is_a_product_of_decays() -> None:
    decays = torch.rand(1, 5, 2, 3, dtype=torch.float64)
    start = torch.randn(1, 2, 3, dtype=torch.float64)
    states = recurrence(decays, torch.zeros_like(decays), start)
    assert relative_error(states, decays.cumprod(1) * start[:, None]) <= 1e-14


ONE_GRAPH = """
import torch
from ssminterp_kernels.selective_scan import StateEdits
from ssminterp_kernels.selective_scan.reference import recurrence

def run(A_bar, B_bar_x, positions, keep, add):
    return recurrence(A_bar, B_bar_x, None, StateEdits(positions, keep, add))

for positions in ((1, 3), torch.tensor([[1, 3], [0, 4]])):
    inputs = torch.rand(2, 5, 3, 4), torch.randn(2, 5, 3, 4), positions, torch.rand(2, 1, 1), torch.randn(1, 2, 3, 4)
    torch.testing.assert_close(torch.compile(run, fullgraph=True, backend="eager")(*inputs), run(*inputs))
"""


def test_recurrence_and_its_edits_are_one_graph() -> None:
    """Models whose A_bar is hooked run on it, compiled ones too; positions are shared or of each element."""
    run_in_own_process(ONE_GRAPH)
