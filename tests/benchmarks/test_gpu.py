"""What the benchmarks say of GPUs: the ways of other packages mean the same, and the static table is true."""

from __future__ import annotations

import os
import subprocess
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import __main__ as command
from benchmarks import attention, harness, peers, static, terminal


def fake_flash_attention() -> types.ModuleType:
    """flash_attn's two functions with the layouts that its documentation gives, in torch."""
    module = types.ModuleType("flash_attn")

    def flash_attn_func(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        assert q.shape[0] == k.shape[0] and q.shape[2] % k.shape[2] == 0
        return attention.sdpa(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)

    def flash_attn_varlen_func(
        q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int
    ) -> Tensor:
        assert int(cu_q.diff().max()) == max_q and int(cu_k.diff().max()) == max_k
        parts = zip(q.split(cu_q.diff().tolist()), *(t.split(cu_k.diff().tolist()) for t in (k, v)), strict=True)
        return torch.cat([flash_attn_func(a[None], b[None], c[None])[0] for a, b, c in parts])

    module.__dict__.update(flash_attn_func=flash_attn_func, flash_attn_varlen_func=flash_attn_varlen_func)
    return module


def fake_xformers() -> types.ModuleType:
    module = types.ModuleType("xformers.ops")

    def memory_efficient_attention(
        query: Tensor, key: Tensor, value: Tensor, attn_bias: Tensor | None = None
    ) -> Tensor:
        if query.dim() == 5:
            assert key.shape[2:4] == query.shape[2:4]
            flat = [tensor.flatten(2, 3) for tensor in (query, key, value)]
            return memory_efficient_attention(*flat).unflatten(2, query.shape[2:4])
        if attn_bias is not None:
            assert attn_bias.shape == (query.shape[0], query.shape[2], query.shape[1], key.shape[1])
        heads_first = (tensor.transpose(1, 2) for tensor in (query, key, value))
        return F.scaled_dot_product_attention(*heads_first, attn_mask=attn_bias).transpose(1, 2)

    module.__dict__["memory_efficient_attention"] = memory_efficient_attention
    return module


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_other_packages_compute_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", fake_flash_attention())
    monkeypatch.setitem(sys.modules, "xformers", types.ModuleType("xformers"))
    monkeypatch.setitem(sys.modules, "xformers.ops", fake_xformers())
    monkeypatch.setattr(peers, "installed", lambda name: True)
    cases = {
        "plain": (attention.attention_case("plain", 2, 4, 2, 5, 9, 16), {"flex", "flash", "xformers"}),
        "bias": (attention.attention_case("bias", 2, 4, 4, 5, 9, 16, bias=True), {"flex", "xformers"}),
        "ranges": (attention.ranges_case(2, 2, 8, 2, 3, 16), {"flex"}),
        "ragged": (attention.varlen_case(2, 16, [3, 3], [4, 7]), {"flash"}),
    }
    for case, names in cases.values():
        assert set(case.gpu_ways) == names
        inputs = case.make(torch.Generator().manual_seed(0))
        expected = case.ways["eager"](**inputs)
        for name, way in case.gpu_ways.items():
            torch.testing.assert_close(way(**inputs), expected, msg=f"{case.name}, {name}")


def test_gpu_ways_are_timed_on_gpus_alone() -> None:
    case = attention.attention_case("plain", 1, 2, 2, 3, 4, 16)
    on_cpu, on_gpu = (
        harness.ways_to_time(case, torch.float32, harness.Settings(torch.device(device), compile=False))
        for device in ("cpu", "cuda")
    )
    assert "flex" in on_gpu and "flex" not in on_cpu


@pytest.mark.skipif(torch.cuda.is_available(), reason="measures where there is a GPU")
@pytest.mark.parametrize("rich", [True, False])
def test_without_a_gpu_the_table_is_printed(
    rich: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(static, "traffic", lambda: iter(()))
    monkeypatch.setattr(terminal, "HAS_RICH", rich and terminal.HAS_RICH)
    assert command.main(["--device", "cuda"]) == 0
    shown = capsys.readouterr().out
    assert "sm_90a" in shown and "sm_120" in shown and "spills" not in shown


built_for_the_host = pytest.mark.skipif(
    static.cuda.why_not("device_on_host") is not None, reason="the kernels were not built for the host"
)


@built_for_the_host
def test_attention_has_no_bank_conflicts() -> None:
    """In a process of its own, because what is counted is settled when the first kernel runs."""
    program = """
import torch
from benchmarks import static
for dim in (64, 128, 256):
    for dtype in (torch.bfloat16, torch.float32):
        counted = static.count("small", 1, 1, 64, 80, dim, 1, dtype)
        assert counted.matrix_instructions > 0
        print(dim, dtype, counted.bank_conflicts)
"""
    environment = {**os.environ, "DEVICE_ON_HOST_BANK_CONFLICTS": "1"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 6
    assert all(line.endswith(" 0") for line in lines), done.stdout
