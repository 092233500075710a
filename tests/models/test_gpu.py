"""The hooked model on a CUDA device: what it computes there is what plain transformers and the CPU compute."""

import copy
from pathlib import Path

import pytest
import torch

from ssminterp import HookedMamba, patch
from ssminterp.activations import collect_activations
from ssminterp.models.verify import TOLERANCE
from tests.tiny_models import hooked_pair, random_tokens, tiny_model

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("family", ["mamba", "falcon"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_equal_plain_transformers(family: str, dtype: torch.dtype) -> None:
    plain, model = hooked_pair(family)
    plain, model = plain.to("cuda", dtype), HookedMamba.from_hf(model.hf_model.to("cuda", dtype))
    tokens = random_tokens(3, 17).cuda()
    with torch.no_grad():
        expected = plain(tokens, use_cache=False).logits
        difference = (expected - model(tokens)).abs().max().item()
    allowed = 1e-4 if dtype == torch.float32 else TOLERANCE[dtype]
    assert difference <= allowed * max(1.0, expected.abs().max().item())


def test_recording_and_patching_agree_with_the_cpu() -> None:
    _, on_cpu = hooked_pair()
    on_gpu = HookedMamba.from_hf(copy.deepcopy(on_cpu.hf_model).cuda())
    tokens, others = random_tokens(2, 13), random_tokens(2, 13, seed=1)
    runs = []
    for model in (on_cpu, on_gpu):
        with torch.no_grad():
            _, cache = model.run_with_cache(others, "*", positions=[3, 8])
            state = patch("blocks.1.mixer.hook_state", cache["state", 1], positions=[3, 8])
            delta = patch("blocks.0.mixer.hook_delta", cache["delta", 0], positions=[3, 8])
            with model.intervene(state, delta):
                logits = model(tokens)
            called = model.run_with_hooks(tokens, [("*hook_state", lambda h, hook: 0.5 * h, [2, 3])])
        runs.append([logits.cpu(), called.cpu(), *(cache[name].cpu() for name in cache)])
    for cpu, gpu in zip(*runs, strict=True):
        torch.testing.assert_close(gpu, cpu, atol=1e-4, rtol=1e-4)


def test_gradients_agree_with_the_cpu() -> None:
    _, on_cpu = hooked_pair()
    on_gpu = HookedMamba.from_hf(copy.deepcopy(on_cpu.hf_model).cuda())
    tokens = random_tokens(2, 13)
    for model in (on_cpu, on_gpu):
        model(tokens).square().mean().backward()
    for (name, cpu), gpu in zip(on_cpu.lm.named_parameters(), on_gpu.lm.parameters(), strict=True):
        torch.testing.assert_close(gpu.grad.cpu(), cpu.grad, atol=1e-5, rtol=1e-3, msg=name)


@pytest.mark.parametrize("options", [{}, {"device_map": "auto"}, {"device": "cuda:0"}], ids=str)
def test_a_checkpoint_goes_straight_to_the_gpu(options: dict[str, str], tmp_path: Path) -> None:
    plain = tiny_model(hidden_size=256, vocab_size=4096)
    plain.save_pretrained(tmp_path, max_shard_size="1MB")
    model = HookedMamba.from_pretrained(tmp_path, **options)
    assert {parameter.device.type for parameter in model.parameters()} == {"cuda"}
    tokens = random_tokens(2, 9)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).cpu(), plain(tokens).logits, atol=1e-3, rtol=1e-4)


def test_activations_collected_on_the_gpu(tmp_path: Path) -> None:
    model = HookedMamba.from_hf(hooked_pair()[1].hf_model.cuda())
    texts = [random_tokens(1, length, seed=length)[0] for length in (5, 9, 1, 7)]
    data = collect_activations(model, texts, ["state", "resid_post"], tmp_path, batch_size=3, progress=False)
    on_cpu = hooked_pair()[1]
    for i in range(len(data)):
        row = data[i]
        _, cache = on_cpu.run_with_cache(texts[row["text"]], data.hooks, positions=row["position"])
        for name in data.hooks:
            torch.testing.assert_close(row[name], cache[name][0, 0], atol=1e-4, rtol=1e-4)
