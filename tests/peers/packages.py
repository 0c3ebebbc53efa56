"""Packages that do not import without something that the tests do not need."""

from __future__ import annotations

import enum
import importlib
import importlib.util
import sys
from types import ModuleType
from typing import Any

import pytest
from torch import nn


class _Interpolation(enum.Enum):
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"


class _Stub(ModuleType):
    """Has every class that is asked for."""

    InterpolationMode = _Interpolation

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return type(name, (nn.Module,), {})


def open_clip() -> Any:
    """The package open_clip, or a skip where it is not installed.

    It prepares pictures by torchvision, of which there is not one for every build of torch; its models only ask whether
    a layer is torchvision's frozen norm. Without torchvision it is given classes that do nothing, and meanwhile no
    transformers, which would look for torchvision in earnest.
    """
    if "open_clip" in sys.modules or importlib.util.find_spec("torchvision") is not None:
        return pytest.importorskip("open_clip")
    names = [
        "torchvision",
        *(f"torchvision.{name}" for name in ("transforms", "transforms.functional", "ops", "ops.misc")),
    ]
    stubs = {name: _Stub(name) for name in names}
    for name in names[1:]:
        parent, _, child = name.rpartition(".")
        setattr(stubs[parent], child, stubs[name])
    with pytest.MonkeyPatch.context() as patch:
        for name, stub in stubs.items():
            patch.setitem(sys.modules, name, stub)
        patch.setitem(sys.modules, "transformers", None)  # type: ignore[arg-type]
        return pytest.importorskip("open_clip")
