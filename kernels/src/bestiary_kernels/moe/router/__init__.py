"""Routers in C++ and in Triton; what they compute is said by `bestiary_kernels.route` and its reference."""
