"""The rotary position embedding of queries and keys, in all layouts that vision-language models have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from velm_kernels import checks
from velm_kernels.backends import Arguments
from velm_kernels.layout import unit_last_stride
from velm_kernels.operator import Operator
from velm_kernels.sequence.rotary import tables
from velm_kernels.sequence.rotary.op import LAYOUTS, OPERATOR, WITH_NORMS


def rotary(
    query: Tensor,
    key: Tensor | None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    *,
    positions: Tensor | None = None,
    inverse_frequencies: Tensor | None = None,
    layout: str = "halves",
    sections: Sequence[int] | None = None,
    interleaved: bool = False,
    query_norm_weight: Tensor | None = None,
    key_norm_weight: Tensor | None = None,
    norm_eps: float = 1e-6,
) -> tuple[Tensor, Tensor | None]:
    """Rotates queries and keys by their positions: ``x * cos + R(x) * sin`` (Su et al., 2021), query and key in one
    pass, forward and backward.

    R turns each pair of columns by a right angle, ``(first, second)`` to ``(-second, first)``. The layout says which
    columns are a pair, of the ``rotated`` first ones; behind them columns stay as they are (partial rotation).

    ============ ====================================== ===========================================================
    layout       the partner of column i                models
    ============ ====================================== ===========================================================
    ``halves``   ``i + rotated / 2``                    Llama's ``rotate_half``: Qwen2-VL to Qwen3-VL, Pixtral, the
                                                        vision towers with 2-D positions
    ``pairs``    ``i + 1``                              Llama 4 (complex numbers), GLM-4V's text, Ernie 4.5 VL, SAM 2
    ``quarters`` ``i + rotated / 4`` within each half   Gemma 4's vision tower: height, height, width, width
    ============ ====================================== ===========================================================

    Args:
        query: ``(batch, heads, tokens, head_dim)``, float32, bfloat16, float16, or float64 (computed by the reference
            backend), of any strides: also as a part of packed ``(batch, tokens, 3, heads, head_dim)``.
        key: ``(batch, kv_heads, tokens, head_dim)`` in query's dtype, or None.
        cos, sin: ``(tokens, rotated)`` or ``(batch or 1, tokens, rotated)``, floating point, for every column of its
            own; rotated is even, by layout ``quarters`` a multiple of 4, and at most head_dim. With ``sections``
            ``(axes, batch or 1, tokens, rotated)``: one table for each axis of positions. Without both (and without
            positions) nothing is rotated, which leaves the norms.
        positions: in place of cos and sin, integers ``(tokens,)`` or ``(batch or 1, tokens)``; with ``sections`` or
            layout ``quarters`` ``(axes, tokens)`` or ``(axes, batch or 1, tokens)``. The tables, which all heads share,
            are computed in float32.
        inverse_frequencies: ``(rotated / 2,)``, what the positions of each pair of columns are multiplied with; or,
            where sections are equally long, as many as one of them has (2-D positions of vision towers).
        layout: see above.
        sections: how many pairs follow each axis of positions (M-RoPE, Wang et al., 2024): section i that of axis
            ``i % axes``. Their sum is ``rotated / 2``. By layout ``quarters`` one half each where not given.
        interleaved: axes take turns: pair i follows axis ``n = i % axes`` while ``i < axes * sections[n]``, and axis 0
            after that (Qwen3-VL). One section for each axis.
        query_norm_weight, key_norm_weight: ``(head_dim,)``: RMS norm with this weight before the rotation; or
            ``(heads * head_dim,)``: one norm over all heads of a token (InternVL). Floating point; a model that
            multiplies with 1 + weight gives that.
        norm_eps: added to the mean square in both norms.

    Returns:
        ``(query, key)`` rotated, in their shapes and dtype, computed in float32 and rounded once. Memory is contiguous
        in the order that the argument has, ``(batch, heads, tokens, head_dim)`` or ``(batch, tokens, heads,
        head_dim)``. The key is None if none was given.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: shapes or devices do not fit together, or both or neither half of a pair of arguments is given.

    Gradients flow to all arguments in floating point; those of query and key are the transposed rotation of what comes
    in. Backward keeps cos and sin, and query and key only for norms or where cos or sin wants a gradient.

    Example:
        >>> query, key = torch.tensor([[[[1.0, 2.0]], [[3.0, 4.0]]]]), torch.tensor([[[[5.0, 6.0]]]])
        >>> cos, sin = torch.zeros(1, 2), torch.ones(1, 2)  # a quarter of a turn
        >>> [rotated.flatten().tolist() for rotated in velm_kernels.rotary(query, key, cos, sin)]
        [[-2.0, 1.0, -4.0, 3.0], [-6.0, 5.0]]
    """
    if (
        positions is inverse_frequencies is sections is query_norm_weight is key_norm_weight is None
        and interleaved is False
        and norm_eps.__class__ is float
        and norm_eps == 1e-6
        and (arguments := _ordinary(query, key, cos, sin, layout)) is not None
    ):
        found: tuple[Tensor, Tensor] = OPERATOR(arguments)
        return found
    arguments = canonical(
        query,
        key,
        cos,
        sin,
        positions=positions,
        inverse_frequencies=inverse_frequencies,
        layout=layout,
        sections=sections,
        interleaved=interleaved,
        query_norm_weight=query_norm_weight,
        key_norm_weight=key_norm_weight,
        norm_eps=norm_eps,
    )
    rotated_query, rotated_key = _operator_for(arguments)(arguments)
    return rotated_query, None if key is None else rotated_key


def _operator_for(arguments: Arguments) -> Operator:
    return WITH_NORMS if "norm_eps" in arguments else OPERATOR


def _ordinary(query: Any, key: Any, cos: Any, sin: Any, layout: Any) -> Arguments | None:
    """The arguments of a call without anything unusual, or None: in a part of the time of :func:`canonical`."""
    if layout.__class__ is not str or layout not in LAYOUTS or not checks.ordinary(query, key, cos, sin):
        return None
    shape, key_shape, table = query.shape, key.shape, cos.shape
    if len(shape) != 4 or len(key_shape) != 4 or len(table) != 3 or sin.shape != table:
        return None
    batch, _, tokens, head_dim = shape
    rotated, step = table[2], 4 if layout == "quarters" else 2
    if (
        (key_shape[0], key_shape[2], key_shape[3], table[1]) != (batch, tokens, head_dim, tokens)
        or rotated > head_dim
        or rotated % step
        or table[0] not in (1, batch)
    ):
        return None
    if table[0] != batch:
        cos, sin = cos.expand(batch, tokens, rotated), sin.expand(batch, tokens, rotated)
    query_strides, key_strides = query.stride(), key.stride()
    if not query_strides[3] == key_strides[3] == cos.stride(2) == sin.stride(2) == 1:
        return None
    return {
        "query": query,
        "key": key,
        "cos": cos,
        "sin": sin,
        "layout": LAYOUTS.index(layout),
        "query_heads_last": query_strides[1] < query_strides[2],
        "key_heads_last": key_strides[1] < key_strides[2],
    }


def canonical(
    query: Tensor,
    key: Tensor | None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    *,
    positions: Tensor | None = None,
    inverse_frequencies: Tensor | None = None,
    layout: str = "halves",
    sections: Sequence[int] | None = None,
    interleaved: bool = False,
    query_norm_weight: Tensor | None = None,
    key_norm_weight: Tensor | None = None,
    norm_eps: float = 1e-6,
) -> Arguments:
    """Checks the arguments of :func:`rotary` and returns those of the operator."""
    heads = "(batch, heads, tokens, head_dim)"
    checks.dtype_in("query", checks.tensor("query", query, dims=4, layout=heads), checks.FLOAT_DTYPES)
    batch, _, tokens, head_dim = query.shape
    if key is None:
        key = query.new_empty((batch, 0, tokens, head_dim))
    else:
        checks.dtype_in("key", checks.tensor("key", key, dims=4, layout=heads), (query.dtype,))
        checks.same_device("key", key, "query", query)
        checks.shape("key", key, "(batch, kv_heads, tokens, head_dim)", (batch, key.shape[1], tokens, head_dim))
    layout = checks.choice("layout", layout, LAYOUTS)
    checks.flag("interleaved", interleaved)
    sizes = _checked_sections(sections, interleaved)
    if positions is None and inverse_frequencies is None:
        cos, sin = _given_tables(query, cos, sin, layout, sizes, interleaved)
    else:
        cos, sin = _computed_tables(
            query, cos, sin, positions, inverse_frequencies, layout, sizes, interleaved=interleaved
        )
    arguments: Arguments = {
        "query": unit_last_stride(query),
        "key": unit_last_stride(key),
        "cos": unit_last_stride(cos.expand(batch, -1, -1)),
        "sin": unit_last_stride(sin.expand(batch, -1, -1)),
    }
    if not query_norm_weight is key_norm_weight is None:
        for name, weight, x in (("query", query_norm_weight, query), ("key", key_norm_weight, key)):
            arguments[f"{name}_norm_weight"] = _checked_weight(f"{name}_norm_weight", weight, x)
        arguments["norm_eps"] = checks.number("norm_eps", norm_eps, 1e-30, 1e30, described="a number greater than 0")
    else:
        checks.number("norm_eps", norm_eps, 1e-30, 1e30, described="a number greater than 0")
    arguments["layout"] = LAYOUTS.index(layout)
    # Which of the two orders in memory the results have.
    for name in ("query", "key"):
        arguments[f"{name}_heads_last"] = bool(arguments[name].stride(1) < arguments[name].stride(2))
    return arguments


def _checked_sections(sections: Sequence[int] | None, interleaved: bool) -> list[int] | None:
    if sections is None:
        if interleaved:
            raise ValueError("interleaved: expected sections beside it, given True without them")
        return None
    if isinstance(sections, str) or not isinstance(sections, Sequence):
        raise TypeError(f"sections: expected a sequence of integers, given {checks.describe(sections)}")
    return [checks.integer(f"sections[{i}]", size, 0) for i, size in enumerate(sections)]


def _checked_rotated(name: str, rotated: int, head_dim: int, layout: str) -> None:
    step = 4 if layout == "quarters" else 2
    if rotated > head_dim or rotated % step:
        raise ValueError(
            f"{name}: expected a multiple of {step} columns to be rotated by layout {layout}, at most head_dim = "
            f"{head_dim}, given {rotated}"
        )


def _checked_pairs(sizes: Sequence[int], axes: int, pairs: int, interleaved: bool) -> None:
    if sum(sizes) != pairs:
        raise ValueError(f"sections: expected integers whose sum is rotated / 2 = {pairs}, given {sum(sizes)}")
    if axes < 1 or (interleaved and len(sizes) != axes):
        raise ValueError(f"sections: expected one for each of {axes} axes, given {len(sizes)}")


def _given_tables(
    query: Tensor, cos: Any, sin: Any, layout: str, sizes: list[int] | None, interleaved: bool
) -> tuple[Tensor, Tensor]:
    batch, _, tokens, head_dim = query.shape
    if cos is None and sin is None:
        if sizes is not None:
            raise ValueError("sections: expected cos and sin, or positions, beside them, given None")
        empty = query.new_empty((1, tokens, 0))
        return empty, empty
    named = []
    for name, table in (("cos", cos), ("sin", sin)):
        checks.dtype_in(name, checks.tensor(name, table), checks.FLOAT_DTYPES)
        checks.same_device(name, table, "query", query)
        # float64 is the dtype of all or of none.
        if torch.float64 in (table.dtype, query.dtype):
            table = table.to(query.dtype)
        named.append(table)
    cos, sin = named
    if sizes is None:
        described, leading = "(tokens, rotated) or (batch or 1, tokens, rotated)", cos.shape[:-2]
        fits = cos.dim() in (2, 3)
    else:
        described, leading = "(axes, batch or 1, tokens, rotated)", cos.shape[1:-2]
        fits = cos.dim() == 4 and cos.shape[0] > 0
    if not fits or cos.shape[-2] != tokens or (leading and leading[0] != 1 and leading[0] != batch):
        raise ValueError(f"cos: expected {described} with batch {batch} and tokens {tokens}, given {tuple(cos.shape)}")
    checks.shape("sin", sin, "the shape of cos", cos.shape)
    checks.dtype_in("sin", sin, (cos.dtype,))
    rotated = cos.shape[-1]
    _checked_rotated("cos", rotated, head_dim, layout)
    if sizes is not None:
        _checked_pairs(sizes, cos.shape[0], rotated // 2, interleaved)
        axis = tables.columns(tables.axis_of_pairs(sizes, cos.shape[0], interleaved, cos), layout)
        cos, sin = tables.of_axes(cos, axis), tables.of_axes(sin, axis)
    if cos.dim() == 2:
        cos, sin = cos[None], sin[None]
    return cos, sin


def _computed_tables(
    query: Tensor,
    cos: Any,
    sin: Any,
    positions: Any,
    inverse_frequencies: Any,
    layout: str,
    sizes: list[int] | None,
    *,
    interleaved: bool,
) -> tuple[Tensor, Tensor]:
    batch, _, tokens, head_dim = query.shape
    given = {"positions": positions, "inverse_frequencies": inverse_frequencies}
    for name, value in given.items():
        if value is not None:
            dtypes = checks.INTEGER_DTYPES if name == "positions" else checks.FLOAT_DTYPES
            checks.dtype_in(name, checks.tensor(name, value), dtypes)
            checks.same_device(name, value, "query", query)
    for name, value in given.items():
        if value is None:
            raise ValueError(f"{name}: expected a tensor, as positions and inverse_frequencies go together, given None")
    for name, value in (("cos", cos), ("sin", sin)):
        if value is not None:
            raise ValueError(f"{name}: expected None beside positions, given {checks.describe(value)}")
    frequencies = checks.tensor("inverse_frequencies", inverse_frequencies, dims=1, layout="(rotated / 2,)")
    if sizes is None and layout == "quarters":
        count = frequencies.shape[0]
        # Either all pairs, or those of one axis.
        half = count // 2 if 4 * count > head_dim else count
        sizes = [half, half]
    dims = (1, 2) if sizes is None else (2, 3)
    described = "(tokens,) or (batch or 1, tokens)"
    if sizes is not None:
        described = "(axes, tokens) or (axes, batch or 1, tokens)"
    leading = positions.shape[dims[0] - 1 : -1]
    fits = positions.dim() in dims and positions.shape[-1] == tokens and (sizes is None or positions.shape[0] > 0)
    if not fits or (leading and leading[0] != 1 and leading[0] != batch):
        raise ValueError(
            f"positions: expected {described} with batch {batch} and tokens {tokens}, given {tuple(positions.shape)}"
        )
    if positions.dim() == dims[0]:
        positions = positions.unsqueeze(-2)
    axis = None
    if sizes is not None:
        if frequencies.shape[0] != sum(sizes) and all(size == frequencies.shape[0] for size in sizes):
            frequencies = frequencies.repeat(len(sizes))
        _checked_pairs(sizes, positions.shape[0], frequencies.shape[0], interleaved)
        axis = tables.axis_of_pairs(sizes, positions.shape[0], interleaved, positions)
    _checked_rotated("inverse_frequencies", 2 * frequencies.shape[0], head_dim, layout)
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    return tables.of_positions(positions, frequencies, axis, layout, dtype)


def _checked_weight(name: str, weight: Any, x: Tensor) -> Tensor | None:
    if weight is None:
        return None
    checks.dtype_in(name, checks.tensor(name, weight), checks.FLOAT_DTYPES)
    checks.same_device(name, weight, "query", x)
    heads, head_dim = x.shape[1], x.shape[3]
    if tuple(weight.shape) not in ((head_dim,), (heads * head_dim,)):
        raise ValueError(
            f"{name}: expected (head_dim,) = ({head_dim},) or (heads * head_dim,) = ({heads * head_dim},), given "
            f"{tuple(weight.shape)}"
        )
    if torch.float64 in (weight.dtype, x.dtype):
        weight = weight.to(x.dtype)
    return weight.contiguous()


OPERATOR.serves("rotary", canonical, operator_for=_operator_for)
