"""Checkpoints written as their publishers write them, and a local stand-in for the hub and its cache."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

COMMIT = "0123456789abcdef0123456789abcdef01234567"

# The config.json of state-spaces/mamba-130m, with the sizes of `tiny_model(vocab_size=24)`: 21 tokens, padded to 24.
ORIGINAL_CONFIG = {
    "d_model": 8,
    "n_layer": 3,
    "vocab_size": 21,
    "ssm_cfg": {"d_state": 4, "d_conv": 3, "dt_rank": 2},
    "rms_norm": True,
    "residual_in_fp32": True,
    "fused_add_norm": True,
    "pad_vocab_size_multiple": 8,
}


def write_original(lm: PreTrainedModel, folder: Path, **config: Any) -> Path:
    """mamba_ssm's `save_pretrained`: config.json, and a pickle in which the tied lm_head shares its storage."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name.replace("embeddings", "embedding"): value for name, value in lm.state_dict().items()}
    assert "lm_head.weight" in weights
    torch.save(weights, folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps(ORIGINAL_CONFIG | config, indent=4))
    return folder


def write_pickle(lm: PreTrainedModel, folder: Path, n_shards: int = 1) -> Path:
    """transformers' older format: .bin files, with an index if there are several."""
    folder.mkdir(parents=True, exist_ok=True)
    lm.config.architectures = [type(lm).__name__]
    lm.config.save_pretrained(folder)
    weights = dict(lm.state_dict())
    if n_shards == 1:
        torch.save(weights, folder / "pytorch_model.bin")
        return folder
    names = [list(weights)[i::n_shards] for i in range(n_shards)]
    files = [f"pytorch_model-{i + 1:05d}-of-{n_shards:05d}.bin" for i in range(n_shards)]
    for file, kept in zip(files, names, strict=True):
        torch.save({name: weights[name] for name in kept}, folder / file)
    weight_map = {name: file for file, kept in zip(files, names, strict=True) for name in kept}
    size = sum(weight.nbytes for weight in weights.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return folder


def in_cache(cache: Path, repository: str, commit: str = COMMIT, ref: str = "main") -> Path:
    """The empty snapshot of a repository in a cache of the hub, to write files into."""
    root = cache / f"models--{repository.replace('/', '--')}"
    (root / "refs").mkdir(parents=True, exist_ok=True)
    (root / "refs" / ref).write_text(commit)
    snapshot = root / "snapshots" / commit
    snapshot.mkdir(parents=True, exist_ok=True)
    return snapshot


def use_cache(monkeypatch: pytest.MonkeyPatch, cache: Path, *, offline: bool = True) -> Path:
    """Let this folder be the local cache of the hub."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
    return cache


@contextmanager
def hub_of(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A hub on localhost, whose repositories are the folders `folder`/{owner}/{name}; yields the files asked for.

    It speaks as much of the protocol as downloading needs: the list of files, and a file with its ETag and commit.
    """
    served: list[str] = []

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer(with_body=False)

        def do_GET(self) -> None:
            self.answer(with_body=True)

        def answer(self, with_body: bool) -> None:
            parts = self.path.split("?")[0].strip("/").split("/")
            is_api = parts[:2] == ["api", "models"]
            if len(parts) < 4:
                return self.reply(404, b"", {})
            owner, name, kind, revision, *file = parts[2:] if is_api else parts
            repository = folder / owner / name
            if not repository.is_dir():
                return self.reply(401, b"", {"X-Error-Code": "RepoNotFound"})
            if revision not in ("main", COMMIT):
                return self.reply(404, b"", {"X-Error-Code": "RevisionNotFound"})
            if is_api:
                files = {str(path.relative_to(repository)): path.stat().st_size for path in repository.rglob("*.*")}
                siblings = [{"rfilename": path} for path in files]
                tree = [{"type": "file", "path": path, "size": size, "oid": ""} for path, size in files.items()]
                info = {"id": f"{owner}/{name}", "sha": COMMIT, "siblings": siblings, "private": False, "tags": []}
                return self.reply(200, json.dumps(tree if kind == "tree" else info).encode(), {})
            content = (repository / "/".join(file)).read_bytes()
            if with_body:
                served.append("/".join(file))
            etag = hashlib.sha256(content).hexdigest()
            self.reply(200, content if with_body else b"", {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT}, len(content))

        def reply(self, code: int, body: bytes, headers: dict[str, str], length: int | None = None) -> None:
            self.send_response(code)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(body) if length is None else length))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    point_at(f"http://127.0.0.1:{server.server_port}", monkeypatch)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()


def point_at(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this be the hub's address."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
