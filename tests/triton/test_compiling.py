"""Kernels are compiled in tests exactly as a launch on a GPU would compile them."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from tests.triton import compiling
from velm_kernels.backends import triton as backend


@pytest.mark.skipif(backend.is_interpreted(), reason="needs kernels that are compiled")
@pytest.mark.parametrize("level", ["plain", "loaded", "others"])
def test_signatures_are_those_of_a_launch(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    from tests.triton import resources

    monkeypatch.setattr(resources, "_empty", lambda *shape, dtype=torch.int32: torch.zeros(shape, dtype=dtype))
    monkeypatch.setattr(resources, "QUERIES", 64)
    monkeypatch.setattr(resources, "TOKENS", 64)
    compiler = make_backend(GPUTarget("cuda", 90, 32))
    options = {"num_warps": 4, "num_stages": 2, "enable_fp_fusion": True, "debug": False, "instrumentation_mode": ""}
    if level == "others":
        launches = resources.others(torch.float16, 90)
        assert {"linear_epilogue", "dropout_residual", "rms_norm_backward"} <= set(launches)
    else:
        launches = resources.attention(level, torch.float16, 64, 90)
        assert {"forward", "grad_query", "grad_key_value"} <= set(launches)
    for launch in launches.values():
        bind = create_function_from_signature(launch.kernel.signature, launch.kernel.params, compiler)
        bound, specialization, bound_options = bind(*launch.arguments, **launch.constants, **options)
        _, signature, constants, attributes = launch.kernel._pack_args(
            compiler, options, bound, specialization, bound_options
        )
        source = compiling.source(launch)
        assert signature == source.signature
        assert constants == source.constants
        assert {path: value for path, value in attributes.items() if value} == source.attrs
