"""What a GPU shows: `make gpu`. Needs torch, Triton and transformers; no package index, no download."""
