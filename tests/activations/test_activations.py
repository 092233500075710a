"""Datasets of activations: rows are what the model computes, however batched; a folder is whole, resumed or refused."""

import json
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import FAMILIES, hooked, random_tokens
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from ssminterp import HookedMamba
from ssminterp.activations import ActivationDataset, collect_activations, folder

HOOKS = ["state", "delta", "resid_post"]
WORDS = ["<pad>", "the", "cat", "dog", "sat", "mat", "on", "John", "Mary"]
TEXTS = ["the cat sat on the mat", "John sat", "", "Mary", "the dog", "on the mat sat the dog", "cat", "the mat"]


def words_model(family: str = "mamba", seed: int = 0) -> HookedMamba:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="<pad>")
    return HookedMamba.from_hf(hooked(family, seed, vocab_size=len(WORDS)).hf_model, tokenizer)


MODEL = words_model()
HALF = HookedMamba.from_hf(words_model().hf_model.bfloat16(), MODEL.tokenizer)


def collect(out: Path, texts: Any = TEXTS, model: HookedMamba = MODEL, **options: Any) -> ActivationDataset:
    hooks = options.pop("hooks", HOOKS)
    return collect_activations(model, texts, hooks, out, progress=False, **{"batch_size": 3} | options)


def check_rows(data: ActivationDataset, model: HookedMamba = MODEL, texts: list[str] = TEXTS) -> None:
    """Every row is that of a run of its text alone."""
    runs = {i: model.run_with_cache(text, data.hooks)[1] for i, text in enumerate(texts) if text}
    for i in range(len(data)):
        row = data[i]
        assert data.text(row["text"]) == texts[row["text"]]
        assert int(data.tokens(row["text"])[row["position"]]) == row["token"]
        for name in data.hooks:
            expected = runs[row["text"]][name][0, row["position"]]
            torch.testing.assert_close(row[name], expected, atol=1e-4, rtol=1e-4)


def files(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir()}


# --- rows ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_every_token_is_a_row(family: str, tmp_path: Path) -> None:
    model = words_model(family)
    data = collect(tmp_path, model=model, shard_bytes=4000)
    assert data.n_shards > 1
    assert len(data.hooks) == 9
    check_rows(data, model)
    lengths = [len(text.split()) for text in TEXTS]
    expected = [(i, position) for i, length in enumerate(lengths) for position in range(length)]
    assert list(data.table()[["text", "position"]].itertuples(index=False, name=None)) == expected
    assert [data.text(i) for i in range(data.n_texts)] == TEXTS
    assert [len(data.tokens(i)) for i in range(data.n_texts)] == lengths
    assert data.fingerprint == model.fingerprint()


@pytest.mark.parametrize(
    ("positions", "expected"),
    [
        (-1, lambda n: [n - 1]),
        ([0, -1], lambda n: [0, n - 1]),
        (slice(2, None), lambda n: range(n)[2:]),
        (slice(None, None, -2), lambda n: range(n)[::-2]),
        (torch.tensor([-1]), lambda n: [n - 1]),
        (lambda tokens: slice(0, len(tokens) // 2), lambda n: range(n // 2)),
    ],
    ids=["last", "first and last", "from the third", "every other, backwards", "tensor", "function"],
)
def test_positions(positions: Any, expected: Callable[[int], list[int]], tmp_path: Path) -> None:
    texts = [text for text in TEXTS if len(text.split()) > 1]
    data = collect(tmp_path, texts, positions=positions)
    check_rows(data, texts=texts)
    wanted = [(i, position) for i, text in enumerate(texts) for position in expected(len(text.split()))]
    assert list(data.table()[["text", "position"]].itertuples(index=False, name=None)) == wanted


@given(
    texts=st.lists(st.lists(st.sampled_from(WORDS[1:]), max_size=5).map(" ".join), min_size=1, max_size=7),
    batch_size=st.integers(1, 4),
    shard_bytes=st.integers(1, 3000),
)
def test_batches_and_shards_do_not_matter(
    texts: list[str], batch_size: int, shard_bytes: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    data = collect(
        tmp_path_factory.mktemp("data"), texts, hooks=["state"], batch_size=batch_size, shard_bytes=shard_bytes
    )
    assert len(data) == sum(len(text.split()) for text in texts)
    assert data.n_texts == len(texts)
    check_rows(data, texts=texts)


def test_hooks_by_name_pattern_and_layer(tmp_path: Path) -> None:
    data = collect(tmp_path / "a", hooks=["x", "blocks.0.mixer.hook_B", "hook_embed"], layers=[0, 2])
    assert data.hooks == ["hook_embed", "blocks.0.mixer.hook_x", "blocks.0.mixer.hook_B", "blocks.2.mixer.hook_x"]
    assert data.axes("blocks.0.mixer.hook_B") == ["d_state"]
    check_rows(data)
    check_rows(collect(tmp_path / "b", hooks=["*hook_A_bar", "logits", "final_norm"]))
    check_rows(collect(tmp_path / "c", hooks=lambda name: name.endswith("hook_conv_taps")))


def test_layers_above_are_not_run(tmp_path: Path) -> None:
    def fail(tensor: torch.Tensor, hook: object) -> None:
        raise AssertionError("ran")

    with MODEL.hooks([("blocks.2.mixer.hook_in_x", fail)]):
        check_rows_of = collect(tmp_path, hooks=["state", "resid_post"], layers=[0, 1])
    check_rows(check_rows_of)
    assert not any(hook.functions or hook.recorders for hook in MODEL.hook_points.values())


def test_what_interventions_change(tmp_path: Path) -> None:
    """The changed run is what is written, and is not gone on with by one that is not changed."""
    halved = [("blocks.0.mixer.hook_x", lambda tensor, hook: tensor / 2)]
    with MODEL.hooks(halved):
        data = collect(tmp_path)
        check_rows(data)
    with pytest.raises(ValueError, match=r"changed_at is \['blocks.0.mixer.hook_x'\] there and \[\] here"):
        collect(tmp_path)
    assert not torch.equal(data.all("blocks.0.mixer.hook_state"), collect(tmp_path / "plain").all(data.hooks[0]))


def test_types(tmp_path: Path) -> None:
    data = collect(tmp_path / "half", dtype=torch.float16)
    exact = collect(tmp_path / "as it is")
    for name in data.hooks:
        assert data.all(name).dtype == torch.float16
        assert torch.equal(data.all(name), exact.all(name).half())


def test_a_model_in_bfloat16(tmp_path: Path) -> None:
    data = collect(tmp_path, model=HALF, hooks=["state", "gate"], batch_size=1)
    assert data[0]["blocks.0.mixer.hook_state"].dtype == torch.float32
    assert data[0]["blocks.0.mixer.hook_gate"].dtype == torch.bfloat16
    cache = HALF.run_with_cache(TEXTS[0], data.hooks)[1]
    assert all(torch.equal(data.all(name)[:6], cache[name][0]) for name in data.hooks)


def test_rows_of_a_dataset_and_tokens(tmp_path: Path) -> None:
    """What Hugging Face datasets yield, a generator, and tokens for a model without a tokenizer."""
    plain = collect(tmp_path / "texts")
    rows = collect(tmp_path / "rows", [{"label": 1, "body": text} for text in TEXTS], text_field="body")
    stream = collect(tmp_path / "stream", iter(TEXTS))
    for name in plain.hooks:
        assert torch.equal(plain.all(name), rows.all(name))
        assert torch.equal(plain.all(name), stream.all(name))
    tokens = random_tokens(2, 5)
    data = collect(tmp_path / "tokens", list(tokens), model=hooked())
    assert torch.equal(torch.stack([data.tokens(0), data.tokens(1)]), tokens)
    expected = hooked().run_with_cache(tokens, "*hook_state")[1]["state", 2]
    torch.testing.assert_close(data.all("blocks.2.mixer.hook_state"), expected.flatten(0, 1), atol=1e-4, rtol=1e-4)


def test_long_texts_are_cut(tmp_path: Path) -> None:
    data = collect(tmp_path, max_tokens=2)
    check_rows(data)
    assert int(data.table()["position"].max()) == 1
    assert [data.text(i) for i in range(data.n_texts)] == TEXTS


# --- reading ---------------------------------------------------------------------------------------------------------


def test_a_data_loader(tmp_path: Path) -> None:
    data = collect(tmp_path, shard_bytes=2000)
    assert data.n_shards > 2
    name = "blocks.1.mixer.hook_state"
    loader = DataLoader(data, batch_size=4, shuffle=True)
    seen = torch.cat([batch[name] for batch in loader])
    assert seen.shape == (len(data), MODEL.cfg.d_inner, MODEL.cfg.d_state)
    torch.testing.assert_close(seen.sum(0), data.all(name).sum(0))
    again = pickle.loads(pickle.dumps(data))
    assert torch.equal(again[3][name], data[3][name])
    assert len(pickle.dumps(data)) < 10_000


def test_shards_and_some_hooks_only(tmp_path: Path) -> None:
    collect(tmp_path, shard_bytes=2000)
    data = ActivationDataset(tmp_path, "*hook_delta")
    assert data.hooks == [f"blocks.{layer}.mixer.hook_delta" for layer in range(3)]
    assert set(data[0]) == {*data.hooks, "text", "position", "token"}
    rows = [data.shard(number) for number in range(data.n_shards)]
    assert torch.equal(torch.cat([part[data.hooks[0]] for part in rows]), data.all(data.hooks[0]))
    assert torch.equal(torch.cat([part["token"] for part in rows]), torch.tensor(data.table()["token"].to_numpy()))
    for index in (len(data), -len(data) - 1):
        with pytest.raises(IndexError, match="out of range"):
            data[index]
    assert data[-1]["text"] == data[len(data) - 1]["text"]
    with pytest.raises(IndexError, match="text 8 is out of range: there are 8"):
        data.text(8)
    with pytest.raises(ValueError, match="no hook is called"):
        ActivationDataset(tmp_path, "*hook_gate")


def test_no_rows_at_all(tmp_path: Path) -> None:
    data = collect(tmp_path / "blank", ["", ""])
    assert (len(data), data.n_texts, len(data.table())) == (0, 2, 0)
    assert (len(collect(tmp_path / "none", [])), collect(tmp_path / "none", []).n_texts) == (0, 0)


# --- going on, and refusing ------------------------------------------------------------------------------------------


class Stop(Exception):
    pass


def broken_off(texts: list[str], after: int) -> Iterator[str]:
    yield from texts[:after]
    raise Stop


def test_an_interrupted_collection_goes_on(tmp_path: Path) -> None:
    """It is not read as whole before; the files are then those of a run in one piece."""
    whole = collect(tmp_path / "whole", shard_bytes=1, batch_size=2)
    out = tmp_path / "out"
    with pytest.raises(Stop):
        collect(out, broken_off(TEXTS, 5), shard_bytes=1, batch_size=2)
    assert len(list(out.glob("shard-*"))) == 2
    with pytest.raises(ValueError, match="holds an unfinished collection"):
        ActivationDataset(out)
    beginning = ActivationDataset(out, partial=True)
    assert beginning.n_texts == 4
    check_rows(beginning)
    kept = files(out)
    data = collect(out, iter(TEXTS), shard_bytes=1, batch_size=2)
    assert data.n_texts == len(TEXTS)
    assert {name: files(out)[name] for name in kept if name.startswith("shard")} == {
        name: content for name, content in kept.items() if name.startswith("shard")
    }
    for name in whole.hooks:
        assert torch.equal(data.all(name), whole.all(name))
    assert data.table().equals(whole.table())


def test_a_finished_collection_is_not_run_again_and_can_grow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    collect(tmp_path)
    before = files(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(MODEL.hf_model, "forward", None)
        collect(tmp_path)
    assert files(tmp_path) == before
    data = collect(tmp_path, [*TEXTS, "the end sat".replace("end", "cat")])
    assert data.n_texts == 9
    check_rows(data, texts=[*TEXTS, "the cat sat"])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hooks": ["state"]}, "hooks is"),
        ({"layers": [1]}, "hooks is"),
        ({"positions": -1}, "positions is 'None' there and '-1' here"),
        ({"max_tokens": 4}, "max_tokens is None there and 4 here"),
        ({"dtype": torch.float16}, "dtype is None there"),
        ({"model": words_model(seed=1)}, "fingerprint is"),
        ({"model": HALF}, "model_dtype is 'torch.float32' there and 'torch.bfloat16' here"),
        ({"texts": TEXTS[:5]}, "its texts 0 to 7 are not those given now"),
        ({"texts": ["Mary", *TEXTS[1:]]}, "its texts 0 to 7 are not those given now"),
    ],
    ids=str,
)
def test_a_folder_of_another_collection(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    collect(tmp_path, [text for text in TEXTS if text] if "positions" in change else TEXTS)
    before = files(tmp_path)
    with pytest.raises(ValueError, match=f"holds another collection: .*{said}"):
        collect(tmp_path, **change)
    assert files(tmp_path) == before


def test_a_folder_of_other_things(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="holds other files and no collection"):
        collect(tmp_path)
    with pytest.raises(ValueError, match="is a file: name a folder"):
        collect(tmp_path / "thesis.txt")
    with pytest.raises(ValueError, match=r"holds no index\.json"):
        ActivationDataset(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


# --- full disks and damage -------------------------------------------------------------------------------------------


FILL_THE_DISK = """
import sys, torch
from ssminterp.activations import ActivationDataset
from ssminterp.activations.folder import Part, Read, Writer
writer = Writer(sys.argv[1], {"fingerprint": "", "hooks": {"hook_embed": ["d_model"]}}, "none")
rows = torch.arange(3)
try:
    while True:
        part = Part()
        columns = {"row.text": rows + writer.n_texts, "row.position": 0 * rows, "row.token": rows}
        part.add([Read("text", rows[:1])] * 3, columns | {"hook_embed": torch.randn(3, 1000)})
        writer.write(part)
except ValueError as error:
    print(error)
data = ActivationDataset(sys.argv[1], partial=True)
assert len(data) == data.n_texts and data.all("hook_embed").isfinite().all()
print(data.n_texts)
"""


def test_a_full_disk(tmp_path: Path) -> None:
    """A real one, of 100 kB: what was finished stays, nothing else does."""
    mount = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    fill = ['mount -t tmpfs -o size=100k none $1 && $2 -c "$3" $1 && ls -A $1', "sh", str(tmp_path)]
    try:
        subprocess.run([*mount, "mount -t tmpfs -o size=100k none $1", "sh", str(tmp_path)], check=True)
    except (FileNotFoundError, subprocess.CalledProcessError):
        pytest.skip("needs Linux that lets users mount a file system of their own")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [*mount, *fill, sys.executable, FILL_THE_DISK]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    said, n_texts, *there = done.stdout.splitlines()
    n_shards = int(n_texts) // 3
    assert 1 < n_shards < 20
    finished = f"{n_shards} shards with {n_texts} texts are finished"
    assert re.search(rf"cannot be written: the disk is full. {finished} in .*: the same call goes on after them", said)
    assert there == ["index.json", *(f"shard-{i:05d}.safetensors" for i in range(len(there) - 1))]
    assert len(there) - 1 in (n_shards, n_shards + 1)  # a shard is there before the index lists it


def test_a_file_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write that ends half-way, by an error or by Ctrl-C, leaves no file that could be taken for a shard."""
    for error in (OSError(28, "No space left on device"), KeyboardInterrupt()):

        def half(tensors: object, path: Path, metadata: object, error: BaseException = error) -> None:
            path.write_bytes(b"half a shard")
            raise error

        with monkeypatch.context() as patched:
            patched.setattr(folder, "save_file", half)
            with pytest.raises((ValueError, KeyboardInterrupt)):
                collect(tmp_path)
        assert not list(tmp_path.iterdir())
    check_rows(collect(tmp_path))


@pytest.mark.parametrize("damage", ["shard missing", "shard cut", "index cut", "index of another kind", "path outside"])
def test_damage_is_found(damage: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    collect(out, shard_bytes=2000)
    shard, index = out / "shard-00001.safetensors", out / "index.json"
    written = json.loads(index.read_text())
    match damage:
        case "shard missing":
            shard.unlink()
        case "shard cut":
            shard.write_bytes(shard.read_bytes()[:-1])
        case "index cut":
            index.write_text(index.read_text()[:-20])
        case "index of another kind":
            index.write_text('{"kind": "something else"}')
        case "path outside":
            shard.rename(tmp_path / "elsewhere")
            written["shards"][1]["file"] = "../elsewhere"
            index.write_text(json.dumps(written))
    with pytest.raises(ValueError, match=r"missing|damaged|cannot be read as the index"):
        ActivationDataset(out)
    with pytest.raises(ValueError, match=r"missing|damaged|cannot be read as the index"):
        collect(out, shard_bytes=2000)


def test_a_shard_of_the_right_size_that_is_none(tmp_path: Path) -> None:
    shard = collect(tmp_path).folder / "shard-00000.safetensors"
    shard.write_bytes(b"x" * shard.stat().st_size)
    with pytest.raises(ValueError, match="cannot be read"):
        ActivationDataset(tmp_path)[0]


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hooks": "stat"}, "no hook has the short name 'stat'"),
        ({"hooks": "*hook_nothing"}, "no hook is called"),
        ({"hooks": []}, "names_filter is empty"),
        ({"hooks": "state", "layers": [3]}, r"layers \[3\] do not exist"),
        ({"hooks": "blocks.0.hook_resid_pre", "layers": [1]}, r"has none in layers \[1\]"),
        (
            {"positions": [0, 5]},
            r"text 1 \('John sat'\): positions \[5\] are out of range.*A slice takes what there is",
        ),
        ({"texts": "the cat"}, r"texts is one text, 'the cat': pass a list"),
        ({"texts": {"train": ["the cat"]}}, r"texts is a mapping of \['train'\]: pass one of these"),
        ({"texts": None}, "texts must be an iterable of texts, got NoneType"),
        ({"texts": ["the cat", 3]}, "text 1: it must be a string"),
        ({"texts": [{"body": "the cat"}]}, r"text 0: there is no 'text' in it, but \['body'\]"),
        ({"texts": ["the zebra"]}, "text 0: words out of the tokenizer's vocabulary"),
        ({"texts": [torch.tensor([1, 99])]}, "text 0: tokens from 1 to 99 do not fit"),
        ({"texts": [random_tokens(2, 3, vocab=5)]}, r"text 0: tokens must be \[pos\]"),
        ({"model": hooked()}, "text 0: the model has no tokenizer"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"dtype": torch.int8}, "dtype must be one of"),
    ],
    ids=str,
)
@pytest.mark.usefixtures("as_users_run_it")
def test_bad_input(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=said):
        collect(tmp_path / "out", **change)
    assert not (tmp_path / "out").exists()


def test_a_batch_that_would_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ssminterp.models.memory.free_bytes", lambda device: 1000)
    with pytest.raises(ValueError, match=r"needs .* GB, .* are free on cpu"):
        collect(tmp_path)


def test_a_hugging_face_dataset(tmp_path: Path) -> None:
    import datasets  # takes seconds

    rows = datasets.Dataset.from_dict({"text": TEXTS})
    check_rows(collect(tmp_path / "whole", rows))
    check_rows(collect(tmp_path / "stream", rows.to_iterable_dataset()))
    with pytest.raises(ValueError, match=r"texts is a mapping of \['train'\]"):
        collect(tmp_path / "splits", datasets.DatasetDict({"train": rows}))
    renamed = rows.rename_column("text", "body")
    check_rows(collect(tmp_path / "renamed", renamed, text_field="body"))


def test_a_dataset_says_what_it_holds(tmp_path: Path) -> None:
    data = collect(tmp_path, hooks=["state", "x"], layers=[1])
    assert repr(data) == (
        f"ActivationDataset({str(tmp_path)!r}, {len(data)} rows of {data.n_texts} texts, {data.model_name}: "
        "blocks.1.mixer.hook_x [d_inner], blocks.1.mixer.hook_state [d_inner, d_state])"
    )
