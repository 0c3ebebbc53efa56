"""``velm info``: what is installed, what this machine is, and which backends can run here."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
from pathlib import Path
from types import ModuleType

import torch

import velm_kernels
from velm_kernels import backends
from velm_kernels.backends import cpu, cuda

HELP = "Show versions, processor, devices, and which backends are available and why others are not."
PEAK_SECONDS = 0.5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--peaks", action="store_true", help="also measure what this processor can do at most (about two seconds)"
    )


def run(args: argparse.Namespace) -> int:
    facts = _facts()
    _print("velm_kernels", [*_versions(), ("installed in", str(Path(velm_kernels.__file__).parent))])
    _print("processor", _processor(facts))
    _print("gpu", _gpus())
    _print("cpu libraries", _libraries(facts))
    _print("cuda library", _cuda_library())
    _print("backends", _backends())
    if args.peaks:
        _print("limits", _peaks(facts))
    return 0


def _print(title: str, rows: list[tuple[str, str]]) -> None:
    print(title)
    for name, value in rows:
        print(f"  {name:<22}{value}")


def _facts() -> ModuleType | None:
    try:
        from velm_kernels import _facts
    except ImportError:
        return None
    return _facts


def _versions() -> list[tuple[str, str]]:
    rows = [("velm_kernels", velm_kernels.__version__), ("python", platform.python_version())]
    for name in ("torch", "triton", "transformers"):
        try:
            rows.append((name, importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            rows.append((name, "not installed"))
    return rows


def _processor(facts: ModuleType | None) -> list[tuple[str, str]]:
    if facts is None:
        return [
            ("model", platform.processor() or platform.machine()),
            ("threads of torch", str(torch.get_num_threads())),
        ]
    found = facts.cpu()
    return [
        ("model", " ".join(filter(None, (found["vendor"], found["model"]))) or platform.machine()),
        ("instruction sets", " ".join(found["features"]) or platform.machine()),
        ("threads", f"{found['threads']} available, {torch.get_num_threads()} used by torch"),
    ]


def _gpus() -> list[tuple[str, str]]:
    missing = cuda.why_no_gpu()
    if missing is not None:
        return [("none", missing if torch.backends.cuda.is_built() else "this torch is built for CPUs alone")]
    rows = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        rows.append(
            (
                f"cuda:{index}",
                f"{properties.name}, compute capability {properties.major}.{properties.minor}, "
                f"{properties.total_memory / 2**30:.1f} GiB",
            )
        )
        if cuda.why_not_open("cuda") is None and (reason := cuda.why_not_on(index)) is not None:
            rows.append(("", f"not for the CUDA kernels: {reason}"))
    return rows


def _libraries(facts: ModuleType | None) -> list[tuple[str, str]]:
    rows = []
    try:
        used = cpu.in_use()
    except RuntimeError as error:
        rows.append(("none in use", str(error)))
        used = None
    for isa in cpu.INSTRUCTION_SETS:
        reason = cpu.why_not(isa)
        rows.append((isa, f"no: {reason}" if reason else "in use" if isa == used else "usable"))
    if facts is None:
        rows.append(("built", "velm_kernels._facts is missing, nothing is known about the build"))
    else:
        build = facts.build()
        rows.append(("built", f"by {build['compiler']} with the headers of torch {build['torch']}"))
        if build["version"] != velm_kernels.__version__:
            rows.append(("stale", f"the build is of velm_kernels {build['version']}: install the package again"))
    return rows


def _cuda_library() -> list[tuple[str, str]]:
    closed, reason = cuda.why_not_open("cuda"), cuda.why_not("cuda")
    rows = [
        ("opens", "yes" if closed is None else f"no: {closed}"),
        ("in use", "yes" if reason is None else f"no: {reason}"),
    ]
    build = cuda.build_info()
    if build:
        codes = ", ".join(f"sm_{arch}" for arch in build["isa"].split(","))
        rows.append(("machine code", f"{codes}; PTX of sm_{build['ptx']} for later devices"))
        rows.append(("built", f"with CUDA {build['cuda']} and the headers of torch {build['torch']}"))
        if build["version"] != velm_kernels.__version__:
            rows.append(("stale", f"the build is of velm_kernels {build['version']}: install the package again"))
    return rows


def _backends() -> list[tuple[str, str]]:
    """What each backend says to a small call of cross_attention on the best device here, on a GPU after a trial."""
    device, dtype = ("cpu", torch.float32) if cuda.why_no_gpu() else ("cuda", torch.float16)
    query = torch.zeros(1, 1, 1, 16, device=device, dtype=dtype)
    rows = [("for", f"{str(dtype).removeprefix('torch.')} on {device}")]
    if device == "cuda":
        # Whether kernels compile and launch shows only then; `explain` tells what was learnt.
        for name in ("cuda", "triton", "torch"):
            try:
                with backends.use_backend(name):
                    velm_kernels.cross_attention(query, query, query)
                torch.cuda.synchronize()
            except backends.NoBackendError:
                pass
            except Exception as error:
                first = str(error).partition("\n")[0]
                return [*rows, (name, f"fails, and the GPU with it: {type(error).__name__}: {first}")]
    try:
        lines = backends.explain("cross_attention", query, query, query).splitlines()
    except RuntimeError as error:
        return [*rows, ("none", str(error))]
    for line in lines[1:]:
        name, _, answer = line.strip().partition(" ")
        rows.append((name, answer.strip()))
    return rows


def _peaks(facts: ModuleType | None) -> list[tuple[str, str]]:
    if facts is None:
        return [("not measured", "velm_kernels._facts was not built")]
    bf16 = facts.peak_bf16(seconds=PEAK_SECONDS)
    return [
        ("fp32 multiply-add", f"{facts.peak_fp32(seconds=PEAK_SECONDS) / 1e9:.0f} GFLOP/s"),
        ("bf16 pair products", f"{bf16 / 1e9:.0f} GFLOP/s" if bf16 else "this processor has none"),
        ("copy", f"{facts.copy_bandwidth(seconds=PEAK_SECONDS) / 1e9:.1f} GB/s read and written"),
    ]
