"""A tensor subclass as quantisation libraries make them: integers with a scale, known to few of torch's functions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import return_and_correct_aliasing

_aten = torch.ops.aten


class Int8(Tensor):
    """Stands for a (rows, columns) weight; only `linear` and copies know it."""

    @staticmethod
    def __new__(cls, values: Tensor, scale: Tensor) -> Int8:
        return Tensor._make_wrapper_subclass(cls, values.shape, dtype=scale.dtype, device=values.device)  # type: ignore[attr-defined]

    def __init__(self, values: Tensor, scale: Tensor) -> None:
        self.values, self.scale = values, scale

    @classmethod
    def of(cls, weight: Tensor) -> Int8:
        scale = weight.abs().amax(1, keepdim=True).clamp_min(1e-8) / 127
        return cls((weight / scale).round().to(torch.int8), scale)

    def dequantised(self) -> Tensor:
        return self.values * self.scale

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Int8({tuple(self.shape)})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (_aten.detach.default, _aten.clone.default):
            return return_and_correct_aliasing(func, args, kwargs or {}, cls(args[0].values, args[0].scale))
        if func is _aten.linear.default:
            x, weight, *bias = args
            return torch.ops.aten.linear.default(x, weight.dequantised(), *bias)
        raise NotImplementedError(f"Int8 does not know {func}")

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.linear:
            given = dict(zip(("input", "weight", "bias"), args, strict=False)) | (kwargs or {})
            return func(given["input"], given["weight"].dequantised(), given.get("bias"))
        return super().__torch_function__(func, types, args, kwargs or {})


def quantise(model: nn.Module, names: tuple[str, ...] = ()) -> int:
    """Quantise the weights of all linear layers (of those whose name ends so) in place; return how many."""
    count = 0
    for path, module in model.named_modules():
        plain = isinstance(module, nn.Linear) and type(module) is not nn.modules.linear.NonDynamicallyQuantizableLinear
        if plain and (not names or path.endswith(names)):
            module.weight = nn.Parameter(Int8.of(module.weight.detach()), requires_grad=False)
            count += 1
    return count
