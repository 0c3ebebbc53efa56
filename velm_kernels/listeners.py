"""Whether anybody would notice that a submodule is not called: its parameters may then be read instead."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_module

# A library that replaces the forward of one of these for the whole process listens to all of them.
_FORWARDS: dict[type[nn.Module], Any] = {
    cls: cls.forward
    for cls in (nn.Linear, nn.Dropout, nn.Identity, nn.MultiheadAttention, nn.ReLU, nn.GELU, nn.SiLU, nn.Tanh)
}


def has_listeners(module: nn.Module) -> bool:
    """Say whether calling `module` does more than its class's forward: hooks, and a forward of the instance's own."""
    own = vars(module).get("forward")
    if own is not None and own is not vars(module).get("velm_forward"):
        return True
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or torch_module._has_any_global_hook()
    )


def is_bare(module: nn.Module, *classes: type[nn.Module]) -> bool:
    """Say whether `module` is exactly of one of `classes`, and nobody would notice that it is not called."""
    cls = type(module)
    if cls not in classes or has_listeners(module):
        return False
    return torch.compiler.is_compiling() or _FORWARDS.get(cls, cls.forward) is cls.forward
