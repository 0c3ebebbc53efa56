"""What every instance of every CUDA kernel occupies, as ptxas says: the table beside this file, and how it is made.

python -m tests.cuda.resources            # compiles all of them and compares with the table
python -m tests.cuda.resources --write    # writes the table
python -m tests.cuda.resources --write film gated_residual    # of these sources alone
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass, fields
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FILE = Path(__file__).with_name("resources.csv")
# Of each source, with the headers that it includes, as it was when the table was written.
DIGESTS = Path(__file__).with_name("digests.csv")
ARCHITECTURES = ("80", "90a", "100", "120")

# What a multiprocessor has: threads, shared memory in bytes and blocks. Registers are given to warps by 256.
THREADS = {"80": 2048, "90a": 2048, "100": 2048, "120": 1536}
SHARED = {"80": 167936, "90a": 233472, "100": 233472, "120": 102400}
BLOCKS = {"80": 32, "90a": 32, "100": 32, "120": 24}
REGISTERS = 65536
# The system keeps this much shared memory of every block.
RESERVED = 1024
# Kernels that multiply no matrices, or too few rows to be worth it; all others do, and by matrix instructions.
WITHOUT_PRODUCTS = re.compile(
    r"(attention_pool|count_sketches|dropout_residual|factorized_pool|film|gated_residual|gather_rows|merge_attention|cross_attention_norm|"
    r"multiscale_deformable_attention(_value)?|pool|rotary(_norms)?|rows|weighted_sum) .*|"
    r".* (add_splits|delta|gradients|inverse_norms|merge_splits|pair_maps|pair_slopes|sum_partials)_kernel<.*"
)


@dataclass(frozen=True)
class Resources:
    registers: int
    spilled_bytes: int
    shared_bytes: int
    occupancy: float
    # In the machine code; of a loop those of one turn.
    matrix_instructions: int


Key = tuple[str, str, str]


def sources() -> list[Path]:
    """The files with kernels, as the build finds them."""
    return sorted(
        path.relative_to(ROOT / "csrc")
        for pattern in ("*/cuda*.cu", "*/*/cuda*.cu")
        for path in (ROOT / "csrc").glob(pattern)
    )


def name_of(source: Path) -> str:
    """The operator whose kernels these are and what its file is called beside, or what that of a family is called."""
    is_own = len(source.parts) == 3
    return source.parent.name + source.stem.removeprefix("cuda") if is_own else source.stem.removeprefix("cuda_")


def digest(source: Path) -> str:
    """Of a source and of the headers of csrc that it includes, directly or not."""
    waiting, seen = [source], set[Path]()
    while waiting:
        path = waiting.pop()
        if path in seen or not (ROOT / "csrc" / path).exists():
            continue
        seen.add(path)
        included = re.findall(r'^#include "(.*)"', (ROOT / "csrc" / path).read_text(), re.M)
        # What threads of the host run on is not compiled here.
        waiting += [Path(name) for name in included if not name.startswith("device_on_host/")]
    whole = hashlib.sha256()
    for path in sorted(seen):
        whole.update((ROOT / "csrc" / path).read_bytes())
    return whole.hexdigest()[:16]


def read_digests() -> dict[str, str]:
    lines = DIGESTS.read_text().splitlines() if DIGESTS.exists() else []
    return {line.split(",")[0]: line.split(",")[1] for line in lines}


def is_current(source: Path) -> bool:
    """Whether the table is that of this source, so that compiling it would tell nothing new."""
    return read_digests().get(str(source)) == digest(source)


def write_digests(written: list[Path]) -> None:
    known = read_digests() | {str(source): digest(source) for source in written}
    DIGESTS.write_text("".join(f"{name},{known[name]}\n" for name in map(str, sources()) if name in known))


def occupancy(registers: int, shared_bytes: int, threads: int, arch: str) -> float:
    """The share of a multiprocessor's threads that can be there at once."""
    of_a_warp = -(-registers * 32 // 256) * 256
    by_registers = REGISTERS // of_a_warp // (threads // 32)
    by_shared = SHARED[arch] // (shared_bytes + RESERVED)
    blocks = min(by_registers, by_shared, THREADS[arch] // threads, BLOCKS[arch])
    return round(blocks * threads / THREADS[arch], 3)


def block_threads(instance: str) -> int:
    """Threads of a block, by the source's own constants; tests/device_on_host/test_traffic.py compares."""
    if instance.startswith(("pair_maps_kernel", "pair_slopes_kernel", "deformable_scan_kernel")):
        return 512
    return (
        64
        if re.match(r"(grad_query|row_sums)_kernel<float, 256>|grad_key_value_kernel<float, 256, 0>", instance)
        else 128
    )


def dynamic_shared(instance: str) -> int:
    """Bytes that a launch asks for, which ptxas does not know; tests/device_on_host/test_traffic.py compares."""
    found = re.fullmatch(r"(\w+)<(float|__half|__nv_bfloat16)(?:, (\d+))?(?:, (\d))?>", instance)
    if found is None:
        return 0
    kernel, dtype, dim = found.group(1), found.group(2), int(found.group(3) or 0)
    size = 4 if dtype == "float" else 2
    rows = block_threads(instance) // 2
    tile = rows * dim * size
    if kernel == "forward_kernel" and dim >= 64:
        keys, slots = {(2, 64): (64, 4), (2, 256): (32, 3), (4, 64): (32, 4), (4, 256): (16, 2)}.get(
            (size, dim), (64 if size == 2 else 32, 2)
        )
        return tile + slots * keys * dim * size + 1024
    if kernel in ("grad_query_kernel", "row_sums_kernel"):
        keys = 16 if rows == 32 else 32 if size == 4 or dim == 256 else 64
        return 2 * tile + 2 * keys * dim * size + 16 * rows
    if kernel == "grad_side_kernel":
        rows, columns = 64 if size * dim <= 256 else 32, 64 if size * dim == 128 else 32
        return 3 * (rows + columns) * dim * size + 6 * columns * 4
    if kernel == "grad_bias_kernel":
        keys, stages = (16, 1) if size == 4 and dim == 256 else (32 if size == 4 or dim == 256 else 64, 2)
        return stages * (tile + keys * dim * size) + 1024 + 4 * keys * 4
    if kernel == "grad_key_value_kernel":
        of_key = found.group(4) == "0"
        few = dim == 256 and (size == 4 or of_key)
        queries = 16 if few else 32 if size == 4 or dim == 256 else 64
        return tile + (tile if of_key else 8 * size) + 2 * queries * dim * size + 2 * queries * 20
    if kernel == "match_rows_kernel":
        return 2 * (64 + 32) * 64 * size
    if kernel == "key_mass_kernel":
        queries = 32 if size == 4 else 64
        return 4 * 64 * 64 * size + 2 * queries * 64 * size + 2 * queries * 20
    return 0


def instance_of(name: str) -> str:
    """A kernel's name as the table has it."""
    return re.sub(r"^void |\(.*$", "", re.sub(r"velm::cuda::|\(anonymous namespace\)::", "", name))


def parse(output: str, machine_code: str, source: Path, arch: str) -> dict[Key, Resources]:
    """What `ptxas -v` says of each kernel, and `cuobjdump -sass` shows of it."""
    found = {}
    products = {
        name: len(re.findall(r"\b[A-Z]*MMA\.", body))
        for name, body in re.findall(r"Function : (\w+)(.*?)(?=Function : |\Z)", machine_code, re.S)
    }
    names = re.findall(r"Compiling entry function '(\w+)'", output)
    plain = subprocess.run(["c++filt", *names], capture_output=True, text=True, check=True).stdout.splitlines()
    texts = re.split(r"Compiling entry function", output)[1:]
    for name, readable, text in zip(names, plain, texts, strict=True):
        spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", text)
        registers, shared = re.search(r"Used (\d+) registers", text), re.search(r"(\d+) bytes smem", text)
        assert spills is not None and registers is not None, text
        instance = instance_of(readable)
        bytes_shared = (int(shared.group(1)) if shared else 0) + dynamic_shared(instance)
        found[name_of(source), instance, arch] = Resources(
            int(registers.group(1)),
            int(spills.group(1)) + int(spills.group(2)),
            bytes_shared,
            occupancy(int(registers.group(1)), bytes_shared, block_threads(instance), arch),
            products[name],
        )
    return found


def disassembler() -> Path | None:
    """Triton brings cuobjdump along; nvcc may be installed without it."""
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        path = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        if path.exists():
            return path
    found = shutil.which("cuobjdump")
    return Path(found) if found else None


def run(*command: str | Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def compile_for(source: Path, architectures: tuple[str, ...] = ARCHITECTURES) -> dict[Key, Resources]:
    """The kernels of a source on each architecture, compiled as the build does: to PTX once, and from there on."""
    nvcc, cuobjdump = shutil.which("nvcc"), disassembler()
    assert nvcc is not None and cuobjdump is not None
    found: dict[Key, Resources] = {}
    with tempfile.TemporaryDirectory() as folder:
        ptx, cubin = Path(folder) / "kernels.ptx", Path(folder) / "kernels.cubin"
        options = ("-std=c++20", "-O3", "-DNDEBUG", "-I", ROOT / "csrc")
        run(nvcc, *options, "-arch=compute_80", "-ptx", "-o", ptx, ROOT / "csrc" / source)
        for arch in architectures:
            output = run(nvcc, f"-arch=sm_{arch}", "-Xptxas", "-v", "-cubin", "-o", cubin, ptx)
            found |= parse(output, run(cuobjdump, "-sass", cubin), source, arch)
    return found


def read() -> dict[Key, Resources]:
    if not FILE.exists():
        return {}
    with FILE.open() as file:
        return {
            (row["source"], row["kernel"], row["arch"]): Resources(
                int(row["registers"]),
                int(row["spilled_bytes"]),
                int(row["shared_bytes"]),
                float(row["occupancy"]),
                int(row["matrix_instructions"]),
            )
            for row in csv.DictReader(file)
        }


def write(table: dict[Key, Resources]) -> None:
    with FILE.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("source", "kernel", "arch", *(field.name for field in fields(Resources))))
        for key in sorted(table, key=lambda key: (key[0], key[1], ARCHITECTURES.index(key[2]))):
            writer.writerow((*key, *astuple(table[key])))


def complaints(key: Key, now: Resources, before: Resources | None) -> list[str]:
    """What is wrong with an instance, or worse than before."""
    found = []
    if now.spilled_bytes:
        found.append(f"spills {now.spilled_bytes} bytes")
    multiplies = not WITHOUT_PRODUCTS.fullmatch(f"{key[0]} {key[1]}")
    # How many there are changes with how loops are unrolled.
    if not now.matrix_instructions and (multiplies or (before is not None and before.matrix_instructions)):
        found.append("has no matrix instructions")
    if before is None:
        found.append("is not in the table: python -m tests.cuda.resources --write")
    else:
        # Registers move a little with every edit; what counts is how many blocks fit.
        if now.registers > before.registers + 8 or now.occupancy < before.occupancy:
            found.append(
                f"registers {before.registers} -> {now.registers}, occupancy {before.occupancy} -> {now.occupancy}"
            )
        if now.shared_bytes > before.shared_bytes:
            found.append(f"shared memory {before.shared_bytes} -> {now.shared_bytes}")
    return [f"{' '.join(key)}: {text}" for text in found]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="*", help="names without ending; all of them if none is given")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--jobs", type=int, default=2)
    chosen = parser.parse_args()
    wanted = [source for source in sources() if not chosen.sources or name_of(source) in chosen.sources]
    before, table = read(), dict[Key, Resources]()
    with ThreadPoolExecutor(chosen.jobs) as pool:
        for part in pool.map(compile_for, wanted):
            table |= part
    stems, known = {name_of(source) for source in sources()}, {name_of(source) for source in wanted}
    gone = [key for key in before if key not in table and (key[0] in known or key[0] not in stems)]
    if chosen.write:
        failed = [text for key, now in table.items() for text in complaints(key, now, now)]
        write({key: kept for key, kept in before.items() if key not in gone} | table)
        write_digests(wanted)
    else:
        failed = [text for key, now in table.items() for text in complaints(key, now, before.get(key))]
        failed += [f"{' '.join(key)}: is in the table and no longer compiled" for key in gone]
    print(*failed, f"{len(table)} instances, {len(failed)} complaints", sep="\n")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
