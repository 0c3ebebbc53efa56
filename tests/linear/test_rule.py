"""The rule that chooses the product on the CPU depends on processor, dtype and sizes, and on nothing else."""

from __future__ import annotations

import pytest
import torch

import velm_kernels
from velm_kernels import processors
from velm_kernels.backends import cpu
from velm_kernels.linear import faster_than_torch
from velm_kernels.processors import Processor
from velm_kernels.products import always_torch, own_product, use_product

AVX512 = frozenset({"avx2", "avx512f", "avx512vnni"})
BF16 = AVX512 | {"avx512bf16"}
AMX = BF16 | {"avx512fp16", "amx-bf16"}

CASCADE_LAKE = (Processor("GenuineIntel", 6, 85, AVX512), "avx512")
SAPPHIRE_RAPIDS = (Processor("GenuineIntel", 6, 143, AMX), "avx512_bf16")
# A virtual machine may show the model number of another processor, here of one without AMX.
DISGUISED = (Processor("GenuineIntel", 6, 167, AMX), "avx512_bf16")
ZEN_3 = (Processor("AuthenticAMD", 25, 0x01, frozenset({"avx2"})), "avx2")
ZEN_4 = (Processor("AuthenticAMD", 25, 0x11, BF16), "avx512_bf16")
ZEN_5 = (Processor("AuthenticAMD", 26, 0x02, BF16), "avx512_bf16")
ZEN_5_LAPTOP = (Processor("AuthenticAMD", 26, 0x24, BF16), "avx512_bf16")
AMD_TO_COME = (Processor("AuthenticAMD", 27, 0x02, BF16), "avx512_bf16")
NAMELESS = (Processor(), "avx512")


@pytest.mark.parametrize(
    ("processor", "float32", "bfloat16", "float16"),
    [
        (CASCADE_LAKE, False, True, True),
        (SAPPHIRE_RAPIDS, False, False, False),
        (DISGUISED, False, False, False),
        (ZEN_3, False, True, True),
        (ZEN_4, False, False, True),
        (ZEN_5, True, False, True),
        (ZEN_5_LAPTOP, False, False, True),
        (AMD_TO_COME, False, False, True),
        (NAMELESS, False, True, True),
    ],
)
def test_processors(
    monkeypatch: pytest.MonkeyPatch,
    processor: tuple[Processor, str],
    float32: bool,
    bfloat16: bool,
    float16: bool,
) -> None:
    monkeypatch.setattr(processors, "this_processor", lambda: processor[0])
    monkeypatch.setattr(cpu, "in_use", lambda: processor[1])
    for training in (False, True):
        for dtype, expected in ((torch.float32, float32), (torch.bfloat16, bfloat16), (torch.float16, float16)):
            assert faster_than_torch(2048, 768, 3072, dtype, "cpu", training) is expected
            assert faster_than_torch(0, 768, 3072, dtype, "cpu", training) is False
            assert faster_than_torch(2048, 768, 3072, dtype, torch.device("cuda"), training) is False
        assert faster_than_torch(2048, 768, 3072, torch.float64, "cpu", training) is False
    for dtype in (torch.float32, torch.bfloat16):
        assert faster_than_torch(1, 768, 3072, dtype, "cpu", False) is False


def test_a_library_without_avx512_does_not_multiply_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processors, "this_processor", lambda: ZEN_5[0])
    monkeypatch.setattr(cpu, "in_use", lambda: "avx2")
    assert not faster_than_torch(2048, 768, 3072, torch.float32, "cpu", False)


def test_every_line_rests_on_something() -> None:
    assert [line.name for line in processors.TABLE][-1] == "not in the table"
    assert all(line.measured for line in processors.TABLE)
    assert processors.line_for(ZEN_4[0]) is not processors.line_for(ZEN_5[0])
    assert processors.line_for(AMD_TO_COME[0]) is processors.line_for(NAMELESS[0]) is processors.TABLE[-1]


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


@pytest.mark.parametrize(
    ("processor", "expected"),
    [(SAPPHIRE_RAPIDS, True), (DISGUISED, True), (CASCADE_LAKE, False), (ZEN_4, False), (ZEN_5, False)],
)
def test_torch_for_all_sizes(processor: tuple[Processor, str], expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processors, "this_processor", lambda: processor[0])
    monkeypatch.setattr(cpu, "in_use", lambda: processor[1])
    assert always_torch() is expected
    monkeypatch.setattr(cpu, "in_use", lambda: None)
    assert always_torch()
