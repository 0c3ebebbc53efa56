"""What add_at_tokens is tried with."""

from __future__ import annotations

from velm_kernels.cases import Arguments, Case, Draw
from velm_kernels.sequence.add_at_tokens import reference
from velm_kernels.sequence.places import placeholders


def _added(draw: Draw, batch: int, tokens: int, dim: int) -> Arguments:
    mask, count = placeholders(batch, tokens)
    return {"hidden": draw(batch, tokens, dim), "features": draw(count, dim), "mask": mask}


CASES = [
    Case(
        "add_at_tokens",
        "",
        _added,
        reference.add_at_tokens,
        ("hidden", "features"),
        sizes={"batch": 2, "tokens": 7, "dim": 12},
        larger={"batch": 3, "tokens": 130, "dim": 530},
        published={"deepstack": {"batch": 1, "tokens": 8192, "dim": 2560}},
    )
]
