"""Schemas of operators and kernels, argument by argument."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Parameter(NamedTuple):
    """One argument of a schema."""

    kind: str
    name: str

    @property
    def is_tensor(self) -> bool:
        return self.kind.startswith("Tensor")

    @property
    def is_list(self) -> bool:
        return self.kind.endswith("[]")

    def optional(self) -> Parameter:
        return Parameter(self.kind if self.kind.endswith(("?", "[]")) else f"{self.kind}?", self.name)

    def __str__(self) -> str:
        return f"{self.kind} {self.name}"


def parameters(schema: str) -> list[Parameter]:
    """``"Tensor x, int n"`` in parts."""
    found = (argument.rpartition(" ") for argument in schema.split(", ") if argument)
    return [Parameter(kind, name) for kind, _, name in found]


def filled_by_kernel(names: Sequence[str], optional: Sequence[str], lists: Sequence[str] = ()) -> list[Parameter]:
    """Arguments of a kernel that it writes."""
    letters = (chr(ord("a") + i) for i in range(len(names)))
    return [
        Parameter(f"Tensor({letter}!){'?[]' if name in lists else '?' * (name in optional)}", name)
        for letter, name in zip(letters, names)
    ]
