"""Triton's kernels compile for a Hopper GPU: errors that only the compiler finds are found without one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bestiary_kernels import gpu

from .compiled import OPERATIONS


@pytest.mark.skipif(not gpu.is_installed(), reason="Triton is not installed")
@pytest.mark.parametrize("operation", OPERATIONS)
def test_kernels_compile_for_hopper(operation: str) -> None:
    root = Path(__file__).parents[2]
    there = {name: value for name, value in os.environ.items() if name != gpu.INTERPRETED}
    command = [sys.executable, "-m", "kernels.tests.compiled", operation]
    done = subprocess.run(command, cwd=root, env=there, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
