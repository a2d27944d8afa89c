"""Kernels that begin while the one before ends; the one implementation is `triton`."""
