"""Triton's kernels compile for a Hopper GPU; in a process of its own, as here they are defined for the interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bestiary_kernels import gpu

from .grid import CASES

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(not gpu.is_installed(), reason="Triton is not installed")
def test_what_the_grid_launches_compiles_for_hopper() -> None:
    # The folder of this very package: installed or not, it is what is tested.
    path = os.pathsep.join((str(ROOT), *filter(None, sys.path)))
    environment = {**os.environ, gpu.INTERPRETED: "0", "PYTHONPATH": path}
    command = [sys.executable, "-m", "kernels.tests.grid.hopper", "4"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("compiled") == len(CASES)
