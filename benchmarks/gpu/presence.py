"""Whether PyTorch has a GPU to work with. Needs nothing else, so it can be asked before set-up."""

from __future__ import annotations

import torch

# As exit status: nothing was checked and nothing was measured.
NO_DEVICE = 2


def missing(index: int = 0) -> str | None:
    """Why there is no CUDA device of this number, in one sentence, or None when there is."""
    if torch.version.cuda is None:
        return (
            f"PyTorch {torch.__version__} is built without CUDA; name a Python whose PyTorch has "
            "it: make gpu GPU_PYTHON=/path/to/python"
        )
    if not torch.cuda.is_available():
        return (
            f"PyTorch {torch.__version__} finds none; nvidia-smi says whether there is a GPU and "
            f"whether its driver is new enough for CUDA {torch.version.cuda}"
        )
    count = torch.cuda.device_count()
    if not 0 <= index < count:
        return f"device {index} is none of the {count} that PyTorch finds; choose one with --device"
    return None
