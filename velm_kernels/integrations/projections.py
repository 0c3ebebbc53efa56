"""Linear projections and feed-forward blocks inside patched layers.

A replaced `torch.nn.Linear` decides at every call, by the fixed rule `velm_kernels.linear.faster_than_torch`, which
product serves it. A block whose projection is a plain one, served by this library's product, fuses activation and
residual into it; beside torch's product it fuses what saves a pass over memory: bias, activation and their gradients.
Dropout is fused into the residual. Everything else - adapters, quantised layers, hooks - is called as the module it is.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from velm_kernels.backends import cpu
from velm_kernels.fusion import dropout_residual
from velm_kernels.linear import faster_than_torch, linear

from .patching import LINEAR, Replacement, replaces

# Exact classes, and the name under which `linear` knows what they compute. transformers' GELUActivation and GELUTanh
# hold one of several functions, see `_activation`.
_ACTIVATIONS = {
    ("torch.nn.modules.activation", "ReLU"): "relu",
    ("torch.nn.modules.activation", "SiLU"): "silu",
    ("torch.nn.modules.activation", "Tanh"): "tanh",
    ("open_clip.transformer", "QuickGELU"): "quick_gelu",
    ("transformers.activations", "FastGELUActivation"): "gelu_tanh",
    ("transformers.activations", "NewGELUActivation"): "gelu_tanh",
    ("transformers.activations", "QuickGELUActivation"): "quick_gelu",
    ("transformers.activations", "SiLUActivation"): "silu",
}


# Results with fewer elements stay in the cache: fusing an activation to torch's product gains nothing there.
_FUSED_ELEMENTS = 1 << 18


@replaces(*LINEAR, family="", by="linear")
class Linear(Replacement):
    weight: Tensor
    bias: Tensor | None

    def forward(self, input: Tensor) -> Tensor:
        if _kernel_product(input, self.weight):
            return linear(input, self.weight, self.bias)
        return nn.functional.linear(input, self.weight, self.bias)


def project(
    projection: nn.Module,
    x: Tensor,
    activation: Any = None,
    residual: Tensor | None = None,
    dropout: nn.Module | None = None,
) -> Tensor:
    """Return `dropout(activation(projection(x))) + residual`, fused where that gains.

    Args:
        projection: what the model calls; fused only if it is exactly a `torch.nn.Linear` that nobody listens to.
        x: (..., in_features).
        activation: module or function, or None.
        residual: (..., out_features), or None.
        dropout: the model's `torch.nn.Dropout`, or None.
    """
    name = "" if activation is None else _activation(activation)
    drops = dropout is not None and not _does_nothing(dropout)
    fused = None
    if (name or (name is not None and residual is not None and not drops)) and is_plain(projection):
        weight: Tensor = projection.weight  # type: ignore[assignment]
        own = _on_cpu(x, weight) and _kernel_product(x, weight)
        if own and not drops:
            fused = residual
        fuses = own or (name and _activation_gains(x, weight))
    else:
        fuses = False
    if fuses:
        out = linear(x, projection.weight, projection.bias, name or None, fused)  # type: ignore[arg-type]
        if fused is not None:
            return out
    else:
        out = projection(x)
        if activation is not None:
            out = activation(out)
    if drops:
        return _drop_and_add(out, residual, dropout)  # type: ignore[arg-type]
    return out if residual is None else out + residual


def _drop_and_add(x: Tensor, residual: Tensor | None, dropout: nn.Module) -> Tensor:
    """Return `dropout(x) + residual`; the kernel draws its own random numbers, from a seed of torch's generator."""
    plain = type(dropout) is nn.Dropout and not heard(dropout) and not dropout.inplace and 0.0 < dropout.p < 1.0
    same_dtype = residual is None or residual.dtype is x.dtype
    if plain and same_dtype and x.device.type == "cpu" and x.dtype in cpu.DTYPES and _cpu_library():
        return dropout_residual(x, residual, dropout.p)  # type: ignore[arg-type]
    x = dropout(x)
    return x if residual is None else x + residual


def _does_nothing(dropout: nn.Module) -> bool:
    return type(dropout) is nn.Dropout and not (dropout.training and dropout.p > 0.0) and not heard(dropout)


def _dtype(x: Tensor) -> torch.dtype:
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def _kernel_product(x: Tensor, weight: Tensor) -> bool:
    training = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    out_features, in_features = weight.shape
    if torch.compiler.is_compiling():
        return _traced_rule(in_features, out_features, _dtype(x), x.device.type, training)
    rows = x.numel() // max(x.shape[-1], 1)
    return faster_than_torch(rows, in_features, out_features, _dtype(x), x.device, training)


@torch.compiler.assume_constant_result
def _traced_rule(in_features: int, out_features: int, dtype: torch.dtype, device_type: str, training: bool) -> bool:
    """The rule for many rows: in a graph their number may be a symbol."""
    return faster_than_torch(4096, in_features, out_features, dtype, device_type, training)


@torch.compiler.assume_constant_result
def _cpu_library() -> bool:
    return cpu.in_use() is not None


def _on_cpu(x: Tensor, weight: Tensor) -> bool:
    return x.device.type == "cpu" and weight.device.type == "cpu" and _dtype(x) in cpu.DTYPES and _cpu_library()


def _activation_gains(x: Tensor, weight: Tensor) -> bool:
    """Say whether fusing bias and activation to torch's product gains; a compiler fuses them itself."""
    if torch.compiler.is_compiling() or not _on_cpu(x, weight):
        return False
    return x.numel() // max(x.shape[-1], 1) * weight.shape[0] >= _FUSED_ELEMENTS


def is_plain(projection: nn.Module) -> bool:
    cls = getattr(type(projection), "velm_original_class", type(projection))
    return cls is nn.Linear and not heard(projection)


def heard(module: nn.Module) -> bool:
    """Say whether calling `module` does more than its class's forward."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or torch_module._has_any_global_hook()
        or "forward" in vars(module)
    )


def _activation(activation: Any) -> str | None:
    """Return the name of the activation for `linear`, or None where it is not one that `linear` knows."""
    function = activation
    if isinstance(activation, nn.Module):
        if heard(activation):
            return None
        cls = type(activation)
        name = _ACTIVATIONS.get((cls.__module__, cls.__qualname__))
        if name is not None:
            return name
        if cls is nn.GELU:
            return "gelu" if activation.approximate == "none" else "gelu_tanh"
        if (cls.__module__, cls.__qualname__) not in (
            ("transformers.activations", "GELUActivation"),
            ("transformers.activations", "GELUTanh"),
        ):
            return None
        function = activation.act
    if function is nn.functional.gelu:
        return "gelu"
    if isinstance(function, functools.partial) and function.func is nn.functional.gelu and not function.args:
        return {"tanh": "gelu_tanh", "none": "gelu"}[function.keywords.get("approximate", "none")]
    return None
