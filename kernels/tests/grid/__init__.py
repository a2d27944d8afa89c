"""Every operation over drawn shapes, lengths, dtypes and layouts, against float64; on any backend and any device.

A case draws its inputs, calls the public operation, and compares with a formula of its own, which is as plain as can
be and never looks at the references. Under pytest Hypothesis draws (test_grid.py); `python -m kernels.tests.grid`
draws from seeds and needs nothing but torch, so that it runs on a machine with a GPU and no package index.
"""

from .cases import CASES

__all__ = ["CASES"]
