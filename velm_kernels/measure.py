"""Measuring what code costs: alternating timings, memory, and what this machine can do at most.

Needs torch alone. Everything here works on CPUs and on CUDA devices.
"""

from __future__ import annotations

import contextlib
import functools
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

Run = Callable[[], Any]


@dataclass(frozen=True)
class Timing:
    """Seconds that each sample took for one call.

    Attributes:
        clock: "wall" on a CPU. On a GPU the device's time: "graph" for replays of a CUDA graph, which holds the work
            without what launches it, "events" for calls that cannot be captured.
        host: on a GPU, the seconds that the processor needs for one call, which only launches the work.
    """

    samples: tuple[float, ...]
    clock: str = "wall"
    host: tuple[float, ...] = ()

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def quartiles(self) -> tuple[float, float]:
        if len(self.samples) == 1:
            return self.samples[0], self.samples[0]
        lower, _, upper = statistics.quantiles(self.samples, n=4, method="inclusive")
        return lower, upper

    @property
    def best(self) -> float:
        return min(self.samples)

    @property
    def host_median(self) -> float | None:
        return statistics.median(self.host) if self.host else None


@functools.cache
def _fills_cache(device: torch.device) -> torch.Tensor:
    """Twice as much as the device's second-level cache holds."""
    return torch.empty(2 * torch.cuda.get_device_properties(device).L2_cache_size, dtype=torch.uint8, device=device)


def seconds_of(run: Run, calls: int, device: torch.device) -> float:
    """Seconds a call of ``run`` takes, over ``calls`` calls in a row; on a GPU each begins with an empty cache."""
    if device.type == "cuda":
        # Filling the cache takes longer than a launch, so that the first one is not part of the time.
        other = _fills_cache(device)
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(calls)]
        torch.cuda.synchronize(device)
        for start, stop in events:
            other.zero_()
            start.record()
            run()
            stop.record()
        torch.cuda.synchronize(device)
        return sum(start.elapsed_time(stop) for start, stop in events) / 1e3 / calls
    begin = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - begin) / calls


def captured(run: Run, device: torch.device) -> Run | None:
    """The replay of a CUDA graph of ``run``, or None where it cannot be captured: it waits for the device, copies from
    the host, or reseeds a generator."""
    try:
        # What is made at the first call, and what libraries set up, must not be part of the graph.
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(3):
                run()
        torch.cuda.current_stream(device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        graph.replay()
        torch.cuda.synchronize(device)
    except Exception:
        torch.cuda.synchronize(device)
        return None
    return graph.replay


def host_seconds(run: Run, calls: int, device: torch.device) -> float:
    """Seconds that the processor needs for a call of ``run`` while the device has no work to wait for."""
    torch.cuda.synchronize(device)
    begin = time.perf_counter()
    for _ in range(calls):
        run()
    took = time.perf_counter() - begin
    torch.cuda.synchronize(device)
    return took / calls


# Calls whose launches fit into the queue of a device: one that is full makes the processor wait.
HOST_CALLS = 5


def alternate(
    runs: Mapping[str, Run],
    *,
    rounds: int = 10,
    warm_up: int = 2,
    sample_seconds: float = 0.02,
    longest: float | None = None,
    device: torch.device | str = "cpu",
    after_round: Callable[[int], None] | None = None,
) -> dict[str, Timing]:
    """Time several ways to do the same work in turns, A B C A B C, so that what the machine does beside hits them all.

    On a GPU it is the device's time of a CUDA graph's replay, beside the processor's time of a call.

    Args:
        runs: name -> the call to time.
        rounds: samples of each.
        warm_up: calls before the first sample.
        sample_seconds: a sample repeats short calls until they take about this long together.
        longest: whoever needs more seconds than this for one call is not called again: that call is its only sample.
        device: whose clock counts.
        after_round: told the number of finished rounds.
    """
    if rounds < 1:
        raise ValueError(f"rounds: expected at least 1, given {rounds}")
    device = torch.device(device)
    on_gpu = device.type == "cuda"
    calls: dict[str, int] = {}
    timed: dict[str, Run] = dict(runs)
    clocks = dict.fromkeys(runs, "events" if on_gpu else "wall")
    samples: dict[str, list[float]] = {name: [] for name in runs}
    hosts: dict[str, list[float]] = {name: [] for name in runs}
    for name, run in runs.items():
        took = seconds_of(run, 1, device)
        if longest is not None and took > longest:
            samples[name] = [took]
            continue
        if on_gpu and (replay := captured(run, device)) is not None:
            timed[name], clocks[name] = replay, "graph"
        for _ in range(warm_up - 1):
            took = min(took, seconds_of(timed[name], 1, device))
        calls[name] = max(1, min(1000, round(sample_seconds / max(took, 1e-9))))
    for finished in range(1, rounds + 1):
        for name, count in calls.items():
            samples[name].append(seconds_of(timed[name], count, device))
            if on_gpu:
                hosts[name].append(host_seconds(runs[name], min(count, HOST_CALLS), device))
        if after_round is not None:
            after_round(finished)
    return {name: Timing(tuple(values), clocks[name], tuple(hosts[name])) for name, values in samples.items()}


def saved_for_backward(run: Run, inputs: Iterable[torch.Tensor] = ()) -> int:
    """Bytes that autograd keeps alive between the forward pass ``run`` and its backward, each storage counted once.

    The storages of ``inputs`` (which the caller holds anyway, such as parameters) do not count.
    """
    known = {tensor.untyped_storage().data_ptr() for tensor in inputs}
    found: dict[int, int] = {}
    # Kept until the end: a freed storage's address could be given to another one and hide it.
    alive: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor.detach())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    del result
    return sum(found.values())


def peak_memory(run: Run, device: torch.device | str = "cpu") -> int:
    """The most bytes of torch's allocator that ``run`` holds at once, beyond what was held before."""
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with (
        _quiet(),
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile,
    ):
        run()
    results = profile.profiler.kineto_results
    events = sorted((event.start_ns(), event.nbytes()) for event in results.events() if event.name() == "[memory]")
    held = most = 0
    for _, change in events:
        held += change
        most = max(most, held)
    return most


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The profiler announces itself on the process's stderr, in the middle of progress bars."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(kept, 2)
        os.close(kept)


def relative_rms(got: Iterable[torch.Tensor], exact: Iterable[torch.Tensor]) -> float:
    """The largest ``|got - exact| / |exact|`` (Frobenius) over pairs of tensors; inf where shapes, NaNs or
    infinities differ."""
    worst = 0.0
    for one, other in zip(got, exact, strict=True):
        if one.shape != other.shape:
            return float("inf")
        finite = other.isfinite()
        if not torch.allclose(one[~finite], other[~finite].to(one.dtype), rtol=0, atol=0, equal_nan=True):
            return float("inf")
        one, other = one[finite].double(), other[finite].double()
        difference = torch.linalg.vector_norm(one - other)
        size = torch.linalg.vector_norm(other)
        error = float(difference / size) if size > 0 else float(difference)
        worst = max(worst, error if error == error else float("inf"))
    return worst


@dataclass(frozen=True)
class Limits:
    """What this machine can do at most, in operations and bytes per second, measured now with ``threads`` threads.

    Attributes:
        copy: bytes read plus bytes written by a copy.
        read: bytes read where next to nothing is written.
    """

    device: str
    threads: int
    fp32: float
    bf16: float | None
    copy: float
    matmul: dict[str, float] = field(default_factory=dict)
    read: float | None = None

    def flops(self, dtype: torch.dtype) -> float:
        """The multiply-add peak for operands of ``dtype``: fp32's where the machine has nothing better."""
        if self.device.startswith("cuda"):
            return self.matmul[str(dtype).removeprefix("torch.")]
        return self.bf16 if dtype == torch.bfloat16 and self.bf16 else self.fp32

    def seconds(self, flops: float, traffic: float, dtype: torch.dtype, *, reads_only: bool = False) -> float:
        """The least time for so many operations and bytes: whichever takes longer. The bytes are read and written, or,
        where ``reads_only``, read."""
        bandwidth = self.read if reads_only and self.read else self.copy
        return max(flops / self.flops(dtype), traffic / bandwidth)


def measure_limits(device: torch.device | str = "cpu", seconds: float = 0.5) -> Limits:
    """Measure the multiply-add peaks, the bandwidths of a copy and of reading, and the rate of ``torch.matmul``.

    On a CPU the peaks come from ``velm_kernels._facts``; without it, and on a GPU, from ``torch.matmul``.
    """
    device = torch.device(device)
    cuda = device.type == "cuda"
    size = 8192 if cuda else 1536
    matmul = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16) if cuda else (torch.float32, torch.bfloat16):
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        timing = alternate({"matmul": functools.partial(torch.matmul, a, b)}, rounds=5, device=device)["matmul"]
        matmul[str(dtype).removeprefix("torch.")] = 2 * size**3 / timing.best
    threads = torch.get_num_threads()
    source = torch.empty(2**28 if cuda else 2**27, dtype=torch.uint8, device=device).fill_(1)
    numbers = source.view(torch.float32)
    read = source.numel() / alternate({"read": numbers.sum}, rounds=5, device=device)["read"].best
    if not cuda:
        try:
            from velm_kernels import _facts
        except ImportError:
            pass
        else:
            return Limits(
                str(device),
                threads,
                _facts.peak_fp32(threads=threads, seconds=seconds),
                _facts.peak_bf16(threads=threads, seconds=seconds),
                _facts.copy_bandwidth(threads=threads, seconds=seconds),
                matmul,
                read,
            )
    target = torch.empty_like(source)
    copy = alternate({"copy": lambda: target.copy_(source)}, rounds=5, device=device)["copy"]
    return Limits(
        str(device), threads, matmul["float32"], matmul["bfloat16"], 2 * source.numel() / copy.best, matmul, read
    )
