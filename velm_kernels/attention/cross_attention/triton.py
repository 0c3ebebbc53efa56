"""Cross-attention by Triton kernels: launches of the forward and backward passes, for tensors in canonical form."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from velm_kernels.attention.cross_attention.op import DIFFERENTIABLE, SCALAR_NAMES, TENSOR_NAMES, empty_like_heads
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
from velm_kernels.attention.cross_attention.triton_kernels.norm import rms_norm_backward_kernel, rms_norm_kernel
from velm_kernels.attention.triton_kernels.tiles import Strides
from velm_kernels.attention.triton_problem import (
    Problem,
    aligned_empty,
    matrix_strides,
    prepare,
    row_strides,
)
from velm_kernels.backends.triton import Config, dimension_class, launch, parts_of, sums_both
from velm_kernels.layout import unit_last_stride
from velm_kernels.triton.launches import FEW_PROGRAMS, cdiv, sum_partials

# Splitting over keys, where there are fewer than FEW_PROGRAMS, gives each split at least this many tiles.
LEAST_TILES = 4
# What one program of the norm's backward sums before partial results are added.
NORM_STEPS = 16
# Elements of a tile of the norm: more would not fit the registers of backward.
NORM_TILE = 2048
BIAS_PROGRAMS = 512
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
    x: torch.Tensor, weight: torch.Tensor, grad_y: torch.Tensor, eps: float, wants_x: bool, wants_weight: bool
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    x = unit_last_stride(x)
    dim = x.shape[-1]
    heads, length, rows = x.shape[1], x.shape[0 if x.dim() == 3 else 2], x.numel() // dim
    grad_x = empty_like_heads(x, dim) if wants_x else None
    config = norm_config(dim)
    blocks = cdiv(rows, config.block_m)
    steps = max(1, min(NORM_STEPS, blocks // FEW_PROGRAMS))
    programs = cdiv(blocks, steps)
    partials = x.new_empty((programs, dim), dtype=torch.float32) if wants_weight else None
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
    return grad_x, None if partials is None else sum_partials(partials, torch.empty_like(weight))


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
    if p.masks.bias is None:
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


def key_mass(p: Problem, logsumexp: torch.Tensor) -> torch.Tensor:
    shape = (p.heads, p.sizes.keys) if p.packed else (p.batch, p.heads, p.keys)
    mass = p.query.new_empty(shape, dtype=torch.float32)
    if p.packed or p.is_empty:
        mass.zero_()
    if p.is_empty:
        return mass
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
    return mass


def attention_forward(*args: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`velm::attention_forward` by Triton kernels."""
    given = dict(zip((*TENSOR_NAMES, *SCALAR_NAMES, "return_key_mass"), args, strict=True))
    query = rms_norm(given["query"], given["query_norm_weight"], given["norm_eps"])
    key = rms_norm(given["key"], given["key_norm_weight"], given["norm_eps"])
    p = prepare(given, query, key)
    out = empty_like_heads(p.query, p.value_dim)
    shape = (p.heads, p.sizes.queries) if p.packed else (p.batch, p.heads, p.queries)
    logsumexp = p.query.new_empty(shape, dtype=torch.float32)
    forward(p, out, logsumexp)
    mass = key_mass(p, logsumexp) if given["return_key_mass"] else logsumexp.new_empty((0,))
    return out, logsumexp, mass


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
    config = Config(32, 0, 4, 1)
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


def grad_query(b: Backward, dtype: torch.dtype | None, grad_bias: torch.Tensor | None) -> torch.Tensor | None:
    """Gradient of the (normed) query in `dtype`, None where that is None; fills `grad_bias` where given."""
    p = b.p
    grad = None
    if dtype is not None:
        grad = empty_like_heads(p.query.to(dtype) if p.query.dtype != dtype else p.query, p.head_dim)
        if p.packed:
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
    return grad


def grad_key_value(
    b: Backward, key_dtype: torch.dtype | None, wants_value: bool
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Gradients of the (normed) key in `key_dtype` and of value; None where not wanted."""
    p = b.p
    grad_key = grad_value = None
    if key_dtype is not None:
        grad_key = empty_like_heads(p.key.to(key_dtype) if p.key.dtype != key_dtype else p.key, p.head_dim)
    if wants_value:
        grad_value = empty_like_heads(p.value, p.value_dim)
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
            not_guarded = constants | {"GUARDED": False, "FIRST_PART": p.first_part}
            arguments = arguments_for(grads, flags, blocks)
            launch(kind, grad_key_value_kernel, programs, arguments, not_guarded, config)
            if flags is None:
                continue
            for single, only in (("grad_key", (grads[0], None)), ("grad_value", (None, grads[1]))):
                if any(grad is not None for grad in only):
                    arguments = arguments_for(only, flags, blocks)
                    p.launch_again(single, grad_key_value_kernel, programs, arguments, constants, config, "block_m")

    run(p.choose("grad_key_value", run))
    return grad_key, grad_value


def broadcast_grad_bias(b: Backward, bias: torch.Tensor) -> torch.Tensor:
    """Gradient of a bias that broadcasts somewhere."""
    p = b.p
    grad = torch.empty(bias.shape, dtype=bias.dtype, device=bias.device)
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
    return grad


def attention_backward(
    grad_out: torch.Tensor, grad_logsumexp: torch.Tensor | None, *args: Any
) -> tuple[torch.Tensor, ...]:
    """`velm::attention_backward` by Triton kernels."""
    given = dict(zip((*TENSOR_NAMES, "out", "logsumexp", *SCALAR_NAMES, "grad_mask"), args, strict=True))
    wants = {name: bool(given["grad_mask"] & (1 << bit)) for bit, name in enumerate(DIFFERENTIABLE)}
    eps = given["norm_eps"]
    query = rms_norm(given["query"], given["query_norm_weight"], eps)
    key = rms_norm(given["key"], given["key_norm_weight"], eps)
    p = prepare(given, query, key)
    if p.is_empty or p.keys == 0:
        return tuple(
            torch.zeros_like(given[name]) if wants[name] else grad_out.new_empty((0,)) for name in DIFFERENTIABLE
        )
    grad_out, logsumexp = unit_last_stride(grad_out), given["logsumexp"]
    shift = row_shift(p, logsumexp)
    delta = delta_of(p, grad_out, grad_logsumexp, given["out"], logsumexp, shift)
    b = Backward(p, grad_out, logsumexp, shift, delta, given["scale"])
    grads: dict[str, torch.Tensor | None] = dict.fromkeys(DIFFERENTIABLE)

    bias = given["bias"]
    full_grad_bias = None
    if wants["bias"]:
        if tuple(bias.shape) == (p.batch, p.heads, p.queries, p.keys):
            # Tiles that nobody sees are not visited.
            full_grad_bias = aligned_empty(bias.shape, bias).zero_()
        else:
            grads["bias"] = broadcast_grad_bias(b, bias)

    def inner_dtype(side: str) -> torch.dtype | None:
        """Gradients that still pass through a norm stay in float32."""
        if not (wants[side] or wants[f"{side}_norm_weight"]):
            return None
        return p.dtype if given[f"{side}_norm_weight"] is None else torch.float32

    if inner_dtype("query") is not None or full_grad_bias is not None:
        grads["query"] = grad_query(b, inner_dtype("query"), full_grad_bias)
        if full_grad_bias is not None:
            grads["bias"] = full_grad_bias.contiguous()
    if inner_dtype("key") is not None or wants["value"]:
        grads["key"], grads["value"] = grad_key_value(b, inner_dtype("key"), wants["value"])
    for side in ("query", "key"):
        weight, inner = given[f"{side}_norm_weight"], grads[side]
        if weight is not None and inner is not None:
            grads[side], grads[f"{side}_norm_weight"] = rms_norm_backward(
                given[side], weight, inner, eps, wants[side], wants[f"{side}_norm_weight"]
            )
    return tuple(grad_out.new_empty((0,)) if grad is None else grad for grad in grads.values())
