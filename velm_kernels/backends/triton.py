"""What every Triton kernel of the library shares: where it can run, how it is launched, and with which block sizes.

Block sizes come from a small table by kernel, architecture, element size and head dimension (`TABLE`). With
VELM_AUTOTUNE=1 the neighbours of the entry are timed once for each class of shapes, and the fastest is kept in a
file under VELM_CACHE_DIR (default ~/.cache/velm_kernels).

TRITON_INTERPRET=1, set before triton is imported, executes the kernels on CPU tensors by Triton's interpreter.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import importlib.util
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from velm_kernels.backends import Arguments, devices, failures, tensors_of

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Oldest architecture that the kernels are compiled for.
OLDEST = 80


@dataclass(frozen=True)
class Config:
    """Block sizes and launch options of one kernel."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    # Columns of its sums that a program holds at the most, where that is fewer than `parts_of` says; of a second launch
    # those that it multiplies at a time, where that is fewer than usual.
    columns: int = 0


@dataclass(frozen=True)
class Launch:
    """A launch that was recorded instead of run."""

    kind: str
    kernel: Any
    grid: int
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    config: Config


@functools.cache
def is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def is_interpreted() -> bool:
    """Whether kernels are executed by Triton's interpreter."""
    if not is_installed() or not ("triton" in sys.modules or os.environ.get("TRITON_INTERPRET")):
        return False
    try:
        import triton

        return bool(triton.knobs.runtime.interpret)
    except Exception:
        # It does not import, or is older than all that are supported; the first call of a kernel says why.
        return False


def why_not(device: torch.device) -> list[str]:
    """Reasons why no Triton kernel can run on tensors of `device`; empty when one can."""
    if not is_installed():
        return ["triton is not installed (pip install triton)"]
    if device.type == "cpu":
        return [] if is_interpreted() else ["CPU tensors need Triton's interpreter (TRITON_INTERPRET=1)"]
    if device.type != "cuda":
        return [f"no Triton kernels for {device.type} tensors"]
    if torch.version.hip is not None:
        return ["not tested on ROCm"]
    capability = devices.capability(device.index)
    if capability < OLDEST:
        return [f"compute capability {capability / 10} is older than {OLDEST / 10}"]
    return []


def common_reasons(arguments: Arguments) -> list[str]:
    """Why no Triton kernel could take `arguments`: triton itself, devices, dtypes."""
    reasons = why_not(_first_tensor(arguments).device)
    if reasons:
        return reasons
    for name, tensor in tensors_of(arguments):
        if tensor.dtype not in DTYPES and tensor.is_floating_point():
            reasons.append(f"{name} is {tensor.dtype}, not float32, bfloat16 or float16")
    return reasons


def _first_tensor(arguments: Arguments) -> torch.Tensor:
    first = next(iter(arguments.values()))
    return first if isinstance(first, torch.Tensor) else tensors_of(arguments)[0][1]


def imported(module: str, function: str) -> Callable[..., Any]:
    """``function`` of ``module``; where that cannot be imported, this is a reason against Triton."""
    try:
        return getattr(importlib.import_module(module), function)
    except Exception as error:
        # Triton itself, or what this version of it does not know.
        failure = failures.of_launch(error, "Triton")
        if failure is None:
            raise
        raise failure from error


_pretended: int | None = None


@contextlib.contextmanager
def pretend(arch: int) -> Iterator[list[Launch]]:
    """Record launches as `arch` (80, 90, 100 or 120) would do them, instead of running them. -> the list they go to"""
    global _pretended, _recorded
    before = _pretended, _recorded
    _pretended, _recorded = arch, []
    try:
        yield _recorded
    finally:
        _pretended, _recorded = before


_recorded: list[Launch] | None = None


def is_recording() -> bool:
    return _recorded is not None


def architecture(device: torch.device) -> int:
    """The column of `TABLE` for a device: 0 for the interpreter, else 80, 90, 100 or 120."""
    if _pretended is not None:
        return _pretended
    if device.type != "cuda" or is_interpreted():
        return 0
    capability = devices.capability(device.index)
    if capability >= 120:
        return 120
    if capability >= 100:
        return 100
    if capability >= 90:
        return 90
    # sm_86 and sm_89 have the matrix instructions of sm_80 but the small shared memory of sm_120.
    return 80 if capability in (80, 87) else 120


def precision(dtype: torch.dtype) -> str:
    """How float32 matrix products are computed: as exactly as torch.matmul would under the same setting. "tf32x3"
    splits operands into three TF32 products, which keeps float32's accuracy and the matrix units."""
    if dtype != torch.float32 or torch.get_float32_matmul_precision() != "highest":
        return "tf32"
    return "tf32x3"


def dimension_class(head_dim: int) -> int:
    """The head dimension that a kernel is compiled for: the next power of two, at least 16."""
    return max(16, 1 << (head_dim - 1).bit_length())


def piece(dtype: torch.dtype, head_dim: int) -> int:
    """How many columns of a row the kernels over tiles of queries and keys multiply at a time."""
    if is_interpreted():
        widest = 64
    elif dtype == torch.float32:
        widest = 32 if head_dim <= 64 else 16
    else:
        widest = 256
    return min(dimension_class(head_dim), widest)


def parts_of(config: Config, dtype: torch.dtype, columns: int) -> int:
    """Programs that share sums of so many columns, of which each holds its own in registers and computes the weights
    anew."""
    widest = 128 if is_interpreted() or dtype == torch.float32 else 256
    return -(-columns // (config.columns or widest))


def sums_both(dtype: torch.dtype, columns: int) -> bool:
    """Whether a program can hold two kinds of sums, of so many columns together, in registers."""
    return columns <= 128 if is_interpreted() else dtype != torch.float32


# (kernel, what it does beside its products) -> (element bytes, largest head dimension) -> architecture ->
# (block_m, block_n, warps, stages, and `columns` where it is not 0); ANY stands for the architectures that have no
# entry of their own. "plain" kernels mask by length, key mask and causality at most, "grid" ones add those of a
# grid of keys, "loaded" ones do anything; what has no entry of its own takes the "loaded" one. The entries were chosen
# from what the compiler reports (tests/triton/resources.csv: no spills); they have not been timed on devices.
#
# Eight warps are meant to run on a multiprocessor, with all of its registers, 255 per thread: two blocks of four,
# so that one multiplies while the other waits, or one of eight where a tile serves more rows from one load. That is an
# occupancy of 0.125 of 2048 threads (0.167 of 1536); sums and operands in registers save more than further warps
# would hide. A warp of mma.sync takes 16 rows of a tile (or 8 columns); in tiles of fewer, warps repeat each other.
ANY = 0
_Blocks = tuple[int, ...]
_Row = dict[int, _Blocks]
_Rows = dict[tuple[int, int], _Row]


# The largest head dimension of each of the columns.
DIMENSIONS = (64, 128, 256, 512)


def _rows(size: int, *entries: _Row | _Blocks) -> _Rows:
    """Entries for elements of `size` bytes and head dimensions up to 64, 128, 256 and 512. Where only the last is not
    given it is that of 256: wider rows are multiplied in more pieces, and more programs share their sums."""
    if len(entries) == 3:
        entries = (*entries, entries[-1])
    return {(size, dim): entry if isinstance(entry, dict) else {ANY: entry} for dim, entry in zip(DIMENSIONS, entries)}


# Where rows of more than 256 columns of 16 bits have blocks without spills; of float32 they have them everywhere.
WIDE_16_BITS = (80,)


def has_blocks(dtype: torch.dtype, columns: int, arch: int) -> bool:
    """Whether `TABLE` is right for rows of so many columns; the interpreter, 0, needs no table."""
    return columns <= 256 or dtype == torch.float32 or arch in (0, *WIDE_16_BITS)


def too_wide(arguments: Arguments, *rows: str) -> list[str]:
    """Why kernels over tiles of queries and keys cannot serve `rows` of `arguments`, if they are too wide."""
    tensor = arguments[rows[0]]
    columns, arch = max(arguments[name].shape[-1] for name in rows), architecture(tensor.device)
    if has_blocks(tensor.dtype, columns, arch):
        return []
    return [f"rows of {columns} columns of 16 bits have blocks for compute capability 8.0 alone"]


TABLE: dict[tuple[str, str], _Rows] = {
    ("forward", "plain"): _rows(
        2,
        {ANY: (128, 64, 8, 3), 120: (128, 64, 8, 2)},
        {ANY: (128, 64, 8, 3), 120: (64, 64, 8, 2)},
        (64, 32, 8, 2),
        {ANY: (64, 32, 8, 2), 120: (64, 32, 8, 1)},
    ),
    ("forward", "loaded"): _rows(
        2,
        {ANY: (128, 64, 8, 2), 120: (128, 32, 8, 2)},
        {ANY: (128, 64, 8, 2), 80: (128, 32, 8, 2), 120: (32, 64, 8, 2)},
        (32, 32, 8, 2),
        {ANY: (32, 32, 8, 2), 120: (32, 32, 8, 1)},
    )
    | _rows(
        4,
        (64, 16, 4, 1),
        {ANY: (64, 16, 4, 1), 100: (64, 32, 8, 2)},
        {ANY: (64, 16, 4, 1), 100: (64, 32, 8, 2)},
    ),
    ("grad_query", "plain"): _rows(
        2,
        {ANY: (128, 64, 8, 2), 100: (64, 64, 8, 2)},
        {ANY: (128, 32, 8, 2), 100: (64, 64, 8, 2), 120: (64, 32, 8, 2)},
        {ANY: (64, 32, 8, 1), 90: (32, 32, 8, 2)},
        (32, 32, 8, 2),
    ),
    ("grad_query", "loaded"): _rows(
        2,
        (128, 32, 8, 2),
        {ANY: (32, 32, 8, 2), 90: (128, 16, 8, 2), 100: (64, 64, 8, 2)},
        (32, 32, 8, 1),
    )
    | _rows(4, {ANY: (64, 16, 4, 1), 120: (64, 16, 8, 1)}, {ANY: (64, 16, 4, 1), 80: (32, 16, 4, 1)}, (64, 16, 4, 1)),
    ("grad_key_value", "plain"): _rows(2, (32, 128, 8, 2), {ANY: (16, 128, 8, 2), 100: (32, 64, 8, 2)}, (32, 32, 8, 1)),
    ("grad_key_value", "loaded"): _rows(
        2,
        {ANY: (16, 64, 4, 2), 100: (32, 64, 8, 2)},
        {ANY: (32, 32, 8, 2), 90: (16, 64, 4, 2), 100: (32, 64, 8, 2)},
        (32, 32, 8, 1),
    )
    | _rows(
        4,
        (16, 64, 4, 1),
        {ANY: (32, 64, 4, 1), 80: (16, 64, 4, 1), 120: (16, 64, 4, 1)},
        {ANY: (32, 64, 4, 1), 80: (16, 64, 4, 1), 120: (16, 64, 4, 1)},
    ),
    ("grad_bias", "loaded"): _rows(
        2,
        (64, 32, 8, 2),
        {ANY: (64, 32, 8, 1), 80: (32, 32, 8, 1)},
        (16, 32, 8, 1),
    )
    | _rows(4, {ANY: (64, 32, 4, 1), 80: (64, 16, 4, 1), 120: (64, 32, 8, 1)}, (64, 32, 4, 2), (64, 32, 4, 2)),
    ("key_mass", "loaded"): _rows(2, (64, 64, 8, 2), (64, 64, 8, 2), (32, 64, 8, 2))
    | _rows(4, (32, 64, 4, 2), (32, 64, 4, 2), (32, 64, 4, 2)),
    ("grad_rel_pos", "loaded"): _rows(2, (64, 32, 8, 1), (64, 32, 8, 1), (32, 32, 8, 1))
    | _rows(4, (64, 16, 4, 1), (64, 16, 4, 1), (64, 16, 4, 1)),
    ("grad_side", "loaded"): _rows(
        2,
        {ANY: (64, 16, 4, 2), 80: (32, 32, 8, 2)},
        {ANY: (128, 16, 8, 2), 90: (16, 32, 8, 2), 120: (32, 16, 4, 2)},
        {ANY: (32, 32, 8, 2), 90: (16, 32, 8, 1), 100: (16, 32, 8, 1)},
        {ANY: (32, 32, 8, 1), 90: (16, 32, 8, 1), 100: (16, 32, 8, 1)},
    )
    | _rows(
        4,
        {ANY: (64, 16, 4, 1), 80: (32, 16, 4, 1), 100: (64, 16, 4, 2), 120: (64, 16, 8, 1)},
        {ANY: (64, 16, 4, 1), 80: (32, 16, 4, 1, 64), 120: (64, 16, 8, 1, 64)},
        {ANY: (64, 16, 4, 1), 80: (64, 16, 8, 1), 120: (64, 16, 8, 1, 64)},
    ),
}

# Heads of the published towers have 64 columns; wider ones take the entries of "loaded" kernels.
for _kind in ("forward", "grad_query", "grad_key_value", "grad_rel_pos"):
    TABLE[_kind, "grid"] = {key: row for key, row in TABLE[_kind, "loaded"].items() if key[1] == 64}
TABLE["grad_query", "grid"][2, 64] = {ANY: (128, 32, 8, 2), 120: (64, 32, 8, 2)}
TABLE["grad_key_value", "grid"][2, 64] = {ANY: (16, 64, 4, 2), 100: (32, 32, 8, 2), 120: (32, 32, 8, 2)}

# Where only older versions of Triton spill: (kernel, level, element bytes, largest head dimension, architecture) -> the
# version that takes the entry of `TABLE`, and the entry of those before. A second launch ("_guarded") takes the tiles
# of the first, made smaller; where it alone spills, it has an entry of its own.
BEFORE: dict[tuple[str, str, int, int, int], tuple[tuple[int, int], _Blocks]] = {
    ("forward", "loaded", 2, 64, 100): ((3, 8), (128, 32, 8, 2)),
    ("forward_guarded", "loaded", 2, 64, 80): ((3, 9), (128, 16, 8, 1)),
    ("forward_guarded", "loaded", 2, 128, 80): ((3, 9), (128, 16, 8, 1, 32)),
    ("forward_guarded", "loaded", 2, 128, 90): ((3, 9), (128, 16, 8, 1)),
    ("grad_query", "plain", 2, 128, 80): ((3, 9), (64, 64, 8, 2)),
    ("grad_query", "loaded", 2, 256, 80): ((3, 8), (16, 32, 8, 1)),
    ("grad_query", "loaded", 2, 256, 120): ((3, 8), (16, 64, 8, 1)),
    ("grad_bias", "loaded", 2, 64, 100): ((3, 8), (64, 64, 8, 2)),
    ("grad_key_value", "loaded", 2, 128, 90): ((3, 9), (32, 32, 8, 2)),
    ("grad_key_value", "loaded", 4, 64, 100): ((3, 7), (16, 64, 8, 1)),
    ("key_mass", "loaded", 4, 128, 120): ((3, 7), (32, 64, 4, 1)),
    ("key_mass", "loaded", 4, 256, 120): ((3, 7), (32, 64, 4, 1)),
    ("grad_side", "loaded", 2, 64, 100): ((3, 7), (64, 16, 8, 2)),
    ("grad_side", "loaded", 2, 128, 80): ((3, 8), (32, 32, 8, 2)),
    ("grad_side", "loaded", 4, 128, 100): ((3, 7), (64, 16, 8, 1)),
    ("grad_side", "loaded", 4, 256, 100): ((3, 8), (64, 16, 8, 1)),
}


@functools.cache
def version() -> tuple[int, int]:
    """The version of Triton, as (3, 9)."""
    import triton

    major, minor = triton.__version__.split(".")[:2]
    return int(major), int(minor)


def entry(kind: str, level: str, size: int, dim: int) -> _Row:
    """The row of `TABLE` for elements of `size` bytes and a power of two as head dimension."""
    fitting = {key: row for key, row in TABLE.get((kind, level), {}).items() if key[0] >= size and key[1] >= dim}
    return fitting[min(fitting)] if fitting else entry(kind, "loaded", size, dim)


def before(kind: str, level: str, dtype: torch.dtype, head_dim: int, arch: int) -> Config | None:
    """The entry of `BEFORE`, if this is one of the versions that take it."""
    key = kind, level, dtype.itemsize, max(64, dimension_class(head_dim)), arch
    first, blocks = BEFORE.get(key, ((0, 0), ()))
    return Config(*blocks) if version() < first else None


def _lookup(kind: str, level: str, dtype: torch.dtype, head_dim: int, arch: int) -> Config:
    if arch == 0:
        # Small tiles, so that small tests cross many of their edges.
        return Config(16, 16, 4, 1)
    older = before(kind, level, dtype, head_dim, arch)
    if older is not None:
        return older
    row = entry(kind, level, dtype.itemsize, max(64, dimension_class(head_dim)))
    return Config(*row.get(arch, row[ANY]))


def default_config(kind: str, level: str, dtype: torch.dtype, head_dim: int, device: torch.device) -> Config:
    """The table's entry for one kernel."""
    return _lookup(kind, level, dtype, head_dim, architecture(device))


def candidates(config: Config, dtype: torch.dtype) -> list[Config]:
    """What autotuning tries: the table's entry first, then its neighbours."""
    # A float32 product sums no more than 64 terms in tensor cores (`LONGEST_CHAIN` in velm_kernels/triton).
    largest = 64 if dtype == torch.float32 else 128
    found = [config]
    for block_m in (config.block_m // 2, config.block_m, config.block_m * 2):
        for block_n in (config.block_n // 2, config.block_n, config.block_n * 2):
            for num_warps in (4, 8):
                for num_stages in (2, 3, 4):
                    new = Config(block_m, block_n, num_warps, num_stages, config.columns)
                    if 16 <= block_m <= largest and 16 <= block_n <= largest and new not in found:
                        found.append(new)
    return found


def autotunes() -> bool:
    return os.environ.get("VELM_AUTOTUNE", "") == "1"


def cache_directory() -> Path:
    chosen = os.environ.get("VELM_CACHE_DIR")
    return Path(chosen) if chosen else Path.home() / ".cache" / "velm_kernels"


def _measure(run: Callable[[], None]) -> float:
    """Milliseconds of one run; inf where the compiler or the device refuses the block sizes."""
    import triton

    try:
        run()
        return float(triton.testing.do_bench(run, warmup=5, rep=20, return_mode="median"))
    except failures.StartError:
        return float("inf")


# Tests put a function of (config, run) -> milliseconds here.
measure: Callable[[Config, Callable[[], None]], float] = lambda config, run: _measure(run)  # noqa: E731
_tuned: dict[str, Config] = {}


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _tuning_file(key: str) -> Path:
    return cache_directory() / "autotune" / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.json"


def _read(path: Path, key: str) -> Config | None:
    try:
        found = json.loads(path.read_text())
        if found["key"] != key:
            return None
        return Config(**found["config"])
    except (OSError, ValueError, KeyError, TypeError):
        # Absent, damaged or written by another version: tuned again.
        return None


def _write(path: Path, key: str, config: Config, milliseconds: float) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Renamed into place, so that processes that tune at the same time never read half a file.
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
        json.dump({"key": key, "config": asdict(config), "milliseconds": milliseconds}, file)
    os.replace(file.name, path)


def _size_class(number: int) -> int:
    """Sizes are tuned together up to the next power of two."""
    return 1 << max(0, number - 1).bit_length()


def choose(
    kind: str,
    level: str,
    dtype: torch.dtype,
    head_dim: int,
    device: torch.device,
    shape: tuple[int, ...],
    variant: str,
    run: Callable[[Config], None],
    adjust: Callable[[Config], Config] = lambda config: config,
) -> Config:
    """Block sizes for one kernel: the table's, or under VELM_AUTOTUNE=1 the fastest for this class of shapes.

    `shape` are the sizes that matter (rounded up to powers of two), `variant` names compile-time switches, `run`
    launches the kernel with given block sizes; it must leave nothing behind that a second run would see. `adjust`
    limits block sizes to what the caller can use."""
    config = adjust(default_config(kind, level, dtype, head_dim, device))
    if not autotunes() or is_recording() or (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
        return config
    import triton

    sizes = "x".join(str(_size_class(number)) for number in shape)
    key = f"{kind}|{_device_name(device)}|triton {triton.__version__}|{dtype}|{head_dim}|{sizes}|{variant}"
    known = _tuned.get(key)
    if known is not None:
        return known
    path = _tuning_file(key)
    best = _read(path, key)
    if best is None:
        tried = list(dict.fromkeys(adjust(candidate) for candidate in candidates(config, dtype)))
        times = [measure(candidate, lambda c=candidate: run(c)) for candidate in tried]  # type: ignore[misc]
        fastest = min(range(len(tried)), key=times.__getitem__)
        best = tried[fastest]
        _write(path, key, best, times[fastest])
    _tuned[key] = best
    return best


def launch(
    kind: str, kernel: Any, grid: int, arguments: tuple[Any, ...], constants: dict[str, Any], config: Config
) -> None:
    """Run `kernel` on `grid` programs, or record the launch inside `pretend`. A grid of nothing runs nothing."""
    if grid <= 0:
        return
    if _recorded is not None:
        _recorded.append(Launch(kind, kernel, grid, arguments, constants, config))
        return
    options: dict[str, Any] = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    try:
        if is_interpreted():
            kernel[(grid,)](*arguments, **constants, **options)
            return
        # Triton launches on the current device, which need not be the one of the tensors.
        device = next(argument.device for argument in arguments if isinstance(argument, torch.Tensor))
        with torch.cuda.device(device):
            kernel[(grid,)](*arguments, **constants, **options, enable_fp_fusion=True)
    except Exception as error:
        failure = failures.of_launch(error, f"Triton's kernel {kind!r}")
        if failure is None:
            raise
        raise failure from error
