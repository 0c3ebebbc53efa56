"""Linear projections and feed-forward blocks inside patched layers.

A replaced `torch.nn.Linear` decides at every call, by the fixed rule `velm_kernels.linear.faster_than_torch`, which
product serves it; weights that are more than tensors (quantised, distributed) are left to torch. A block whose
projection is a plain one, served by this library's product, fuses activation and residual into it; beside torch's
product it fuses what saves a pass over memory: bias, activation and their gradients. Dropout is fused into the
residual. Everything else - adapters, quantised layers, hooks - is called as the module it is.
"""

from __future__ import annotations

import functools
import types
from typing import Any

import torch
from torch import Tensor, nn

from velm_kernels import checks
from velm_kernels.backends import cpu
from velm_kernels.fusion import dropout_residual
from velm_kernels.linear import faster_than_torch, linear
from velm_kernels.products import always_torch

from .patching import LINEAR, Replacement, record_fallback, replaces
from .plain import are_plain, is_bare, under_autocast

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
    """Declares the replacement. Nothing becomes an instance of it, see `LinearForward`."""

    def forward(self, input: Tensor) -> Tensor:
        raise NotImplementedError


class LinearForward:
    """The forward of one replaced `torch.nn.Linear`, kept on the instance.

    Its class stays what it was: quantisation (`quantize_dynamic`), profilers and per-sample gradients look for exactly
    that class.
    """

    __name__ = "forward"

    def __init__(self, module: nn.Linear) -> None:
        self.module = module

    @staticmethod
    def install(module: nn.Module) -> None:
        assert isinstance(module, nn.Linear)
        own = LinearForward(module)
        # The second name is what tells that the module is replaced, also where a forward around this one takes the
        # first; the third keeps replicas of DataParallel from computing with the weights of the module they are of.
        vars(module).update(velm_forward=own, forward=own, _replicate_for_data_parallel=own.replicate)

    @staticmethod
    def remove(module: nn.Module) -> None:
        attributes = vars(module)
        own = attributes.pop("velm_forward")
        for name, value in list(attributes.items()):
            if getattr(value, "__self__", None) is own or (name == "forward" and value is own):
                del attributes[name]
            elif value is own:
                # A forward around ours keeps it under another name, to put it back one day.
                attributes[name] = types.MethodType(nn.Linear.forward, module)

    def replicate(self) -> nn.Module:
        replica = nn.Module._replicate_for_data_parallel(self.module)
        LinearForward.install(replica)
        return replica

    def __call__(self, input: Tensor) -> Tensor:
        module = self.module
        weight, bias = module.weight, module.bias
        is_usual = weight.__class__ is nn.Parameter and input.__class__ is Tensor
        if is_usual and (bias is None or bias.__class__ is nn.Parameter) and not _is_traced() and always_torch():
            # Whatever the sizes, without a look at them.
            return nn.functional.linear(input, weight, bias)
        # Somebody may have kept this forward, as offloading hooks do, until after `unpatch`.
        if "velm_forward" not in vars(module):
            return nn.functional.linear(input, weight, bias)
        if not are_plain(input, weight, bias):
            record_fallback(module, f"input or weight is a {_kind(input, weight, bias)}")
            return nn.functional.linear(input, weight, bias)
        if _kernel_product(input, weight):
            return linear(input, weight, bias)
        return nn.functional.linear(input, weight, bias)


def _kind(*values: Any) -> str:
    return next(type(x).__name__ for x in values if x is not None and not checks.is_plain(x))


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
    wants = name or (name is not None and residual is not None and not drops)
    if wants and is_plain(projection) and are_plain(x, residual):
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
    plain = is_bare(dropout, nn.Dropout) and not dropout.inplace and 0.0 < dropout.p < 1.0  # type: ignore[operator]
    same_dtype = residual is None or residual.dtype is x.dtype
    if (
        plain
        and same_dtype
        and are_plain(x, residual)
        and x.device.type == "cpu"
        and x.dtype in cpu.DTYPES
        and _cpu_library()
    ):
        return dropout_residual(x, residual, dropout.p)  # type: ignore[arg-type]
    x = dropout(x)
    return x if residual is None else x + residual


def _does_nothing(dropout: nn.Module) -> bool:
    return is_bare(dropout, nn.Dropout) and not (dropout.training and dropout.p > 0.0)  # type: ignore[operator]


def _dtype(x: Tensor) -> torch.dtype:
    if under_autocast(x):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def _is_traced() -> bool:
    return torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None


def _kernel_product(x: Tensor, weight: Tensor) -> bool:
    if x.device.type == "meta" or (not _is_traced() and always_torch()):
        return False
    training = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    out_features, in_features = weight.shape
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
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
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or not _on_cpu(x, weight):
        return False
    return x.numel() // max(x.shape[-1], 1) * weight.shape[0] >= _FUSED_ELEMENTS


def is_plain(projection: nn.Module) -> bool:
    """Say whether `projection` is a `torch.nn.Linear` whose weight may be read instead of calling it."""
    return is_bare(projection, nn.Linear) and are_plain(projection.weight, projection.bias)


def _activation(activation: Any) -> str | None:
    """Return the name of the activation for `linear`, or None where it is not one that `linear` knows."""
    function = activation
    if isinstance(activation, nn.Module):
        cls = type(activation)
        if not is_bare(activation, cls):
            return None
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
