"""The wheel: built with nothing but setuptools, tagged for the platform, and usable where no compiler is found."""

import importlib
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

KERNELS = Path(__file__).parents[1]

pytest.importorskip("setuptools", minversion="70.1")


def build(folder: Path, **environment: str) -> tuple[Path, str]:
    """Build a wheel from a copy of the source; returns it and what the build said."""
    source = folder / "source"
    shutil.copytree(KERNELS, source, ignore=shutil.ignore_patterns("build", "*.so", "*.egg-info", "__pycache__"))
    command = "import setuptools.build_meta as b, sys; b.build_wheel(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-S", "-c", f"import sys; sys.path.append({_setuptools()!r}); {command}", str(folder)],
        cwd=source,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    (wheel,) = folder.glob("*.whl")
    return wheel, done.stdout + done.stderr


def _setuptools() -> str:
    setuptools = importlib.import_module("setuptools")
    return str(Path(str(setuptools.__file__)).parents[1])


@pytest.mark.skipif(shutil.which("g++") is None, reason="no compiler")
def test_the_wheel_holds_the_library_and_fits_every_python_on_this_platform(tmp_path: Path) -> None:
    wheel, _ = build(tmp_path)
    assert wheel.name.startswith("bestiary_kernels-0.1.0-py3-none-") and not wheel.name.endswith("-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "bestiary_kernels/libbestiary_kernels.so" in names and "bestiary_kernels/py.typed" in names
    assert not [name for name in names if name.endswith((".cpp", ".hpp"))]


def test_without_a_compiler_the_wheel_computes_with_the_references(tmp_path: Path) -> None:
    wheel, said = build(tmp_path, CXX="/nonexistent")
    assert "built without the C++ library" in said
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = """
import torch, bestiary_kernels as b
assert b.status().backend == "reference" and "compiler" in b.status().reason, b.status()
assert b.gated_activation(torch.ones(2, 4)).shape == (2, 2)
x = torch.randn(2, 8).bfloat16()
layer = b.PackedLinear(torch.randn(64, 8).bfloat16(), keep_rows=True)
assert layer(x).shape == (2, 64) and layer.embedding(torch.tensor([3])).shape == (1, 8)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        check=False,
    )
    assert done.returncode == 0
