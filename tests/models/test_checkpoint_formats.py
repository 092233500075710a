"""Formats other than one folder of transformers': mamba_ssm's, .bin files, adapters, models spread over devices."""

import json
import shutil
import sys
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from checkpoint_formats import in_cache, use_cache, write_original, write_pickle
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import FAMILIES, random_tokens, tiny_model
from torch import nn
from transformers import PreTrainedTokenizerFast

from ssminterp import HookedMamba
from ssminterp.models.original_format import padded_vocab, to_transformers_config

TOKENS = random_tokens(2, 6)


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return use_cache(monkeypatch, tmp_path / "cache")


@torch.no_grad()
def check(model: HookedMamba, plain: nn.Module) -> None:
    """Logits and generated tokens are plain transformers'."""
    torch.testing.assert_close(model(TOKENS), plain(input_ids=TOKENS).logits, atol=1e-4, rtol=0)
    options: dict[str, Any] = {"attention_mask": torch.ones_like(TOKENS), "max_new_tokens": 3, "do_sample": False}
    assert torch.equal(model.generate(TOKENS, 3, do_sample=False), plain.generate(input_ids=TOKENS, **options))


# --- mamba_ssm -------------------------------------------------------------------------------------------------------


def without_tokenizer(folder: Path, **options: Any) -> HookedMamba:
    with pytest.warns(UserWarning, match=r"holds no tokenizer, and EleutherAI/gpt-neox-20b.*cannot be loaded"):
        return HookedMamba.from_pretrained(folder, device="cpu", **options)


@pytest.mark.parametrize("untied", [{}, {"tie_word_embeddings": False}], ids=["tied", "untied"])
def test_the_original_format(untied: dict[str, bool], tmp_path: Path) -> None:
    plain = tiny_model(vocab_size=24, **untied)
    config = {"tie_embeddings": False} if untied else {}
    model = without_tokenizer(write_original(plain, tmp_path, **config))
    check(model, plain)
    assert (model.cfg.vocab, model.cfg.d_state, model.cfg.dt_rank, model.cfg.architecture) == (
        *(24, 4, 2, "MambaForCausalLM"),
    )
    assert model.tokenizer is None


def test_the_original_config_of_130m() -> None:
    """With the defaults of mamba_ssm for what it leaves out."""
    published = {"d_model": 768, "n_layer": 24, "vocab_size": 50277, "ssm_cfg": {}, "rms_norm": True}
    config = to_transformers_config(published | {"residual_in_fp32": True, "pad_vocab_size_multiple": 8})
    assert (config.hidden_size, config.num_hidden_layers, config.vocab_size) == (768, 24, 50280)
    assert (config.intermediate_size, config.state_size, config.conv_kernel, config.time_step_rank) == (1536, 16, 4, 48)
    assert config.tie_word_embeddings
    assert config.residual_in_fp32


@pytest.mark.parametrize(("vocab", "multiple", "rows"), [(50277, 8, 50280), (24, 8, 24), (1, 8, 8), (9, 1, 9)])
def test_padding_of_the_vocabulary(vocab: int, multiple: int, rows: int) -> None:
    assert padded_vocab(vocab, multiple) == rows


def test_the_original_format_with_its_usual_tokenizer(
    tokenizer: PreTrainedTokenizerFast, empty_cache: Path, tmp_path: Path
) -> None:
    tokenizer.save_pretrained(in_cache(empty_cache, "EleutherAI/gpt-neox-20b"))
    folder = write_original(tiny_model(vocab_size=24), tmp_path / "model")
    assert HookedMamba.from_pretrained(folder, device="cpu").to_str_tokens("the cat") == ["the", "cat"]


@pytest.mark.parametrize("way", ["own", "folder", "object"])
def test_the_original_format_with_another_tokenizer(
    way: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    folder = write_original(tiny_model(vocab_size=24), tmp_path / "model")
    tokenizer.save_pretrained(folder if way == "own" else tmp_path / "tokenizer")
    given = {"own": None, "folder": tmp_path / "tokenizer", "object": tokenizer}[way]
    model = HookedMamba.from_pretrained(folder, device="cpu", tokenizer=given)
    assert model.to_str_tokens("the cat") == ["the", "cat"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"ssm_cfg": {"layer": "Mamba2"}}, "layers of the kind 'Mamba2'; supported is Mamba-1 alone"),
        ({"attn_layer_idx": [1]}, "attention layers"),
        ({"d_intermediate": 16}, "MLP layers"),
        ({"rms_norm": False}, "LayerNorm instead of RMSNorm"),
        ({"ssm_cfg": {"d_stat": 4}}, "the option ssm_cfg.d_stat"),
        ({"vocab_size": 30}, "do not fit its config: of the wrong shape .*embeddings"),
        ({"ssm_cfg": {"d_state": 5, "d_conv": 3, "dt_rank": 2}}, "do not fit its config: of the wrong shape .*A_log"),
        ({"n_layer": 4}, "do not fit its config: missing .*layers.3"),
        ({"n_layer": 2}, "do not fit its config: unexpected .*layers.2"),
        ({"d_model": "wide"}, "cannot load"),
    ],
    ids=str,
)
def test_an_original_config_that_cannot_be(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    folder = write_original(tiny_model(vocab_size=24), tmp_path, **change)
    with pytest.raises(ValueError, match=said):
        HookedMamba.from_pretrained(folder, device="cpu")


def test_a_config_of_nothing_known(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"dim": 8, "n_layers": 3}')
    with pytest.raises(ValueError, match=r"names no model_type.*Supported are MambaForCausalLM"):
        HookedMamba.from_pretrained(tmp_path)


# --- .bin files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("n_shards", [1, 3])
def test_pickles(family: str, n_shards: int, tmp_path: Path) -> None:
    plain = tiny_model(family, tie_word_embeddings=False)
    check(HookedMamba.from_pretrained(write_pickle(plain, tmp_path, n_shards), device="cpu"), plain)


# --- adapters --------------------------------------------------------------------------------------------------------


def adapted(plain: nn.Module, seed: int = 0) -> PeftModel:
    """LoRA weights that are not zero, as after training."""
    model = get_peft_model(plain, LoraConfig(r=2, target_modules=["in_proj", "x_proj"], lora_alpha=8))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3, generator=generator)
    return model.eval()


def write_adapter(folder: Path, base: Path | str, family: str = "mamba", **config: Any) -> PeftModel:
    plain = tiny_model(family, **config)
    plain.name_or_path = plain.config.name_or_path = str(base)
    model = adapted(plain)
    model.save_pretrained(folder)
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter(family: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    base, folder = tmp_path / "base", tmp_path / "adapter"
    tiny_model(family).save_pretrained(base)
    tokenizer.save_pretrained(base)
    expected = write_adapter(folder, base, family)
    model = HookedMamba.from_pretrained(folder, device="cpu")
    check(model, expected)
    with torch.no_grad():
        assert (model(TOKENS) - tiny_model(family)(TOKENS).logits).abs().max() > 0.1
    assert isinstance(model.hf_model, PeftModel)
    assert model.cfg.model_name == str(folder)
    assert model.to_str_tokens("the cat") == ["the", "cat"]
    cache = model.run_with_cache(TOKENS, "*hook_state")[1]
    assert len(cache) == model.cfg.n_layers


def test_an_adapter_of_the_original_format_on_the_hub(empty_cache: Path, tmp_path: Path) -> None:
    """Both in the cache, the base at a revision."""
    write_original(tiny_model(vocab_size=24), in_cache(empty_cache, "state-spaces/mamba-130m", ref="v2"))
    folder = in_cache(empty_cache, "someone/adapter")
    expected = write_adapter(folder, "state-spaces/mamba-130m", vocab_size=24)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"revision": "v2"}))
    with pytest.warns(UserWarning, match="holds no tokenizer"):
        model = HookedMamba.from_pretrained("someone/adapter", device="cpu")
    check(model, expected)


def test_an_adapter_beside_a_config(tmp_path: Path) -> None:
    """As a training run leaves it: the folder has the base's config, and the base's weights are elsewhere."""
    base, folder = tmp_path / "base", tmp_path / "adapter"
    tiny_model().save_pretrained(base)
    expected = write_adapter(folder, base)
    shutil.copy(base / "config.json", folder)
    check(HookedMamba.from_pretrained(folder, device="cpu"), expected)


def test_an_adapter_trained_on_a_hooked_model(tmp_path: Path) -> None:
    """It names the bundled model, and not a folder of this machine."""
    model = HookedMamba.from_pretrained("nano-mamba", device="cpu")
    expected = adapted(model.lm)
    expected.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == "nano-mamba"
    again = HookedMamba.from_pretrained(tmp_path, device="cpu")
    text = "Then, Shelby"
    with torch.no_grad():
        torch.testing.assert_close(again(text), HookedMamba.from_hf(expected, model.tokenizer)(text))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ("no weights", "cannot load"),
        ("truncated", "cannot load"),
        ("no base named", "does not say of which model it is"),
        ("base gone", "there is no folder"),
        ("of a deeper model", r"does not fit its base .*unexpected .*layers\.2"),
        ("of a shallower model", r"cannot load .*missing|does not fit its base .*missing .*layers\.2"),
        ("of a wider model", "cannot load .*size mismatch"),
        ("no peft", r"needs peft: pip install 'ssminterp\[peft\]'"),
    ],
)
def test_an_adapter_that_does_not_load(damage: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, folder = tmp_path / "base", tmp_path / "adapter"
    sizes = {
        "of a deeper model": {"num_hidden_layers": 2},
        "of a shallower model": {"num_hidden_layers": 4},
        "of a wider model": {"hidden_size": 4},
    }
    tiny_model(**sizes.get(damage, {})).save_pretrained(base)
    write_adapter(folder, base)
    weights = folder / "adapter_model.safetensors"
    match damage:
        case "no weights":
            weights.unlink()
        case "truncated":
            weights.write_bytes(weights.read_bytes()[:-9])
        case "no base named":
            (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
        case "base gone":
            shutil.rmtree(base)
        case "no peft":
            monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(ValueError, match=f"(?s){said}"):
        HookedMamba.from_pretrained(folder, device="cpu")


# --- spread over devices ---------------------------------------------------------------------------------------------


ON_DISK = {
    **dict.fromkeys(("backbone.embeddings", "backbone.norm_f", "lm_head", "backbone.layers.0"), "cpu"),
    **dict.fromkeys(("backbone.layers.1", "backbone.layers.2"), "disk"),
}


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("mamba", "safetensors"),
        ("falcon", "safetensors"),
        ("mamba", "shards"),
        ("mamba", ".bin"),
        ("mamba", "original"),
    ],
)
def test_offloaded_to_disk(family: str, kind: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """One layer on the CPU, the others read from disk whenever they run."""
    plain, folder = tiny_model(family, vocab_size=24), tmp_path / "model"
    if kind == "original":
        write_original(plain, folder)
    elif kind == ".bin":
        write_pickle(plain, folder)
    else:
        plain.save_pretrained(folder, max_shard_size="2KB" if kind == "shards" else "1GB")
    model = HookedMamba.from_pretrained(
        folder, device_map=ON_DISK, offload_folder=tmp_path / "offload", tokenizer=tokenizer
    )
    assert model.blocks[1].mixer.A_log.device.type == "meta"
    check(model, plain)
    cache = model.run_with_cache(TOKENS, "*hook_state")[1]
    expected = HookedMamba.from_hf(plain).run_with_cache(TOKENS, "*hook_state")[1]
    for name in expected:
        torch.testing.assert_close(cache[name], expected[name], atol=1e-4, rtol=1e-4)


def test_an_adapter_of_an_offloaded_base(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "base")
    write_adapter(tmp_path / "adapter", tmp_path / "base")
    with pytest.raises(ValueError, match=r"parts of the base .* are offloaded.*merge"):
        HookedMamba.from_pretrained(tmp_path / "adapter", device_map=ON_DISK, offload_folder=tmp_path / "offload")


def test_no_more_memory_than_was_allowed(tmp_path: Path) -> None:
    plain = tiny_model(num_hidden_layers=6)
    plain.save_pretrained(tmp_path / "model")
    size = sum(parameter.nbytes for parameter in plain.parameters())
    model = HookedMamba.from_pretrained(
        tmp_path / "model", device_map="auto", max_memory={"cpu": size // 2}, offload_folder=tmp_path / "offload"
    )
    kept = sum(parameter.nbytes for parameter in model.parameters() if parameter.device.type != "meta")
    assert 0 < kept <= size // 2
    check(model, plain)


# --- memory --------------------------------------------------------------------------------------------------------


class Largest:
    """The most memory of its own that this process has beyond what it began with; mapped files are not its own."""

    def __enter__(self) -> "Largest":
        self.start, self.bytes, self.stop = own_memory(), 0, threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.thread.join()

    def watch(self) -> None:
        while not self.stop.wait(0.001):
            self.bytes = max(self.bytes, own_memory() - self.start)


def own_memory() -> int:
    memory = psutil.Process().memory_info()
    return memory.rss - memory.shared


@pytest.mark.skipif(sys.platform != "linux", reason="counts pages as Linux does")
@pytest.mark.parametrize(
    ("kind", "dtype", "copies"),
    [("shards", torch.float32, 0.5), ("shards", torch.bfloat16, 1.5), ("original", torch.bfloat16, 1.5)],
    ids=str,
)
def test_no_second_copy_in_memory(
    kind: str, dtype: torch.dtype, copies: float, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """100 MB of float32: mapped from the file as they are, and copied once where their type changes."""
    plain = tiny_model(hidden_size=512, num_hidden_layers=12, vocab_size=10_000)
    if kind == "original":
        ssm = {"d_state": 4, "d_conv": 3, "dt_rank": 2}
        write_original(plain, tmp_path, d_model=512, n_layer=12, vocab_size=10_000, ssm_cfg=ssm)
    else:
        plain.save_pretrained(tmp_path, max_shard_size="20MB")
    del plain
    with Largest() as largest:
        model = HookedMamba.from_pretrained(tmp_path, device="cpu", dtype=dtype, tokenizer=tokenizer, verify=False)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    assert weights > 4e7
    assert largest.bytes < copies * weights
