"""Triton's kernels over pages, of which attention and latent attention are two uses."""
