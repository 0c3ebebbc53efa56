"""What replacements share for modules around a `torch.nn.MultiheadAttention`."""

from __future__ import annotations

from torch import Tensor, nn

from .plain import are_plain, has_listeners, under_autocast


def unsuitable(attention: nn.Module) -> str | None:
    """Return why `attention` can never be served, or None."""
    if type(attention) is not nn.MultiheadAttention:
        return f"its attention is a {type(attention).__name__}, not a MultiheadAttention"
    if not attention.batch_first:
        return "its attention does not take the batch first"
    if attention.bias_k is not None or attention.add_zero_attn:
        return "its attention adds keys of its own"
    return None


def why_original(attention: nn.Module, query: Tensor, x: Tensor, *, drops: bool = False) -> str | None:
    """Return why `attention(query, x, x)` cannot be served by an operator now, or None.

    Args:
        attention: of a replaced module; an adapter or a quantised layer may have taken its place since.
        query, x: expected with three dimensions.
        drops: the operator can drop attention weights.
    """
    reason = unsuitable(attention)
    if reason is not None:
        return reason
    assert isinstance(attention, nn.MultiheadAttention)
    if has_listeners(attention):
        return "hooks on the attention"
    # Its output projection is not called by the original either, but its weight is read.
    if type(attention.out_proj) is not nn.modules.linear.NonDynamicallyQuantizableLinear:
        return f"its output projection is a {type(attention.out_proj).__name__}"
    weights = (attention.out_proj.weight, attention.out_proj.bias)
    if not are_plain(query, x, *attention._parameters.values(), *weights):
        return "inputs or weights that are more than tensors"
    if attention.training and attention.dropout > 0.0 and not drops:
        return "dropout of attention weights"
    if query.dim() != 3 or x.dim() != 3:
        return f"inputs of {query.dim()} and {x.dim()} dimensions"
    if not under_autocast(x) and not query.dtype == x.dtype == attention.out_proj.weight.dtype:
        return f"inputs of {query.dtype} and {x.dtype}, weights of {attention.out_proj.weight.dtype}"
    return None
