"""Files of an index, in the format of safetensors: written aside and put in place at once, read by mapping.

A file has the tensors ids, features, offsets and metadata (the JSON of all rows, one after the other), those of the
approximate search, if there is any, and a CRC-32 of each. It is written from front to back, some rows at a time.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

FORMAT, VERSION = "velm_kernels.retrieval", 1
DTYPES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.uint8: "U8",
}
ASIDE = ".aside"
CHECKSUMS = "checksums"


@dataclass(frozen=True)
class Part:
    """A tensor of a file, which comes in pieces."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: Callable[[], Iterable[Tensor]]

    @property
    def bytes(self) -> int:
        return self.dtype.itemsize * torch.Size(self.shape).numel()


def whole(name: str, tensor: Tensor) -> Part:
    return Part(name, tensor.dtype, tuple(tensor.shape), lambda: (tensor,))


def write(path: str | os.PathLike[str], facts: Mapping[str, str], parts: Iterable[Part]) -> None:
    """Puts a file at ``path``: whoever reads it, and whatever ends this process, finds the one that was there or the
    new one, whole. A file that others have mapped stays theirs."""
    # From wide numbers to bytes, so that each is aligned.
    parts = sorted(parts, key=lambda part: -part.dtype.itemsize)
    facts = {"format": FORMAT, "version": str(VERSION), **facts, CHECKSUMS: " ".join(part.name for part in parts)}
    with replaced(path) as file:
        file.write(
            _header(facts, [*parts, whole(CHECKSUMS, torch.empty(4 * len(parts), dtype=torch.uint8, device="cpu"))])
        )
        checksums = b""
        for part in parts:
            checksum, size = 0, 0
            for piece in part.pieces():
                seen = _bytes_of(piece)
                checksum, size = zlib.crc32(seen, checksum), size + len(seen)
                file.write(seen)
            if size != part.bytes:
                raise RuntimeError(f"{part.name} has {size} bytes, not the {part.bytes} that were announced")
            checksums += checksum.to_bytes(4, "little")
        file.write(checksums)


def _header(facts: Mapping[str, str], parts: Iterable[Part]) -> bytes:
    told: dict[str, Any] = {"__metadata__": dict(facts)}
    at = 0
    for part in parts:
        told[part.name] = {"dtype": DTYPES[part.dtype], "shape": part.shape, "data_offsets": [at, at + part.bytes]}
        at += part.bytes
    text = json.dumps(told).encode()
    # What follows begins at a multiple of 64 bytes.
    text += b" " * (-(len(text) + 8) % 64)
    return len(text).to_bytes(8, "little") + text


def _bytes_of(tensor: Tensor) -> Any:
    """The memory of a tensor, which has to live as long as this is used."""
    tensor = tensor.detach().cpu().contiguous()
    seen = (ctypes.c_char * (tensor.numel() * tensor.element_size())).from_address(tensor.data_ptr())
    seen.tensor = tensor  # type: ignore[attr-defined]
    return memoryview(seen).cast("B")


@contextlib.contextmanager
def replaced(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A file beside ``path`` to write on, which takes its place when all is on the disk."""
    # A link stays one.
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise IsADirectoryError(f"path: expected that of a file, given the folder {target}")
    remove_left_over(target)
    aside, file = _aside(target)
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            # Closing releases the lock by which others know that this is not left over: that comes last.
            os.replace(aside, target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(aside)
        raise
    sync_folder(target.parent)


def sync_folder(folder: Path) -> None:
    """The names in a folder are on the disk after this."""
    at = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(at)
    finally:
        os.close(at)


def _aside(target: Path) -> tuple[Path, BinaryIO]:
    """A new file, locked as long as it is open: what a process leaves that was killed is not locked."""
    while True:
        path = target.with_name(f".{target.name}.{os.urandom(4).hex()}{ASIDE}")
        file = open(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666), "wb")  # noqa: SIM115
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            # Another process may have taken it for left over before it was locked.
            if os.path.exists(path):
                return path, file
        except BaseException:
            os.unlink(path)
            file.close()
            raise
        file.close()


def remove_left_over(target: Path) -> None:
    """Removes what saves of ``target`` have left whose processes were killed."""
    for path in target.parent.glob(f".{glob_escaped(target.name)}.*{ASIDE}"):
        with contextlib.suppress(OSError), open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.unlink(path)


def glob_escaped(name: str) -> str:
    return "".join(f"[{one}]" if one in "*?[" else one for one in name)


@dataclass(frozen=True)
class Contents:
    """What a file holds: its facts, and its tensors by name."""

    facts: Mapping[str, str]
    tensors: Mapping[str, Tensor]


def read(path: str | os.PathLike[str], memory_map: bool, but: Iterable[str] = ()) -> Contents:
    """The tensors of a file, other than those in ``but``; on the CPU, mapped or in memory.

    The checksums of what is in memory are compared; of a mapped file all but that of features, which are not read."""
    safetensors = _library()
    path = os.fspath(path)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"path: expected a file, and there is none at {path}")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            facts = file.metadata() or {}
            _check_format(path, facts)
            names = facts.get(CHECKSUMS, "").split()
            tensors = {name: file.get_tensor(name) for name in names if name not in but}
            checksums = bytes(_bytes_of(file.get_tensor(CHECKSUMS)))
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path}: expected a whole index, and it is broken or cut short: {error}") from None
    if len(checksums) != 4 * len(names):
        raise ValueError(f"{path}: expected a checksum of each tensor, given {len(checksums)} bytes of them")
    for at, name in enumerate(names):
        if name not in tensors or (memory_map and name == "features"):
            continue
        if zlib.crc32(_bytes_of(tensors[name])).to_bytes(4, "little") != checksums[4 * at : 4 * at + 4]:
            raise ValueError(f"{path}: {name} are not what was written: the file is broken")
    if not memory_map:
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    return Contents(facts, tensors)


def _library() -> Any:
    if sys.byteorder != "little":
        raise RuntimeError("files of an index are read on machines whose numbers begin with the lowest byte")
    try:
        import safetensors
    except ImportError as error:
        raise ImportError("load needs the package safetensors: pip install 'velm_kernels[retrieval]'") from error
    return safetensors


def _check_format(path: str, facts: Mapping[str, str]) -> None:
    if facts.get("format") != FORMAT:
        raise ValueError(f"{path}: expected the file of an index, given other safetensors ({facts.get('format')})")
    if facts.get("version") != str(VERSION):
        raise ValueError(
            f"{path}: expected version {VERSION} of the format, given {facts.get('version')}; another version of "
            "velm_kernels has written it"
        )
