"""What every test of the workspace starts from: one compute thread a worker, and none of the user's settings."""

import os

# Workers of xdist share the cores: with more than one thread each they would wait for one another at every operation.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["BESTIARY_CONFIG"] = os.devnull
KEPT = ("BESTIARY_CACHE", "BESTIARY_CONFIG")
for name in [n for n in os.environ if n.startswith("BESTIARY_") and n not in KEPT]:
    del os.environ[name]
