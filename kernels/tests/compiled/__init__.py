"""Calls whose Triton kernels are compiled for a GPU that need not be there: one file an operation, one function a call.

A function whose name begins with no underscore, defined in such a file, is a row: it calls the public operation with
tensors of realistic shapes on the CPU. What it launches is compiled for the tensors and sizes of that launch, and is
not run, so a row looks at no result. Rows that a file names in AHEAD must load the next tiles while they compute: what
stops that is easily written, and costs most of the speed.

`python -m kernels.tests.compiled [OPERATION ...]` says what each kernel takes.
"""

from pathlib import Path

__all__ = ["OPERATIONS"]

#: The files with rows.
OPERATIONS = sorted(path.stem for path in Path(__file__).parent.glob("*.py") if not path.stem.startswith("_"))
