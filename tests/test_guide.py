"""The author's guide, followed as a reader would: its files in an empty folder, its commands, a plugin proven."""

import os
import re
import subprocess
import sysconfig
import venv
from pathlib import Path

import pytest

GUIDE = (Path(__file__).parent.parent / "docs" / "plugins.md").read_text()
FILE = re.compile(r'^```\w+ title="([^"]+)"\n(.*?)^```$', re.MULTILINE | re.DOTALL)
COMMANDS = re.compile(r"^```console\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NAME = "ArceeForCausalLM"

pytestmark = pytest.mark.xdist_group("guide")


class Reader:
    """Somebody with an environment of his own, in which Bestiary is installed, and a folder for his plugin."""

    def __init__(self, root: Path) -> None:
        self.folder = root / "bestiary-arcee"
        for name, text in FILE.findall(GUIDE):
            path = self.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        venv.create(root / "venv", with_pip=False, symlinks=True)
        self.python = root / "venv" / "bin" / "python"
        # What is installed here is installed there too; what he installs comes into his own.
        (site,) = (root / "venv" / "lib").glob("python*/site-packages")
        (site / "outer.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")

    def run(self, command: str) -> subprocess.CompletedProcess[str]:
        program, *arguments = command.split()
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST", "PYTHON"))}
        return subprocess.run(
            [str(self.python), "-m", program, *arguments],
            cwd=self.folder,
            env={**environment, "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
            capture_output=True,
            text=True,
            timeout=300,
        )


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Reader:
    return Reader(tmp_path_factory.mktemp("guide"))


def commands() -> list[str]:
    return [line.removeprefix("$ ") for block in COMMANDS.findall(GUIDE) for line in block.splitlines()]


def test_the_guide_names_every_file_of_its_plugin(reader: Reader) -> None:
    drawn = re.search(r"^```\nbestiary-arcee/\n(.*?)^```$", GUIDE, re.MULTILINE | re.DOTALL)
    assert drawn is not None
    assert [line.split()[0] for line in drawn[1].splitlines()] == [name for name, _ in FILE.findall(GUIDE)]


def test_the_guides_commands_install_list_and_prove_its_plugin(reader: Reader) -> None:
    told = {}
    for command in commands():
        done = reader.run(command)
        assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        told[command.split()[1]] = done.stdout
    assert re.search(rf"{NAME}\s+bestiary-arcee\s+0\.1\.0", told["list"])
    assert re.search(r"\d\d passed, 0 failed", told["verify"])
    assert re.search(r"\d\d passed", told["tests"])


def test_a_mistake_in_the_plugin_is_found_and_named(reader: Reader) -> None:
    """As if its author had forgotten what the feed-forward does."""
    model = reader.folder / "src" / "bestiary_arcee" / "arcee.py"
    right = model.read_text()
    model.write_text(right.replace('act="relu2"', 'act="relu"'))
    try:
        assert reader.run(commands()[0]).returncode == 0
        done = reader.run(f"bestiary verify {NAME} --level L2")
    finally:
        model.write_text(right)
    assert done.returncode == 1
    assert "L2 logits base: failed" in done.stdout
