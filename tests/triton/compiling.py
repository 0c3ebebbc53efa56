"""Compiles Triton kernels for GPUs that need not be there, and reads from the result what they would occupy."""

from __future__ import annotations

import hashlib
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
import triton.backends.nvidia
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend

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


def _options(launch: Launch) -> dict[str, Any]:
    return {
        "num_warps": launch.config.num_warps,
        "num_stages": launch.config.num_stages,
        "enable_fp_fusion": True,
    }


def lower(launch: Launch, arch: int) -> str:
    """What this version of Triton makes of a kernel's source for the compiler behind it (MLIR, after its first passes).

    Functions are inlined there, branches not taken are gone, and so is what the source calls things: what the compiler
    reads after this is the text that is returned, and nothing else but the architecture and the options."""
    target = GPUTarget("cuda", arch, 32)
    compiler = make_backend(target)
    asked = source(launch)
    options = compiler.parse_options(_options(launch) | asked.parse_options())
    context = ir.context()
    ir.load_dialects(context)
    compiler.load_dialects(context)
    stages: dict[str, Any] = {}
    compiler.add_stages(stages, options, asked.language)
    generators = compiler.get_codegen_implementation(options)
    module = asked.make_ir(target, options, generators, compiler.get_module_map(), context)
    # Without lines of the source; the kernel's own name is the last one.
    return re.sub(r"(?<=tt\.func public @)\w+", "kernel", stages["ttir"](module, {}).str_nodebug())


def digest(launch: Launch, arch: int) -> str:
    """Tells what is compiled for an instance from everything else."""
    return hashlib.sha256(f"{lower(launch, arch)}{arch}{_options(launch)}".encode()).hexdigest()[:8]


def compile_for(launch: Launch, arch: int) -> Any:
    return triton.compile(source(launch), target=GPUTarget("cuda", arch, 32), options=_options(launch))


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
