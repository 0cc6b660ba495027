"""The forms of a file; apart, since the command line knows them without onnx."""

from __future__ import annotations

from enum import StrEnum


class Standalone(StrEnum):
    """How a file stands without the operator library."""

    FUNCTION = "function"  # nodes of ai.sage::Attention, and a local function for each kind
    STANDARD = "standard"  # standard operators alone
    CUSTOM = "custom"  # nodes alone: it needs the library
