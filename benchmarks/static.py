"""What can be said of the GPU kernels without a GPU: what they occupy, and the bytes they move at the benchmark shapes.

Registers, shared memory and occupancy are the compilers' (``tests/cuda/resources.csv``, ``tests/triton/resources.csv``,
which the tests compare with the sources). Bytes are counted by executing the CUDA kernels on threads of the host.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import velm_kernels
from benchmarks import terminal
from velm_kernels.backends import cuda

TABLES = Path(__file__).parents[1] / "tests"
# Rows of a block of the attention kernel: each block reads the keys and values that its rows see once.
BLOCK_ROWS = 64
# (case of benchmarks.attention, key heads of all batch entries, query heads of a key head, queries, keys, head_dim,
# images). Bytes are the same for every key head and batch entry: one of them has keys, the others are there because
# their number decides whether keys are split among blocks.
SHAPES = (
    ("q-former", 96, 1, 32, 257, 64, 1),
    ("llama-3.2-vision", 32, 4, 256, 1601, 128, 1),
    ("idefics-4-images", 32, 1, 512, 1028, 64, 4),
    ("decode", 32, 4, 1, 6404, 128, 1),
)


@dataclass(frozen=True)
class Traffic:
    """Bytes of global memory of one key head of one batch entry, and matrix instructions.

    Attributes:
        least: what the stated way of working cannot avoid: query read once, keys and values once for every block of
            rows that sees them, out and logsumexp written once.
    """

    case: str
    dtype: str
    read: int
    written: int
    least: int
    matrix_instructions: int
    bank_conflicts: int

    @property
    def ratio(self) -> float:
        return (self.read + self.written) / self.least


def _bytes(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def count(
    case: str, kv_heads: int, group: int, queries: int, keys: int, dim: int, images: int, dtype: torch.dtype
) -> Traffic:
    """Runs one key head of a case on threads of the host, beside others without keys."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, group, queries, dim, generator=generator).to(dtype)
    key, value = (torch.randn(1, 1, keys, dim, generator=generator).to(dtype) for _ in range(2))
    start = (torch.arange(queries) * images // queries * (keys // images))[None]
    stop = start + keys // images
    ranges = (start, stop) if images > 1 else None
    everything: dict[str, Any] = {"return_logsumexp": True}
    if ranges is not None:
        everything["key_ranges"] = tuple(x.expand(kv_heads, -1) for x in ranges)

    def run(with_keys: int) -> tuple[list[dict[str, Any]], Tensor, Tensor]:
        lengths = torch.tensor([keys] * with_keys + [0] * (kv_heads - with_keys), dtype=torch.int32)
        cuda.launches()
        with velm_kernels.use_backend("device_on_host"), torch.no_grad():
            heads = (x.expand(kv_heads, -1, -1, -1) for x in (query, key, value))
            out, lse = velm_kernels.cross_attention(*heads, key_lengths=lengths, **everything)
        return cuda.launches(), out[:1], lse[:1]

    idle, _, _ = run(0)
    launches, out, lse = run(1)
    # Heads that share a key head share blocks where one alone would not fill one.
    rows = [(0, keys)] * queries if ranges is None else list(zip(start[0].tolist(), stop[0].tolist(), strict=True))
    lines = [rows * group] if queries < BLOCK_ROWS else [rows] * group
    seen = 0
    for line in lines:
        for first in range(0, len(line), BLOCK_ROWS):
            block = line[first : first + BLOCK_ROWS]
            seen += max(b for _, b in block) - min(a for a, _ in block)
    least = _bytes(query, out, lse) + seen * 2 * dim * dtype.itemsize
    if ranges is not None:
        least += 8 * queries * group

    def total(name: str) -> int:
        """Of the head with keys alone."""
        of_idle = sum(int(launch[name]) for launch in idle) * (kv_heads - 1) // kv_heads
        return sum(int(launch[name]) for launch in launches) - of_idle

    return Traffic(
        case,
        str(dtype).removeprefix("torch."),
        total("global_bytes_read"),
        total("global_bytes_written"),
        least,
        total("matrix_instructions"),
        total("bank_conflicts"),
    )


def traffic() -> Iterator[Traffic]:
    for dtype in (torch.bfloat16, torch.float32):
        for shape in SHAPES:
            yield count(*shape, dtype)


def _resources(path: Path, named: tuple[str, ...]) -> tuple[list[str], dict[tuple[str, ...], dict[str, str]]]:
    """The architectures of a table, and for each kernel what is said of it on each of them."""
    found: dict[tuple[str, ...], dict[str, str]] = {}
    with path.open() as file:
        for row in csv.DictReader(file):
            kilobytes = int(row["shared_bytes"]) / 1024
            text = f"{row['registers']} {kilobytes:.0f}K {float(row['occupancy']):.0%}"
            if int(row["spilled_bytes"]):
                text += f", spills {row['spilled_bytes']} B"
            found.setdefault(tuple(row[name] for name in named), {})[row["arch"]] = text
    return list(dict.fromkeys(arch for of_kernel in found.values() for arch in of_kernel)), found


def show(console: Any) -> None:
    """Prints the tables."""
    # Read when the kernels run for the first time.
    os.environ.setdefault("DEVICE_ON_HOST_BANK_CONFLICTS", "1")
    for title, path, named in (
        ("CUDA", TABLES / "cuda" / "resources.csv", ("source", "kernel")),
        ("Triton", TABLES / "triton" / "resources.csv", ("kernel", "level", "dtype", "head_dim")),
    ):
        architectures, found = _resources(path, named)
        table = terminal.table(f"{title}: registers a thread, shared memory a block, occupancy")
        for name in (*named, *(f"sm_{arch}" for arch in architectures)):
            table.add_column(name)
        for names, texts in found.items():
            table.add_row(*names, *(texts.get(arch, "") for arch in architectures))
        console.print(table)
    reason = cuda.why_not("device_on_host")
    if reason is not None:
        console.print(f"no bytes counted: {reason}")
        return
    table = terminal.table("CUDA attention, forward, one key head of one batch entry")
    table.add_column("case")
    for name in ("dtype", "read", "written", "of the least", "matrix instructions", "bank conflicts"):
        table.add_column(name, justify="right")
    for one in traffic():
        table.add_row(
            one.case,
            one.dtype,
            f"{one.read:,}",
            f"{one.written:,}",
            f"{one.ratio:.3f}",
            f"{one.matrix_instructions:,}",
            f"{one.bank_conflicts:,}",
        )
    console.print(table)
    console.print("No times: nothing here has run on a GPU.")
