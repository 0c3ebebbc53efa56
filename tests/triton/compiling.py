"""Compiles Triton kernels for GPUs that need not be there, and reads from the result what they would occupy."""

from __future__ import annotations

import hashlib
import inspect
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from velm_kernels.backends.triton import Launch

# Shared memory one block may use, in bytes; registers, blocks and threads of a multiprocessor.
SHARED_LIMIT = {80: 166912, 90: 232448, 100: 232448, 120: 101376}
SHARED_TOTAL = {80: 167936, 90: 233472, 100: 233472, 120: 102400}
REGISTERS = 65536
THREADS = {80: 2048, 90: 2048, 100: 2048, 120: 1536}
BLOCKS = {80: 32, 90: 32, 100: 32, 120: 24}

MATRIX = (
    ("tcgen05", re.compile(r"\btcgen05\.mma")),
    ("wgmma", re.compile(r"\bwgmma\.mma_async")),
    ("mma.sync", re.compile(r"\bmma\.sync")),
)
_BITS = {
    "int8": "i8",
    "float16": "fp16",
    "bfloat16": "bf16",
    "float32": "fp32",
    "int32": "i32",
    "int64": "i64",
    "uint8": "u8",
}


@dataclass(frozen=True)
class Resources:
    registers: int
    spilled_bytes: int
    shared_bytes: int
    num_warps: int
    occupancy: float
    matrix: str


def _describe(value: Any, path: tuple[int, ...], constants: dict[Any, Any], attributes: dict[Any, Any]) -> Any:
    """The signature entry of one argument, as a launch on a GPU would specialise it: 1 and None are constants,
    multiples of 16 and (of torch's allocator) pointers are known to be divisible."""
    if isinstance(value, tuple):
        parts = [_describe(part, (*path, i), constants, attributes) for i, part in enumerate(value)]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    if value is None or (isinstance(value, int) and value == 1):
        constants[path] = value
        return "constexpr"
    if isinstance(value, torch.Tensor):
        attributes[path] = [["tt.divisibility", 16]]
        return "*" + _BITS[str(value.dtype).removeprefix("torch.")]
    if isinstance(value, float):
        return "fp32"
    if value % 16 == 0:
        attributes[path] = [["tt.divisibility", 16]]
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def source(launch: Launch) -> ASTSource:
    names = launch.kernel.arg_names
    constants: dict[Any, Any] = {}
    attributes: dict[Any, Any] = {}
    signature = {
        name: _describe(value, (i,), constants, attributes)
        for i, (name, value) in enumerate(zip(names, launch.arguments, strict=False))
    }
    for name, value in launch.constants.items():
        signature[name] = "constexpr"
        constants[(names.index(name),)] = value
    ordered = {name: signature[name] for name in names}
    return ASTSource(fn=launch.kernel, signature=ordered, constexprs=constants, attrs=attributes)


def digest(kernel: Any) -> str:
    """Tells the source text of a kernel, with all that it calls and the constants that it knows, from any other."""
    found: dict[str, str] = {}

    def visit(function: Any) -> None:
        name = f"{function.__module__}.{function.__qualname__}"
        if name in found:
            return
        found[name] = inspect.getsource(function)
        for used in function.__code__.co_names:
            value = function.__globals__.get(used)
            if inspect.isfunction(inner := getattr(value, "fn", None)):
                visit(inner)
            elif isinstance(value, triton.language.constexpr):
                found[f"{name}.{used}"] = repr(value.value)

    visit(kernel.fn)
    return hashlib.sha256("\n".join(map(str, sorted(found.items()))).encode()).hexdigest()[:8]


def compile_for(launch: Launch, arch: int) -> Any:
    options = {
        "num_warps": launch.config.num_warps,
        "num_stages": launch.config.num_stages,
        "enable_fp_fusion": True,
    }
    return triton.compile(source(launch), target=GPUTarget("cuda", arch, 32), options=options)


def _usage(cubin: bytes) -> str:
    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run(
            [tool, "--dump-resource-usage", file.name], check=True, capture_output=True, text=True
        ).stdout


def occupancy(arch: int, registers: int, shared: int, num_warps: int) -> float:
    """Fraction of a multiprocessor's threads that can be resident."""
    # Registers are given to warps in units of 256, shared memory to blocks in units of 128 bytes beside 1 KiB of the
    # system's.
    registers_a_block = num_warps * -(-registers * 32 // 256) * 256
    shared_a_block = -(-shared // 128) * 128 + 1024
    blocks = min(
        REGISTERS // registers_a_block,
        SHARED_TOTAL[arch] // shared_a_block,
        BLOCKS[arch],
        THREADS[arch] // (32 * num_warps),
    )
    return blocks * num_warps * 32 / THREADS[arch]


def resources(launch: Launch, arch: int) -> Resources:
    compiled = compile_for(launch, arch)
    usage = _usage(compiled.asm["cubin"])
    registers = int(re.search(r"REG:(\d+)", usage).group(1))  # type: ignore[union-attr]
    # STACK are local arrays and spilled registers together; these kernels have no local arrays.
    spilled = int(re.search(r"STACK:(\d+)", usage).group(1))  # type: ignore[union-attr]
    shared = int(compiled.metadata.shared)
    ptx = compiled.asm["ptx"]
    matrix = "+".join(name for name, pattern in MATRIX if pattern.search(ptx)) or "none"
    warps = int(re.search(r"\.reqntid (\d+)", ptx).group(1)) // 32  # type: ignore[union-attr]
    return Resources(registers, spilled, shared, warps, round(occupancy(arch, registers, shared, warps), 3), matrix)
