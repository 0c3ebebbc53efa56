"""The rule that chooses the product on the CPU depends on processor, dtype and sizes, and on nothing else."""

from __future__ import annotations

import pytest
import torch

import velm_kernels
from velm_kernels.backends import cpu
from velm_kernels.linear import faster_than_torch, rule
from velm_kernels.linear.rule import own_product, use_product

INTEL_AVX512 = ("GenuineIntel", frozenset({"avx512f", "avx512vnni"}), "avx512")
AMD_AVX512 = ("AuthenticAMD", frozenset({"avx512f", "avx512bf16"}), "avx512_bf16")
INTEL_AMX = ("GenuineIntel", frozenset({"avx512bf16", "avx512fp16", "amx-bf16"}), "avx512_bf16")
AMD_AVX2 = ("AuthenticAMD", frozenset({"avx2"}), "avx2")


@pytest.mark.parametrize(
    ("processor", "dtype", "expected"),
    [
        (INTEL_AVX512, torch.float32, False),
        (INTEL_AVX512, torch.bfloat16, True),
        (INTEL_AVX512, torch.float16, True),
        (AMD_AVX512, torch.float32, True),
        (AMD_AVX512, torch.bfloat16, False),
        (AMD_AVX512, torch.float16, True),
        (INTEL_AMX, torch.float32, False),
        (INTEL_AMX, torch.bfloat16, False),
        (INTEL_AMX, torch.float16, False),
        (AMD_AVX2, torch.float32, False),
        (AMD_AVX2, torch.bfloat16, True),
    ],
)
def test_processors(
    monkeypatch: pytest.MonkeyPatch,
    processor: tuple[str, frozenset[str], str],
    dtype: torch.dtype,
    expected: bool,
) -> None:
    vendor, features, isa = processor
    monkeypatch.setattr(rule, "processor", lambda: (vendor, features))
    monkeypatch.setattr(cpu, "in_use", lambda: isa)
    for training in (False, True):
        assert faster_than_torch(2048, 768, 3072, dtype, "cpu", training) is expected
        assert faster_than_torch(0, 768, 3072, dtype, "cpu", training) is False
        assert faster_than_torch(2048, 768, 3072, dtype, torch.device("cuda"), training) is False
        assert faster_than_torch(2048, 768, 3072, torch.float64, "cpu", training) is False
    if dtype != torch.float16:
        assert faster_than_torch(1, 768, 3072, dtype, "cpu", False) is False


def test_without_a_library_everything_goes_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "in_use", lambda: None)
    assert not faster_than_torch(2048, 768, 3072, torch.float16, "cpu", True)


def test_use_product_overrides_and_nests() -> None:
    arguments = (64, 64, 64, torch.float32, torch.device("cpu"), False)
    with use_product("velm"):
        assert own_product(*arguments)
        with use_product("torch"):
            assert not own_product(*arguments)
        assert own_product(*arguments)
    assert own_product(*arguments) == faster_than_torch(*arguments)
    with pytest.raises(ValueError, match="use_product: expected one of velm, torch, given 'mkl'"), use_product("mkl"):
        pass


def test_a_product_that_goes_to_torch_is_torch() -> None:
    x, weight = torch.randn(40, 8, requires_grad=True), torch.randn(12, 8)
    with use_product("torch"):
        out = velm_kernels.linear(x, weight)
    assert torch.equal(out, torch.nn.functional.linear(x, weight))
    assert type(out.grad_fn).__name__ == type(torch.nn.functional.linear(x, weight).grad_fn).__name__
    with use_product("velm"):
        assert "linear_forward" in type(velm_kernels.linear(x, weight).grad_fn.next_functions[0][0]).__name__
