"""Which part of attention's work a program has; its one implementation is `triton`."""
