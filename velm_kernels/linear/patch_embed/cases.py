"""What patch_embed is tried with."""

from __future__ import annotations

from collections.abc import Callable

from velm_kernels.cases import Arguments, Case, Draw
from velm_kernels.linear.patch_embed import reference


def _picture(draw: Draw, batch: int, channels: int, patch: int, rows: int, columns: int, embed: int) -> Arguments:
    # A row and two columns of pixels are left over.
    pixels = draw(batch, channels, rows * patch + 1, columns * patch + 2)
    weight = draw(embed, channels, patch, patch) * max(1, channels * patch * patch) ** -0.5
    return {"pixels": pixels, "weight": weight, "bias": draw(embed)}


def _flattened(draw: Draw, batch: int, channels: int, patch: int, tokens: int, embed: int) -> Arguments:
    features = channels * 2 * patch * patch
    weight = draw(embed, channels, 2, patch, patch) * max(1, features) ** -0.5
    return {"pixels": draw(batch * tokens, features), "weight": weight}


def _film(draw: Draw, batch: int, channels: int, frames: int, patch: int, rows: int, embed: int) -> Arguments:
    pixels = draw(batch, channels, 2 * frames, rows * patch, rows * patch)
    weight = draw(embed, channels, 2, patch, patch) * max(1, channels * 2 * patch * patch) ** -0.5
    return {"pixels": pixels, "weight": weight, "bias": draw(embed), "layout": "channels_first"}


def _sizes(**sizes: int) -> dict[str, int]:
    return sizes


def _case(
    name: str,
    make: Callable[..., Arguments],
    differentiable: tuple[str, ...],
    sizes: dict[str, int],
    larger: dict[str, int],
    not_zero: tuple[str, ...],
    published: dict[str, dict[str, int]],
    numbers_only: bool = False,
) -> Case:
    return Case(
        "patch_embed",
        name,
        make,
        reference.patch_embed,
        differentiable,
        sizes=sizes,
        larger=larger,
        published=published,
        # Torch has no convolution of no pixels.
        not_zero=not_zero,
        numbers_only=numbers_only,
    )


CASES = [
    _case(
        "",
        _picture,
        ("pixels", "weight", "bias"),
        _sizes(batch=2, channels=3, patch=4, rows=2, columns=3, embed=8),
        _sizes(batch=3, channels=3, patch=7, rows=5, columns=6, embed=70),
        ("channels", "patch", "rows", "columns", "embed"),
        {
            "patches-clip": _sizes(batch=8, channels=3, patch=16, rows=14, columns=14, embed=768),
            "patches-siglip": _sizes(batch=4, channels=3, patch=14, rows=27, columns=27, embed=1152),
        },
    ),
    _case(
        "flattened",
        _flattened,
        ("pixels", "weight"),
        _sizes(batch=2, channels=3, patch=2, tokens=5, embed=8),
        _sizes(batch=3, channels=3, patch=5, tokens=37, embed=70),
        (),
        {"patches-qwen2-vl": _sizes(batch=1, channels=3, patch=14, tokens=1024, embed=1280)},
    ),
    _case(
        "film",
        _film,
        ("pixels", "weight", "bias"),
        _sizes(batch=2, channels=2, frames=2, patch=3, rows=2, embed=5),
        _sizes(batch=2, channels=3, frames=2, patch=5, rows=4, embed=33),
        ("channels", "frames", "patch", "rows", "embed"),
        {},
        numbers_only=True,
    ),
]
