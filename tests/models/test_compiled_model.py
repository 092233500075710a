"""A compiled backbone: one graph per kind of run, and hooks that act as they do without it."""

import os
import subprocess
import sys

import pytest
import torch

CODE = """
import torch
from ssminterp import HookedMamba, patch
from tests.tiny_models import hooked, random_tokens

def to_device(model):
    return HookedMamba.from_hf(model.hf_model.to("DEVICE"))

eager, model = (to_device(hooked("FAMILY", num_hidden_layers=1)) for _ in range(2))
tokens = random_tokens(2, 9).to("DEVICE")
graphs = []

def counted(graph, inputs):
    graphs.append(graph)
    return torch._dynamo.lookup_backend("BACKEND")(graph, inputs)

model.lm.backbone.compile(fullgraph=True, backend=counted, dynamic=False)
with torch.no_grad():
    logits = eager(tokens)
    torch.testing.assert_close(model(tokens), logits, atol=1e-4, rtol=1e-4)
    assert len(graphs) == 1
    generated = eager.generate(tokens, 8, do_sample=False)
    assert torch.equal(model.generate(tokens, 8, do_sample=False), generated)
    assert len(graphs) == 3, len(graphs)  # the prompt with a cache, and a step
    assert torch.equal(model.generate(tokens, 12, do_sample=False)[:, :17], generated)
    assert len(graphs) == 3, len(graphs)
    state = torch.randn(2, 1, model.cfg.d_inner, model.cfg.d_state)
    patched = []
    for m in (model, eager):
        with m.intervene(patch("blocks.0.mixer.hook_state", state, positions=[5])):
            patched.append(m(tokens))
    torch.testing.assert_close(*patched, atol=1e-3, rtol=1e-3)
    assert (patched[0] - logits).abs().max() > 0.1
    torch.testing.assert_close(model(tokens), logits, atol=1e-4, rtol=1e-4)
for m in (model, eager):
    m(tokens).square().mean().backward()
for (name, ours), theirs in zip(model.lm.named_parameters(), eager.lm.parameters()):
    torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-4, rtol=1e-3, msg=name)
"""


def run(family: str, device: str, backend: str) -> None:
    # In a process of its own, because Dynamo cannot look into the checks that the tests wrap around every function.
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((".", "kernels"))}
    code = CODE.replace("FAMILY", family).replace("DEVICE", device).replace("BACKEND", backend)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def test_one_graph_and_hooks_that_act() -> None:
    run("mamba", "cpu", "aot_eager")


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["mamba", "falcon"])
def test_compiled_for_the_gpu(family: str) -> None:
    torch.cuda.empty_cache()
    run(family, "cuda", "inductor")
