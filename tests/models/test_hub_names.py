"""Names on the hub: fetched from a hub on localhost, found in the local cache, and what is said when neither works."""

import shutil
from pathlib import Path

import pytest
import torch
from checkpoint_formats import COMMIT, hub_of, in_cache, point_at, use_cache, write_original, write_pickle
from tiny_models import random_tokens, tiny_model
from transformers import PreTrainedTokenizerFast

from ssminterp import HookedMamba
from ssminterp.models.hub import checkpoint_files

TOKENS = random_tokens(2, 6)


def same(model: HookedMamba, seed: int = 0, **config: int) -> bool:
    """Whether the model computes what plain transformers' tiny model does."""
    with torch.no_grad():
        plain = tiny_model(seed=seed, **config)(TOKENS).logits
        return torch.allclose(model(TOKENS), plain, atol=1e-4, rtol=0)


def test_fetching(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what a checkpoint needs is fetched, once; what was fetched loads again without a network."""
    repository = tmp_path / "hub" / "someone" / "mamba-hf"
    tiny_model().save_pretrained(repository, max_shard_size="6KB")
    shards = {path.name for path in repository.glob("*.safetensors")}
    assert len(shards) > 1
    write_pickle(tiny_model(seed=1), tmp_path / "old")
    for extra in ("pytorch_model.bin", "model.fp16.safetensors", "training/model.safetensors", "setup.py", "card.md"):
        (repository / extra).parent.mkdir(exist_ok=True)
        shutil.copy(tmp_path / "old" / "pytorch_model.bin", repository / extra)
    use_cache(monkeypatch, tmp_path / "cache", offline=False)
    with hub_of(tmp_path / "hub", monkeypatch) as served:
        model = HookedMamba.from_pretrained("someone/mamba-hf", device="cpu")
        fetched = {"config.json", "generation_config.json", "model.safetensors.index.json", *shards}
        assert sorted(served) == sorted(fetched)
        assert same(HookedMamba.from_pretrained("someone/mamba-hf", device="cpu", revision=COMMIT))
        assert sorted(served) == sorted(fetched)
    assert same(model)
    assert model.cfg.model_name == model.lm.name_or_path == model.lm.config.name_or_path == "someone/mamba-hf"
    use_cache(monkeypatch, tmp_path / "cache", offline=True)
    assert same(HookedMamba.from_pretrained("someone/mamba-hf", device="cpu"))


def test_fetching_the_original_format(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_original(tiny_model(vocab_size=24), tmp_path / "hub" / "state-spaces" / "mamba-130m")
    tokenizer.save_pretrained(tmp_path / "hub" / "EleutherAI" / "gpt-neox-20b")
    use_cache(monkeypatch, tmp_path / "cache", offline=False)
    with hub_of(tmp_path / "hub", monkeypatch) as served:
        model = HookedMamba.from_pretrained("state-spaces/mamba-130m", device="cpu")
    assert served[:2] == ["config.json", "pytorch_model.bin"]
    assert same(model, vocab_size=24)
    assert model.to_str_tokens("the cat sat") == ["the", "cat", "sat"]


def test_what_the_hub_does_not_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_model().save_pretrained(tmp_path / "hub" / "someone" / "mamba")
    use_cache(monkeypatch, tmp_path / "cache", offline=False)
    with hub_of(tmp_path / "hub", monkeypatch):
        with pytest.raises(ValueError, match=r"the hub has no model 'state-space/mamba-130m'.*state-spaces/mamba-130m"):
            HookedMamba.from_pretrained("state-space/mamba-130m")
        with pytest.raises(ValueError, match="someone/mamba has no revision 'step-7' on the hub"):
            HookedMamba.from_pretrained("someone/mamba", revision="step-7")


def test_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A branch, a commit, and a repository of which the cache holds but a part."""
    cache = use_cache(monkeypatch, tmp_path)
    tiny_model().save_pretrained(in_cache(cache, "someone/mamba"))
    other = "f" * 40
    tiny_model(seed=1).save_pretrained(in_cache(cache, "someone/mamba", other, "step-7"))
    assert same(HookedMamba.from_pretrained("someone/mamba", device="cpu"))
    for revision in ("step-7", other):
        assert same(HookedMamba.from_pretrained("someone/mamba", device="cpu", revision=revision), seed=1)
    (in_cache(cache, "someone/tokenizer-only") / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"holds no config.json"):
        HookedMamba.from_pretrained("someone/tokenizer-only")
    with pytest.raises(ValueError, match=r"someone/mamba at revision 'step-9' is not in the local cache"):
        HookedMamba.from_pretrained("someone/mamba", revision="step-9")


@pytest.mark.parametrize("name", ["state-spaces/mamba-130m-hf", "tiny-mambo"])
def test_offline(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_cache(monkeypatch, tmp_path)
    said = rf"{name} is not in the local cache.*HF_HUB_OFFLINE is set.*Bundled are: tiny-mamba, nano-mamba.*hf download"
    with pytest.raises(ValueError, match=said):
        HookedMamba.from_pretrained(name)


def test_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_cache(monkeypatch, tmp_path, offline=False)
    point_at("http://127.0.0.1:9", monkeypatch)
    said = r"someone/mamba is not in the local cache.*http://127.0.0.1:9 cannot be reached.*HF_HUB_OFFLINE=1"
    with pytest.raises(ValueError, match=said):
        HookedMamba.from_pretrained("someone/mamba")


def test_no_network_but_a_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was fetched once loads when the hub cannot be reached, without being told so."""
    cache = use_cache(monkeypatch, tmp_path, offline=False)
    tiny_model().save_pretrained(in_cache(cache, "someone/mamba"))
    point_at("http://127.0.0.1:9", monkeypatch)
    assert same(HookedMamba.from_pretrained("someone/mamba", device="cpu"))


def test_names_that_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_cache(monkeypatch, tmp_path)
    for name in ("a/b/c", "mamba 130m", ""):
        with pytest.raises(ValueError, match=r"cannot be a hub name|is empty"):
            HookedMamba.from_pretrained(name)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="is a file: name the folder"):
        HookedMamba.from_pretrained(tmp_path / "model.safetensors")


@pytest.mark.usefixtures("as_users_run_it")
def test_a_revision_of_what_has_none(tmp_path: Path) -> None:
    for name in (tmp_path, "tiny-mamba"):
        with pytest.raises(ValueError, match="revision='main' is for names on the hub"):
            checkpoint_files(name, "main")
    with pytest.raises(ValueError, match="revision must be a branch, a tag or a commit as a string, got 3"):
        HookedMamba.from_pretrained("someone/mamba", revision=3)  # type: ignore[arg-type]
