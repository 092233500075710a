"""The Python of the README runs as it stands, from top to bottom."""

import linecache
import re
from pathlib import Path

import pytest

README = Path(__file__).parent.parent.parent / "README.md"


def test_readme_runs(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) >= 4
    source = "\n".join(blocks)
    # nnsight reads the code of a trace where Python looks up source lines.
    monkeypatch.setitem(linecache.cache, "<readme>", (len(source), None, source.splitlines(keepends=True), "<readme>"))
    exec(compile(source, "<readme>", "exec"), {"__name__": "readme"})
    printed = capsys.readouterr().out
    assert "['Emma']" in printed
    assert "moved" in printed
    assert "the last token of 2 texts: [2, 192]" in printed
