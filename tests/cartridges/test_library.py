"""A folder of cartridges, and the command that fills and asks it."""

from pathlib import Path

import pytest
import torch
from tiny_models import hooked, random_tokens
from typer.testing import CliRunner

from ssminterp.cartridges import CartridgeLibrary
from ssminterp.cli import app

MODEL = hooked()
STATE = MODEL.read(random_tokens(2, 5))


def test_what_is_added_is_listed_and_read(tmp_path: Path) -> None:
    library = CartridgeLibrary(tmp_path / "new" / "library")
    assert library.names() == []
    assert library.table().empty
    library.add("b.2", STATE)
    library.add("a cartridge", STATE[0])
    assert library.names() == ["a cartridge", "b.2"]
    table = library.table().set_index("name")
    assert table.loc["b.2", ["model", "fingerprint"]].tolist() == [STATE.model_name, STATE.fingerprint]
    assert table["n_tokens"].tolist() == [5, 5]
    assert table["batch"].tolist() == [1, 2]
    assert torch.equal(library.read("b.2", MODEL).ssm, STATE.ssm)
    with pytest.raises(ValueError, match="cannot be continued by"):
        library.read("b.2", hooked(seed=1))
    with pytest.raises(ValueError, match="already: pass overwrite=True"):
        library.add("b.2", STATE[1])
    library.add("b.2", STATE[1], overwrite=True)
    assert library.read("b.2").batch == 1
    with pytest.raises(ValueError, match=r"no state called 'c'; there are: a cartridge, b\.2"):
        library.read("c")


def test_a_damaged_file_is_listed_with_what_is_wrong(tmp_path: Path) -> None:
    library = CartridgeLibrary(tmp_path)
    whole = library.add("whole", STATE).read_bytes()
    (tmp_path / "half.safetensors").write_bytes(whole[: len(whole) // 2])
    table = library.table().set_index("name")
    assert "cannot be read" in table.loc["half", "problem"]
    assert table.loc["whole", "problem"] == ""


@pytest.mark.parametrize("name", ["../escape", "/tmp/escape", "a/b", "", ".hidden", "a\\b", "a\nb", "x" * 101, "a\0"])
def test_names_that_would_leave_the_folder_are_refused(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "library"
    for ask in (lambda: CartridgeLibrary(folder).add(name, STATE), lambda: CartridgeLibrary(folder).read(name)):
        with pytest.raises(ValueError, match="cannot be a state's name"):
            ask()
    assert not folder.exists()


def test_links_and_files_in_place_of_the_folder_are_refused(tmp_path: Path) -> None:
    STATE.save(tmp_path / "outside.safetensors")
    library = CartridgeLibrary(tmp_path / "library")
    library.add("a", STATE)
    (library.folder / "link.safetensors").symlink_to(tmp_path / "outside.safetensors")
    for ask in (lambda: library.read("link"), lambda: library.add("link", STATE, overwrite=True)):
        with pytest.raises(ValueError, match="is a link"):
            ask()
    with pytest.raises(ValueError, match="is a file: name a folder"):
        CartridgeLibrary(tmp_path / "outside.safetensors")


def run(*options: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["states", *map(str, options)])
    return result.exit_code, " ".join(result.output.replace("│", " ").split())


def test_the_command_reads_lists_and_answers(tmp_path: Path) -> None:
    folder = tmp_path / "library"
    text = "Given wood: trumpet, cotton: onion, green: potato, spring: hammer."
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    read = ["--model", "tiny-mamba", "--device", "cpu"]
    assert run("read", folder, "table", "--file", tmp_path / "text.txt", *read)[0] == 0
    assert run("read", folder, "half", "--text", "Given wood: trumpet, cotton: onion,", *read)[0] == 0
    assert run("read", folder, "joined", "--after", "half", "--text", " green: potato, spring: hammer.", *read)[0] == 0
    code, listed = run("list", folder)
    assert code == 0
    assert "table: 17 tokens, batch 1" in listed
    assert "joined: 17 tokens" in listed
    for name in ("table", "joined"):
        code, said = run("apply", folder, name, " Now green:", *read)
        assert code == 0
        assert f"with {name}: Now green: potato" in said
        assert "potato" not in said.split("without:")[1]


def test_the_command_takes_precision_and_revision(tmp_path: Path) -> None:
    """A cartridge read in half precision is asked in half precision."""
    options = ["--model", "nano-mamba", "--device", "cpu"]
    assert run("read", tmp_path, "a", "--text", "Given red: lamp.", "--dtype", "bfloat16", *options)[0] == 0
    assert CartridgeLibrary(tmp_path).read("a").conv.dtype == torch.bfloat16
    assert "with a: Now red:" in run("apply", tmp_path, "a", " Now red:", "--dtype", "bfloat16", *options)[1]
    assert "dtype must be one of" in run("apply", tmp_path, "a", " Now red:", "--dtype", "half", *options)[1]
    for command in (["read", tmp_path, "b", "--text", "Given"], ["apply", tmp_path, "a", " Now red:"]):
        assert "revision='v2' is for names on the hub" in run(*command, "--revision", "v2", *options)[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["list", "{folder}/table.safetensors"], "is a file"),
        (["read", "{folder}", "x"], "either as --text or as --file"),
        (["read", "{folder}", "x", "--text", "a", "--file", "b"], "either as --text or as --file"),
        (["read", "{folder}", "table", "--text", "Given"], "pass --overwrite"),
        (["read", "{folder}", "../x", "--text", "Given"], "cannot be a state's name"),
        (["read", "{folder}", "x", "--file", "{folder}/nowhere.txt"], "No such file"),
        (["apply", "{folder}", "nowhere", "Now"], "no state called 'nowhere'"),
        (["apply", "{folder}", "table", "Now"], "cannot be continued by"),
    ],
)
def test_the_command_says_what_is_wrong(options: list[str], message: str, tmp_path: Path) -> None:
    CartridgeLibrary(tmp_path).add("table", STATE)
    filled = [option.format(folder=tmp_path) for option in options]
    code, said = run(*filled, *(["--model", "nano-mamba", "--device", "cpu"] if options[0] != "list" else []))
    assert code == 2
    assert message in said
    assert [path.name for path in tmp_path.iterdir()] == ["table.safetensors"]


def test_an_empty_library_says_so(tmp_path: Path) -> None:
    assert "holds no cartridges" in run("list", tmp_path / "nowhere")[1]
