"""What the benchmarks say of GPUs: the ways of other packages mean the same, and the static table is true."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import types
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import __main__ as command
from benchmarks import attention, harness, peers, static, terminal
from velm_kernels import measure


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


class FakeDevice:
    """torch.cuda with one stream and two clocks, in seconds: the host's, and the time when the device will be idle."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.host = self.idle = 0.0
        self.graph: list[float] | None = None
        monkeypatch.setattr(measure, "_fills_cache", lambda device: types.SimpleNamespace(zero_=self.fill))
        monkeypatch.setattr(measure.time, "perf_counter", lambda: self.host)
        null = lambda *args: contextlib.nullcontext()  # noqa: E731
        stream = types.SimpleNamespace(wait_stream=lambda other: None)
        for name, value in {
            "synchronize": self.synchronize,
            "Event": lambda enable_timing: Event(self),
            "Stream": lambda device: stream,
            "current_stream": lambda device: stream,
            "stream": null,
            "CUDAGraph": lambda: Graph(self),
            "graph": self.capture,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)

    def launch(self, seconds: float, host: float = 5e-6) -> None:
        if self.graph is not None:
            self.graph.append(seconds)
            return
        self.host += host
        self.idle = max(self.idle, self.host) + seconds

    def fill(self) -> None:
        self.launch(20e-6)

    def synchronize(self, device: torch.device | None = None) -> None:
        if self.graph is not None:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.host = max(self.host, self.idle)

    @contextlib.contextmanager
    def capture(self, graph: Graph) -> Iterator[None]:
        self.graph = graph.kernels
        try:
            yield
        finally:
            self.graph = None


class Graph:
    def __init__(self, device: FakeDevice) -> None:
        self.device = device
        self.kernels: list[float] = []

    def replay(self) -> None:
        self.device.launch(sum(self.kernels))


class Event:
    def __init__(self, device: FakeDevice) -> None:
        self.device, self.time = device, 0.0

    def record(self) -> None:
        self.time = max(self.device.idle, self.device.host)

    def elapsed_time(self, stop: Event) -> float:
        return (stop.time - self.time) * 1e3


def test_the_devices_time_is_that_of_a_graph_and_the_hosts_stands_beside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten kernels of 1 us that take 5 us each to launch: 10 us of the device, 50 us of the processor."""
    device = FakeDevice(monkeypatch)

    def kernels() -> None:
        for _ in range(10):
            device.launch(1e-6)

    def waits() -> None:
        kernels()
        device.synchronize()

    timings = measure.alternate({"kernels": kernels, "waits": waits}, rounds=3, device="cuda")
    assert timings["kernels"].clock == "graph"
    assert timings["kernels"].median == pytest.approx(10e-6)
    assert timings["kernels"].host_median == pytest.approx(50e-6)
    # What cannot be captured is timed as it is called.
    assert timings["waits"].clock == "events"
    assert timings["waits"].median > 30e-6
    assert len(timings["waits"].host) == len(timings["waits"].samples) == 3


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
