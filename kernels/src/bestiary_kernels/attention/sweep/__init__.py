"""What attention does with a run of keys; its one implementation is `triton`."""
