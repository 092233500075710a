"""The scan by hand: three ways agree with the reference and the model, until selection parts one of them."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import hooked, random_tokens

from ssminterp.learn import (
    OneChannel,
    channel_of,
    convolved,
    kernel,
    made_up,
    numbers,
    recurrence,
    selective_story,
    unrolled,
    with_fixed_steps,
    written_out,
)
from ssminterp_kernels.selective_scan.reference import selective_scan_reference


def random_channel(seed: int, length: int = 9, d_state: int = 3) -> OneChannel:
    draw = np.random.default_rng(seed)
    return OneChannel(
        tuple(f"{i} w" for i in range(length)),
        draw.normal(size=length),
        draw.uniform(0.1, 2.0, length),
        -draw.uniform(0.1, 2.0, d_state),
        draw.normal(size=(length, d_state)),
        draw.normal(size=(length, d_state)),
    )


def reference(one: OneChannel) -> tuple[np.ndarray, np.ndarray]:
    x, delta, A, B, C = (torch.from_numpy(v) for v in (one.x, one.delta, one.A, one.B, one.C))
    y, states = selective_scan_reference(x[None, :, None], delta[None, :, None], A[None], B[None], C[None])
    return y[0, :, 0].numpy(), states[0, :, 0].numpy()


@given(st.integers(0, 1000))
def test_recurrence_and_unrolled_sum_are_the_reference(seed: int) -> None:
    one = random_channel(seed)
    y, states = reference(one)
    steps = recurrence(one)
    np.testing.assert_allclose(steps["state"].values, states, rtol=1e-12)
    np.testing.assert_allclose(steps["y"].values, y, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(unrolled(one).sum("source").values, y, rtol=1e-10, atol=1e-12)


@given(st.integers(0, 1000))
def test_without_selection_the_convolution_is_the_recurrence(seed: int) -> None:
    one = with_fixed_steps(random_channel(seed))
    np.testing.assert_allclose(convolved(one).values, recurrence(one)["y"].values, rtol=1e-10, atol=1e-12)


def test_every_number_of_a_step_follows_from_those_before_it() -> None:
    steps = recurrence(random_channel(3))
    np.testing.assert_array_equal(steps["before"].values[1:], steps["state"].values[:-1])
    np.testing.assert_array_equal(steps["before"].values[0], 0.0)
    np.testing.assert_allclose(steps["state"], steps["kept"] + steps["written"])
    np.testing.assert_allclose(steps["read"].sum("coordinate"), steps["y"])


def test_a_channel_of_a_model_gives_the_state_and_output_that_the_model_has() -> None:
    model, tokens = hooked(), random_tokens(1, 8)
    cache = model.run_with_cache(tokens, ["*hook_state", "*hook_y"])[1]
    steps = recurrence(channel_of(model, tokens, 1, 5))
    np.testing.assert_allclose(steps["state"].values, cache["state", 1][0, :, 5], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(steps["y"].values, cache["y", 1][0, :, 5], rtol=1e-4, atol=1e-6)
    assert "layer 1, channel 5" in steps.attrs["source"]


def test_large_steps_forget_and_absorb_small_ones_keep_and_ignore() -> None:
    small, large = recurrence(made_up(0.05)), recurrence(made_up(3.0))
    assert (large["A_bar"].values < small["A_bar"].values).all()
    assert (large["B_bar"].values > small["B_bar"].values).all()


def test_selection_holds_a_name_that_fixed_steps_lose() -> None:
    one = selective_story(at_names=2.0, elsewhere=0.05)
    assert one.varies == ["Δ"]
    shares = []
    for channel in (one, with_fixed_steps(one)):
        terms = np.abs(unrolled(channel).values[-1])
        shares.append(terms[[0, 2]].sum() / terms.sum())
    assert shares[0] > 0.95
    assert shares[1] < 0.8


def test_one_step_in_numbers() -> None:
    lines = written_out(recurrence(made_up(delta=1.0, A=[-1.0, -2.0], words=[("a", 1.0), ("b", -2.0)])), 1, 0)
    assert lines["A_bar"][2:] == [r"e^{1 \cdot (-1)}", "0.368"]
    assert lines["state"][2:] == [r"0.368 \cdot 1 + 1 \cdot (-2)", "-1.63"]
    assert lines["y"][2:] == [r"1 \cdot (-1.63) + \underbrace{(-1.86)}_{\text{1 others}}", "-3.5"]
    tiny = written_out(recurrence(made_up(delta=1.0, A=-12.0)), 0, 0)
    assert tiny["A_bar"][-1] == r"6.1 \times 10^{-6}"


def test_all_numbers_of_a_coordinate_in_one_table() -> None:
    steps = recurrence(random_channel(4))
    table = numbers(steps, 2)
    np.testing.assert_allclose(table["before"] * table["A_bar"] + table["B_bar"] * table["x"], table["state"])
    np.testing.assert_allclose(table["C"] * table["state"], table["read"])
    np.testing.assert_array_equal(table["y"], steps["y"])
    assert list(table.index) == list(steps["position"].values)


def test_what_is_no_channel_is_refused(as_users_run_it: None) -> None:
    with pytest.raises(ValueError, match="Δ is a step size and must be positive, got 0"):
        made_up(delta=0.0)
    with pytest.raises(ValueError, match=r"A is a rate of decay and must be negative, got 0\.5"):
        made_up(A=[-1.0, 0.5])
    with pytest.raises(ValueError, match="2 step sizes were given for 6 words"):
        made_up(delta=[1.0, 2.0])
    with pytest.raises(ValueError, match="needs at least one token"):
        made_up(words=[])
    one = made_up()
    with pytest.raises(ValueError, match=r"x has shape \(3,\), 6 tokens and 1 coordinates need \(6,\)"):
        OneChannel(one.labels, one.x[:3], one.delta, one.A, one.B, one.C)
    with pytest.raises(ValueError, match="Δ differs from token to token, so no one kernel"):
        kernel(selective_story(2.0, 0.1))
    with pytest.raises(ValueError, match="position 6 does not exist: there are 6"):
        written_out(recurrence(one), 6, 0)
    with pytest.raises(ValueError, match="coordinate 1 does not exist: there are 1"):
        numbers(recurrence(one), 1)
    with pytest.raises(ValueError, match="one text is shown at a time, got 2"):
        channel_of(hooked(), random_tokens(2, 4), 0, 0)
    with pytest.raises(ValueError, match=r"channel \[99\] do not exist"):
        channel_of(hooked(), random_tokens(1, 4), 0, 99)
