"""States and generation on a CUDA device: chunks change nothing, memory is flat, steps are what one run says."""

import copy
from pathlib import Path

import pytest
import torch

from ssminterp import HookedMamba, patch, steer
from tests.tiny_models import FAMILIES, hooked, random_tokens

pytestmark = pytest.mark.gpu


def on_gpu(model: HookedMamba, dtype: torch.dtype = torch.float32) -> HookedMamba:
    return HookedMamba.from_hf(copy.deepcopy(model.hf_model).to("cuda", dtype))


@pytest.mark.parametrize("family", FAMILIES)
def test_reading_in_chunks_agrees_with_the_cpu(family: str, tmp_path: Path) -> None:
    on_cpu = hooked(family, conv_kernel=4)
    model = on_gpu(on_cpu)
    assert model.fingerprint() == on_cpu.fingerprint()
    tokens = random_tokens(2, 301)
    expected = on_cpu.read(tokens)
    for chunk in (1000, 64, 7):
        state = model.read(tokens, chunk=chunk)
        assert state.ssm.device.type == "cuda"
        torch.testing.assert_close(state.ssm.cpu(), expected.ssm, atol=1e-3, rtol=1e-4)
        torch.testing.assert_close(state.conv.cpu(), expected.conv, atol=1e-4, rtol=1e-4)
    state.save(tmp_path / "state.safetensors")
    question = random_tokens(2, 3)
    with torch.no_grad():
        there = model(question, state=model.load_state(tmp_path / "state.safetensors"))
        here = on_cpu(question, state=on_cpu.load_state(tmp_path / "state.safetensors"))
    torch.testing.assert_close(there.cpu(), here, atol=1e-3, rtol=1e-3)


def test_pieces_of_a_long_text_are_scanned_in_chunks_that_go_on_from_a_state() -> None:
    """At the width of mamba-130m, where states lie farther apart than what the allocator has mapped behind them."""
    model = on_gpu(hooked(hidden_size=768, num_hidden_layers=4, vocab_size=2000))
    tokens = random_tokens(1, 3 * 2048)
    expected = model.read(tokens, chunk=tokens.shape[1])
    torch.testing.assert_close(model.read(tokens, chunk=2048).ssm, expected.ssm, atol=1e-3, rtol=1e-3)


def test_memory_of_reading_is_flat() -> None:
    model = on_gpu(hooked(vocab_size=2000, hidden_size=64))
    peaks = []
    for length in (4096, 4096, 65_536):
        torch.cuda.reset_peak_memory_stats()
        model.read(random_tokens(1, length), chunk=2048)
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[2] <= 1.01 * peaks[1]


def test_memory_of_decoding_is_flat() -> None:
    model = on_gpu(hooked(vocab_size=200, hidden_size=64))
    peaks = []
    for new in (16, 16, 512):
        torch.cuda.reset_peak_memory_stats()
        model.generate(random_tokens(1, 64).cuda(), new, do_sample=True, seed=0)
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[2] - peaks[1] < 1e5


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_generating_under_intervention(family: str, dtype: torch.dtype) -> None:
    """Teacher forced: the logits of every step are those of one run with the same interventions."""
    model = on_gpu(hooked(family), dtype)
    state = model.read(random_tokens(2, 4, seed=1))
    value = torch.randn(2, 2, model.cfg.d_inner, model.cfg.d_state)
    interventions = [
        patch("blocks.1.mixer.hook_state", value, positions=[5, 11]),
        steer("blocks.0.hook_resid_post", torch.randn(model.cfg.d_model), positions=slice(10, None)),
    ]
    with model.intervene(*interventions):
        generated, cache = model.generate_with_cache(
            random_tokens(2, 5), ["hook_logits", "*hook_state"], max_new_tokens=6, state=state, do_sample=False
        )
        expected = model.run_with_cache(generated[:, :-1], ["hook_logits", "*hook_state"], state=state)[1]
    assert torch.equal(cache["hook_logits"][:, -6:].argmax(-1), generated[:, -6:])
    tolerance = 1e-3 if dtype == torch.float32 else 0.2
    for name in expected:
        scale = max(1.0, expected[name].abs().max().item())
        assert (cache[name] - expected[name]).abs().max().item() <= tolerance * scale, name


def test_seeded_sampling_leaves_the_gpu_generator_alone() -> None:
    model, tokens = on_gpu(hooked()), random_tokens(2, 5).cuda()
    before = torch.cuda.get_rng_state()
    first = model.generate(tokens, 10, seed=3, do_sample=True, temperature=2.0)
    assert torch.equal(torch.cuda.get_rng_state(), before)
    assert torch.equal(model.generate(tokens, 10, seed=3, do_sample=True, temperature=2.0), first)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_steps_are_one_run(family: str, dtype: torch.dtype) -> None:
    model = on_gpu(hooked(family, hidden_size=64, vocab_size=200), dtype)
    tokens = random_tokens(3, 40, vocab=200).cuda()
    whole = model(tokens)
    state = model.read(tokens[:, :7])
    rows = []
    cache = model.cache_of(state, 3)
    for t in range(7, 40):
        rows.append(model.hf_model(input_ids=tokens[:, t : t + 1], cache_params=cache, use_cache=True).logits)
    allowed = (1e-3 if dtype == torch.float32 else 0.1) * max(1.0, whole.abs().max().item())
    assert (torch.cat(rows, dim=1) - whole[:, 7:]).abs().max().item() <= allowed
