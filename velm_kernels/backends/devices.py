"""What backends ask about a GPU, once for each."""

from __future__ import annotations

import functools

import torch


@functools.lru_cache(maxsize=64)
def capability(index: int | None) -> int:
    """The compute capability of a GPU as one number: 90 for 9.0."""
    major, minor = torch.cuda.get_device_capability(index)
    return major * 10 + minor
