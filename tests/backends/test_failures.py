"""A backend that says it can and then does not start: the next one serves the call, and the reason is told."""

from __future__ import annotations

import dataclasses
import gc
import os
import subprocess
import sys
import textwrap
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import velm_kernels
from velm_kernels import backends
from velm_kernels.backends import NoBackendError, cpu, cuda, failures, triton
from velm_kernels.cli import main

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(cpu.in_use() is None, reason="no CPU library")


@pytest.fixture(autouse=True)
def _nothing_known() -> Iterator[None]:
    before = set(backends._warned)
    failures.forget()
    backends._warned.clear()
    yield
    failures.forget()
    backends._warned.clear()
    backends._warned.update(before)


@pytest.fixture
def break_cpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Exception], list[int]]:
    """Lets the backend ``cpu`` raise in place of computing an operator; -> a list that grows with each attempt."""

    def replace(operator: str, error: Exception) -> list[int]:
        attempts: list[int] = []

        def call(*args: Any) -> Any:
            attempts.append(len(attempts))
            raise error

        broken = dataclasses.replace(backends._implementations[operator]["cpu"], call=call)
        monkeypatch.setitem(backends._implementations[operator], "cpu", broken)
        return attempts

    return replace


def inputs(requires_grad: bool = False, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 4, 5, 16), (2, 2, 9, 16), (2, 2, 9, 16))
    made = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    return [tensor.requires_grad_(requires_grad) for tensor in made]


def start_error() -> failures.StartError:
    error = failures.StartError("the kernel does not start: planted")
    error.__cause__ = RuntimeError("what the compiler said")
    return error


def test_the_next_backend_serves_the_call_and_one_warning_says_so(break_cpu) -> None:
    attempts = break_cpu("attention_forward", start_error())
    query, key, value = inputs()
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, enable_gqa=True)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        for _ in range(3):
            torch.testing.assert_close(velm_kernels.cross_attention(query, key, value), expected)
        velm_kernels.cross_attention(*inputs(dtype=torch.float16))
    # A second kind of call is tried as well, and says nothing new.
    assert len(attempts) == 2
    (warning,) = heard
    assert "cross_attention runs on" in str(warning.message)
    assert "cpu can serve it, but the kernel does not start: planted" in str(warning.message)
    assert warning.filename == __file__
    told = velm_kernels.explain("cross_attention", query, key, value)
    assert not told.startswith("cross_attention -> cpu")
    assert "no: the kernel does not start: planted" in told
    assert failures.listed() == [("cpu", "the kernel does not start: planted")]


@pytest.mark.parametrize("fails", ["attention_forward", "attention_backward"])
def test_backward_works_whichever_pass_fell_back(break_cpu, fails: str) -> None:
    leaves = inputs(requires_grad=True)
    with velm_kernels.use_backend("reference"):
        expected = torch.autograd.grad(velm_kernels.cross_attention(*leaves).square().sum(), leaves)
    break_cpu(fails, start_error())
    with pytest.warns(UserWarning, match="does not start: planted"):
        got = torch.autograd.grad(velm_kernels.cross_attention(*leaves).square().sum(), leaves)
    torch.testing.assert_close(got, expected)


def test_what_was_asked_for_is_not_replaced(break_cpu) -> None:
    attempts = break_cpu("attention_forward", start_error())
    for _ in range(2):
        with velm_kernels.use_backend("cpu"), pytest.raises(NoBackendError, match="does not start: planted") as raised:
            velm_kernels.cross_attention(*inputs())
        assert str(raised.value.__cause__) == "what the compiler said"
    assert len(attempts) == 1


def test_a_backend_that_fails_everywhere_is_asked_once(break_cpu) -> None:
    whole = failures.StartError("no driver", everywhere=True)
    first, second = break_cpu("attention_forward", whole), break_cpu("gated_residual_forward", whole)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        velm_kernels.cross_attention(*inputs())
        velm_kernels.gated_residual(torch.ones(2, 3, 4), torch.ones(2, 3, 4), torch.ones(1))
    assert len(first) == 1 and not second
    assert ["no driver" in str(warning.message) for warning in heard].count(True) >= 1


@pytest.mark.parametrize(
    "error",
    [
        ValueError("the user's"),
        TypeError("the user's"),
        ZeroDivisionError("a fault of ours"),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_other_errors_are_raised(break_cpu, error: Exception) -> None:
    break_cpu("attention_forward", error)
    with pytest.raises(type(error), match=str(error)):
        velm_kernels.cross_attention(*inputs())
    assert not failures.some()


@pytest.mark.parametrize("kind", [RuntimeError, getattr(torch, "AcceleratorError", RuntimeError)])
def test_a_device_that_torch_has_no_code_for_is_a_reason(break_cpu, kind) -> None:
    try:
        error = kind("CUDA error: no kernel image is available for execution on the device")
    except TypeError:
        pytest.skip("this torch makes none by hand")
    break_cpu("attention_forward", error)
    with pytest.warns(UserWarning, match="cpu can serve it, but a kernel does not start: .*no kernel image"):
        velm_kernels.cross_attention(*inputs())


def test_nothing_of_the_call_is_kept(break_cpu) -> None:
    try:
        raise start_error()
    except failures.StartError as error:
        break_cpu("attention_forward", error)
    query, key, value = inputs()
    alive = weakref.ref(query)
    with pytest.warns(UserWarning):
        velm_kernels.cross_attention(query, key, value)
    del query
    gc.collect()
    assert alive() is None


def test_the_check_fails_for_what_does_not_start(break_cpu, capsys) -> None:
    break_cpu("gated_residual_forward", start_error())
    assert main(["check", "--backend", "cpu", "--operator", "gated_residual"]) == 1
    assert "FAILED cpu: the kernel does not start: planted" in capsys.readouterr().out


class Refusing:
    """A kernel that raises when it is launched."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **options: Any) -> None:
            raise self.error

        return launch


def triton_errors() -> list[tuple[Exception, bool]]:
    """What Triton was seen to raise, and whether no other kernel would do better."""
    found: list[tuple[Exception, bool]] = [
        (RuntimeError("PassManager::run failed"), False),
        (TypeError("'NoneType' object is not iterable"), False),
        (AssertionError("libcuda.so cannot found!"), True),
        (RuntimeError("Failed to find C compiler. Please specify via CC environment variable"), True),
        (RuntimeError("0 active drivers ([]). There should only be one."), True),
        (RuntimeError("Triton Error [CUDA]: no kernel image is available for execution on the device"), True),
        (RuntimeError("Triton Error [CUDA]: the provided PTX was compiled with an unsupported toolchain."), True),
        (RuntimeError("Triton Error [CUDA]: invalid argument"), False),
        (subprocess.CalledProcessError(1, ["/usr/bin/gcc", "main.c"]), True),
        (PermissionError(13, "Permission denied", "/root/.triton"), True),
        (ModuleNotFoundError("No module named 'triton._C.libtriton'"), True),
    ]
    try:
        from triton.runtime.errors import OutOfResources
    except ImportError:
        return found
    return [*found, (OutOfResources(300000, 232448, "shared memory"), False)]


@pytest.mark.parametrize(("error", "everywhere"), triton_errors(), ids=lambda value: str(value)[:30])
def test_what_triton_raises_when_a_kernel_does_not_start(monkeypatch, error: Exception, everywhere: bool) -> None:
    monkeypatch.setattr(triton, "is_interpreted", lambda: True)
    with pytest.raises(failures.StartError) as raised:
        triton.launch("forward", Refusing(error), 1, (torch.ones(1),), {}, triton.Config(16, 16, 4, 1))
    assert raised.value.__cause__ is error
    assert raised.value.everywhere == everywhere
    assert raised.value.reason.startswith("Triton's kernel 'forward' does not start: ")
    assert "\n" not in raised.value.reason


@pytest.mark.parametrize(
    "text",
    [
        "Triton Error [CUDA]: an illegal memory access was encountered",
        "Triton Error [CUDA]: device-side assert triggered",
        "Triton Error [CUDA]: out of memory",
        "Triton Error [CUDA]: unspecified launch failure",
        "Triton Error [CUDA]: operation not permitted when stream is capturing",
    ],
)
def test_errors_of_earlier_kernels_and_of_memory_are_raised_as_they_are(monkeypatch, text: str) -> None:
    monkeypatch.setattr(triton, "is_interpreted", lambda: True)
    with pytest.raises(RuntimeError, match=r"Triton Error \[CUDA\]") as raised:
        triton.launch("forward", Refusing(RuntimeError(text)), 1, (torch.ones(1),), {}, triton.Config(16, 16, 4, 1))
    assert not isinstance(raised.value, failures.StartError)


def test_the_line_of_a_compile_error_is_the_innermost() -> None:
    compiling = pytest.importorskip("triton.compiler.errors")
    try:
        try:
            raise compiling.CompilationError(None, None, "cannot convert None of type <class 'NoneType'> to tensor")
        except compiling.CompilationError as inner:
            raise compiling.CompilationError(None, None, None) from inner
    except compiling.CompilationError as outer:
        failure = failures.of_launch(outer, "Triton's kernel 'forward'")
    assert failure is not None
    assert failure.reason.endswith("CompilationError: cannot convert None of type <class 'NoneType'> to tensor")


def plant(monkeypatch, text: str) -> None:
    """An operator ``planted`` of the CUDA library, which raises."""

    def default(*args: Any) -> Any:
        raise RuntimeError(text)

    planted = type("Op", (), {"default": staticmethod(default)})
    monkeypatch.setattr(torch.ops, "velm_cuda", type("Namespace", (), {"planted": planted}))


@pytest.mark.parametrize(
    ("error", "starts", "everywhere"),
    [
        ("cudaErrorNoKernelImageForDevice (no kernel image is available for execution on the device)", False, True),
        ("cudaErrorInsufficientDriver (CUDA driver version is insufficient for CUDA runtime version)", False, True),
        ("cudaErrorUnsupportedPtxVersion (the provided PTX was compiled with an unsupported toolchain.)", False, True),
        ("cudaErrorLaunchOutOfResources (too many resources requested for launch)", False, False),
        ("cudaErrorInvalidValue (invalid argument)", False, False),
        ("cudaErrorIllegalAddress (an illegal memory access was encountered)", True, False),
        ("cudaErrorMemoryAllocation (out of memory)", True, False),
    ],
)
def test_what_the_cuda_library_raises(monkeypatch, error: str, starts: bool, everywhere: bool) -> None:
    text = f"velm: launch of a kernel: {error}\nException raised from somewhere"

    plant(monkeypatch, text)
    with pytest.raises(RuntimeError) as raised:
        cuda.op("cuda", "planted")(torch.ones(1))
    assert isinstance(raised.value, failures.StartError) != starts
    if not starts:
        assert raised.value.everywhere == everywhere
        assert raised.value.reason == f"the CUDA library does not start: RuntimeError: {text.splitlines()[0]}"


def test_arguments_that_the_cuda_library_refuses_are_raised(monkeypatch) -> None:
    plant(monkeypatch, "expected head_dim from 1 to 256")
    with pytest.raises(RuntimeError, match="head_dim") as raised:
        cuda.op("cuda", "planted")(torch.ones(1))
    assert not isinstance(raised.value, failures.StartError)


def test_a_kernel_that_raises_in_the_interpreter() -> None:
    """The whole way of a user's call, in a process of its own: Triton is asked first and raises, and the CPU serves."""
    pytest.importorskip("triton")
    script = """
    import warnings
    import torch, triton
    import triton.language as tl
    import velm_kernels
    from velm_kernels.attention.gated_residual import triton as launches

    @triton.jit
    def broken(*args):
        raise AssertionError("planted")

    names = [name for name, value in vars(launches).items() if name.endswith("_kernel")]
    for name in names:
        setattr(launches, name, broken)
    x = torch.ones(2, 3, 4, requires_grad=True)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        out = velm_kernels.gated_residual(x, torch.ones(2, 3, 4), torch.ones(1))
        out.sum().backward()
        print(out.sum().item(), x.grad.sum().item())
        print(*(str(warning.message) for warning in heard), sep="\\n")
    print(velm_kernels.explain("gated_residual", x, torch.ones(2, 3, 4), torch.ones(1)))
    with velm_kernels.use_backend("triton"):
        velm_kernels.gated_residual(x, torch.ones(2, 3, 4), torch.ones(1))
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.startswith("42.27"), done.stderr
    assert "gated_residual runs on cpu: triton can serve it, but Triton's kernel" in done.stdout
    assert "gated_residual -> cpu" in done.stdout
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert "backend 'triton' was asked for, but Triton's kernel" in last
    assert "InterpreterError" in last


def test_a_triton_that_does_not_import(tmp_path: Path) -> None:
    """Every call works without it, and its error is the reason."""
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text("raise ImportError('libtriton.so: undefined symbol: planted')")
    script = """
    import torch
    import velm_kernels
    from velm_kernels.backends import failures, triton
    x = torch.ones(2, 3, 4)
    print(velm_kernels.gated_residual(x, x, torch.ones(1)).shape)
    print(velm_kernels.explain("gated_residual", x, x, torch.ones(1)))
    try:
        triton.imported("velm_kernels.attention.gated_residual.triton", "gated_residual_forward")
    except failures.StartError as error:
        print(error.everywhere, error.reason)
    """
    for interpret in ("", "1"):
        environment = {**os.environ, "TRITON_INTERPRET": interpret, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
        command = [sys.executable, "-c", textwrap.dedent(script)]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "True Triton does not start: ImportError: libtriton.so: undefined symbol: planted" in done.stdout
