"""What every test runs under: one thread per worker, no network, the Hypothesis profile."""

import os

# Before anything imports torch or transformers: both read these once.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from hypothesis import settings

# pytest-xdist runs one worker per core; more threads would only compete.
torch.set_num_threads(1)

# deadline=None: compiling inside a test takes seconds the first time and none the second.
settings.register_profile("local", deadline=None, print_blob=True)
settings.register_profile("ci", derandomize=False, deadline=None, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")
