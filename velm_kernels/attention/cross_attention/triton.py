"""Cross-attention by Triton kernels: launches of the forward and backward passes, for tensors in canonical form."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from velm_kernels.attention.cross_attention.op import OPERATOR
from velm_kernels.attention.cross_attention.triton_kernels.forward import (
    attention_forward_kernel,
    key_mass_kernel,
    merge_splits_kernel,
    row_shift_kernel,
)
from velm_kernels.attention.cross_attention.triton_kernels.grad_bias import grad_bias_kernel
from velm_kernels.attention.cross_attention.triton_kernels.grad_key_value import grad_key_value_kernel
from velm_kernels.attention.cross_attention.triton_kernels.grad_query import (
    delta_kernel,
    delta_of_products_kernel,
    grad_query_kernel,
)
from velm_kernels.attention.cross_attention.triton_kernels.grad_rel_pos import grad_rel_pos_kernel
from velm_kernels.attention.cross_attention.triton_kernels.norm import rms_norm_backward_kernel, rms_norm_kernel
from velm_kernels.attention.triton_kernels.tiles import Strides
from velm_kernels.attention.triton_problem import (
    Problem,
    aligned_like,
    matrix_strides,
    prepare,
    row_strides,
)
from velm_kernels.backends.triton import Config, dimension_class, launch, parts_of, sums_both
from velm_kernels.layout import empty_like_heads, unit_last_stride
from velm_kernels.triton.launches import FEW_PROGRAMS, cdiv, sum_partials

# Splitting over keys, where there are fewer than FEW_PROGRAMS, gives each split at least this many tiles.
LEAST_TILES = 4
# What one program of the norm's backward sums before partial results are added.
NORM_STEPS = 16
# Elements of a tile of the norm: more would not fit the registers of backward.
NORM_TILE = 2048
BIAS_PROGRAMS = 512
# Rows or columns of a grid of keys, of whose biases one program sums the gradients.
REL_POS_COLUMNS = 64
# In 16 bits, delta comes from the products of scores and values, once more, where so few query rows share a key head:
# such launches wait for keys and values, which the cache has the second time. With more rows the two products would be
# two of nine, and the rows that need them are few among them.
EXACT_DELTA_ROWS = 64


def norm_config(dim: int) -> Config:
    return Config(NORM_TILE // dimension_class(dim), 0, 4, 1)


def rms_norm(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    """`x` normalised over its last dimension where there is a weight, else `x` itself with a last stride of 1."""
    x = unit_last_stride(x)
    if weight is None:
        return x
    y = empty_like_heads(x, x.shape[-1])
    heads, length, rows = x.shape[1], x.shape[0 if x.dim() == 3 else 2], x.numel() // x.shape[-1]
    config = norm_config(x.shape[-1])
    constants = {"DIM": x.shape[-1], "BLOCK_M": config.block_m, "BLOCK_D": dimension_class(x.shape[-1])}
    arguments = (x, weight, y, row_strides(x), row_strides(y), heads, length, rows, eps)
    launch("rms_norm", rms_norm_kernel, cdiv(rows, config.block_m), arguments, constants, config)
    return y


def rms_norm_backward(
    x: torch.Tensor,
    weight: torch.Tensor,
    grad_y: torch.Tensor,
    eps: float,
    grad_x: torch.Tensor | None,
    grad_weight: torch.Tensor | None,
) -> None:
    x = unit_last_stride(x)
    dim = x.shape[-1]
    heads, length, rows = x.shape[1], x.shape[0 if x.dim() == 3 else 2], x.numel() // dim
    config = norm_config(dim)
    blocks = cdiv(rows, config.block_m)
    steps = max(1, min(NORM_STEPS, blocks // FEW_PROGRAMS))
    programs = cdiv(blocks, steps)
    partials = None if grad_weight is None else x.new_empty((programs, dim), dtype=torch.float32)
    constants = {"DIM": dim, "BLOCK_M": config.block_m, "BLOCK_D": dimension_class(dim)}
    arguments = (
        x,
        weight,
        grad_y,
        grad_x,
        partials,
        row_strides(x),
        row_strides(grad_y),
        None if grad_x is None else row_strides(grad_x),
        heads,
        length,
        rows,
        eps,
        steps,
    )
    launch("rms_norm_backward", rms_norm_backward_kernel, programs, arguments, constants, config)
    if partials is not None and grad_weight is not None:
        sum_partials(partials, grad_weight)


def few_rows(config: Config, rows: int, dtype: torch.dtype) -> Config:
    """`config` with no more rows per block than there are."""
    block_m = min(config.block_m, dimension_class(rows))
    if block_m == config.block_m:
        return config
    config = replace(config, block_m=block_m, num_warps=4 if block_m <= 64 else config.num_warps)
    if dtype == torch.float32 and block_m < 64:
        # What is prefetched in pieces is not held in registers.
        return replace(config, block_n=16, num_stages=2)
    return config


def forward(p: Problem, out: torch.Tensor, logsumexp: torch.Tensor) -> None:
    if p.is_empty or p.keys == 0:
        out.zero_()
        logsumexp.fill_(-torch.inf)
        return
    if p.packed:
        # Tokens outside of every sequence, if there are any.
        out.zero_()
        logsumexp.fill_(-torch.inf)
    # Heads that share a key head share a block where one head alone would not fill it.
    group = p.sizes.group
    shares = group > 1 and not p.packed and p.queries <= 64
    rows, programs = (p.queries * group, p.kv_heads) if shares else (p.queries, p.heads)

    def run(config: Config) -> None:
        blocks = cdiv(rows, config.block_m)
        parts = parts_of(config, p.dtype, p.value_dim)
        count = p.batch * programs * blocks * parts
        splits = 1
        if not p.packed and count < FEW_PROGRAMS:
            splits = max(1, min(cdiv(2 * FEW_PROGRAMS, count), p.keys // (LEAST_TILES * config.block_n), 32))
        split_keys = cdiv(cdiv(p.keys, splits), config.block_n) * config.block_n
        splits = cdiv(p.keys, split_keys)
        to_out, to_lse = out, logsumexp
        if splits > 1:
            to_out = out.new_empty((splits, p.rows, p.value_dim), dtype=torch.float32)
            to_lse = logsumexp.new_empty((splits, p.rows))
        flags = p.flags(count * splits * config.block_m)
        arguments = (
            p.query,
            p.key,
            p.value,
            to_out,
            to_lse,
            flags,
            row_strides(p.query),
            row_strides(p.key),
            row_strides(p.value),
            row_strides(out),
            p.logsumexp_strides,
            p.masks,
            p.dropout,
            p.scaling,
            p.sizes,
            blocks,
            splits,
            split_keys,
        )
        constants = p.constants(config) | p.value_constants()
        constants |= {"PARTS": parts, "PACKED": shares, "SPLIT": splits > 1}
        p.launch_guarded(
            "decode" if shares or splits > 1 else "forward",
            attention_forward_kernel,
            count * splits,
            flags,
            arguments,
            constants,
            config,
        )
        if splits > 1:
            merge = Config(16, 0, 4, 1)
            launch(
                "merge_splits",
                merge_splits_kernel,
                cdiv(p.rows, merge.block_m),
                (to_out, to_lse, out, logsumexp, row_strides(out), p.heads, p.queries, p.rows, splits),
                {"BLOCK_M": merge.block_m} | p.value_rows(),
                merge,
            )

    run(p.choose("forward", run, partial(few_rows, rows=rows, dtype=p.dtype)))


def row_shift(p: Problem, logsumexp: torch.Tensor) -> torch.Tensor | None:
    """What the weights of rows with a large logsumexp are short of, which a bias makes; None where there is none."""
    if p.masks.bias is None and p.masks.rel_height is None:
        return None
    shift = torch.empty_like(logsumexp)
    config = Config(16, 16 if p.dtype == torch.float32 else 32, 4, 2)
    blocks = cdiv(p.queries, config.block_m)
    arguments = (
        p.query,
        p.key,
        logsumexp,
        shift,
        row_strides(p.query),
        row_strides(p.key),
        p.logsumexp_strides,
        p.masks,
        p.scaling,
        p.sizes,
        blocks,
    )
    launch("row_shift", row_shift_kernel, p.batch * p.heads * blocks, arguments, p.constants(config), config)
    return shift


def key_mass(p: Problem, logsumexp: torch.Tensor, mass: torch.Tensor) -> None:
    if p.packed or p.is_empty:
        mass.zero_()
    if p.is_empty:
        return
    strides = Strides(0 if p.packed else p.heads * p.keys, p.sizes.keys, 1)
    shift = row_shift(p, logsumexp)

    def run(config: Config) -> None:
        blocks = cdiv(p.keys, config.block_n)
        arguments = (
            p.query,
            p.key,
            logsumexp,
            shift,
            mass,
            row_strides(p.query),
            row_strides(p.key),
            p.logsumexp_strides,
            strides,
            p.masks,
            p.scaling,
            p.sizes,
            blocks,
        )
        launch("key_mass", key_mass_kernel, p.batch * p.heads * blocks, arguments, p.constants(config), config)

    run(p.choose("key_mass", run))


def attention_forward(*args: Any) -> None:
    a, (out, logsumexp, mass) = OPERATOR.named(args)
    query = rms_norm(a.query, a.query_norm_weight, a.norm_eps)
    key = rms_norm(a.key, a.key_norm_weight, a.norm_eps)
    p = prepare(a, query, key)
    forward(p, out, logsumexp)
    if mass is not None:
        key_mass(p, logsumexp, mass)


@dataclass
class Backward:
    """What the backward kernels share."""

    p: Problem
    grad_out: torch.Tensor
    logsumexp: torch.Tensor
    shift: torch.Tensor | None
    delta: torch.Tensor
    scale: float

    def constants(self, config: Config, *tensors: torch.Tensor) -> dict[str, Any]:
        return self.p.constants(config, self.grad_out, *tensors) | self.p.value_constants()

    def inputs(self) -> tuple[Any, ...]:
        return self.p.query, self.p.key, self.p.value, self.grad_out, self.logsumexp, self.shift, self.delta

    def input_strides(self) -> tuple[Any, ...]:
        return tuple(row_strides(x) for x in (self.p.query, self.p.key, self.p.value, self.grad_out))


def delta_of(
    p: Problem,
    grad_out: torch.Tensor,
    grad_logsumexp: torch.Tensor | None,
    out: torch.Tensor,
    logsumexp: torch.Tensor,
    shift: torch.Tensor | None,
) -> torch.Tensor:
    """The row sums of grad_out * out, less grad_logsumexp."""
    delta = torch.empty_like(logsumexp)
    strides = None
    if grad_logsumexp is not None:
        strides = Strides(*(0,) * (3 - grad_logsumexp.dim()), *grad_logsumexp.stride())
    if p.dtype != torch.float32 and p.sizes.group * p.queries <= EXACT_DELTA_ROWS:
        return _delta_of_products(p, grad_out, grad_logsumexp, strides, logsumexp, shift, delta)
    config = Config(32 if p.value_dim <= 256 else 16, 0, 4, 1)
    arguments = (
        grad_out,
        out,
        grad_logsumexp,
        logsumexp,
        delta,
        row_strides(grad_out),
        row_strides(out),
        strides,
        p.logsumexp_strides,
        p.heads,
        p.sizes.queries,
        p.rows,
    )
    launch(
        "delta",
        delta_kernel,
        cdiv(p.rows, config.block_m),
        arguments,
        {"BLOCK_M": config.block_m} | p.value_rows(),
        config,
    )
    return delta


def _delta_of_products(
    p: Problem,
    grad_out: torch.Tensor,
    grad_logsumexp: torch.Tensor | None,
    grad_logsumexp_strides: Strides | None,
    logsumexp: torch.Tensor,
    shift: torch.Tensor | None,
    delta: torch.Tensor,
) -> torch.Tensor:
    if p.packed:
        # Tokens outside of every sequence, if there are any.
        delta.zero_()
    config = Config(16, 32, 4, 2)
    blocks = cdiv(p.queries, config.block_m)
    arguments = (
        p.query,
        p.key,
        p.value,
        grad_out,
        logsumexp,
        grad_logsumexp,
        shift,
        delta,
        row_strides(p.query),
        row_strides(p.key),
        row_strides(p.value),
        row_strides(grad_out),
        grad_logsumexp_strides,
        p.logsumexp_strides,
        p.masks,
        p.dropout,
        p.scaling,
        p.sizes,
        blocks,
    )
    constants = p.constants(config, grad_out) | p.value_constants()
    launch("delta_of_products", delta_of_products_kernel, p.batch * p.heads * blocks, arguments, constants, config)
    return delta


def grad_query(b: Backward, grad: torch.Tensor | None, grad_bias: torch.Tensor | None) -> None:
    """Fills the gradients of the (normed) query and of the bias, of which either may be None."""
    p = b.p
    if grad is not None and p.packed:
        grad.zero_()
    stored = p.query if grad is None else grad

    def run(config: Config) -> None:
        blocks = cdiv(p.queries, config.block_m)
        parts = parts_of(config, p.dtype, p.head_dim)
        programs = p.batch * p.heads * blocks * parts
        flags = p.flags(programs * config.block_m)
        arguments = (
            *b.inputs(),
            grad,
            grad_bias,
            flags,
            *b.input_strides(),
            row_strides(stored),
            matrix_strides(grad_bias),
            p.logsumexp_strides,
            p.masks,
            p.dropout,
            p.scaling,
            p.sizes,
            b.scale,
            blocks,
        )
        constants = b.constants(config, stored) | {"PARTS": parts}
        p.launch_guarded("grad_query", grad_query_kernel, programs, flags, arguments, constants, config)

    run(p.choose("grad_query", run))


def grad_key_value(b: Backward, grad_key: torch.Tensor | None, grad_value: torch.Tensor | None) -> None:
    """Fills the gradients of the (normed) key and of value, of which either may be None."""
    p = b.p
    stored = [grad for grad in (grad_key, grad_value) if grad is not None]
    if p.packed:
        for grad in stored:
            grad.zero_()

    def arguments_for(grads: Any, flags: torch.Tensor | None, blocks: int) -> tuple[Any, ...]:
        return (
            *b.inputs(),
            *grads,
            flags,
            *b.input_strides(),
            *(None if grad is None else row_strides(grad) for grad in grads),
            p.logsumexp_strides,
            p.masks,
            p.dropout,
            p.scaling,
            p.sizes,
            b.scale,
            blocks,
        )

    def run(config: Config) -> None:
        blocks = cdiv(p.keys, config.block_n)
        # Where the registers do not hold both sums, each has its own pass.
        passes = {"grad_key_value": (grad_key, grad_value)}
        if len(stored) == 2 and not sums_both(p.dtype, p.head_dim + p.value_dim):
            passes = {"grad_key": (grad_key, None), "grad_value": (None, grad_value)}
        for kind, grads in passes.items():
            parts = max(parts_of(config, p.dtype, grad.shape[-1]) for grad in grads if grad is not None)
            programs = p.batch * p.kv_heads * blocks * parts
            flags = p.flags(programs * config.block_n)
            constants = b.constants(config, *stored) | {"PARTS": parts}
            not_guarded = constants | {"GUARDED": False, "FIRST_PHASE": p.first_phase}
            arguments = arguments_for(grads, flags, blocks)
            launch(kind, grad_key_value_kernel, programs, arguments, not_guarded, config)
            if flags is None:
                continue
            for single, only in (("grad_key", (grads[0], None)), ("grad_value", (None, grads[1]))):
                if any(grad is not None for grad in only):
                    arguments = arguments_for(only, flags, blocks)
                    p.launch_again(single, grad_key_value_kernel, programs, arguments, constants, config, "block_m")

    run(p.choose("grad_key_value", run))


def broadcast_grad_bias(b: Backward, bias: torch.Tensor, grad: torch.Tensor) -> None:
    """Fills the gradient of a bias that broadcasts somewhere."""
    p = b.p
    sums = [size == 1 and full > 1 for size, full in zip(bias.shape, (p.batch, p.heads, p.queries, p.keys))]

    def run(config: Config) -> None:
        row_blocks, column_blocks = cdiv(p.queries, config.block_m), cdiv(p.keys, config.block_n)
        steps = [total if summed else 1 for total, summed in zip((p.batch, p.heads, row_blocks, column_blocks), sums)]
        row_tiles, column_tiles = row_blocks // steps[2], column_blocks // steps[3]
        tiles = bias.shape[0] * bias.shape[1] * row_tiles * column_tiles
        total = steps[0] * steps[1] * steps[2] * steps[3]
        steps_each = cdiv(total, max(1, min(total, BIAS_PROGRAMS // max(tiles, 1))))
        splits = cdiv(total, steps_each)
        partials = bias.new_empty((splits, bias.numel()), dtype=torch.float32)
        arguments = (
            *b.inputs(),
            partials,
            *b.input_strides(),
            p.logsumexp_strides,
            p.masks,
            p.dropout,
            p.scaling,
            p.sizes,
            bias.shape[1],
            row_tiles,
            column_tiles,
            *steps,
            splits,
            steps_each,
            bias.numel(),
        )
        constants = b.constants(config) | {"SUMS_ROWS": sums[2], "SUMS_COLUMNS": sums[3]}
        launch("grad_bias", grad_bias_kernel, tiles * splits, arguments, constants, config)
        sum_partials(partials, grad)

    run(p.choose("grad_bias", run))


def grad_rel_pos(b: Backward, grad_height: torch.Tensor | None, grad_width: torch.Tensor | None) -> None:
    """Fills the gradients of the biases of a grid's rows and columns, of which either may be None."""
    p = b.p
    heights, widths = (0 if grad is None else grad.shape[3] for grad in (grad_height, grad_width))

    def run(config: Config) -> None:
        columns = min(REL_POS_COLUMNS, dimension_class(max(heights, widths)))
        query_blocks, height_blocks = cdiv(p.queries, config.block_m), cdiv(heights, columns)
        blocks = height_blocks + cdiv(widths, columns)
        arguments = (
            *b.inputs(),
            grad_height,
            grad_width,
            *b.input_strides(),
            p.logsumexp_strides,
            p.masks,
            p.dropout,
            p.scaling,
            p.sizes,
            heights,
            widths,
            height_blocks,
            blocks,
            query_blocks,
        )
        constants = b.constants(config) | {"BLOCK_O": columns}
        launch(
            "grad_rel_pos", grad_rel_pos_kernel, p.batch * p.heads * query_blocks * blocks, arguments, constants, config
        )

    run(p.choose("grad_rel_pos", run))


def attention_backward(*args: Any) -> None:
    a, grads = OPERATOR.named_backward(args)
    to_query, to_key, to_value, to_bias, to_height, to_width, to_query_norm, to_key_norm = grads
    query = rms_norm(a.query, a.query_norm_weight, a.norm_eps)
    key = rms_norm(a.key, a.key_norm_weight, a.norm_eps)
    p = prepare(a, query, key)
    if p.is_empty or p.keys == 0:
        for grad in grads:
            if grad is not None:
                grad.zero_()
        return
    grad_out, logsumexp = unit_last_stride(a.grad_out), a.logsumexp
    shift = row_shift(p, logsumexp)
    delta = delta_of(p, grad_out, a.grad_logsumexp, a.out, logsumexp, shift)
    b = Backward(p, grad_out, logsumexp, shift, delta, a.scale)

    whole_bias = None
    if to_bias is not None:
        if tuple(to_bias.shape) == (p.batch, p.heads, p.queries, p.keys):
            # Tiles that nobody sees are not visited.
            whole_bias = aligned_like(to_bias).zero_()
        else:
            broadcast_grad_bias(b, a.bias, to_bias)

    if to_height is not None or to_width is not None:
        grad_rel_pos(b, to_height, to_width)

    def before_norm(x: torch.Tensor, weight: torch.Tensor | None, *wanted: torch.Tensor | None) -> torch.Tensor | None:
        """Where the gradient of a side goes: one that still passes through a norm stays in float32."""
        if weight is None:
            return wanted[0]
        if all(grad is None for grad in wanted):
            return None
        return empty_like_heads(x.new_empty(x.shape, dtype=torch.float32), x.shape[-1])

    inner_query = before_norm(a.query, a.query_norm_weight, to_query, to_query_norm)
    inner_key = before_norm(a.key, a.key_norm_weight, to_key, to_key_norm)
    if inner_query is not None or whole_bias is not None:
        grad_query(b, inner_query, whole_bias)
    if whole_bias is not None and whole_bias is not to_bias:
        to_bias.copy_(whole_bias)
    if inner_key is not None or to_value is not None:
        grad_key_value(b, inner_key, to_value)
    for x, weight, inner, grad, grad_weight in (
        (a.query, a.query_norm_weight, inner_query, to_query, to_query_norm),
        (a.key, a.key_norm_weight, inner_key, to_key, to_key_norm),
    ):
        if weight is not None and inner is not None:
            rms_norm_backward(x, weight, inner, a.norm_eps, grad, grad_weight)
