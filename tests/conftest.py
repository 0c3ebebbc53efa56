"""What every test uses: the backends that exist here, and how hypothesis searches."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass

import hypothesis
import pytest
import torch

import velm_kernels
from velm_kernels.backends import cpu, cuda

hypothesis.settings.register_profile(
    "velm",
    max_examples=int(os.environ.get("VELM_TEST_EXAMPLES", "30")),
    deadline=None,
    # What a landing check finds must not depend on luck; at a desk every run searches elsewhere.
    derandomize=bool(os.environ.get("CI")),
    suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.differing_executors],
    print_blob=True,
)
hypothesis.settings.load_profile("velm")


@dataclass(frozen=True)
class Backend:
    """A backend as the tests see it: for the CPU, one for every instruction set."""

    name: str
    isa: str | None = None

    def __str__(self) -> str:
        return (self.isa and f"{self.name}-{self.isa}") or self.name

    @contextlib.contextmanager
    def use(self) -> Iterator[None]:
        with velm_kernels.use_backend(self.name), cpu.use_isa(self.isa) if self.isa else contextlib.nullcontext():
            yield


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# Sets that this processor cannot run are left out; one that it can run but that was not built fails its tests. What is
# emulated stands for what it cannot run.
EMULATED = () if cpu.processor_supports("avx512_bf16") else cpu.TEST_ONLY
CPU_BACKENDS = [Backend("cpu", isa) for isa in (*cpu.INSTRUCTION_SETS, *EMULATED) if cpu.processor_supports(isa)]
if only := os.environ.get("VELM_CPU_ISA"):
    CPU_BACKENDS = [backend for backend in CPU_BACKENDS if backend.isa == only]
BACKENDS = [Backend("triton")] if INTERPRETED else [Backend("reference"), *CPU_BACKENDS]

# The CUDA kernels on threads of the host, for the operators that have any.
DEVICE_ON_HOST = pytest.param(
    Backend("device_on_host"),
    marks=pytest.mark.skipif(
        cuda.why_not("device_on_host") is not None, reason=str(cuda.why_not("device_on_host")) + " (VELM_TESTING)"
    ),
)

every_backend_with_cuda = pytest.mark.parametrize(
    "backend", BACKENDS if INTERPRETED else [*BACKENDS, DEVICE_ON_HOST], ids=str
)
every_backend = pytest.mark.parametrize("backend", BACKENDS, ids=str)
# For what happens in torch before an operator reaches its library: one CPU library is like another.
ONCE = BACKENDS if INTERPRETED else [Backend("reference"), *CPU_BACKENDS[-1:]]
every_backend_once = pytest.mark.parametrize("backend", ONCE if INTERPRETED else [*ONCE, DEVICE_ON_HOST], ids=str)
every_cpu_backend = pytest.mark.parametrize("backend", CPU_BACKENDS, ids=str)


# Tests of what CMakeLists.txt leaves out of the emulated library, where avx512 serves for it.
WIDENING = re.compile(r"tests/(fusion|pooling)/|/test_(gated_residual|merge)\.py")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Not twice on the same code: where a test runs on avx512, the emulated set would add nothing."""

    def isa(item: pytest.Item) -> str | None:
        return getattr(getattr(item, "callspec", None) and item.callspec.params.get("backend"), "isa", None)

    def rest(item: pytest.Item) -> tuple:
        others = {name: str(value) for name, value in item.callspec.params.items() if name != "backend"}
        return item.path, item.originalname, tuple(sorted(others.items()))

    on_avx512 = {rest(item) for item in items if isa(item) == "avx512"}
    twice = [
        item
        for item in items
        if isa(item) in cpu.TEST_ONLY and WIDENING.search(item.path.as_posix()) and rest(item) in on_avx512
    ]
    if twice:
        dropped = set(twice)
        items[:] = [item for item in items if item not in dropped]
        config.hook.pytest_deselected(items=twice)


@pytest.fixture(autouse=True)
def _two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
