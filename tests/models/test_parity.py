"""Hooked logits are plain transformers' logits: prefill over random configurations, padding, dtypes, gradients."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import FAMILIES, VOCAB, hooked_pair, random_tokens, tiny_model

from ssminterp import HookedMamba, ablate
from ssminterp.models.verify import whole_float32

configs = st.fixed_dictionaries(
    {
        "hidden_size": st.sampled_from([6, 8]),
        "num_hidden_layers": st.integers(1, 3),
        "state_size": st.integers(1, 16),
        "conv_kernel": st.integers(2, 4),
        "time_step_rank": st.integers(1, 3),
        "intermediate_size": st.sampled_from([5, 12, 16]),
        "use_bias": st.booleans(),
        "use_conv_bias": st.booleans(),
        "tie_word_embeddings": st.booleans(),
        "residual_in_fp32": st.booleans(),
        "hidden_act": st.sampled_from(["silu", "gelu"]),
    }
)


@pytest.mark.parametrize("family", FAMILIES)
@given(config=configs, batch=st.integers(1, 3), length=st.integers(1, 12), seed=st.integers(0, 99))
def test_prefill(family: str, config: dict[str, Any], batch: int, length: int, seed: int) -> None:
    plain, model = hooked_pair(family, seed, **config)
    assert plain.config.intermediate_size == model.cfg.d_inner == config["intermediate_size"]
    tokens = random_tokens(batch, length, seed)
    with torch.no_grad():
        expected = plain(tokens).logits
        # Rounding grows with the logits: Falcon's norm of a B of few numbers is steep where they are small.
        allowed = 1e-4 * max(1.0, expected.abs().max().item())
        torch.testing.assert_close(model(tokens), expected, atol=allowed, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_states_of_the_test_models_matter(family: str) -> None:
    """Otherwise parity would hold for a scan that does nothing."""
    plain, model = hooked_pair(family)
    tokens = random_tokens(2, 9)
    with torch.no_grad(), model.intervene(ablate("*hook_state", positions=list(range(9)))):
        difference = (model(tokens) - plain(tokens).logits).abs().max()
    assert difference > 0.1


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ["left", "right"])
@given(lengths=st.lists(st.integers(1, 8), min_size=2, max_size=3), use_bias=st.booleans())
def test_padded_batches(family: str, side: str, lengths: list[int], use_bias: bool) -> None:
    plain, model = hooked_pair(family, use_bias=use_bias)
    width = max(lengths) + 1
    tokens = random_tokens(len(lengths), width)
    column = torch.arange(width)
    mask = torch.stack([(column >= width - n) if side == "left" else (column < n) for n in lengths]).long()
    with torch.no_grad():
        expected = plain(tokens, attention_mask=mask).logits
        torch.testing.assert_close(model(tokens, attention_mask=mask), expected, atol=1e-4, rtol=0)
        assert (model(tokens) - expected).abs().max() > 1e-2  # the mask matters


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(family: str, dtype: torch.dtype) -> None:
    plain = tiny_model(family).to(dtype)
    model = HookedMamba.from_hf(copy.deepcopy(plain))
    tokens = random_tokens(2, 9)
    with torch.no_grad():
        expected, got = plain(tokens).logits, model(tokens)
    assert got.dtype == expected.dtype
    error = (got - expected).norm() / expected.norm()
    assert error < {torch.bfloat16: 5e-2, torch.float16: 1e-2, torch.float64: 1e-6}[dtype]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("training", [False, True])
def test_parameter_gradients(family: str, training: bool) -> None:
    plain, model = hooked_pair(family, use_bias=True, tie_word_embeddings=False)
    plain.train(training)
    model.train(training)
    tokens = random_tokens(2, 9)
    expected = plain(tokens, labels=tokens).loss
    got = model.hf_model(tokens, labels=tokens).loss
    torch.testing.assert_close(got, expected)
    expected.backward()
    got.backward()
    gradients = dict(model.hf_model.named_parameters())
    assert set(gradients) == set(dict(plain.named_parameters()))
    for name, parameter in plain.named_parameters():
        assert parameter.grad.abs().max() > 0, name
        torch.testing.assert_close(gradients[name].grad, parameter.grad, atol=1e-4, rtol=1e-3, msg=name)


def test_batch_elements_do_not_mix() -> None:
    model = hooked_pair()[1]
    tokens = random_tokens(3, 7)
    with torch.no_grad():
        alone = torch.cat([model(row) for row in tokens])
        torch.testing.assert_close(model(tokens), alone, atol=1e-5, rtol=0)


def test_one_sequence_is_a_batch_of_one() -> None:
    model = hooked_pair()[1]
    tokens = random_tokens(1, 7)
    assert model(tokens[0]).shape == (1, 7, VOCAB)
    assert torch.equal(model(tokens[0]), model(tokens))


def test_the_check_at_load_time_leaves_the_users_precision_alone() -> None:
    cudnn, cublas = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, cublas.allow_tf32
    try:
        for allowed in (True, False):
            cudnn.allow_tf32 = cublas.allow_tf32 = allowed
            with whole_float32():
                assert (cudnn.allow_tf32, cublas.allow_tf32) == (False, False)
            with pytest.raises(KeyError), whole_float32():
                raise KeyError
            assert (cudnn.allow_tf32, cublas.allow_tf32) == (allowed, allowed)
    finally:
        cudnn.allow_tf32, cublas.allow_tf32 = before
