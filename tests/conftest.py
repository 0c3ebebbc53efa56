"""What every test uses: the backends and devices that exist here, and how hypothesis searches."""

from __future__ import annotations

import contextlib
import getpass
import hashlib
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
import torch.overrides
import torch.utils._device

import velm_kernels
from velm_kernels import backends
from velm_kernels.backends import cpu, cuda, small

TESTS = os.path.dirname(__file__) + os.sep


def _inductor_cache() -> str:
    """A folder for what torch.compile keeps on disk, another one for other sources: what it compiled of a backward does
    not ask whether that operator's schema has changed since."""
    sources = hashlib.sha256()
    for path in sorted(Path(velm_kernels.__file__).parent.rglob("*.py")):
        sources.update(path.read_bytes())
    return str(Path(tempfile.gettempdir()) / f"velm_inductor_{getpass.getuser()}_{sources.hexdigest()[:16]}")


os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", _inductor_cache())

# What a run finds does not depend on luck: draws are the same every time, unless new ones are asked for (make explore).
EXPLORES = os.environ.get("VELM_TEST_EXPLORE") == "1"

hypothesis.settings.register_profile(
    "velm",
    max_examples=int(os.environ.get("VELM_TEST_EXAMPLES", "200" if EXPLORES else "12")),
    deadline=None,
    derandomize=not EXPLORES,
    suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.differing_executors],
    print_blob=True,
)
hypothesis.settings.load_profile("velm")


@dataclass(frozen=True)
class Backend:
    """A backend as the tests see it: for the CPU, one for every instruction set.

    Where ``device`` is another one than the CPU, a test with a parameter ``backend`` makes its tensors there: see
    :class:`MadeOn`.
    """

    name: str
    isa: str | None = None
    device: str = "cpu"

    def __str__(self) -> str:
        if self.device != "cpu":
            return f"{self.name}-device"
        return (self.isa and f"{self.name}-{self.isa}") or self.name

    @contextlib.contextmanager
    def use(self) -> Iterator[None]:
        mode = torch.overrides._get_current_function_mode()
        with (
            velm_kernels.use_backend(self.name),
            cpu.use_isa(self.isa) if self.isa else contextlib.nullcontext(),
            mode.of_tests_alone() if isinstance(mode, MadeOn) else contextlib.nullcontext(),
        ):
            yield


class MadeOn(torch.overrides.TorchFunctionMode):
    """Tensors that are made without a device come to ``device``, with the values that they would have on the CPU:
    generators of the tests are those of the CPU.

    Inside of ``backend.use()`` that holds for what a test makes itself: the library has to know where its tensors
    belong.
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device
        self.tests_alone = False

    @contextlib.contextmanager
    def of_tests_alone(self) -> Iterator[None]:
        before, self.tests_alone = self.tests_alone, True
        yield
        self.tests_alone = before

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        makes = function in torch.utils._device._device_constructors() and kwargs.get("device") is None
        made_in = sys._getframe(1).f_code.co_filename
        # The cases beside the operators belong to the tests.
        of_tests = made_in.startswith(TESTS) or made_in.endswith("cases.py")
        if not makes or (self.tests_alone and not of_tests):
            return function(*args, **kwargs)
        wanted = kwargs.pop("requires_grad", False)
        made = function(*args, **kwargs | {"device": "cpu"}).to(self.device)
        return made.requires_grad_() if wanted else made


def compile_without_modes(compile_: Callable[..., Any]) -> Callable[..., Any]:
    """``torch.compile`` whose results are called without :class:`MadeOn`, which it would trace."""

    def compiled(*args: Any, **kwargs: Any) -> Callable[..., Any]:
        function = compile_(*args, **kwargs)

        def call(*args: Any, **kwargs: Any) -> Any:
            with torch.overrides._pop_mode_temporarily():
                return function(*args, **kwargs)

        return call

    return compiled


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# Sets that this processor cannot run are left out; one that it can run but that was not built fails its tests. What is
# emulated stands for what it cannot run.
EMULATED = () if cpu.processor_supports("avx512_bf16") else cpu.TEST_ONLY
CPU_BACKENDS = [Backend("cpu", isa) for isa in (*cpu.INSTRUCTION_SETS, *EMULATED) if cpu.processor_supports(isa)]
if only := os.environ.get("VELM_CPU_ISA"):
    CPU_BACKENDS = [backend for backend in CPU_BACKENDS if backend.isa == only]
BACKENDS = [Backend("triton")] if INTERPRETED else [Backend("reference"), *CPU_BACKENDS]
# On the GPU, where there is one: "triton" has every operator, "cuda" those that "device_on_host" has.
ON_GPU = torch.cuda.is_available() and not INTERPRETED
TRITON = [Backend("triton", device="cuda")] if ON_GPU else []
CUDA = [Backend("cuda", device="cuda")] if ON_GPU else []

# The CUDA kernels on threads of the host, for the operators that have any.
DEVICE_ON_HOST = pytest.param(
    Backend("device_on_host"),
    marks=pytest.mark.skipif(
        cuda.why_not("device_on_host") is not None, reason=str(cuda.why_not("device_on_host")) + " (VELM_TESTING)"
    ),
)

# Where the CUDA kernels run.
CUDA_KERNELS = [*CUDA, DEVICE_ON_HOST]
with_cuda = [] if INTERPRETED else [*TRITON, *CUDA_KERNELS]
every_backend_with_cuda = pytest.mark.parametrize("backend", [*BACKENDS, *with_cuda], ids=str)
# Of drawn sizes: the reference has no kernel whose sizes would matter, and is what they are compared with.
every_kernel = pytest.mark.parametrize(
    "backend", [*(backend for backend in BACKENDS if backend.name != "reference"), *with_cuda], ids=str
)
every_backend = pytest.mark.parametrize("backend", [*BACKENDS, *TRITON], ids=str)
# For what happens in torch before an operator reaches its library: one CPU library is like another.
ONCE = BACKENDS if INTERPRETED else [Backend("reference"), *CPU_BACKENDS[-1:]]
every_backend_once = pytest.mark.parametrize("backend", [*ONCE, *with_cuda], ids=str)
every_cpu_backend = pytest.mark.parametrize("backend", CPU_BACKENDS, ids=str)
# For what takes long and depends on how work is divided: the baseline and the best, between which nothing is divided
# otherwise. Numbers of every case are compared on all.
first_and_last_cpu_backend = pytest.mark.parametrize(
    "backend", CPU_BACKENDS if EXPLORES else list(dict.fromkeys([*CPU_BACKENDS[:1], *CPU_BACKENDS[-1:]])), ids=str
)


# Tests of kernels that multiply no bfloat16 as pairs: the code for avx512_bf16 is that for avx512, and the emulated
# library does without it (CMakeLists.txt).
WIDENING = re.compile(r"tests/(fusion|losses|pooling)/|/test_(gated_residual|merge)\.py")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Not twice on the same code: where one of these runs on avx512_bf16, avx512 adds nothing, and where it runs on
    avx512, the emulated set."""

    def isa(item: pytest.Item) -> str | None:
        return getattr(getattr(item, "callspec", None) and item.callspec.params.get("backend"), "isa", None)

    def rest(item: pytest.Item) -> tuple:
        others = {name: str(value) for name, value in item.callspec.params.items() if name != "backend"}
        return item.path, item.originalname, tuple(sorted(others.items()))

    kept_for = {"avx512": "avx512_bf16", **dict.fromkeys(cpu.TEST_ONLY, "avx512")}
    of_widening = [item for item in items if isa(item) and WIDENING.search(item.path.as_posix())]
    there = {(isa(item), rest(item)) for item in of_widening}
    twice = {item for item in of_widening if (kept_for.get(str(isa(item))), rest(item)) in there}
    if twice:
        items[:] = [item for item in items if item not in twice]
        config.hook.pytest_deselected(items=list(twice))


@pytest.fixture(autouse=True)
def _made_on_the_backends_device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    backend = getattr(getattr(request.node, "callspec", None), "params", {}).get("backend")
    device = getattr(backend, "device", "cpu")
    if device == "cpu":
        yield
        return
    monkeypatch.setattr(torch, "compile", compile_without_modes(torch.compile))
    with MadeOn(device):
        yield


@pytest.fixture(autouse=True)
def _operators_at_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small calls run the operators too; tests/test_small_calls.py is about those that do not."""
    monkeypatch.setattr(small, "enabled", False)


@pytest.fixture(autouse=True)
def _what_backends_serve_is_asked_anew() -> None:
    """Tests change what is installed and which devices there are."""
    backends.forget_kinds()


@pytest.fixture(autouse=True)
def _start() -> Iterator[None]:
    """Two threads, and the same random numbers in whatever order tests run."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    if not EXPLORES:
        torch.manual_seed(0)
    yield
    torch.set_num_threads(before)
