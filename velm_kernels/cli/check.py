"""``velm check``: are the numbers right here? Every operator on every backend that this machine has."""

from __future__ import annotations

import argparse
import contextlib
import functools
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

import velm_kernels
from velm_kernels import backends, cases
from velm_kernels.backends import cpu, cuda, failures
from velm_kernels.cases import Case

HELP = "Check the numbers of every operator on every backend available here; exits with 1 if any are wrong."
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


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
    case: Case
    dtype: torch.dtype
    status: str
    error: float = 0.0
    detail: str = ""

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        name = f", {self.case.name}" if self.case.name else ""
        return f"{self.case.operator}{name}, {dtype} on {self.target}: {self.detail}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--backend", choices=backends.ORDER, action="append", help="only this one (can be repeated)")
    parser.add_argument("--operator", action="append", help="only this one (can be repeated)")
    parser.add_argument("--why", action="store_true", help="also say why a backend does not serve a case")


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


@functools.cache
def _expected(case: Case, dtype: torch.dtype) -> cases.Expected:
    return cases.expected(case, case.larger_arguments(dtype), dtype)


def run_case(case: Case, dtype: torch.dtype, target: Target) -> Result:
    """The numbers rule of :mod:`velm_kernels.cases` for every output and gradient, at the larger sizes of a case.

    What nobody may read is NaN or infinite for the backend and ordinary for the exact result: it must not matter. The
    same call again must give the same bits.
    """
    expected = _expected(case, dtype)
    given = cases.moved(case.poisoned(expected.arguments), target.device)
    try:
        with target.use():
            got, again = case.run(given), case.run(given)
    except backends.NoBackendError as refused:
        return Result(target, case, dtype, "not served", detail=str(refused))
    except Exception as raised:
        said = f"{type(raised).__name__}: {str(raised).partition(chr(10))[0]}"
        return Result(target, case, dtype, "failed", float("inf"), said)
    # Of torch's own kernels on GPUs gradients are so only under torch.use_deterministic_algorithms.
    promised = [
        name for name in got if target.backend != "torch" or target.device == "cpu" or name.startswith("output_")
    ]
    same = all(torch.equal(got[name], again[name]) for name in promised)
    worst, problem = 0.0, "" if same else "two runs give different bits"
    for name, (error, limit) in expected.errors(got).items():
        worst = max(worst, error)
        if not error <= limit:
            what = name.replace("_", " ") if name.startswith("output_") else f"gradient of {name}"
            problem = f"{what} has relative RMS error {error:.2e}, at most {limit:.2e} expected"
    return Result(target, case, dtype, "failed" if problem else "passed", worst, problem)


def run(args: argparse.Namespace) -> int:
    chosen = [case for case in cases.every() if not args.operator or case.operator in args.operator]
    if not chosen:
        names = ", ".join(sorted({case.operator for case in cases.every()}))
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
    jobs = [(case, dtype, target) for target in found for case in chosen for dtype in DTYPES]
    _expected.cache_clear()
    results = []
    for job in _with_progress(jobs):
        results.append(run_case(*job))
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
    operators = list(dict.fromkeys(result.case.operator for result in results))
    width = max(map(len, operators))
    for target in dict.fromkeys(result.target for result in results):
        print(target)
        for operator in operators:
            mine = [r for r in results if r.target == target and r.case.operator == operator]
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
