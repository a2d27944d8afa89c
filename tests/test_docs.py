"""The documents' Python blocks run: what they say is so."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, env={**os.environ})
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.real
@pytest.mark.xdist_group("real")
def test_the_readmes_example_runs(demo: Path) -> None:
    printed = [run(block) for block in BLOCK.findall((ROOT / "README.md").read_text())]
    assert any("Paris" in text for text in printed)


@pytest.mark.parametrize("path", [p for p in DOCUMENTS if p.name != "README.md"], ids=lambda p: p.name)
def test_every_block_of_a_guide_runs(path: Path) -> None:
    code = "\n".join(BLOCK.findall(path.read_text()))
    run(code or "pass")


def test_the_guides_have_blocks_to_run() -> None:
    assert BLOCK.search((ROOT / "docs" / "plugins.md").read_text())


def test_every_linked_file_is_there() -> None:
    link = re.compile(r"\]\((?!https?:)([^)#]+)")
    missing = [f"{p.name}: {t}" for p in DOCUMENTS for t in link.findall(p.read_text()) if not (p.parent / t).exists()]
    assert missing == []
