"""Which backend comes first, by operator and compute capability, on tensors that only say that they are on a GPU."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend

import velm_kernels
from velm_kernels import backends, processors
from velm_kernels.backends import cuda, devices, order, triton

ROOT = Path(__file__).resolve().parents[2]
FAMILIES = {name.removesuffix("_forward").removesuffix("_backward") for name in backends._implementations}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch):
    """A machine with one GPU of a given compute capability, on which every backend starts."""

    def pretend(capability: int, kernel: SDPBackend = SDPBackend.FLASH_ATTENTION) -> None:
        monkeypatch.setattr(devices, "capability", lambda index: capability)
        monkeypatch.setattr(cuda, "why_not", lambda backend: None)
        monkeypatch.setattr(cuda, "why_not_on", lambda index: None)
        monkeypatch.setattr(cuda, "has", lambda backend, operator: True)
        monkeypatch.setattr(triton, "is_installed", lambda: True)
        monkeypatch.setattr(torch, "_fused_sdp_choice", lambda *args, **options: kernel.value)

    return pretend


def taken(name: str, *args: Any, **options: Any) -> str:
    return velm_kernels.explain(name, *args, **options).splitlines()[0].split()[2]


def on_gpu(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda")


# Compute capability -> who serves plain attention, attention that is not plain, other operators.
EXPECTED = {
    80: ("cuda", "cuda", "cuda"),
    86: ("cuda", "cuda", "cuda"),
    89: ("cuda", "cuda", "cuda"),
    90: ("torch", "triton", "triton"),
    100: ("torch", "triton", "triton"),
    103: ("torch", "triton", "triton"),
    120: ("cuda", "cuda", "cuda"),
    121: ("cuda", "cuda", "cuda"),
}


@pytest.mark.parametrize(("capability", "expected"), EXPECTED.items())
@pytest.mark.parametrize(
    "kernel", [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION], ids=lambda kernel: kernel.name
)
def test_by_compute_capability(gpu, capability: int, expected: tuple[str, str, str], kernel: SDPBackend) -> None:
    gpu(capability, kernel)
    plain, rest, others = expected
    with FakeTensorMode():
        query, key = on_gpu(2, 8, 40, 64), on_gpu(2, 4, 50, 64)
        same = on_gpu(2, 8, 50, 64)
        assert taken("cross_attention", query, key, key) == plain
        assert taken("cross_attention", query, key, key, scale=0.5, return_logsumexp=True) == plain
        assert taken("cross_attention", same, key, key, is_causal=True) == plain
        integers = torch.empty(2, 40, dtype=torch.int32, device="cuda")
        for more in (
            {"key_ranges": (integers, integers)},
            {"key_lengths": torch.empty(2, dtype=torch.int32, device="cuda")},
            {"bias": on_gpu(2, 8, 40, 50)},
            {"return_key_mass": True},
            {"softcap": 30.0},
            {"is_causal": True},  # of fewer queries than keys, which torch's kernels align otherwise or not at all
        ):
            assert taken("cross_attention", query, key, key, **more) == rest, more
        float32 = on_gpu(2, 8, 40, 64, dtype=torch.float32)
        assert taken("cross_attention", float32, float32, float32) == rest
        odd = on_gpu(2, 8, 40, 20)
        assert taken("cross_attention", odd, odd, odd) == rest
        assert taken("cross_attention", query, key, on_gpu(2, 4, 50, 32)) == rest
        none = on_gpu(2, 4, 0, 64)
        assert taken("cross_attention", query, none, none) == rest
        assert taken("gated_residual", on_gpu(2, 3, 8), on_gpu(2, 3, 8), on_gpu(1)) == others
        weight = on_gpu(64, 64)
        assert taken("attention_pool", on_gpu(2, 9, 64), on_gpu(1, 64), weight, weight, heads=4) == "triton"


@pytest.mark.parametrize("kernel", [SDPBackend.MATH, SDPBackend.EFFICIENT_ATTENTION], ids=lambda kernel: kernel.name)
def test_torch_is_not_taken_where_it_would_take_a_slower_kernel(gpu, kernel: SDPBackend) -> None:
    gpu(90, kernel)
    with FakeTensorMode():
        query = on_gpu(2, 8, 40, 64)
        assert taken("cross_attention", query, query, query) == "triton"


@pytest.mark.parametrize("capability", EXPECTED)
def test_linear_is_torch_s_product(gpu, capability: int) -> None:
    gpu(capability)
    with FakeTensorMode():
        x, weight, bias, residual = on_gpu(5, 16), on_gpu(24, 16), on_gpu(24), on_gpu(5, 24)
        for activation in (None, "relu", "gelu", "gelu_tanh", "silu", "tanh"):
            assert taken("linear", x, weight, bias, activation) == "torch"
        assert taken("linear", x, weight, bias, None, residual) == "torch"
        # Where torch would need several passes behind the product, Triton needs one.
        assert taken("linear", x, weight, bias, "quick_gelu") == "triton"
        assert taken("linear", x, weight, bias, "gelu", residual) == "triton"


def test_what_does_not_start_leaves_its_place_to_the_next(gpu, monkeypatch) -> None:
    gpu(90)
    monkeypatch.setattr(triton, "is_installed", lambda: False)
    with FakeTensorMode():
        x, weight = on_gpu(5, 16), on_gpu(24, 16)
        assert taken("linear", x, weight, None, "quick_gelu") == "torch"
        query = on_gpu(2, 8, 40, 64)
        assert taken("cross_attention", query, query, query, softcap=30.0) == "cuda"


def test_old_and_unknown_gpus(gpu) -> None:
    assert [order.generation(capability) for capability in (75, 87, 110, 130)] == [80, 80, 100, 100]
    gpu(75)
    with FakeTensorMode():
        assert (
            taken("gated_residual", on_gpu(2, 3, 8), on_gpu(2, 3, 8), on_gpu(1)) == "cuda"
        )  # it is asked, and refuses
        assert taken("linear", on_gpu(5, 16), on_gpu(24, 16)) == "torch"


def test_backward_asks_for_itself(gpu) -> None:
    gpu(90)
    with FakeTensorMode():
        query = on_gpu(2, 8, 40, 64)
        arguments = velm_kernels.backends._public_functions["cross_attention"].canonical(query, query, query)
        logsumexp = on_gpu(2, 8, 40, dtype=torch.float32)
        arguments |= {"grad_out": query, "out": query, "logsumexp": logsumexp, "wanted": 7}
        for grad_logsumexp, expected in ((None, "torch"), (logsumexp, "triton")):
            arguments["grad_logsumexp"] = grad_logsumexp
            assert backends.select("attention_backward", arguments).backend == expected


def test_every_line_of_the_table_is_for_an_operator() -> None:
    assert set(order.TABLE) - {""} <= FAMILIES
    for row in order.TABLE.values():
        assert len(row) == len(order.GENERATIONS)
        assert all(set(line) <= set(backends.ORDER) and line[-1] == "reference" for line in row)


def test_bfloat16_attention_on_processors_whose_matrix_units_only_torch_uses(monkeypatch) -> None:
    line = processors.line_for(processors.this_processor())
    for faster in (True, False):
        one = dataclasses.replace(line, bfloat16_attention=faster)
        monkeypatch.setattr(processors, "line_for", lambda processor, one=one: one)
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            # In rows of fewer keys torch's kernel would lose NaN.
            for keys in (15, 16):
                query, key = torch.ones(1, 2, 3, 16, dtype=dtype), torch.ones(1, 2, keys, 16, dtype=dtype)
                first = order.of("attention_forward", {"query": query, "key": key})[0]
                assert (first == "torch") == (not faster and dtype == torch.bfloat16 and keys == 16)


def test_the_documentation_has_the_table() -> None:
    text = (ROOT / "docs" / "guides" / "backends.md").read_text()
    rows = re.findall(r"^\| (.*?) \| (.*?) \| (.*?) \|$", text, re.M)
    told = {name: (first, second) for name, first, second in rows}
    names = {
        "plain and causal attention in 16 bits": "attention",
        "`attention_pool`": "attention_pool",
        "`linear`": "linear",
        "every other call": "",
    }
    for words, operator in names.items():
        (ampere, hopper, blackwell, small) = order.TABLE[operator]
        assert ampere == small and hopper == blackwell
        for cell, line in zip(told[words], (ampere, hopper), strict=True):
            assert cell.startswith(f"`{line[0]}`"), (words, cell)


def test_calls_on_the_cpu_neither_open_the_cuda_library_nor_look_for_gpus(monkeypatch) -> None:
    def asked(*args: Any) -> str:
        raise AssertionError("asked")

    for name in ("why_not", "why_no_gpu", "why_not_on"):
        monkeypatch.setattr(cuda, name, asked)
    monkeypatch.setattr(torch.cuda, "is_available", asked)
    query = torch.ones(1, 2, 3, 16)
    velm_kernels.cross_attention(query, query, query, softcap=30.0)
    assert "cuda      no: query is on cpu" in velm_kernels.explain("cross_attention", query, query, query)


def test_the_age_of_gpu_and_driver_is_asked_once(monkeypatch) -> None:
    asked = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: asked.append(index) or (7, 5))
    monkeypatch.setattr(cuda, "why_not", lambda backend: None)
    cuda.why_not_on.cache_clear()
    devices.capability.cache_clear()
    try:
        with FakeTensorMode():
            x = on_gpu(2, 3, 8)
            for _ in range(3):
                told = velm_kernels.explain("gated_residual", x, x, on_gpu(1))
        assert "cuda      no: compute capability 7.5 is older than 8.0" in told
        assert "triton    no: compute capability 7.5 is older than 8.0" in told
        # Once for the library, once for everything else.
        assert asked == [0, 0]
    finally:
        cuda.why_not_on.cache_clear()
        devices.capability.cache_clear()
