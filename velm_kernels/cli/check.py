"""``velm check``: are the numbers right here? Every operator on every backend that this machine has."""

from __future__ import annotations

import argparse
import contextlib
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import velm_kernels
from velm_kernels import backends, measure
from velm_kernels.backends import cpu, cuda, failures
from velm_kernels.cli import check_cases
from velm_kernels.cli.check_cases import Check

HELP = "Check the numbers of every operator on every backend available here; exits with 1 if any are wrong."
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FACTOR, ULPS = 2.0, 6.0


@dataclass(frozen=True)
class Target:
    """A backend, and for the CPU one of its instruction sets."""

    backend: str
    isa: str | None = None
    device: str = "cpu"

    def __str__(self) -> str:
        return f"{self.backend} ({self.isa})" if self.isa else self.backend

    @contextlib.contextmanager
    def use(self) -> Iterator[None]:
        with velm_kernels.use_backend(self.backend), cpu.use_isa(self.isa) if self.isa else contextlib.nullcontext():
            yield


@dataclass(frozen=True)
class Result:
    """``status`` is "passed", "failed" or "not served"."""

    target: Target
    check: Check
    dtype: torch.dtype
    status: str
    error: float = 0.0
    detail: str = ""

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.check.operator}, {self.check.name}, {dtype} on {self.target}: {self.detail}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--backend", choices=backends.ORDER, action="append", help="only this one (can be repeated)")
    parser.add_argument("--operator", action="append", help="only this one (can be repeated)")
    parser.add_argument("--why", action="store_true", help="also say why a backend does not serve a check")


def targets() -> tuple[list[Target], list[tuple[str, str]]]:
    """What can be checked here, and (name, reason) of what cannot."""
    found, missing = [Target("reference")], []
    for isa in cpu.INSTRUCTION_SETS:
        reason = cpu.why_not(isa)
        if reason is None:
            found.append(Target("cpu", isa))
        else:
            missing.append((f"cpu ({isa})", reason))
    device = "cpu" if cuda.why_no_gpu() else "cuda"
    found.append(Target("torch", device=device))
    query = torch.zeros(1, 1, 1, 16, device=device)
    for name in ("triton", "cuda"):
        with velm_kernels.use_backend(name):
            answer = velm_kernels.explain("cross_attention", query, query, query)
        reason = next(line for line in answer.splitlines()[1:] if line.split()[0] == name).split(maxsplit=1)[1]
        # Without a GPU the call is one on the CPU, and says no more than that.
        reason = (cuda.why_not("cuda") if name == "cuda" else None) or reason.removeprefix("no: ")
        if reason == "yes":
            found.append(Target(name, device=device))
        else:
            missing.append((name, reason))
    return found, missing


def _run(function: Callable[..., Any], inputs: dict[str, Any], wanted: Sequence[str]) -> list[Tensor]:
    leaves = [inputs[name].detach().requires_grad_() for name in wanted]
    result = function(**(inputs | dict(zip(wanted, leaves, strict=True))))
    outs = [result] if isinstance(result, Tensor) else list(result)
    smooth = [out for out in outs if out.requires_grad]
    generator = torch.Generator().manual_seed(1)
    upstream = [
        torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.device, out.dtype) for out in smooth
    ]
    grads = torch.autograd.grad(smooth, leaves, upstream)
    return [out.detach() for out in outs] + list(grads)


def _cast(inputs: dict[str, Any], dtype: torch.dtype, device: str) -> dict[str, Any]:
    def one(value: Any) -> Any:
        if isinstance(value, (tuple, list)):
            return type(value)(map(one, value))
        if not isinstance(value, Tensor):
            return value
        return value.to(device=device, dtype=dtype if value.is_floating_point() else value.dtype)

    return {name: one(value) for name, value in inputs.items()}


def _errors(found: Sequence[Tensor], exact: Sequence[Tensor]) -> list[float]:
    return [
        measure.relative_rms([one.masked_fill(other.isinf(), 0.0)], [other.masked_fill(other.isinf(), 0.0)])
        if torch.equal(one.isinf(), other.isinf())
        else float("inf")
        for one, other in zip(found, exact, strict=True)
    ]


@functools.cache
def _expected(check: Check, dtype: torch.dtype) -> tuple[dict[str, Any], list[Tensor], list[float]]:
    """Inputs in ``dtype``, exact results on them, and how far off plain torch in ``dtype`` is."""
    clean = _cast(check.make(torch.Generator().manual_seed(0)), dtype, "cpu")
    exact = _run(check.reference, _cast(clean, torch.float64, "cpu"), check.wanted)
    return clean, exact, _errors(_run(check.reference, clean, check.wanted), exact)


def run_check(check: Check, dtype: torch.dtype, target: Target) -> Result:
    """Outputs and gradients may be off by twice what plain torch is in the same dtype, and a few ulps.

    What no row attends to is NaN for the backend and ordinary for the exact result: it must not matter. The same call
    again must give the same bits.
    """
    clean, exact, plain = _expected(check, dtype)
    given = _cast(check.poison(clean), dtype, target.device)
    try:
        with target.use():
            got = _run(check.function, given, check.wanted)
            again = _run(check.function, given, check.wanted)
    except backends.NoBackendError as refused:
        return Result(target, check, dtype, "not served", detail=str(refused))
    except Exception as raised:
        return Result(
            target,
            check,
            dtype,
            "failed",
            float("inf"),
            f"{type(raised).__name__}: {str(raised).partition(chr(10))[0]}",
        )
    # Of torch's own kernels on GPUs gradients are so only under torch.use_deterministic_algorithms.
    promised = len(got) - len(check.wanted) if target.backend == "torch" and target.device != "cpu" else len(got)
    same = all(torch.equal(one, two) for one, two in zip(got[:promised], again[:promised], strict=True))
    got = [tensor.cpu() for tensor in got]
    worst, problem = 0.0, "" if same else "two runs give different bits"
    errors = _errors(got, exact)
    labels = [f"output {number}" for number in range(len(got) - len(check.wanted))]
    labels += [f"gradient of {name}" for name in check.wanted]
    for label, error, other in zip(labels, errors, plain, strict=True):
        worst = max(worst, error)
        limit = FACTOR * other + ULPS * torch.finfo(dtype).eps
        if not error <= limit:
            problem = f"{label} has relative RMS error {error:.2e}, at most {limit:.2e} expected"
    return Result(target, check, dtype, "failed" if problem else "passed", worst, problem)


def run(args: argparse.Namespace) -> int:
    chosen = [check for check in check_cases.checks() if not args.operator or check.operator in args.operator]
    if not chosen:
        names = ", ".join(sorted({check.operator for check in check_cases.checks()}))
        print(f"velm check: --operator: expected one of {names}", file=sys.stderr)
        return 2
    found, missing = targets()
    found = [target for target in found if not args.backend or target.backend in args.backend]
    missing = [(name, why) for name, why in missing if not args.backend or name.split()[0] in args.backend]
    broken = [
        fault for fault in cpu.faults() + cuda.faults() if not args.backend or fault[0].split()[0] in args.backend
    ]
    for name, why in missing:
        if (name, why) not in broken:
            print(f"not checked: {name}: {why}")
    for name, why in broken:
        print(f"FAILED {name}: {why}")
    if not found:
        return 1
    jobs = [(check, dtype, target) for target in found for check in chosen for dtype in DTYPES]
    _expected.cache_clear()
    results = []
    for job in _with_progress(jobs):
        results.append(run_check(*job))
        # At once: what comes after it may hang, or take the device down.
        if results[-1].status == "failed":
            print(f"FAILED {results[-1]}", flush=True)
    _expected.cache_clear()
    _print_table(results)
    failed = [result for result in results if result.status == "failed"]
    # Passed over in silence by calls that may run elsewhere, but what is here should start.
    for name, why in failures.listed():
        print(f"FAILED {name}: {why}")
    if args.why:
        for result in results:
            if result.status == "not served":
                print("not served:", " ".join(str(result).split()))
    served = sum(result.status != "not served" for result in results)
    print(f"{served - len(failed)} of {served} checks passed" + (f", {len(failed)} failed" if failed else ""))
    return 1 if failed or broken or failures.listed() or not served else 0


def _with_progress(jobs: list[Any]) -> Iterator[Any]:
    """A bar for those who watch: on a terminal alone, never in a pipe or a file."""
    try:
        from rich.console import Console
        from rich.progress import track
    except ImportError:
        yield from jobs
        return
    if not sys.stderr.isatty():
        yield from jobs
        return
    yield from track(jobs, description="checking", console=Console(stderr=True), transient=True)


def _print_table(results: list[Result]) -> None:
    operators = list(dict.fromkeys(result.check.operator for result in results))
    width = max(map(len, operators))
    for target in dict.fromkeys(result.target for result in results):
        print(target)
        for operator in operators:
            mine = [r for r in results if r.target == target and r.check.operator == operator]
            parts = [
                f"{sum(r.status == status for r in mine)} {status}" for status in ("passed", "failed", "not served")
            ]
            worst = [
                f"{str(dtype).removeprefix('torch.')} {max(r.error for r in mine if r.dtype == dtype):.1e}"
                for dtype in DTYPES
                if any(r.dtype == dtype and r.status != "not served" for r in mine)
            ]
            shown = ", ".join(part for part in parts if not part.startswith("0 "))
            print(f"  {operator:<{width}}  {shown}" + (f"   largest errors: {', '.join(worst)}" if worst else ""))
