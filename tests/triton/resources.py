"""What every shipped instance of the Triton attention kernels occupies, as the compiler reports it.

    python -m tests.triton.resources                 compares resources.csv with what is compiled now
    python -m tests.triton.resources --write         writes it
    ... --arch 80 --dim 64 --dtype float16           restricts either to some instances

`resources.csv` has a row for each kernel, level (see velm_kernels.backends.triton.TABLE), element type, head dimension
and architecture: block sizes, warps and pipeline stages, registers a thread, bytes of spilled registers, bytes of
shared memory a block, the fraction of a multiprocessor's threads that can be resident, and the matrix instructions in
the PTX. bfloat16 instances differ from the float16 ones in the names of instructions alone, and are left out.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import astuple, fields
from pathlib import Path
from typing import Any

import torch

from tests.triton.compiling import SHARED_LIMIT, Resources, resources
from velm_kernels.attention import triton_attention, triton_bidirectional
from velm_kernels.attention.schema import SCALAR_NAMES, TENSOR_NAMES
from velm_kernels.backends.triton import Launch, pretend

FILE = Path(__file__).with_name("resources.csv")
ARCHITECTURES = (80, 90, 100, 120)
DIMENSIONS = (64, 128, 256)
DTYPES = ("float16", "float32")
LEVELS = ("plain", "masked", "loaded")
KINDS = ("forward", "grad_query", "grad_key_value", "grad_bias", "key_mass", "grad_side")
KEYS = ("kernel", "level", "dtype", "head_dim", "arch")
Key = tuple[str, str, str, int, int]
COLUMNS = (*KEYS, "blocks", *(field.name for field in fields(Resources)))

BATCH, HEADS, QUERIES, TOKENS = 8, 16, 1024, 1024


def _empty(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _arguments(level: str, dtype: torch.dtype, dim: int) -> dict[str, Any]:
    """A call of attention_forward that needs everything a level has."""
    given: dict[str, Any] = dict.fromkeys(TENSOR_NAMES)
    for name, length in (("query", QUERIES), ("key", TOKENS), ("value", TOKENS)):
        given[name] = _empty(BATCH, HEADS, length, dim, dtype=dtype)
    given |= {"max_seqlen_q": 0, "max_seqlen_k": 0, "scale": dim**-0.5, "norm_eps": 1e-6}
    given |= {"is_causal": level != "masked", "softcap": 0.0, "dropout_p": 0.0}
    if level != "masked":
        given["key_lengths"] = _empty(BATCH)
        given["key_mask"] = _empty(BATCH, TOKENS, dtype=torch.bool)
    if level != "plain":
        given["range_start"] = given["range_stop"] = _empty(BATCH, QUERIES)
        given["mask"] = _empty(BATCH, 1, QUERIES, TOKENS, dtype=torch.bool)
        given["bias"] = _empty(1, HEADS, QUERIES, TOKENS, dtype=dtype)
    if level == "loaded":
        given |= {"softcap": 30.0, "dropout_p": 0.1, "seed": _empty(dtype=torch.int64)}
    return given


def _launches(level: str, dtype: torch.dtype, dim: int, arch: int) -> dict[str, Launch]:
    given = _arguments(level, dtype, dim)
    tensors = [given[name] for name in TENSOR_NAMES]
    scalars = [given[name] for name in SCALAR_NAMES]
    with pretend(arch) as launches:
        out, logsumexp, _ = triton_attention.attention_forward(*tensors, *scalars, True)
        wanted = 7 if given["bias"] is None else 15
        triton_attention.attention_backward(out, logsumexp, *tensors, out, logsumexp, *scalars, wanted)
        if level != "masked":
            x = given["query"]
            mask, seed = given["key_mask"], given.get("seed")
            both = (out, out, None, None, x, x, x, x, mask, mask, seed, out, out, logsumexp, logsumexp)
            triton_bidirectional.bidirectional_attention_backward(*both, given["scale"], given["dropout_p"], 15)
    return {launch.kind: launch for launch in launches}


def instances(architectures: tuple[int, ...], dtypes: tuple[str, ...], dims: tuple[int, ...]) -> Iterator[Key]:
    for arch in architectures:
        for dtype in dtypes:
            for dim in dims:
                for level in LEVELS:
                    for kind in KINDS:
                        if (kind == "grad_bias" and level == "plain") or (kind == "grad_side" and level == "masked"):
                            continue
                        yield kind, level, dtype, dim, arch


def measure(key: Key) -> tuple[str, Resources]:
    kind, level, dtype, dim, arch = key
    launch = _launches(level, getattr(torch, dtype), dim, arch)[kind]
    c = launch.config
    return f"{c.block_m}x{c.block_n}x{c.num_stages}", resources(launch, arch)


def read() -> dict[Key, tuple[str, Resources]]:
    table = {}
    if FILE.exists():
        with FILE.open() as file:
            for row in csv.DictReader(file):
                key = (row["kernel"], row["level"], row["dtype"], int(row["head_dim"]), int(row["arch"]))
                numbers = (row[name] for name in ("registers", "spilled_bytes", "shared_bytes", "num_warps"))
                found = Resources(*(int(number) for number in numbers), float(row["occupancy"]), row["matrix"])
                table[key] = row["blocks"], found
    return table


def write(table: dict[Key, tuple[str, Resources]]) -> None:
    order = {key: i for i, key in enumerate(instances(ARCHITECTURES, DTYPES, DIMENSIONS))}
    with FILE.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for key in sorted((key for key in table if key in order), key=order.__getitem__):
            blocks, found = table[key]
            writer.writerow((*key, blocks, *astuple(found)))


def complaints(key: Key, now: Resources, before: Resources | None) -> list[str]:
    """What is wrong with an instance, or worse than before."""
    found = []
    if now.spilled_bytes:
        found.append(f"spills {now.spilled_bytes} bytes")
    if now.shared_bytes > SHARED_LIMIT[key[-1]]:
        found.append(f"needs {now.shared_bytes} bytes of shared memory, the limit is {SHARED_LIMIT[key[-1]]}")
    if now.matrix == "none":
        found.append("has no matrix instructions")
    if before is not None:
        # Registers move a little with every edit; what counts is how many blocks fit.
        if now.registers > before.registers + 16 or now.occupancy < before.occupancy:
            found.append(
                f"registers {before.registers} -> {now.registers}, occupancy {before.occupancy} -> {now.occupancy}"
            )
        if now.shared_bytes > 1.1 * before.shared_bytes:
            found.append(f"shared memory {before.shared_bytes} -> {now.shared_bytes}")
        if now.matrix != before.matrix:
            found.append(f"matrix instructions {before.matrix} -> {now.matrix}")
    return [f"{' '.join(map(str, key))}: {text}" for text in found]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--arch", type=int, nargs="*", default=ARCHITECTURES)
    parser.add_argument("--dim", type=int, nargs="*", default=DIMENSIONS)
    parser.add_argument("--dtype", nargs="*", default=DTYPES)
    parser.add_argument("--jobs", type=int, default=2)
    chosen = parser.parse_args()
    table, failed = read(), []
    keys = list(instances(tuple(chosen.arch), tuple(chosen.dtype), tuple(chosen.dim)))
    with ProcessPoolExecutor(chosen.jobs) as pool:
        for key, (blocks, now) in zip(keys, pool.map(measure, keys)):
            before = None if chosen.write else table.get(key, (blocks, None))[1]
            found = complaints(key, now, before)
            failed += found
            print(*key, blocks, *astuple(now), *found, flush=True)
            table[key] = blocks, now
            if chosen.write:
                write(table)
    print(f"{len(keys)} instances, {len(failed)} complaints")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
