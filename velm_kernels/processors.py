"""What is known of processors: one table of rules by microarchitecture, each line with the measurement it rests on.

Rules choose between this library's kernels and torch's on the CPU. They are fixed functions of processor, dtype and
sizes; nothing is timed when a choice is made. A processor that no line speaks of gets the last one, the conservative
choice: torch wherever torch has an instruction for the dtype.

To add a line: run ``python -m benchmarks sweep`` on the processor, and write what it measured into ``measured``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

NEVER = 1 << 62
# Keys of a row that are a vector of torch's attention for CPUs: in shorter ones it loses NaN.
TORCH_ATTENTION_KEYS = 16


# Hashed by identity: every call of an operator asks caches for what is known of the one processor.
@dataclass(frozen=True, eq=False)
class Processor:
    """What cpuid says: the vendor's name, family and model number, and the instruction sets by the compilers' names."""

    vendor: str = ""
    family: int = 0
    model: int = 0
    features: frozenset[str] = frozenset()

    def has(self, *features: str) -> bool:
        """Whether it has any of ``features``."""
        return not self.features.isdisjoint(features)


@dataclass(frozen=True)
class Line:
    """Where this library's kernels are faster than torch's on processors of one kind.

    Attributes:
        name: of the microarchitecture.
        applies: whether a processor is of this kind.
        measured: processor, date and figures that the line rests on.
        float32_rows: rows of x from which on this library's float32 product is the faster one.
        attention_scores: scores (batch times heads times queries times keys) up to which plain attention in float32 is
            faster by torch.
        attention_recorded: the same with a gradient, by torch's kernel or by forming the scores.
        attention_widest: head_dim from which on, and not at it, plain attention in float32 with many scores is left to
            torch, its forward pass only where nothing is causal.
        bfloat16_attention: whether plain attention in bfloat16 is faster here than by torch, forward.
        bfloat16_attention_backward: queries times keys times head_dim up to which its gradients are faster here.
        bfloat16_attention_recorded: scores up to which attention in bfloat16 with a gradient is faster by forming them.
        steps: elements of the result up to which torch's operators behind a float32 or float16 product of torch's are
            faster than one fused pass.
        bfloat16_steps: the same for bfloat16.
        bfloat16_products: whether operators that are products in bfloat16, but for :func:`velm_kernels.linear`, are
            faster by this library's product.
    """

    name: str
    applies: Callable[[Processor], bool]
    measured: str
    float32_rows: int = NEVER
    attention_scores: int = 1 << 15
    attention_recorded: int = 1 << 15
    attention_widest: int = 256
    bfloat16_attention: bool = True
    bfloat16_attention_backward: int = NEVER
    bfloat16_attention_recorded: int = 0
    steps: int = 1 << 15
    bfloat16_steps: int = 1 << 15
    bfloat16_products: bool = True


def _is_zen_5_of_full_width(processor: Processor) -> bool:
    # Servers and desktops. The models for laptops (0x20 to 0x2f, 0x60 to 0x6f) execute 512-bit instructions in two
    # halves, as Zen 4 does.
    models = (*range(0x20), *range(0x40, 0x50))
    return _is_amd_with_avx512(processor) and processor.family == 26 and processor.model in models


def _is_amd_with_avx512(processor: Processor) -> bool:
    return processor.vendor == "AuthenticAMD" and processor.has("avx512f")


# The first line that applies holds. Features are asked before model numbers, which virtual machines make up.
TABLE = (
    Line(
        "with AMX",
        lambda processor: processor.has("amx-bf16"),
        "Intel server, AMX and AVX512-FP16, 1 thread, 2026-11-29. This library over torch: products in float32 0.48 "
        "to 0.88 from 16 to 2048 rows of 768, in bfloat16 0.09 to 0.32 (torch reaches 1.0 TFLOP/s), in float16 0.52 to "
        "0.91; plain attention forward in bfloat16 0.28 to 0.49, in float16 1.12 to 1.31, in float32 0.8 at 8 heads of "
        "128 x 128 and 0.97 to 1.24 from 197 x 197 on; its gradients in bfloat16 1.4 at 197 x 197 x 64, 1.0 at 197 x "
        "197 x 128, 0.9 at 512 x 512 x 64, 0.6 at 512 x 512 x 128. Redwood Cove, 2 threads, 2026-11-30, the sweep: one "
        "pass of gelu or residual behind torch's product over torch's operators, in bfloat16 0.46 to 0.88 at 2^16 "
        "elements of the result, 0.74 to 0.86 at 2^20 and more with gelu and 0.76 to 0.95 with a residual, in float32 "
        "0.45 to 0.99 at 2^16, 0.74 to 1.01 at 2^18, 0.99 to 1.06 from 3 * 2^18 on; in bfloat16 low_rank_fusion 0.30 "
        "to 0.57 forward and 0.51 to 1.6 with backward from 768 features on, bilinear over the product with outer "
        "products 0.53 to 0.73 forward from 64 rows on with 32 to 128 outputs, products in float32 over torch.bmm 0.30 "
        "to 0.55; attention with a gradient over the best of torch's forms in float32 0.26 to 0.92 up to 2^19 scores, "
        "0.95 to 1.5 above but for heads of 256, in bfloat16 0.28 to 0.98 up to 512 x 512; heads of 512 in float32, "
        "256 to 1024 queries, forward 0.98 to 1.06, causal 0.33 to 0.76, backward 1.3 to 1.8, causal 1.1 to 1.6, "
        "decode of 4096 keys 0.5",
        attention_scores=1 << 18,
        attention_recorded=1 << 19,
        bfloat16_attention=False,
        bfloat16_attention_backward=1 << 23,
        bfloat16_attention_recorded=1 << 22,
        steps=1 << 18,
        bfloat16_steps=NEVER,
        bfloat16_products=False,
    ),
    Line(
        "Zen 5 of full width",
        _is_zen_5_of_full_width,
        "torch's float32 product leaves half of the multiply-add peak unused; below 32 rows it is bound by reading the "
        "weight",
        float32_rows=32,
    ),
    Line(
        "Zen 4, and Zen 5 of half width",
        lambda processor: _is_amd_with_avx512(processor) and processor.family in (25, 26),
        "Zen 4, 2 threads: peak 238 GFLOP/s, torch's float32 product 190; this library over torch 0.59 at 64 x 768 -> "
        "768, 0.79 to 0.90 at 256 rows, 0.99 at 2048 x 768 -> 3072",
    ),
    Line(
        "Intel with AVX-512",
        lambda processor: processor.vendor == "GenuineIntel" and processor.has("avx512f"),
        "Cascade Lake, 2 threads, 2026-11-22: torch's float32 product, by MKL, is the faster one",
    ),
    Line("not in the table", lambda processor: True, "nothing"),
)


@functools.cache
def line_for(processor: Processor) -> Line:
    """The line of the table that holds for ``processor``."""
    return next(line for line in TABLE if line.applies(processor))


@functools.cache
def this_processor() -> Processor:
    """The processor that this runs on; one without a name where the module of facts was not built."""
    try:
        from velm_kernels import _facts
    except ImportError:
        return Processor()
    facts = _facts.cpu()
    if "family" not in facts:
        # A module of an older build, which `velm info` calls stale.
        return Processor()
    return Processor(facts["vendor"], facts["family"], facts["model_number"], frozenset(facts["features"]))


def rules() -> Line:
    """The line of the table that holds for the processor that this runs on."""
    return line_for(this_processor())
