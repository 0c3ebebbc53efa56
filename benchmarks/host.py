"""``python -m benchmarks host``: what a call costs before and after its kernel, on tensors so small that this is all.

Each operator is timed against its shortest form in plain torch, in turns, forward alone and forward with a gradient
recorded: as users call it, where small calls may go to torch's own form, and as an operator whose kernel is replaced by
results that are there already.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

import velm_kernels
from benchmarks import terminal
from velm_kernels import backends
from velm_kernels.backends import small

# What a call of an operator may cost, its kernel aside, in times of the plain form: forward, and with a gradient.
LIMITS = {"cross_attention": (2.5, 3.0)}
SAMPLE_CALLS = 200


class HostCase(NamedTuple):
    """One operator on tiny tensors: ``ours`` and ``plain`` take ``arguments``; the first has a gradient."""

    name: str
    ours: Callable[..., Any]
    plain: Callable[..., Any]
    arguments: tuple[Tensor, ...]


def cases() -> list[HostCase]:
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 2, 4, 16) for _ in range(3))
    x, y, row, shift = torch.randn(2, 3, 8), torch.randn(2, 3, 8), torch.randn(2, 8), torch.randn(2, 8)
    weight, bias, maps = torch.randn(8, 8), torch.randn(8), torch.randn(4, 8, 8)
    mask = torch.tensor([[True, True, False], [True, True, True]])

    def mean(x: Tensor, mask: Tensor) -> Tensor:
        return (x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)

    return [
        HostCase("cross_attention", velm_kernels.cross_attention, F.scaled_dot_product_attention, (query, key, value)),
        HostCase("film", velm_kernels.film, lambda x, g, b: torch.addcmul(b[:, None], g[:, None], x), (x, row, shift)),
        HostCase("masked_pool", lambda x, m: velm_kernels.masked_pool(x, mask=m), mean, (x, mask)),
        HostCase("bilinear", velm_kernels.bilinear, F.bilinear, (row, shift, maps)),
        HostCase("linear", velm_kernels.linear, F.linear, (row, weight, bias)),
        HostCase("gated_residual", velm_kernels.gated_residual, lambda r, x, g: r + x * g.tanh(), (x, y, bias)),
        HostCase("dropout_residual", lambda r, x: velm_kernels.dropout_residual(x, r), _dropped, (x, y)),
        HostCase(
            "weighted_sum",
            lambda a, b, w: velm_kernels.weighted_sum([a, b], w),
            lambda a, b, w: torch.addcmul(a * w[0], b, w[1]),
            (x, y, bias[:2]),
        ),
        HostCase("factorized_pool", velm_kernels.factorized_pool, torch.mul, (x, y)),
    ]


def _dropped(residual: Tensor, x: Tensor) -> Tensor:
    return residual + F.dropout(x, 0.1)


@contextlib.contextmanager
def without_kernels(call: Callable[[], Any]) -> Iterator[None]:
    """Operators inside are called at any size, and those of ``call`` return what they returned before."""
    with mock.patch.object(small, "enabled", False):
        changed: list[tuple[dict[str, backends.Implementation], str, backends.Implementation]] = []
        for of_backend in backends._implementations.values():
            for backend, implementation in list(of_backend.items()):
                changed.append((of_backend, backend, implementation))
                of_backend[backend] = dataclasses.replace(implementation, call=_remembering(implementation.call))
        backends.forget_kinds()
        try:
            call()
            yield
        finally:
            for of_backend, backend, implementation in changed:
                of_backend[backend] = implementation
            backends.forget_kinds()


def _remembering(call: Callable[..., Any]) -> Callable[..., Any]:
    results: list[Any] = []

    def again(*args: Any) -> Any:
        if not results:
            results.append(call(*args))
        # Autograd wants tensors that are nobody's yet.
        made = results[0]
        return (
            made.detach() if isinstance(made, Tensor) else tuple(None if one is None else one.detach() for one in made)
        )

    return again


def measure(case: HostCase, recording: bool, rounds: int) -> tuple[float, float, float]:
    """Microseconds of a call: plain, as users call it, without its kernel."""
    arguments = case.arguments
    if recording:
        arguments = (arguments[0].clone().requires_grad_(), *arguments[1:])

    def plain() -> Any:
        return case.plain(*arguments)

    def ours() -> Any:
        return case.ours(*arguments)

    times: tuple[list[float], list[float], list[float]] = [], [], []
    with torch.set_grad_enabled(recording):
        for _ in range(rounds):
            times[0].append(_microseconds(plain))
            times[1].append(_microseconds(ours))
            with without_kernels(ours):
                times[2].append(_microseconds(ours))
    plain_us, ours_us, stubbed_us = map(statistics.median, times)
    return plain_us, ours_us, stubbed_us


def _microseconds(call: Callable[[], Any]) -> float:
    for _ in range(SAMPLE_CALLS // 10):
        call()
    start = time.perf_counter()
    for _ in range(SAMPLE_CALLS):
        call()
    return (time.perf_counter() - start) / SAMPLE_CALLS * 1e6


def main(given: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks host", description=__doc__)
    parser.add_argument("--case", nargs="*", default=[], help="names of operators; all of them if none is given")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("out/bench/host.csv"))
    args = parser.parse_args(given)
    torch.set_num_threads(args.threads)
    shown = terminal.table("microseconds of a call")
    for name in ("operator", "gradient", "plain torch", "called", "without its kernel", "over plain", "limit"):
        shown.add_column(name, justify="left" if name == "operator" else "right", no_wrap=True)
    rows, exceeded = [], False
    for case in cases():
        if args.case and case.name not in args.case:
            continue
        for recording in (False, True):
            plain, called, stubbed = measure(case, recording, args.rounds)
            limit = LIMITS[case.name][recording] if case.name in LIMITS else None
            exceeded = exceeded or (limit is not None and stubbed > limit * plain)
            rows.append((case.name, recording, plain, called, stubbed))
            shown.add_row(
                case.name,
                "recorded" if recording else "none",
                *(f"{value:.1f}" for value in (plain, called, stubbed)),
                f"{stubbed / plain:.1f}x",
                "" if limit is None else f"{limit:g}x",
            )
    terminal.console().print(shown)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("operator", "recorded", "plain_us", "called_us", "without_kernel_us"))
        writer.writerows(rows)
    return int(exceeded)
