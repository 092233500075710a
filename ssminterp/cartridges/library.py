"""A folder of states, each in a file of its own."""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd

from ssminterp.models import HookedMamba, ModelState
from ssminterp.models.state_files import read_description

SUFFIX = ".safetensors"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 _.-]{0,99}")


class CartridgeLibrary:
    """States by name in a folder: `NAME.safetensors`, as `ModelState.save` writes them.

    >>> import tempfile
    >>> from ssminterp import HookedMamba
    >>> model = HookedMamba.from_pretrained("nano-mamba", device="cpu")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     library = CartridgeLibrary(folder)
    ...     _ = library.add("red", model.read("Given red: lamp."))
    ...     library.read("red", model).n_tokens, library.names()
    (5, ['red'])

    folder: is made when the first state is added. Nothing is read or written outside it.

    Raises ValueError if `folder` is a file.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"{self.folder} is a file: name a folder")

    def names(self) -> list[str]:
        """The names of the states that are there, in alphabetical order."""
        return sorted(path.stem for path in self.folder.glob(f"*{SUFFIX}") if _NAME.fullmatch(path.stem))

    def table(self) -> pd.DataFrame:
        """A row for each state: name, model, fingerprint, n_tokens, batch, megabytes, history, and what is wrong with
        a file that cannot be read ("" if nothing is)."""
        columns = ["name", "model", "fingerprint", "n_tokens", "batch", "megabytes", "history", "problem"]
        return pd.DataFrame([self._row(name) for name in self.names()], columns=columns)

    def add(self, name: str, state: ModelState, *, overwrite: bool = False) -> Path:
        """Keep a state under a name. Returns its path.

        Raises ValueError for a name that is taken, unless `overwrite`, or that cannot be a file's name, and if the file
        cannot be written.
        """
        path = self.path(name)
        if path.exists() and not overwrite:
            raise ValueError(
                f"{self.folder} holds a state called {name!r} already: pass overwrite=True, or another name"
            )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"{self.folder} cannot be made: {error}") from error
        state.save(path)
        return path

    def read(self, name: str, model: HookedMamba | None = None) -> ModelState:
        """The state of that name; with a model, checked to be that model's and put on its device.

        Raises ValueError if there is none, if its file is truncated or no state, or if another model read it.
        """
        path = self.path(name)
        if not path.is_file():
            known = ", ".join(self.names()) or "none"
            raise ValueError(f"{self.folder} holds no state called {name!r}; there are: {known}")
        return ModelState.load(path) if model is None else model.load_state(path)

    def path(self, name: str) -> Path:
        """Where the state of that name lies or would lie. Raises ValueError for what cannot be a file's name."""
        if not _NAME.fullmatch(name):
            raise ValueError(
                f"{name!r} cannot be a state's name: use up to 100 letters, digits, spaces, '.', '_' and '-', "
                "the first of them a letter or a digit"
            )
        path = self.folder / f"{name}{SUFFIX}"
        if path.is_symlink():
            raise ValueError(f"{path} is a link: states are read and written only inside the library's folder")
        return path

    def _row(self, name: str) -> dict[str, object]:
        try:
            path = self.path(name)
            described = read_description(path)
        except ValueError as error:
            return {"name": name, "problem": str(error)}
        return {
            "name": name,
            "model": described["model_name"],
            "fingerprint": described["fingerprint"],
            "n_tokens": described["n_tokens"],
            "batch": described["batch"],
            "megabytes": path.stat().st_size / 1e6,
            "history": "; ".join(described["history"]),
            "problem": "",
        }
