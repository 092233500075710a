"""The list of what can be loaded: sizes are those of the models, and the cache's Mambas are found among others."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_formats import in_cache, use_cache, write_original
from tiny_models import FAMILIES, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM, FalconMambaConfig, MambaConfig
from typer.testing import CliRunner

from ssminterp import HookedMamba
from ssminterp.cli import app
from ssminterp.models.catalogue import KNOWN, SHAPES, available_models, count_parameters


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"tie_word_embeddings": False, "use_bias": True},
        {"use_conv_bias": False, "expand": 3, "time_step_rank": "auto"},
    ],
    ids=str,
)
def test_parameters_are_counted_right(family: str, config: dict[str, Any]) -> None:
    model = tiny_model(family, **config)
    assert count_parameters(model.config.to_dict()) == sum(weight.numel() for weight in model.parameters())


PUBLISHED = {"130m": 0.13, "370m": 0.37, "790m": 0.79, "1.4b": 1.4, "2.8b": 2.8}


@pytest.mark.parametrize(
    ("shape", "billions"),
    [*((f"mamba-{size}", billions) for size, billions in PUBLISHED.items()), ("falcon-mamba-7b", 7.27)],
)
def test_known_shapes_have_the_size_in_their_name(shape: str, billions: float) -> None:
    assert count_parameters(SHAPES[shape]) / 1e9 == pytest.approx(billions, rel=0.03)


@pytest.mark.parametrize("shape", ["mamba-130m", "falcon-mamba-7b"])
def test_known_shapes_are_models(shape: str) -> None:
    """On no device, at full size."""
    config = AutoConfig.for_model(**SHAPES[shape])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert type(model).__name__ == SHAPES[shape]["architectures"][0]
    assert count_parameters(SHAPES[shape]) == sum(weight.numel() for weight in model.parameters())


def test_every_known_name_has_a_shape() -> None:
    assert set(KNOWN.values()) == set(SHAPES)
    assert {"state-spaces/mamba-130m-hf", "state-spaces/mamba-2.8b", "tiiuae/falcon-mamba-7b-instruct"} <= set(KNOWN)


def test_an_empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_cache(monkeypatch, tmp_path / "nowhere")
    listed = {model.name: model for model in available_models()}
    assert [name for name, model in listed.items() if model.place == "bundled"] == ["tiny-mamba", "nano-mamba"]
    assert [name for name, model in listed.items() if model.place == "hub"] == list(KNOWN)
    tiny = HookedMamba.from_pretrained("nano-mamba", device="cpu")
    assert listed["nano-mamba"].parameters == sum(weight.numel() for weight in tiny.parameters())


def test_what_the_cache_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = use_cache(monkeypatch, tmp_path)
    plain = tiny_model("falcon")
    plain.save_pretrained(in_cache(cache, "someone/falcon"))
    write_original(tiny_model(vocab_size=24), in_cache(cache, "state-spaces/mamba-130m"))
    mamba2 = in_cache(cache, "state-spaces/mamba2-130m")
    write_original(tiny_model(vocab_size=24), mamba2, ssm_cfg={"layer": "Mamba2"})
    (in_cache(cache, "someone/adapter") / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    others = {
        "openai/gpt2": '{"architectures": ["GPT2LMHeadModel"]}',
        "a/damaged": "{",
        "a/list": "[]",
        "a/empty": "{}",
    }
    for name, config in others.items():
        (in_cache(cache, name) / "config.json").write_text(config)
    listed = available_models()
    cached = {model.name: model for model in listed if model.place == "cached"}
    assert set(cached) == {"someone/falcon", "someone/adapter", "state-spaces/mamba-130m"}
    assert cached["someone/falcon"].parameters == sum(weight.numel() for weight in plain.parameters())
    assert cached["someone/adapter"].parameters is None
    assert all(model.bytes > 0 for model in cached.values())
    assert [model.name for model in listed].count("state-spaces/mamba-130m") == 1
    printed = CliRunner().invoke(app, ["models"]).output
    assert all(name in printed for name in (*cached, "tiny-mamba", "tiiuae/falcon-mamba-7b"))
    assert "gpt2" not in printed
    assert "  7.27 B parameters  29.09 GB in float32, 14.55 GB in bfloat16" in printed
    assert json.dumps(str(tmp_path))[1:-1] in printed


def test_the_configs_are_those_of_transformers() -> None:
    """What `SHAPES` leaves out is transformers' default."""
    assert MambaConfig(**SHAPES["mamba-2.8b"]).time_step_rank == 160
    assert FalconMambaConfig(**SHAPES["falcon-mamba-7b"]).intermediate_size == 8192
