"""Which way the arrows of the library point: modules, operators, backends, kernels; no family into another's rooms."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "velm_kernels"
FAMILIES = ("attention", "fusion", "linear", "losses", "pooling", "retrieval", "sequence")
# What lies below the families knows none of them.
BELOW = ("backends", "triton")


def imports(path: Path) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(module, names) of every import of the library in a source."""
    package = ("velm_kernels", *path.relative_to(PACKAGE).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, ()
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            yield module, tuple(alias.name for alias in node.names)


def sources(folder: str) -> list[Path]:
    return sorted((PACKAGE / folder).rglob("*.py"))


def family_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if parts[0] == "velm_kernels" and len(parts) > 1 else ""


def is_public(family: str, module: str, names: tuple[str, ...]) -> bool:
    """Whether users are given these names, by the family or by the room of an operator."""
    given = set(importlib.import_module(f"velm_kernels.{family}").__all__)
    return bool(names) and set(names) <= given and module in (f"velm_kernels.{family}", *_rooms(family, names))


def _rooms(family: str, names: tuple[str, ...]) -> Iterator[str]:
    return (f"velm_kernels.{family}.{name}" for name in names)


@pytest.mark.parametrize("family", FAMILIES)
def test_of_another_family_only_what_users_are_given(family: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)}: {', '.join(names)} from {module}"
        for path in sources(family)
        for module, names in imports(path)
        if (other := family_of(module)) in FAMILIES and other != family and not is_public(other, module, names)
    ]
    assert wrong == []


@pytest.mark.parametrize("folder", BELOW)
def test_what_lies_below_knows_no_family(folder: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)}: {module}"
        for path in sources(folder)
        for module, _ in imports(path)
        if family_of(module) in FAMILIES
    ]
    assert wrong == []


def test_sources_of_a_family_include_none_of_another() -> None:
    wrong = []
    for path in sorted((ROOT / "csrc").rglob("*")):
        family = path.relative_to(ROOT / "csrc").parts[0]
        if path.suffix not in (".h", ".cpp", ".cu") or family not in FAMILIES:
            continue
        included = re.findall(r'^#include "(\w+)/', path.read_text(), re.M)
        wrong += [f"{path.relative_to(ROOT)}: {name}" for name in included if name in FAMILIES and name != family]
    assert wrong == []
