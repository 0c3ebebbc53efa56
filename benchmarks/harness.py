"""One way to measure everything: numbers first, then alternating timings, memory, and the limits of the machine."""

from __future__ import annotations

import csv
import dataclasses
import datetime
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from velm_kernels import cases as operator_cases
from velm_kernels import measure

Inputs = dict[str, Any]
Function = Callable[..., "Tensor | tuple[Tensor, ...]"]

# Above this many elements of work in float64 the exact result is computed by the eager code in float32 instead.
LARGEST_EXACT = 2**27
# torch has no half precision arithmetic on CPUs without it: only what takes seconds there, not minutes, is timed.
LARGEST_HALF_ON_CPU = 2e9
# A baseline that needs longer than this for one call is timed once.
LONGEST_CALL = 20.0
# The numbers rule is that of velm_kernels/cases.py. What is compared with float32 is as inexact as that.
ULPS_BESIDE_FLOAT32 = 16.0
VELM = "velm"


@dataclass(frozen=True)
class Case:
    """Work to be done, and several ways to do it.

    Attributes:
        make: makes float64 inputs from a generator; tensors that are not floating point stay as they are.
        wanted: names of the inputs whose gradients are computed in the direction "fwd+bwd".
        ways: name -> function of the inputs, by name. "eager" is plain torch and, in float64, the exact result;
            "velm" is this library.
        flops, traffic: operations and bytes that the forward pass cannot avoid; traffic is counted in elements.
        backward_flops, backward_traffic: the same for the backward pass, None if there is none to measure.
        work: elements of the largest intermediate of the eager way.
        gpu_ways: further ones that only run on GPUs.
        meaning: what the numbers are those of where the eager way draws random numbers of its own; then that way has
            none to check.
        reads_only: whether next to nothing is written, so that the bandwidth of reading is the limit.
    """

    operator: str
    name: str
    shape: str
    make: Callable[[torch.Generator], Inputs]
    wanted: tuple[str, ...]
    ways: dict[str, Function]
    flops: float
    traffic: float
    backward_flops: float | None
    backward_traffic: float = 0.0
    work: float = 0.0
    gpu_ways: dict[str, Function] = field(default_factory=dict)
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)
    reads_only: bool = False
    meaning: Function | None = None

    @property
    def directions(self) -> tuple[str, ...]:
        return ("fwd",) if self.backward_flops is None else ("fwd", "fwd+bwd")


@dataclass
class Row:
    """One line of the CSV; benchmarks/README.md says what the columns mean."""

    date: str
    torch: str
    device: str
    threads: int
    instruction_set: str
    peak_fp32: float
    peak_bf16: float | None
    copy_bandwidth: float
    read_bandwidth: float | None
    family: str
    operator: str
    case: str
    shape: str
    dtype: str
    direction: str
    way: str
    samples: int
    median_ms: float
    lower_quartile_ms: float
    upper_quartile_ms: float
    best_ms: float
    clock: str
    host_ms: float | None
    error: float
    error_limit: float
    exact: str
    saved_bytes: int | None
    peak_bytes: int | None
    flops: float | None = None
    bytes: float | None = None
    limit_ms: float | None = None
    fraction_of_limit: float | None = None
    best_other: str = ""
    speedup_over_best_other: float | None = None


@dataclass(frozen=True)
class Failure:
    """A way whose numbers were wrong, or that raised: it gets no figure."""

    case: str
    dtype: str
    direction: str
    way: str
    reason: str

    def __str__(self) -> str:
        return f"{self.case} {self.dtype} {self.direction}, {self.way}: {self.reason}"


@dataclass(frozen=True)
class Settings:
    """How cases are measured.

    Attributes:
        rounds: samples of each way.
        sample_seconds: about how long a sample of short calls takes.
        check: whether numbers are checked before anything is timed.
    """

    device: torch.device
    rounds: int = 10
    compile: bool = True
    memory: bool = True
    seed: int = 0
    sample_seconds: float = 0.02
    check: bool = True


def published() -> dict[str, Mapping[str, int]]:
    """The sizes of papers and models that the cases beside the operators name."""
    return {name: sizes for case in operator_cases.every() for name, sizes in case.published.items()}


def cast(inputs: Inputs, dtype: torch.dtype, device: torch.device) -> Inputs:
    return operator_cases.moved(operator_cases.cast(inputs, dtype), device)


def runner(function: Function, inputs: Inputs, wanted: Sequence[str], seed: int) -> Callable[[], list[Tensor]]:
    """A call without arguments that returns the outputs, and the gradients of ``wanted`` where there are any."""
    leaves = [inputs[name].detach().requires_grad_() for name in wanted]
    given = inputs | dict(zip(wanted, leaves, strict=True))
    upstream: list[Tensor] = []

    def forward() -> list[Tensor]:
        with torch.no_grad():
            outs = function(**inputs)
        return [outs] if isinstance(outs, Tensor) else list(outs)

    def forward_backward() -> list[Tensor]:
        result = function(**given)
        outs = [result] if isinstance(result, Tensor) else list(result)
        if not upstream:
            generator = torch.Generator().manual_seed(seed)
            for out in outs:
                drawn = torch.randn(out.shape, generator=generator, dtype=torch.float64)
                upstream.append(drawn.to(out.device, out.dtype))
        return [*(out.detach() for out in outs), *torch.autograd.grad(outs, leaves, upstream)]

    return forward_backward if wanted else forward


def ways_to_time(case: Case, dtype: torch.dtype, settings: Settings) -> dict[str, Function]:
    ways = dict(case.ways)
    if settings.device.type == "cuda":
        ways |= case.gpu_ways
    work = case.flops + (case.backward_flops or 0)
    if dtype == torch.float16 and settings.device.type == "cpu" and work > LARGEST_HALF_ON_CPU:
        return {VELM: ways[VELM]}
    if settings.compile:
        ways["compile"] = torch.compile(case.ways["eager"], dynamic=False)
    return ways


def check_numbers(
    case: Case, dtype: torch.dtype, wanted: Sequence[str], ways: dict[str, Function], settings: Settings
) -> tuple[dict[str, tuple[float, float]], str, dict[str, str]]:
    """The error and the limit of each way, of the result or gradient that is nearest to its limit or beyond it; what
    they are compared with; and who failed.

    The limit is that of the numbers rule. In float16 on a CPU, where plain torch needs minutes, what is measured of it
    is plain torch in float32 on the same inputs, rounded: a stricter bound.
    """
    exact_dtype = torch.float64 if case.work <= LARGEST_EXACT else torch.float32
    drawn = case.make(torch.Generator().manual_seed(settings.seed))
    given = cast(drawn, dtype, settings.device)
    meaning = case.meaning or case.ways["eager"]
    exact = runner(meaning, cast(given, exact_dtype, settings.device), wanted, settings.seed)()
    half_on_cpu = dtype == torch.float16 and settings.device.type == "cpu"
    plain_dtype = torch.float32 if half_on_cpu else dtype
    plain = runner(meaning, cast(given, plain_dtype, settings.device), wanted, settings.seed)()
    ulps = operator_cases.ULPS if exact_dtype == torch.float64 else ULPS_BESIDE_FLOAT32
    errors: dict[str, tuple[float, float]] = {}
    failures = {}
    for name, function in ways.items():
        if name == "eager" and case.meaning is not None:
            errors[name] = math.nan, math.nan
            continue
        try:
            got = runner(function, given, wanted, settings.seed)()
            found = [
                operator_cases.error_and_limit(value, true, [rounded.to(dtype)], dtype, ulps=ulps)
                for value, true, rounded in zip(got, exact, plain, strict=True)
            ]
        except Exception as error:
            failures[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            continue
        errors[name] = off, limit = max(found, key=lambda pair: pair[0] / pair[1] if pair[1] else math.inf)
        if not off <= limit:
            failures[name] = f"relative RMS error {off:.2e} is above {limit:.2e}"
    return errors, "float64" if exact_dtype == torch.float64 else "float32 eager", failures


def measure_case(
    case: Case,
    family: str,
    dtype: torch.dtype,
    direction: str,
    limits: measure.Limits,
    settings: Settings,
) -> tuple[list[Row], list[Failure]]:
    """Check and time every way of one case; a way whose numbers are wrong is not timed."""
    backward = direction == "fwd+bwd"
    wanted = case.wanted if backward else ()
    ways = ways_to_time(case, dtype, settings)
    if settings.check:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*lower precision.*|.*TensorFloat32.*")
            errors, exact, failed = check_numbers(case, dtype, wanted, ways, settings)
    else:
        errors, exact, failed = dict.fromkeys(ways, (math.nan, math.nan)), "", {}
    dtype_name = str(dtype).removeprefix("torch.")
    failures = [Failure(case.name, dtype_name, direction, way, reason) for way, reason in failed.items()]

    given = cast(case.make(torch.Generator().manual_seed(settings.seed)), dtype, settings.device)
    runs = {way: runner(ways[way], given, wanted, settings.seed) for way in ways if way not in failed}
    if not runs:
        return [], failures
    timings = measure.alternate(
        runs,
        rounds=settings.rounds,
        sample_seconds=settings.sample_seconds,
        longest=LONGEST_CALL,
        device=settings.device,
    )

    flops = case.flops + (case.backward_flops or 0.0) * backward
    traffic = (case.traffic + case.backward_traffic * backward) * dtype.itemsize
    limit = limits.seconds(flops, traffic, dtype, reads_only=case.reads_only and not backward)
    rows = []
    for way, timing in timings.items():
        saved = peak = None
        if settings.memory:
            peak = measure.peak_memory(runs[way], settings.device)
            if backward:
                saved = _saved(ways[way], given, wanted)
        lower, upper = timing.quartiles
        rows.append(
            Row(
                date=datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
                torch=torch.__version__,
                device=limits.device,
                threads=limits.threads,
                instruction_set=instruction_set(settings.device),
                peak_fp32=limits.fp32,
                peak_bf16=limits.bf16,
                copy_bandwidth=limits.copy,
                read_bandwidth=limits.read,
                family=family,
                operator=case.operator,
                case=case.name,
                shape=case.shape,
                dtype=dtype_name,
                direction=direction,
                way=way,
                samples=len(timing.samples),
                median_ms=timing.median * 1e3,
                lower_quartile_ms=lower * 1e3,
                upper_quartile_ms=upper * 1e3,
                best_ms=timing.best * 1e3,
                clock=timing.clock,
                host_ms=None if timing.host_median is None else timing.host_median * 1e3,
                error=errors[way][0],
                error_limit=errors[way][1],
                exact=exact,
                saved_bytes=saved,
                peak_bytes=peak,
                flops=flops,
                bytes=traffic,
                limit_ms=limit * 1e3,
                fraction_of_limit=limit / timing.median,
            )
        )
    compare(rows)
    return rows, failures


def _saved(function: Function, given: Inputs, wanted: Sequence[str]) -> int:
    """Bytes kept for backward, the inputs not among them."""
    leaves = {name: given[name].detach().requires_grad_() for name in wanted}
    inputs = given | leaves
    flat = [part for value in inputs.values() for part in (value if isinstance(value, tuple) else (value,))]
    return measure.saved_for_backward(
        lambda: function(**inputs), [tensor for tensor in flat if isinstance(tensor, Tensor)]
    )


def compare(rows: list[Row], ours: Sequence[str] = (VELM,)) -> None:
    """Fills in, for each row, the fastest other one that is not of this library, and how many times as fast this is."""
    others = [row for row in rows if row.way not in ours]
    for row in rows:
        rivals = [other for other in others if other is not row]
        if rivals:
            best = min(rivals, key=lambda other: other.median_ms)
            row.best_other, row.speedup_over_best_other = best.way, best.median_ms / row.median_ms


def instruction_set(device: torch.device) -> str:
    if device.type == "cuda":
        return "sm_{}{}".format(*torch.cuda.get_device_capability(device))
    from velm_kernels.backends import cpu

    return cpu.in_use() or "none"


def columns() -> list[str]:
    return [field.name for field in dataclasses.fields(Row)]


def write_csv(path: Path, rows: Iterable[Row]) -> None:
    """Writes rows to ``path``, after what is there already if its columns are the same."""
    path.parent.mkdir(parents=True, exist_ok=True)
    names = columns()
    fresh = not path.exists()
    if not fresh:
        with path.open(newline="") as file:
            if next(csv.reader(file), None) != names:
                raise ValueError(f"{path}: has other columns than this version writes; give another name")
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, names)
        if fresh:
            writer.writeheader()
        for row in rows:
            writer.writerow(dataclasses.asdict(row))


def selected(
    cases: Iterable[Case], patterns: Sequence[str], dtypes: Sequence[torch.dtype], directions: Sequence[str]
) -> Iterator[tuple[Case, torch.dtype, str]]:
    import fnmatch

    for case in cases:
        if patterns and not any(fnmatch.fnmatch(case.name, pattern) for pattern in patterns):
            continue
        for dtype in case.dtypes:
            for direction in case.directions:
                if dtype in dtypes and direction in directions:
                    yield case, dtype, direction
