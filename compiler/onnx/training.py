"""What a model does in training alone, and a file would do for ever."""

from __future__ import annotations

from torch import fx

from sage_compiler.errors import InvalidOptionError
from sage_compiler.passes.normalize import argument, operation, source_of

_DROPOUTS = ("dropout", "alpha_dropout", "feature_dropout", "feature_alpha_dropout")


def refuse(graph: fx.GraphModule) -> None:
    """Raises InvalidOptionError for dropout, and for statistics of the batch."""
    for node in graph.graph.nodes:
        what = _in_training(node)
        if what is not None:
            source = source_of(node)
            raise InvalidOptionError(
                f"{what} in training mode{f', at {source}' if source else ''}; a file would do so "
                "for ever: call model.eval() first"
            )


def _in_training(node: fx.Node) -> str | None:
    name = operation(node)
    if name in _DROPOUTS and argument(node, 1, "p") and argument(node, 2, "train"):
        return "dropout"
    if name == "scaled_dot_product_attention" and argument(node, 4, "dropout_p"):
        return "dropout of attention"
    if name == "batch_norm" and argument(node, 5, "training"):
        return "batch normalization"
    return None
