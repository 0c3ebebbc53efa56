"""Bad arguments of velm_kernels.linear: each error names the argument, what was expected and what was given."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import velm_kernels

X, W = torch.randn(2, 3, 4), torch.randn(5, 4)

BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"x": torch.tensor(1.0)}, ValueError, r"x: expected \(\.\.\., in_features\), given \(\)"),
    ({"x": torch.randn(2, 6)}, ValueError, r"in_features = 4 as in weight \(5, 4\), given \(2, 6\)"),
    ({"weight": torch.randn(4)}, ValueError, r"weight: expected \(out_features, in_features\), given \(4,\)"),
    ({"weight": W.double()}, TypeError, "weight: expected dtype torch.float32, given torch.float64"),
    ({"bias": torch.randn(4)}, ValueError, r"bias: expected \(out_features,\) = \(5,\), given \(4,\)"),
    ({"bias": torch.randn(5).half()}, TypeError, "bias: expected dtype torch.float32, given torch.float16"),
    ({"activation": "swish"}, ValueError, "activation: expected one of relu, .*None, given 'swish'"),
    ({"activation": ""}, ValueError, "activation: expected one of relu, .*None, given ''"),
    ({"residual": torch.randn(2, 3, 4)}, ValueError, r"residual: .* = \(2, 3, 5\), given \(2, 3, 4\)"),
    ({"residual": torch.randn(5)}, ValueError, r"residual: .* = \(2, 3, 5\), given \(5,\)"),
    ({"residual": torch.ones(2, 3, 5, dtype=torch.long)}, TypeError, "residual: expected dtype .*given torch.int64"),
]


@pytest.mark.parametrize(("changes", "error", "message"), BAD)
def test_errors_name_the_argument(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        velm_kernels.linear(**{"x": X, "weight": W, **changes})


def test_module_refuses_an_unknown_activation() -> None:
    with pytest.raises(ValueError, match="activation: expected one of relu"):
        velm_kernels.Linear(3, 4, activation="swish")


def test_explain_lists_the_backends() -> None:
    assert "reference" in velm_kernels.explain("linear", X, W)
