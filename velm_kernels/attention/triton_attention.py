"""Cross-attention by Triton kernels: launches of the forward and backward passes, for tensors in canonical form."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from velm_kernels.attention.schema import DIFFERENTIABLE, SCALAR_NAMES, TENSOR_NAMES, empty_like_heads
from velm_kernels.attention.triton_forward import attention_forward_kernel, key_mass_kernel, merge_splits_kernel
from velm_kernels.attention.triton_grad_bias import grad_bias_kernel, sum_partials_kernel
from velm_kernels.attention.triton_grad_key_value import grad_key_value_kernel
from velm_kernels.attention.triton_grad_query import delta_kernel, grad_query_kernel
from velm_kernels.attention.triton_norm import rms_norm_backward_kernel, rms_norm_kernel
from velm_kernels.attention.triton_tiles import Masks, MatrixStrides, Scaling, Sizes, Strides
from velm_kernels.backends.triton import Config, choose, dimension_class, launch, precision

LOG2E = 1.4426950408889634

# Splitting over keys starts where fewer programs than this would run, and gives each split at least this many tiles.
FEW_PROGRAMS = 256
LEAST_TILES = 4
# What one program of the norm's backward sums before partial results are added.
NORM_STEPS = 16
NORM_ROWS = 16
BIAS_PROGRAMS = 512
# Offsets inside one tile are 32-bit up to this row stride.
NARROW_STRIDE = 1 << 23


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def row_strides(x: torch.Tensor) -> Strides:
    """Strides of (batch, heads, rows, dim), or of packed (tokens, heads, dim)."""
    if x.dim() == 4:
        return Strides(x.stride(0), x.stride(1), x.stride(2))
    return Strides(0, x.stride(1), x.stride(0))


def matrix_strides(x: torch.Tensor | None) -> MatrixStrides | None:
    """Strides of what broadcasts to (batch, heads, queries, keys)."""
    if x is None:
        return None
    return MatrixStrides(*(0 if size == 1 else stride for size, stride in zip(x.shape, x.stride())))


def as_bytes(mask: torch.Tensor | None) -> torch.Tensor | None:
    return None if mask is None else mask.view(torch.uint8)


@dataclass
class Problem:
    """The arguments of an attention operator in the form the kernels take them."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    masks: Masks
    scaling: Scaling
    sizes: Sizes
    batch: int
    heads: int
    kv_heads: int
    # Longest sequences; totals of tokens are in `sizes`.
    queries: int
    keys: int
    causal: bool
    packed: bool
    variant: str

    @property
    def device(self) -> torch.device:
        return self.query.device

    @property
    def dtype(self) -> torch.dtype:
        return self.query.dtype

    @property
    def head_dim(self) -> int:
        return self.query.shape[-1]

    @property
    def value_dim(self) -> int:
        return self.value.shape[-1]

    @property
    def rows(self) -> int:
        """Rows of logsumexp."""
        return self.heads * self.sizes.queries * (1 if self.packed else self.batch)

    @property
    def logsumexp_strides(self) -> Strides:
        return Strides(0 if self.packed else self.heads * self.queries, self.sizes.queries, self.rows)

    @property
    def spans_far(self) -> bool:
        """Whether an offset inside one head of mask or bias may not fit 32 bits."""
        return any(
            strides is not None and self.queries * strides.row + self.keys * strides.column >= 2**31
            for strides in (self.masks.mask_strides, self.masks.bias_strides)
        )

    @property
    def level(self) -> str:
        """How much the kernels do beside the products, which decides how large their tiles may be."""
        m = self.masks
        if m.seed is not None or self.scaling.cap is not None:
            return "loaded"
        return "plain" if m.range_start is None and m.mask is None and m.bias is None else "masked"

    @property
    def is_empty(self) -> bool:
        return self.rows == 0 or self.batch == 0 or self.queries == 0

    def choose(self, kind: str, run: Any, adjust: Any = lambda config: config) -> Config:
        shape = (self.batch, self.heads, self.kv_heads, self.queries, self.keys, self.value_dim)
        widest = max(self.head_dim, self.value_dim)
        return choose(kind, self.level, self.dtype, widest, self.device, shape, self.variant, run, adjust)

    def constants(self, config: Config, *tensors: torch.Tensor) -> dict[str, Any]:
        """What the kernels over query-key tiles are compiled for."""
        strides = [stride for x in (self.query, self.key, self.value, *tensors) for stride in row_strides(x)]
        return {
            "CAUSAL": self.causal,
            "HEAD_DIM": self.head_dim,
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "BLOCK_D": dimension_class(self.head_dim),
            "WIDE": max(strides) >= NARROW_STRIDE or self.spans_far,
            "PRECISION": precision(self.dtype),
        }

    def value_constants(self) -> dict[str, Any]:
        return {"VALUE_DIM": self.value_dim, "BLOCK_DV": dimension_class(self.value_dim)}


def unit_rows(x: torch.Tensor) -> torch.Tensor:
    """`x` with a last stride of 1."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def prepare(given: dict[str, Any], query: torch.Tensor, key: torch.Tensor) -> Problem:
    value = unit_rows(given["value"])
    packed = given["cu_seqlens_q"] is not None
    heads, kv_heads = query.shape[1], key.shape[1]
    if packed:
        batch = given["cu_seqlens_q"].shape[0] - 1
        total_q, total_k = query.shape[0], key.shape[0]
        queries, keys = min(given["max_seqlen_q"], total_q), min(given["max_seqlen_k"], total_k)
    else:
        batch, queries, keys = query.shape[0], query.shape[2], key.shape[2]
        total_q, total_k = queries, keys
    drops = given["dropout_p"] > 0
    masks = Masks(
        lengths=given["key_lengths"],
        range_start=given["range_start"],
        range_stop=given["range_stop"],
        key_mask=as_bytes(given["key_mask"]),
        mask=as_bytes(given["mask"]),
        mask_strides=matrix_strides(given["mask"]),
        bias=given["bias"],
        bias_strides=matrix_strides(given["bias"]),
        seed=given["seed"] if drops else None,
        drop_below=int(given["dropout_p"] * 2**32) if drops else None,
        keep_scale=1.0 / (1.0 - given["dropout_p"]) if drops else None,
    )
    softcap, scale = given["softcap"], given["scale"]
    if softcap > 0:
        scaling = Scaling(product=scale / softcap, cap=softcap * LOG2E)
    else:
        scaling = Scaling(product=scale * LOG2E, cap=None)
    present = [name for name in ("key_lengths", "range_start", "key_mask", "mask", "bias") if given[name] is not None]
    present += [
        name
        for name, there in (
            ("causal", given["is_causal"]),
            ("softcap", softcap > 0),
            ("dropout", drops),
            ("packed", packed),
        )
        if there
    ]
    return Problem(
        query=query,
        key=key,
        value=value,
        masks=masks,
        scaling=scaling,
        sizes=Sizes(
            heads, heads // kv_heads if kv_heads else 1, total_q, total_k, given["cu_seqlens_q"], given["cu_seqlens_k"]
        ),
        batch=batch,
        heads=heads,
        kv_heads=kv_heads,
        queries=queries,
        keys=keys,
        causal=given["is_causal"],
        packed=packed,
        variant=",".join(present),
    )


def rms_norm(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    """`x` normalised over its last dimension where there is a weight, else `x` itself with a last stride of 1."""
    x = unit_rows(x)
    if weight is None:
        return x
    y = empty_like_heads(x, x.shape[-1])
    heads, length, rows = x.shape[1], x.shape[0 if x.dim() == 3 else 2], x.numel() // x.shape[-1]
    config = Config(NORM_ROWS, 0, 4, 1)
    constants = {"DIM": x.shape[-1], "BLOCK_M": NORM_ROWS, "BLOCK_D": dimension_class(x.shape[-1])}
    arguments = (x, weight, y, row_strides(x), row_strides(y), heads, length, rows, eps)
    launch("rms_norm", rms_norm_kernel, cdiv(rows, NORM_ROWS), arguments, constants, config)
    return y


def rms_norm_backward(
    x: torch.Tensor, weight: torch.Tensor, grad_y: torch.Tensor, eps: float, wants_x: bool, wants_weight: bool
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    x = unit_rows(x)
    dim = x.shape[-1]
    heads, length, rows = x.shape[1], x.shape[0 if x.dim() == 3 else 2], x.numel() // dim
    grad_x = empty_like_heads(x, dim) if wants_x else None
    blocks = cdiv(rows, NORM_ROWS)
    steps = max(1, min(NORM_STEPS, blocks // FEW_PROGRAMS))
    programs = cdiv(blocks, steps)
    partials = x.new_empty((programs, dim), dtype=torch.float32) if wants_weight else None
    config = Config(NORM_ROWS, 0, 4, 1)
    constants = {"DIM": dim, "BLOCK_M": NORM_ROWS, "BLOCK_D": dimension_class(dim)}
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


def sum_partials(partials: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """Sums float32 (count, elements) over its first dimension, in order, into `total` (contiguous)."""
    block = 128
    arguments = (partials, total, partials.shape[0], total.numel())
    launch(
        "sum_partials",
        sum_partials_kernel,
        cdiv(total.numel(), block),
        arguments,
        {"BLOCK": block},
        Config(block, 0, 4, 1),
    )
    return total


def few_rows(config: Config, rows: int) -> Config:
    """`config` with no more rows a block than there are."""
    block_m = min(config.block_m, dimension_class(rows))
    return Config(block_m, config.block_n, 4 if block_m <= 64 else config.num_warps, config.num_stages)


def forward(p: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    """-> (out, logsumexp)"""
    out = empty_like_heads(p.query, p.value_dim)
    shape = (p.heads, p.sizes.queries) if p.packed else (p.batch, p.heads, p.queries)
    logsumexp = p.query.new_empty(shape, dtype=torch.float32)
    if p.is_empty or p.keys == 0:
        return out.zero_(), logsumexp.fill_(-torch.inf)
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
        count = p.batch * programs * blocks
        splits = 1
        if not p.packed and count < FEW_PROGRAMS:
            splits = max(1, min(cdiv(2 * FEW_PROGRAMS, count), p.keys // (LEAST_TILES * config.block_n), 32))
        split_keys = cdiv(cdiv(p.keys, splits), config.block_n) * config.block_n
        splits = cdiv(p.keys, split_keys)
        to_out, to_lse = out, logsumexp
        if splits > 1:
            to_out = out.new_empty((splits, p.rows, p.value_dim), dtype=torch.float32)
            to_lse = logsumexp.new_empty((splits, p.rows))
        arguments = (
            p.query,
            p.key,
            p.value,
            to_out,
            to_lse,
            row_strides(p.query),
            row_strides(p.key),
            row_strides(p.value),
            row_strides(out),
            p.logsumexp_strides,
            p.masks,
            p.scaling,
            p.sizes,
            blocks,
            splits,
            split_keys,
        )
        constants = p.constants(config) | p.value_constants() | {"PACKED": shares, "SPLIT": splits > 1}
        launch("forward", attention_forward_kernel, count * splits, arguments, constants, config)
        if splits > 1:
            merge = Config(16, 0, 4, 1)
            launch(
                "merge_splits",
                merge_splits_kernel,
                cdiv(p.rows, merge.block_m),
                (to_out, to_lse, out, logsumexp, row_strides(out), p.heads, p.queries, p.rows, splits),
                {"BLOCK_M": merge.block_m} | p.value_constants(),
                merge,
            )

    run(p.choose("forward", run, partial(few_rows, rows=rows)))
    return out, logsumexp


def key_mass(p: Problem, logsumexp: torch.Tensor) -> torch.Tensor:
    shape = (p.heads, p.sizes.keys) if p.packed else (p.batch, p.heads, p.keys)
    mass = p.query.new_empty(shape, dtype=torch.float32)
    if p.packed or p.is_empty:
        mass.zero_()
    if p.is_empty:
        return mass
    strides = Strides(0 if p.packed else p.heads * p.keys, p.sizes.keys, 1)

    def run(config: Config) -> None:
        blocks = cdiv(p.keys, config.block_n)
        arguments = (
            p.query,
            p.key,
            logsumexp,
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
    out, logsumexp = forward(p)
    mass = key_mass(p, logsumexp) if given["return_key_mass"] else logsumexp.new_empty((0,))
    return out, logsumexp, mass


@dataclass
class Backward:
    """What the backward kernels share."""

    p: Problem
    grad_out: torch.Tensor
    logsumexp: torch.Tensor
    delta: torch.Tensor
    scale: float

    def constants(self, config: Config, *tensors: torch.Tensor) -> dict[str, Any]:
        return self.p.constants(config, self.grad_out, *tensors) | self.p.value_constants()

    def inputs(self) -> tuple[Any, ...]:
        return self.p.query, self.p.key, self.p.value, self.grad_out, self.logsumexp, self.delta

    def input_strides(self) -> tuple[Any, ...]:
        return tuple(row_strides(x) for x in (self.p.query, self.p.key, self.p.value, self.grad_out))


def delta_of(
    p: Problem, grad_out: torch.Tensor, grad_logsumexp: torch.Tensor | None, out: torch.Tensor, logsumexp: torch.Tensor
) -> torch.Tensor:
    delta = torch.empty_like(logsumexp)
    config = Config(32, 0, 4, 1)
    strides = None
    if grad_logsumexp is not None:
        strides = Strides(*(0,) * (3 - grad_logsumexp.dim()), *grad_logsumexp.stride())
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
        {"BLOCK_M": config.block_m} | p.value_constants(),
        config,
    )
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
        arguments = (
            *b.inputs(),
            grad,
            grad_bias,
            *b.input_strides(),
            row_strides(stored),
            matrix_strides(grad_bias),
            p.logsumexp_strides,
            p.masks,
            p.scaling,
            p.sizes,
            b.scale,
            blocks,
        )
        constants = b.constants(config, stored)
        launch("grad_query", grad_query_kernel, p.batch * p.heads * blocks, arguments, constants, config)

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

    def run(config: Config) -> None:
        blocks = cdiv(p.keys, config.block_n)
        strides = [None if grad is None else row_strides(grad) for grad in (grad_key, grad_value)]
        arguments = (
            *b.inputs(),
            grad_key,
            grad_value,
            *b.input_strides(),
            *strides,
            p.logsumexp_strides,
            p.masks,
            p.scaling,
            p.sizes,
            b.scale,
            blocks,
        )
        constants = b.constants(config, *stored)
        launch("grad_key_value", grad_key_value_kernel, p.batch * p.kv_heads * blocks, arguments, constants, config)

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
    grad_out, logsumexp = unit_rows(grad_out), given["logsumexp"]
    delta = delta_of(p, grad_out, grad_logsumexp, given["out"], logsumexp)
    b = Backward(p, grad_out, logsumexp, delta, given["scale"])
    grads: dict[str, torch.Tensor | None] = dict.fromkeys(DIFFERENTIABLE)

    bias = given["bias"]
    full_grad_bias = None
    if wants["bias"]:
        if tuple(bias.shape) == (p.batch, p.heads, p.queries, p.keys):
            full_grad_bias = torch.zeros(bias.shape, dtype=bias.dtype, device=bias.device)
            grads["bias"] = full_grad_bias
        else:
            grads["bias"] = broadcast_grad_bias(b, bias)

    def inner_dtype(side: str) -> torch.dtype | None:
        """Gradients that still pass through a norm stay in float32."""
        if not (wants[side] or wants[f"{side}_norm_weight"]):
            return None
        return p.dtype if given[f"{side}_norm_weight"] is None else torch.float32

    if inner_dtype("query") is not None or full_grad_bias is not None:
        grads["query"] = grad_query(b, inner_dtype("query"), full_grad_bias)
    if inner_dtype("key") is not None or wants["value"]:
        grads["key"], grads["value"] = grad_key_value(b, inner_dtype("key"), wants["value"])
    for side in ("query", "key"):
        weight, inner = given[f"{side}_norm_weight"], grads[side]
        if weight is not None and inner is not None:
            grads[side], grads[f"{side}_norm_weight"] = rms_norm_backward(
                given[side], weight, inner, eps, wants[side], wants[f"{side}_norm_weight"]
            )
    return tuple(grad_out.new_empty((0,)) if grad is None else grad for grad in grads.values())
