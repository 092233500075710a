"""The pictures of the scan by hand show its numbers."""

import numpy as np
import pytest

from ssminterp.learn import convolved, made_up, recurrence, selective_story, unrolled, with_fixed_steps
from ssminterp.plots import forgetting_figure, held_at_the_end, state_map, state_steps, three_ways


def test_a_step_is_what_was_kept_and_what_was_written() -> None:
    steps = recurrence(made_up(A=[-0.5, -1.0]))
    kept, written, state = state_steps(steps, position=3, coordinate=1).data
    np.testing.assert_allclose(np.asarray(kept.y) + written.y, state.y)
    np.testing.assert_array_equal(state.y, steps["state"].values[:, 1])
    np.testing.assert_array_equal(state_map(steps).data[0].z, steps["state"].values.T)


def test_bars_dot_and_ring_are_the_same_output() -> None:
    one = made_up()
    ways = {"recurrence": recurrence(one)["y"], "convolution": convolved(one)}
    *bars, ring, dot = three_ways(unrolled(one), ways).data
    np.testing.assert_allclose(np.sum([bar.y for bar in bars], axis=0), dot.y)
    np.testing.assert_allclose(ring.y, dot.y)
    with pytest.raises(ValueError, match="a dot and a ring, got 3 ways"):
        three_ways(unrolled(one), {**ways, "magic": ways["recurrence"]})


def test_parts_at_the_end_add_up_to_all_of_it() -> None:
    one = selective_story(2.0, 0.05)
    for bars in held_at_the_end({"selective": unrolled(one), "fixed": unrolled(with_fixed_steps(one))}).data:
        assert np.abs(bars.y).sum() == pytest.approx(1.0)


def test_forgetting_follows_the_step_size() -> None:
    figure = forgetting_figure(0.5, -0.4)
    np.testing.assert_allclose(figure.data[0].y[3], np.exp(-0.6))
    assert "half is left after 3.47" in figure.layout.annotations[0].text
    assert not forgetting_figure(0.01, -0.1).layout.annotations
    with pytest.raises(ValueError, match="Δ must be positive and A negative"):
        forgetting_figure(0.5, 0.4)
