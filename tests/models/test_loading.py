"""Loading checkpoints from folders: whole, sharded, damaged, incomplete, of other architectures."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_formats import write_pickle
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES, hooked, random_tokens, tiny_model
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from ssminterp import HookedMamba

pytestmark = pytest.mark.usefixtures("as_users_run_it")
TOKENS = random_tokens(2, 6)


def saved(folder: Path, **options: Any) -> Path:
    tiny_model().save_pretrained(folder, **options)
    return folder


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder: Path, **changes: torch.Tensor | None) -> None:
    """Replace weights by name, or leave them out."""
    path = folder / "model.safetensors"
    weights = {name: changes.get(name, value) for name, value in load_file(path).items()} | changes
    save_file({name: value for name, value in weights.items() if value is not None}, path, {"format": "pt"})


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("options", [{}, {"max_shard_size": "2KB"}], ids=["one file", "sharded"])
@torch.no_grad()
def test_a_folder(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    plain = tiny_model(family, tie_word_embeddings=False)
    plain.save_pretrained(tmp_path, **options)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == bool(options)
    for name in (tmp_path, str(tmp_path)):
        model = HookedMamba.from_pretrained(name, device="cpu")
        torch.testing.assert_close(model(TOKENS), plain(TOKENS).logits, atol=1e-4, rtol=0)
        assert not model.training
        assert model.tokenizer is None
        assert model.cfg.architecture == type(plain).__name__


def test_a_tokenizer_comes_along(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    saved(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = HookedMamba.from_pretrained(tmp_path, device="cpu")
    assert model.to_str_tokens("the cat sat") == ["the", "cat", "sat"]


def test_dtype(tmp_path: Path) -> None:
    """A type, its name, or that of the file."""
    tiny_model().to(torch.bfloat16).save_pretrained(tmp_path)
    for dtype in (torch.bfloat16, "bfloat16", "auto"):
        model = HookedMamba.from_pretrained(tmp_path, device="cpu", dtype=dtype)
        assert model.cfg.dtype == model.blocks[0].mixer.in_proj.weight.dtype == torch.bfloat16
    model = HookedMamba.from_pretrained(tmp_path, device="cpu")
    assert model.cfg.dtype == torch.float32
    assert model.to(torch.bfloat16).cfg.dtype == torch.bfloat16
    assert model.double().cfg.dtype == torch.float64


def test_sizes_in_cfg(tmp_path: Path) -> None:
    cfg = HookedMamba.from_pretrained(saved(tmp_path), device="cpu").cfg
    assert (cfg.n_layers, cfg.d_model, cfg.d_inner, cfg.d_state, cfg.d_conv, cfg.dt_rank, cfg.vocab) == (
        *(3, 8, 16, 4, 3, 2, 23),
    )
    assert cfg.model_name == str(tmp_path)


@torch.no_grad()
def test_a_hooked_model_saved_is_a_plain_model(tmp_path: Path) -> None:
    plain, model = tiny_model(), hooked()
    assert list(model.state_dict()) == list(model.hf_model.state_dict()) == list(plain.state_dict())
    model.hf_model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is type(plain)
    assert torch.equal(again(TOKENS).logits, plain(TOKENS).logits)
    model.load_state_dict(tiny_model(seed=1).state_dict())
    torch.testing.assert_close(model(TOKENS), tiny_model(seed=1)(TOKENS).logits, atol=1e-4, rtol=0)


def test_no_such_folder(tmp_path: Path) -> None:
    for name in (tmp_path / "nowhere", str(tmp_path / "nowhere"), "./nowhere"):
        with pytest.raises(ValueError, match=r"there is no folder .*nowhere"):
            HookedMamba.from_pretrained(name)


def test_a_folder_without_config(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no config.json"):
        HookedMamba.from_pretrained(tmp_path)


def test_a_folder_without_weights(tmp_path: Path) -> None:
    (saved(tmp_path) / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"cannot load .* holds no weights: neither of model.safetensors"):
        HookedMamba.from_pretrained(tmp_path)


def test_a_missing_shard(tmp_path: Path) -> None:
    sorted(saved(tmp_path, max_shard_size="2KB").glob("*.safetensors"))[1].unlink()
    with pytest.raises(ValueError, match=r"cannot load .*index.json, \S+00002-of-\S+ is not there: fetch"):
        HookedMamba.from_pretrained(tmp_path)


@pytest.mark.parametrize("kept", [0, 5, 300, -1])
@pytest.mark.parametrize("options", [{}, {"max_shard_size": "2KB"}], ids=["one file", "sharded"])
def test_truncated_weights(kept: int, options: dict[str, Any], tmp_path: Path) -> None:
    path = sorted(saved(tmp_path, **options).glob("*.safetensors"))[-1]
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=rf"cannot load .*{path.name} is damaged or was cut off at .*fetch"):
        HookedMamba.from_pretrained(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": "../elsewhere.safetensors"}}'])
def test_an_index_that_is_none(text: str, tmp_path: Path) -> None:
    saved(tmp_path, max_shard_size="2KB")
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=r"cannot load .*index.json (is no index|names files outside)"):
        HookedMamba.from_pretrained(tmp_path)


def test_a_pickle_that_is_not_plain_weights(tmp_path: Path) -> None:
    """What it would run is not run."""
    write_pickle(tiny_model(), tmp_path)
    torch.save({"backbone.norm_f.weight": Touch(tmp_path / "touched")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"cannot load .*objects that are no plain weights.*safetensors"):
        HookedMamba.from_pretrained(tmp_path)
    assert not (tmp_path / "touched").exists()


class Touch:
    """An object whose unpickling makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("kept", [0, 5, 300, -200, -1])
@pytest.mark.parametrize("n_shards", [1, 3])
def test_a_truncated_pickle(kept: int, n_shards: int, tmp_path: Path) -> None:
    path = sorted(write_pickle(tiny_model(), tmp_path, n_shards).glob("*.bin"))[-1]
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"cannot load .*damaged"):
        HookedMamba.from_pretrained(tmp_path)


def test_a_pickle_of_before_archives(tmp_path: Path) -> None:
    path = write_pickle(tiny_model(), tmp_path) / "pytorch_model.bin"
    torch.save(torch.load(path, weights_only=True), path, _use_new_zipfile_serialization=False)
    torch.testing.assert_close(HookedMamba.from_pretrained(tmp_path, device="cpu")(TOKENS), hooked()(TOKENS))


def test_a_missing_shard_of_a_pickle(tmp_path: Path) -> None:
    sorted(write_pickle(tiny_model(), tmp_path, n_shards=3).glob("*.bin"))[1].unlink()
    with pytest.raises(ValueError, match=r"cannot load .*index.json, \S+00002-of-\S+ is not there: fetch"):
        HookedMamba.from_pretrained(tmp_path)


def test_something_else_than_weights(tmp_path: Path) -> None:
    """A training checkpoint, with the weights one level down."""
    write_pickle(tiny_model(), tmp_path)
    torch.save({"step": torch.tensor(3), "model": tiny_model().state_dict()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"cannot load|do not fit its config: missing"):
        HookedMamba.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"dtype": torch.int8}, "dtype must be one of auto, float64, float32, float16, bfloat16, got torch.int8"),
        ({"dtype": "half"}, "dtype must be one of"),
        ({"device": "cuda:7"}, "device='cuda:7' is not to be had"),
        ({"device": "gpu"}, "device='gpu' is not to be had"),
        ({"device": "cpu", "device_map": "auto"}, "not both"),
        ({"max_memory": {"cpu": "1GB"}}, "take effect with device_map= only"),
        ({"offload_folder": "offload"}, "take effect with device_map= only"),
        ({"device_map": "everywhere"}, "cannot load .*everywhere"),
    ],
    ids=str,
)
def test_options_that_cannot_be(options: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=said):
        HookedMamba.from_pretrained(saved(tmp_path), **options)


@pytest.mark.parametrize("text", ["", "{", "[]", "null"])
def test_a_config_that_is_no_config(text: str, tmp_path: Path) -> None:
    (saved(tmp_path) / "config.json").write_text(text)
    with pytest.raises(ValueError, match=f"cannot load '{tmp_path}'"):
        HookedMamba.from_pretrained(tmp_path)


def test_a_damaged_tokenizer(tmp_path: Path) -> None:
    (saved(tmp_path) / "tokenizer.json").write_text('{"model": ')
    with pytest.raises(ValueError, match=f"cannot load '{tmp_path}'"):
        HookedMamba.from_pretrained(tmp_path, device="cpu")


def test_a_missing_weight(tmp_path: Path) -> None:
    edit_weights(saved(tmp_path), **{"backbone.layers.1.mixer.A_log": None})
    with pytest.raises(ValueError, match=r"do not fit its config: missing \['backbone.layers.1.mixer.A_log'\]"):
        HookedMamba.from_pretrained(tmp_path)


def test_a_weight_too_many(tmp_path: Path) -> None:
    edit_weights(saved(tmp_path), **{"backbone.layers.3.mixer.A_log": torch.zeros(16, 4)})
    with pytest.raises(ValueError, match=r"do not fit its config: .*unexpected \['backbone.layers.3.mixer.A_log'\]"):
        HookedMamba.from_pretrained(tmp_path)


@pytest.mark.parametrize("change", [{"state_size": 5}, {"num_hidden_layers": 4}, {"intermediate_size": 12}], ids=str)
def test_a_config_that_does_not_fit_the_weights(change: dict[str, int], tmp_path: Path) -> None:
    edit_json(saved(tmp_path) / "config.json", **change)
    with pytest.raises(ValueError, match=r"do not fit its config.*mixer"):
        HookedMamba.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "change", [{"hidden_size": "wide"}, {"num_hidden_layers": None}, {"hidden_act": "none"}], ids=str
)
def test_a_config_with_impossible_values(change: dict[str, Any], tmp_path: Path) -> None:
    edit_json(saved(tmp_path) / "config.json", **change)
    with pytest.raises(ValueError, match=f"cannot load '{tmp_path}'"):
        HookedMamba.from_pretrained(tmp_path)


def gpt2() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=11, n_positions=8, n_embd=8, n_layer=1, n_head=2))


def test_a_model_that_is_no_mamba(tmp_path: Path) -> None:
    gpt2().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a GPT2LMHeadModel; supported are MambaForCausalLM"):
        HookedMamba.from_pretrained(tmp_path)
    plain = gpt2()
    modules = [type(module) for module in plain.modules()]
    with pytest.raises(ValueError, match="GPT2LMHeadModel is not supported"):
        HookedMamba.from_hf(plain)
    assert [type(module) for module in plain.modules()] == modules
    with pytest.raises(ValueError, match="MambaModel is not supported"):
        HookedMamba.from_hf(tiny_model().backbone)


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Mamba2ForCausalLM", "Mamba9ForCausalLM"])
def test_an_architecture_that_is_not_supported(architecture: str, tmp_path: Path) -> None:
    """Known to transformers or not, and whatever else its config says."""
    kind = architecture.removesuffix("ForCausalLM").lower()
    edit_json(saved(tmp_path) / "config.json", architectures=[architecture], model_type=kind)
    with pytest.raises(
        ValueError, match=f"is a {architecture}; supported are MambaForCausalLM, FalconMambaForCausalLM"
    ):
        HookedMamba.from_pretrained(tmp_path)


def test_an_unknown_model_type(tmp_path: Path) -> None:
    edit_json(saved(tmp_path) / "config.json", model_type="mamba9")
    with pytest.raises(ValueError, match=f"(?s)cannot load '{tmp_path}'.*mamba9"):
        HookedMamba.from_pretrained(tmp_path)
