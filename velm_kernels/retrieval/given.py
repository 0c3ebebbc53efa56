"""Checks of what an index is given."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from velm_kernels import checks

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
METRICS = ("dot", "cosine", "l2")
ENGINES = ("exact", "faiss")
# Made once: dumps with other than the usual settings makes one for every call.
_ENCODE = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode
Where = Mapping[str, Any] | Callable[[Any], bool]


def features(name: str, value: Any, dim: int, dtype: torch.dtype, device: torch.device, rows: str = "n") -> Tensor:
    """``(rows, dim)`` in the dtype of the index, all of them finite."""
    checks.dtype_in(name, checks.tensor(name, value), checks.FLOAT_DTYPES)
    if value.dim() != 2 or value.shape[1] != dim:
        raise ValueError(f"{name}: expected ({rows}, dim) with dim = {dim}, given {tuple(value.shape)}")
    if value.device != device:
        raise ValueError(f"{name}: expected device {device} like the index, given {value.device}")
    if value.is_meta:
        raise ValueError(f"{name}: expected a tensor with values, given {checks.describe(value)}")
    given, value = value.detach(), value.detach().to(dtype)
    finite = value.isfinite().all(1)
    if not bool(finite.all()):
        row = int((~finite).nonzero()[0])
        first = float(given[row][~value[row].isfinite()][0])
        beside = "" if given.dtype == dtype else f" in {dtype}"
        raise ValueError(f"{name}: expected finite numbers{beside}, given {first} in row {row}")
    return value


def ids(name: str, value: Any, rows: int | None = None) -> Tensor:
    """``(rows,)`` int64 on the CPU, none negative, all different."""
    found = some_ids(name, value)
    if found.dim() != 1 or (rows is not None and len(found) != rows):
        expected = "(rows,)" if rows is None else f"(rows,) = ({rows},)"
        raise ValueError(f"{name}: expected {expected}, given {tuple(found.shape)}")
    if len(found) and int(found.min()) < 0:
        raise ValueError(f"{name}: expected integers from 0 on, given {int(found.min())}")
    if len(found) > 1 and not bool((found[1:] > found[:-1]).all()):
        ordered = found.sort().values
        twice = ordered[1:][ordered[1:] == ordered[:-1]]
        if len(twice):
            raise ValueError(f"{name}: expected different ids, given {listed(twice.unique())} more than once")
    return found


def some_ids(name: str, value: Any) -> Tensor:
    """Integers of any shape as int64 on the CPU, from a tensor, an integer or a sequence of them."""
    if not isinstance(value, Tensor):
        try:
            if isinstance(value, (str, bytes)):
                raise TypeError
            given = value if isinstance(value, int) else list(value)
            value = torch.tensor(given, dtype=None if given != [] else torch.int64, device="cpu")
        except (TypeError, ValueError, RuntimeError, OverflowError):
            raise TypeError(f"{name}: expected integers below 2^63, given {checks.describe(value)}") from None
    if value.dtype not in checks.INTEGER_DTYPES:
        raise TypeError(f"{name}: expected integers, given {checks.describe(value)}")
    return value.detach().to("cpu", torch.int64)


def listed(values: Tensor, most: int = 5) -> str:
    """The first few of many ids."""
    shown = ", ".join(map(str, values[:most].tolist()))
    return shown + (f" and {len(values) - most} more" if len(values) > most else "")


def there(name: str, given: Tensor, order: Tensor) -> None:
    """Every id was found."""
    if len(missing := given[order < 0]):
        raise ValueError(f"{name}: expected ids that are in the index, given {listed(missing)}")


def new(name: str, given: Tensor, order: Tensor) -> None:
    if len(known := given[order >= 0]):
        raise ValueError(f"{name}: expected ids that are not in the index yet, given {listed(known)}")


def texts(name: str, value: Any, rows: int) -> list[bytes]:
    """The JSON of every row, nothing for None."""
    if value is None:
        return [b""] * rows
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
        raise TypeError(f"{name}: expected a list with what JSON can hold for each row, given {checks.describe(value)}")
    if len(value) != rows:
        raise ValueError(f"{name}: expected {rows} entries, one for each row, given {len(value)}")
    return [_text(f"{name}[{row}]", one) for row, one in enumerate(value)]


def _text(name: str, value: Any) -> bytes:
    if value is None:
        return b""
    try:
        return _ENCODE(value).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise TypeError(f"{name}: expected what JSON can hold, given {checks.describe(value)} ({error})") from None


def untexted(text: bytes) -> Any:
    return json.loads(text.decode()) if text else None


def condition(name: str, where: Any) -> Callable[[bytes], bool]:
    """Whether the metadata of a row, as JSON, is what ``where`` asks for."""
    if callable(where):
        return lambda text: bool(where(untexted(text)))
    if not isinstance(where, Mapping):
        raise TypeError(
            f"{name}: expected values by key, or a function of the metadata, given {checks.describe(where)}"
        )
    wanted = [
        (key, tuple(one) if isinstance(one, (list, tuple, set, frozenset)) else (one,)) for key, one in where.items()
    ]

    def holds(text: bytes) -> bool:
        found = untexted(text)
        return isinstance(found, dict) and all(key in found and found[key] in values for key, values in wanted)

    return holds
