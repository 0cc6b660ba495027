"""What the tests of ``sagec`` share: a module of models, a policy, a call that must fail."""

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import pytest

from sage_compiler import cli
from sage_compiler.policy import LayerPolicy, Policy

MODELS: Final = """\
import torch, helper
from torch import nn
import torch.nn.functional as F

class Model(nn.Module):
    def forward(self, x, causal=False):
        assert helper.ONE
        return F.scaled_dot_product_attention(x, x, x, is_causal=causal)

def build():
    return Model(), (torch.randn(1, 2, 70, 16),)

def with_keywords():
    return Model(), (torch.randn(1, 2, 70, 16),), {"causal": True}

def function():
    return lambda *x: x[0], (torch.ones(2),), {}

def positional():
    return lambda x, /, y: x + y, (torch.ones(2),), {"y": 1}

def inputs():
    yield (torch.zeros(1, 2, 70, 16),)
    yield {"x": torch.ones(1, 2, 70, 16)}

def wrong():
    return Model()

def interrupted():
    raise KeyboardInterrupt  # a signal may be ignored in a process without a terminal

def needy(x, *more, size, scale=1):
    return Model(), (x,)

def broken():
    raise LookupError("in the user's code")

number = 3
"""
LAYER: Final = "(root)#0"  # the attention of Model
FINGERPRINT: Final = "q2 kv2 d16 dv16 none"


def write_models(folder: Path) -> str:
    """The path of a file with the functions of ``MODELS``."""
    (folder / "helper.py").write_text("ONE = 1.0\n")
    (folder / "models.py").write_text(MODELS)
    return str(folder / "models.py")


def write_policy(
    path: Path, recipe: str | tuple[str, ...] = "int8_int8", *, fingerprint: str = FINGERPRINT
) -> str:
    """The path of a policy for ``Model``."""
    recipes = (recipe,) if isinstance(recipe, str) else recipe
    layer = LayerPolicy(fingerprints=(fingerprint,), recipes=recipes, reason="as the test says")
    Policy({LAYER: layer}, target="cpu", timestep_ranges=len(recipes)).save(path)
    return str(path)


def error_of(arguments: Sequence[str], capsys: pytest.CaptureFixture[str], *, code: int = 1) -> str:
    """What ``sagec`` says when it fails: one line on stderr, and nothing on stdout."""
    assert cli.main(arguments) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("sagec: ") and captured.err.count("\n") == 1
    return captured.err
