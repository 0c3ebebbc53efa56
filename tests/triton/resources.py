"""What every shipped instance of the Triton kernels occupies, as the compiler reports it.

    python -m tests.triton.resources                 compares resources.csv with what is compiled now
    python -m tests.triton.resources --write         writes it
    ... --arch 80 --dim 64 --dtype float16 --kernel forward    restricts either to some instances
    ... --missing                                    only instances that have no row yet
    ... --stale                                      only those without a row of these kernels

`resources.csv` has a row for each kernel, level, element type, head dimension and architecture: block sizes, warps and
pipeline stages, registers a thread, bytes of spilled registers, bytes of shared memory a block, the fraction of a
multiprocessor's threads that can be resident, the matrix instructions in the PTX, the version of Triton that compiled
it, and the digest of what it compiled. That is taken after Triton's own first passes, so that names, comments, branches
that the instance does not take and kernels beside it do not change it; making it takes a tenth of what compiling does,
and `--stale` compiles what has another one now. Other versions are asked only whether every instance compiles, fits and
spills nothing (`python -m tests.triton.versions`, which keeps the answers in versions.csv).

There is a row for each entry of velm_kernels.backends.triton.TABLE, compiled with everything that the entry's level may
do at once, as what does less needs no more; of kernels over queries the second launches of "plain" ones, which do
nothing but where there is NaN, are left out. Kernels whose block sizes are fixed are compiled for rows of 256.
bfloat16 instances differ from the float16 ones in the names of instructions alone, and are left out.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import astuple, fields
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton

from tests.triton import versions
from tests.triton.compiling import SHARED_LIMIT, Resources, digest, resources
from velm_kernels.attention.bidirectional_attention import triton as triton_bidirectional
from velm_kernels.attention.cross_attention import triton as triton_attention
from velm_kernels.attention.cross_attention.op import OPERATOR
from velm_kernels.attention.gated_residual import triton as triton_gated_residual
from velm_kernels.attention.merge_attention import triton as triton_merge_attention
from velm_kernels.attention.multiscale_deformable_attention import triton as triton_deformable
from velm_kernels.backends import triton as backend
from velm_kernels.backends.triton import Launch, pretend
from velm_kernels.fusion.bilinear.triton import bilinear_backward, bilinear_forward
from velm_kernels.fusion.bilinear_attention.triton import bilinear_attention_backward, bilinear_attention_forward
from velm_kernels.fusion.count_sketches.triton import count_sketches_forward
from velm_kernels.fusion.dropout_residual.triton import dropout_residual_forward
from velm_kernels.fusion.factorized_pool.triton import factorized_pool_backward, factorized_pool_forward
from velm_kernels.fusion.film.triton import film_backward, film_forward
from velm_kernels.fusion.low_rank_fusion import triton as triton_low_rank
from velm_kernels.fusion.weighted_sum import triton as triton_weighted_sum
from velm_kernels.linear.linear import triton as triton_linear
from velm_kernels.losses.contrastive_loss.triton import contrastive_gradients, contrastive_statistics
from velm_kernels.losses.linear_cross_entropy import triton as triton_linear_cross_entropy
from velm_kernels.losses.maxsim.triton import maxsim_backward, maxsim_forward
from velm_kernels.losses.sigmoid_loss.triton import sigmoid_pass
from velm_kernels.pooling.attention_pool.triton import attention_pool_backward, attention_pool_forward
from velm_kernels.pooling.gather_rows.triton import gather_rows_forward
from velm_kernels.pooling.match_rows.triton import match_rows_forward
from velm_kernels.pooling.merge_patches.triton import merge_patches_backward, merge_patches_forward
from velm_kernels.pooling.pool.reference import MODES
from velm_kernels.pooling.pool.triton import pool_backward, pool_forward
from velm_kernels.pooling.pool_grid.triton import pool_grid_backward, pool_grid_forward
from velm_kernels.pooling.weighted_rows.triton import weighted_rows_backward, weighted_rows_forward
from velm_kernels.retrieval.topk_similarity.triton import topk_similarity_backward, topk_similarity_forward
from velm_kernels.sequence import triton_rows
from velm_kernels.sequence.rotary import triton as triton_rotary

FILE = Path(__file__).with_name("resources.csv")
ARCHITECTURES = (80, 90, 100, 120)
DIMENSIONS = backend.DIMENSIONS
DTYPES = ("float16", "float32")
# Kernels over tiles of queries and keys. The second launch of a kernel, the one for few queries and those for one kind
# of sums alone take the block sizes of the first.
SHARED_ENTRY = {
    "forward_guarded": "forward",
    "decode": "forward",
    "decode_guarded": "forward",
    "grad_query_guarded": "grad_query",
    "grad_key": "grad_key_value",
    "grad_key_guarded": "grad_key_value",
    "grad_value": "grad_key_value",
    "grad_value_guarded": "grad_key_value",
    "grad_side_query": "grad_side",
    "grad_side_value": "grad_side",
    "grad_side_guarded": "grad_side",
}
ATTENTION = (
    ("forward", "plain"),
    ("forward", "loaded"),
    ("forward_guarded", "loaded"),
    ("decode", "loaded"),
    ("decode_guarded", "loaded"),
    ("grad_query", "plain"),
    ("grad_query", "loaded"),
    ("grad_query_guarded", "loaded"),
    ("grad_key_value", "plain"),
    ("grad_key_value", "loaded"),
    ("grad_bias", "loaded"),
    *((kind, "grid") for kind in ("forward", "grad_query", "grad_key_value", "grad_key", "grad_value", "grad_rel_pos")),
    ("key_mass", "loaded"),
    ("grad_side", "loaded"),
    ("grad_key", "plain"),
    ("grad_value", "plain"),
    ("grad_key", "loaded"),
    ("grad_value", "loaded"),
    ("grad_key_guarded", "plain"),
    ("grad_key_guarded", "loaded"),
    ("grad_value_guarded", "plain"),
    ("grad_value_guarded", "loaded"),
    ("grad_side_query", "loaded"),
    ("grad_side_value", "loaded"),
    ("grad_side_guarded", "loaded"),
)
# Kernels of two kinds of sums, and of one of them where the registers hold no more.
TOGETHER = ("grad_key_value", "grad_side")
ALONE = ("grad_key", "grad_value", "grad_side_query", "grad_side_value")
# Kernels that read each element once.
STREAMING = (
    "linear_epilogue",
    "linear_grad",
    "gated_residual",
    "gated_residual_backward",
    "merge",
    "merge_backward",
    "merge_logsumexp_backward",
    "merge_splits",
    "rms_norm",
    "rms_norm_backward",
    "delta",
    "sum_partials",
    "pack_bits",
    "dropout_residual",
    "factorized_pool",
    "factorized_pool_backward",
    "count_sketch",
    "contrastive_rows",
    "contrastive_columns",
    "contrastive_gradients",
    "sigmoid_pass",
    "film",
    "film_backward",
    "film_along_backward",
    "weighted_sum",
    "weighted_sum_backward",
    *(f"pool_{mode}" for mode in MODES),
    *(f"pool_{mode}_backward" for mode in MODES),
    "pool_counts",
    "gather_rows",
    "pool_grid",
    "pool_grid_backward",
    "merge_patches",
    "merge_patches_backward",
    "weighted_rows",
    "weighted_rows_backward",
    "tap_dots",
    "placed_rows",
    "summed_rows",
    "rotary",
    "rotary_tables",
    "normed_rotary",
    "normed_rotary_backward",
    "inverse_norms",
    "attention_pool_softmax",
    "attention_pool_softmax_backward",
    "bilinear_attention_softmax",
    "bilinear_attention_slopes",
    "linear_cross_entropy_sums",
    "linear_cross_entropy_gradient",
    "maxsim_grad_queries",
    "maxsim_grad_documents",
    "topk_pairs",
    "topk_pairs_backward",
    "topk_grad_queries",
    "topk_grad_database",
    "deformable",
    "deformable_samples",
    "deformable_corners",
    "deformable_tokens",
)
BILINEAR = ("bilinear", "bilinear_inputs", "bilinear_weight")
LOW_RANK = ("low_rank", "low_rank_gradients", "low_rank_projection")
# Kernels with products whose block sizes are fixed.
PRODUCTS = (
    "row_shift",
    *BILINEAR,
    *LOW_RANK,
    "attention_pool_products",
    "attention_pool_pooled",
    "attention_pool_tokens",
    "match_rows",
    "bilinear_attention_scores",
    "bilinear_attention_side",
    "bilinear_attention_joint",
    "maxsim",
    "topk_keys",
)
# And those that float32 has no need of.
IN_16_BITS = ("delta_of_products",)
WIDEST = 256
KEYS = ("kernel", "level", "dtype", "head_dim", "arch")
Key = tuple[str, str, str, int, int]
COLUMNS = (*KEYS, "blocks", *(field.name for field in fields(Resources)), "triton", "digest")

# Few enough for one query to be split over its keys.
BATCH, HEADS, QUERIES, TOKENS = 4, 16, 1024, 1024


def _empty(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _arguments(level: str, dtype: torch.dtype, dim: int, queries: int = 0) -> dict[str, Any]:
    """A call of attention_forward that needs everything a level has."""
    # As many programs share the columns of wide rows.
    heads = HEADS if dim <= 256 or queries != 1 else HEADS // 4
    queries = queries or QUERIES
    given: dict[str, Any] = dict.fromkeys(OPERATOR.names)
    for name, length in (("query", queries), ("key", TOKENS), ("value", TOKENS)):
        given[name] = _empty(BATCH, heads, length, dim, dtype=dtype)
    given |= {"max_seqlen_q": 0, "max_seqlen_k": 0, "scale": dim**-0.5, "norm_eps": 1e-6}
    given |= {"is_causal": True, "softcap": 0.0, "dropout_p": 0.0, "return_key_mass": False}
    given["key_lengths"] = _empty(BATCH)
    given["key_mask"] = _empty(BATCH, TOKENS, dtype=torch.bool)
    if level == "grid":
        # More of either than one program sums of.
        for name in ("rel_pos_height", "rel_pos_width"):
            given[name] = _empty(BATCH, HEADS, queries, 32, dtype=dtype)
    if level == "loaded":
        given["range_start"] = given["range_stop"] = _empty(BATCH, queries)
        given["mask"] = _empty(BATCH, 1, queries, TOKENS, dtype=torch.bool)
        given["bias"] = _empty(1, heads, queries, TOKENS, dtype=dtype)
        given |= {"softcap": 30.0, "dropout_p": 0.1, "seed": _empty(dtype=torch.int64)}
    return given


def _run(given: dict[str, Any], *wanted: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention forward, and backward for those gradients that are wanted; -> output and logsumexp."""
    a, _ = OPERATOR.named(list(given.values()))
    out, logsumexp, key_mass = OPERATOR.empty(a)
    triton_attention.attention_forward(*given.values(), out, logsumexp, key_mass)
    if wanted:
        given = given | {"grad_out": out, "grad_logsumexp": logsumexp, "out": out, "logsumexp": logsumexp}
        *names, _, _ = (argument.name for argument in torch.ops.velm.attention_backward.default._schema.arguments)
        values = [given[name] for name in names]
        b, _ = OPERATOR.named_backward(values)
        grads = OPERATOR.empty_gradients(b, [name in wanted for name in OPERATOR.differentiable])
        triton_attention.attention_backward(*values, *grads)
    return out, logsumexp


def attention(level: str, dtype: torch.dtype, dim: int, arch: int) -> dict[str, Launch]:
    given = _arguments(level, dtype, dim) | {"return_key_mass": True}
    with pretend(arch) as launches:
        out, logsumexp = _run(given, *(name for name in OPERATOR.differentiable if given[name] is not None))
        x = given["query"]
        mask, seed = given["key_mask"], given["seed"]
        both = (out, out, None, None, x, x, x, x, mask, mask, seed, out, out, logsumexp, logsumexp)
        triton_bidirectional.bidirectional_attention_backward(*both, given["scale"], given["dropout_p"], x, x, x, x)
        _run(_arguments(level, dtype, dim, queries=1))
    return {launch.kind: launch for launch in launches}


def others(dtype: torch.dtype, arch: int) -> dict[str, Launch]:
    """Everything but the kernels over tiles of queries and keys, with every option that a kernel has."""
    rows, dim, shards = 4096, 768, 4
    x, row = _empty(rows, dim, dtype=dtype), _empty(dim, dtype=dtype)
    mask, seed = _empty(rows, dtype=torch.bool), _empty(dtype=torch.int64)
    given = _arguments("loaded", dtype, WIDEST, queries=1)
    given |= {"query_norm_weight": _empty(WIDEST, dtype=dtype), "key_norm_weight": _empty(WIDEST, dtype=dtype)}
    with pretend(arch) as launches:
        # With many queries for the delta of the result, with few for that of the products.
        _run(_arguments("plain", dtype, WIDEST), "query")
        out, logsumexp = _run(given, *(name for name in OPERATOR.differentiable if given[name] is not None))
        outs, logsumexps = [out] * shards, [logsumexp] * shards
        triton_merge_attention.merge_attention_forward(outs, logsumexps, out, logsumexp)
        triton_merge_attention.merge_attention_backward(
            out, logsumexp, outs, logsumexps, logsumexp, list(outs), list(logsumexps)
        )
        triton_gated_residual.gated_residual_forward(x, x, row, mask, x)
        triton_gated_residual.gated_residual_backward(x, x, row, mask, dtype, x, row)
        dropout_residual_forward(x, x, seed, 0.1, x)
        triton_linear.linear_forward(x, _empty(dim, dim, dtype=dtype), row, x, "gelu", "z", x, x)
        pair, options = x[None], (seed, 6, True, True, True, 0.1)
        pooled = _empty(1, x.shape[0], x.shape[1] // 6, dtype=dtype)
        factorized_pool_forward(pair, pair, *options, pooled)
        factorized_pool_backward(pooled, pair, pair, *options, pair, pair)
        few, weight = _empty(64, WIDEST, dtype=dtype), _empty(WIDEST, WIDEST, WIDEST, dtype=dtype)
        bilinear_forward(few, few, weight, row[:WIDEST], few)
        bilinear_backward(few, few, few, weight, few, few, weight, row[:WIDEST])
        _low_rank(dtype)
        square = _empty(dim, dim, dtype=dtype)
        triton_linear.linear_backward(x, x, square, None, x, "gelu", "z", x, square, row)
        _modulation(dtype)
        _bilinear_attention(dtype)
        _pooling(dtype)
        _losses(dtype)
        _retrieval(dtype)
        _sequence(dtype)
        _deformable(dtype)
    return {launch.kind: launch for launch in launches}


def _deformable(dtype: torch.dtype) -> None:
    value, locations = _empty(1, 80, 8, 32, dtype=dtype), _empty(1, 100, 8, 4, 4, 2, dtype=dtype)
    given = (value, _empty(4, 2, dtype=torch.int64), locations, locations[..., 0])
    triton_deformable.multiscale_deformable_attention_forward(*given, _empty(1, 100, 256, dtype=dtype))
    triton_deformable.multiscale_deformable_attention_backward(
        _empty(1, 100, 256, dtype=dtype), *given, value, locations, locations[..., 0]
    )


def _low_rank(dtype: torch.dtype) -> None:
    x, row, grad_row = _empty(64, WIDEST, dtype=dtype), _empty(WIDEST, dtype=dtype), _empty(WIDEST, dtype=dtype)
    factor, weight, rank = _empty(4, 1 + WIDEST, WIDEST, dtype=dtype), row[:4], 4
    # The first time for the kernel that projects a row for several; the second has all of the other.
    for shared in (_empty(16, WIDEST, dtype=dtype), x):
        inputs, rows = (shared, x, x, x), sum((shared.shape[0], 64, 64, 64))
        kept = _empty(rank * rows * WIDEST, dtype=torch.float32)
        triton_low_rank.low_rank_fusion_forward(*inputs, *[factor] * 4, weight, row, 64, True, x, kept)
    nothing = _empty(0, dtype=torch.float32)
    gradients = (*[x] * 4, *[torch.empty_like(factor)] * 4, weight, grad_row)
    triton_low_rank.low_rank_fusion_backward(x, *[x] * 4, *[factor] * 4, weight, nothing, 64, False, *gradients)


def _modulation(dtype: torch.dtype) -> None:
    x, row = _empty(BATCH, TOKENS, 768, dtype=dtype), _empty(BATCH, 768, dtype=dtype)
    weights = _empty(BATCH, triton_weighted_sum.AT_ONCE, dtype=torch.float32)
    for along in (False, True):
        film_forward(x, row, row, along, 0.0, x)
        film_backward(x, x, row, along, 0.0, x, row, row)
    hashes = _empty(768), _empty(768, dtype=torch.float32)
    sketches = _empty(2 * TOKENS, 16000, dtype=torch.float32)
    count_sketches_forward(x[0], *hashes, x[0], *hashes, 16000, sketches)
    features = [x] * triton_weighted_sum.AT_ONCE
    triton_weighted_sum.weighted_sum_forward(features, weights, x)
    # The second of two launches would be that of the features with one region.
    broadcast = [False] * len(features)
    triton_weighted_sum.weighted_sum_backward(x, features, weights, broadcast, list(features), weights)


def _bilinear_attention(dtype: torch.dtype) -> None:
    v, q, h = (_empty(BATCH, rows, 768, dtype=dtype) for rows in (100, 20, 8))
    masks = (_empty(BATCH), None, None, _empty(BATCH, 20, dtype=torch.bool))
    h, bias, maps, logits = h[0], h[0, :, 0], *(_empty(BATCH, 8, 100, 20, dtype=dtype) for _ in range(2))
    bilinear_attention_forward(v, q, h, bias, *masks, True, maps, logits)
    bilinear_attention_backward(maps, logits, v, q, h, *masks, maps, True, v, q, h, bias)


def _pooling(dtype: torch.dtype) -> None:
    x, lengths, mask = _empty(BATCH, TOKENS, 768, dtype=dtype), _empty(BATCH), _empty(BATCH, TOKENS, dtype=torch.bool)
    out = _empty(BATCH, 768, dtype=dtype)
    for mode in range(len(MODES)):
        stats = _empty(BATCH, 768, dtype=torch.int32 if MODES[mode] == "max" else torch.float32)
        pool_forward(x, lengths, mask, None, False, mode, 2.5, out, stats)
        pool_backward(out, x, lengths, mask, None, stats, TOKENS, False, mode, 2.5, x)
    index, weight = _empty(BATCH, TOKENS), _empty(BATCH, TOKENS, dtype=torch.float32)
    gather_rows_forward(x, index, _empty(BATCH, TOKENS // 2 + 1), weight, index, None, weight, x[:, : TOKENS // 2])
    match_rows_forward(x, x, weight, index)
    windows, squares = _empty(BATCH, TOKENS // 4, 2), x[:, : TOKENS // 4]
    pool_grid_forward(x, windows, 0, 0, 2, squares)
    pool_grid_backward(squares, windows, TOKENS, 0, 0, 2, x)
    merged = _empty(BATCH, TOKENS // 4, 4 * 768, dtype=dtype)
    merge_patches_forward(x, windows, 0, 0, 2, True, merged)
    merge_patches_backward(merged, windows, TOKENS, 768, 0, 0, 2, True, x)
    taps = _empty(TOKENS // 2, 4), _empty(TOKENS // 2, 4, dtype=torch.float32)
    weighted_rows_forward(x, *taps, x[:, : TOKENS // 2])
    weighted_rows_backward(x[:, : TOKENS // 2], x, *taps, TOKENS, x, taps[1])
    rows = _empty(BATCH, HEADS, 768, dtype=dtype)
    given, kept = (x, rows, lengths, mask, None), (rows, _empty(BATCH, HEADS, dtype=torch.float32))
    attention_pool_forward(*given, *kept)
    attention_pool_backward(rows, *given, *kept, x, rows)


def _sequence(dtype: torch.dtype) -> None:
    x, features, numbers = _empty(TOKENS, 768, dtype=dtype), _empty(TOKENS, 768, dtype=dtype), _empty(TOKENS)
    triton_rows.put_rows(x, numbers, features, numbers, x, add=True)
    triton_rows.sum_rows_of_text(x, numbers, numbers, features)
    # The widest heads of published models, half of them rotated.
    query, key = _empty(BATCH, HEADS, TOKENS, WIDEST, dtype=dtype), _empty(BATCH, 2, TOKENS, WIDEST, dtype=dtype)
    table = _empty(BATCH, TOKENS, WIDEST // 2, dtype=torch.float32)
    weights = _empty(HEADS * WIDEST, dtype=dtype), _empty(2 * WIDEST, dtype=dtype)
    triton_rotary.rotary_forward(query, key, table, table, 2, True, True, query, key)
    given = query, key, table, table, *weights, 1e-6, 2, True, True
    triton_rotary.normed_rotary_forward(*given, query, key)
    triton_rotary.normed_rotary_backward(query, key, *given, query, key, table, table, *weights)


def _losses(dtype: torch.dtype) -> None:
    rows, vocabulary, dim = 1024, 32000, 768
    leaves = _empty(rows, dim, dtype=dtype), _empty(vocabulary, dim, dtype=dtype), _empty(vocabulary, dtype=dtype)
    targets, of_rows = _empty(rows, dtype=torch.int64), _empty(rows, dtype=torch.float32)
    statistics, options = _empty(2, rows, dtype=torch.float32), (0.1, 30.0, "none", True, 7)
    given, made = (*leaves, targets), (None, None, None)
    results = (of_rows, of_rows, of_rows, statistics, *made)
    triton_linear_cross_entropy.linear_cross_entropy_forward(*given, *options, *results)
    kept = (*given, statistics, *made)
    triton_linear_cross_entropy.linear_cross_entropy_backward(of_rows, of_rows, of_rows, *kept, *options, *leaves)
    tile, labels, number = _empty(512, 4096, dtype=dtype), _empty(4096, dtype=torch.int32), _empty(dtype=torch.float32)
    sums, tile_labels = _empty(4, 4096, dtype=torch.float32), (labels[:512], labels)
    of_tile = (tile, number, number, 0, *tile_labels)
    contrastive_statistics(*of_tile, None, None, sums[:, :512], sums)
    contrastive_gradients(*of_tile, None, None, sums[:, :512], sums)
    sigmoid_pass(*of_tile, sums[0, :512], True, sums)
    queries, documents = _empty(BATCH, 32, WIDEST, dtype=dtype), _empty(BATCH, TOKENS, WIDEST, dtype=dtype)
    masks = _empty(BATCH, 32, dtype=torch.bool), _empty(BATCH, TOKENS, dtype=torch.bool)
    out, places = _empty(BATCH, BATCH, dtype=torch.float32), _empty(BATCH * 32, BATCH)
    maxsim_forward(queries, documents, *masks, True, out, places)
    maxsim_backward(out, queries, documents, *masks, places, True, queries, documents)


def _retrieval(dtype: torch.dtype) -> None:
    queries, database = _empty(64, 512, dtype=dtype), _empty(4096, 512, dtype=dtype)
    given = (queries, database, _empty(4096, dtype=torch.bool), _empty(4096, dtype=torch.int64))
    values, places = _empty(64, 100, dtype=torch.float32), _empty(64, 100, dtype=torch.int64)
    topk_similarity_forward(*given, 100, "cosine", values, places)
    topk_similarity_backward(values, *given, places, 100, "cosine", queries, database)


def is_launched(kind: str, dtype: torch.dtype, dim: int) -> bool:
    """Whether gradients that are both wanted come from one launch or from one each."""
    if kind in TOGETHER:
        return backend.sums_both(dtype, 2 * dim)
    return kind not in ALONE or not backend.sums_both(dtype, 2 * dim)


def instances(architectures: tuple[int, ...], dtypes: tuple[str, ...], dims: tuple[int, ...]) -> Iterator[Key]:
    for arch in architectures:
        for dtype in dtypes:
            size = getattr(torch, dtype).itemsize
            for dim in dims:
                for kind, level in ATTENTION:
                    has_entry = (size, dim) in backend.TABLE[SHARED_ENTRY.get(kind, kind), level]
                    has_entry = has_entry and backend.has_blocks(getattr(torch, dtype), dim, arch)
                    if has_entry and is_launched(kind, getattr(torch, dtype), dim):
                        yield kind, level, dtype, dim, arch
            for kind in (*PRODUCTS, *(IN_16_BITS if size == 2 else ())):
                yield kind, "plain", dtype, WIDEST, arch
        if "float16" in dtypes:
            for kind in STREAMING:
                yield kind, "plain", "float16", WIDEST, arch


@cache
def _launches(level: str | None, dtype: torch.dtype, dim: int, arch: int) -> dict[str, Launch]:
    return others(dtype, arch) if level is None else attention(level, dtype, dim, arch)


def launch_of(key: Key) -> Launch:
    kind, level, dtype, dim, arch = key
    is_attention = (kind, level) in ATTENTION
    return _launches(level if is_attention else None, getattr(torch, dtype), dim, arch)[kind]


@cache
def digest_of(key: Key) -> str:
    """The digest of what this version of Triton would compile for an instance now."""
    return digest(launch_of(key), key[-1])


def measure(key: Key) -> tuple[str, Resources]:
    launch = launch_of(key)
    c = launch.config
    return f"{c.block_m}x{c.block_n}x{c.num_stages}", resources(launch, key[-1])


def measure_or_say_why(key: Key) -> tuple[str, Resources | None, str]:
    """The same, or None and the last line of what the compiler says."""
    try:
        return *measure(key), ""
    except Exception as error:
        while error.__cause__ is not None and isinstance(error.__cause__, Exception):
            error = error.__cause__
        return "", None, f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[-1]}"


def blocks_and_warps(key: Key) -> str:
    """The blocks of an instance in versions.csv."""
    c = launch_of(key).config
    return f"{c.block_m}x{c.block_n}x{c.num_stages}x{c.num_warps}"


def record(key: Key, now: Resources, digest_now: str, found: list[str]) -> None:
    """Keeps in versions.csv what this version, if it is an older one, made of an instance."""
    version = ".".join(triton.__version__.split(".")[:2])
    if version in versions.OLDER:
        table = versions.read()
        cells = table.setdefault(key, {})
        cells[version] = "" if found else f"{blocks_and_warps(key)}:{now.registers}:{digest_now}"
        versions.write(table, list(instances(ARCHITECTURES, DTYPES, DIMENSIONS)))


def version_of_table() -> str:
    """The version of Triton that compiled all rows."""
    with FILE.open() as file:
        (version,) = {row["triton"] for row in csv.DictReader(file)}
    return version


def read() -> dict[Key, tuple[str, Resources]]:
    table = {}
    if FILE.exists():
        with FILE.open() as file:
            for row in csv.DictReader(file):
                key = (row["kernel"], row["level"], row["dtype"], int(row["head_dim"]), int(row["arch"]))
                numbers = (row[name] for name in ("registers", "spilled_bytes", "shared_bytes", "num_warps"))
                found = Resources(*(int(number) for number in numbers), float(row["occupancy"]), row["matrix"])
                table[key] = row["blocks"], found
    return table


def read_digests() -> dict[Key, str]:
    """instance -> the digest of what its row is of"""
    with FILE.open() as file:
        rows = list(csv.DictReader(file))
    return {(r["kernel"], r["level"], r["dtype"], int(r["head_dim"]), int(r["arch"])): r["digest"] for r in rows}


def recorded(keys: list[Key]) -> list[tuple[str, str]]:
    """Blocks and digest of what this version of Triton has compiled, as far as its table knows."""
    version = ".".join(triton.__version__.split(".")[:2])
    if version in versions.OLDER:
        cells = versions.read()
        split = (cells.get(key, {}).get(version, "").split(":") for key in keys)
        return [(cell[0], cell[2] if len(cell) > 2 else "") for cell in split]
    table, digests = read(), read_digests()
    return [(table[key][0], digests[key]) if key in table else ("", "") for key in keys]


def measure_unless(key: Key, before: tuple[str, str]) -> tuple[str, Resources | None, str, str] | None:
    """What `measure_or_say_why` says, and the digest; None where blocks and digest are those `before`."""
    now = blocks_and_warps(key)
    try:
        is_known = before[0] in (now, now.rpartition("x")[0]) and before[1] == digest_of(key)
    except Exception:
        # It does not compile; why, is said below.
        is_known = False
    if is_known:
        return None
    blocks, found, why_not = measure_or_say_why(key)
    return blocks, found, why_not, "" if found is None else digest_of(key)


def write(table: dict[Key, tuple[str, Resources]], digests: dict[Key, str]) -> None:
    order = {key: i for i, key in enumerate(instances(ARCHITECTURES, DTYPES, DIMENSIONS))}
    with FILE.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for key in sorted((key for key in table if key in order), key=order.__getitem__):
            blocks, found = table[key]
            writer.writerow((*key, blocks, *astuple(found), triton.__version__, digests[key]))


def complaints(key: Key, now: Resources, before: Resources | None) -> list[str]:
    """What is wrong with an instance, or worse than before."""
    found = []
    if now.spilled_bytes:
        found.append(f"spills {now.spilled_bytes} bytes")
    if now.shared_bytes > SHARED_LIMIT[key[-1]]:
        found.append(f"needs {now.shared_bytes} bytes of shared memory, the limit is {SHARED_LIMIT[key[-1]]}")
    if now.matrix == "none" and key[0] not in STREAMING:
        found.append("has no matrix instructions")
    if before is not None and triton.__version__ == version_of_table():
        # Registers move a little with every edit; what counts is how many blocks fit.
        if now.registers > before.registers + 16 or now.occupancy < before.occupancy:
            found.append(
                f"registers {before.registers} -> {now.registers}, occupancy {before.occupancy} -> {now.occupancy}"
            )
        if now.shared_bytes > 1.1 * before.shared_bytes:
            found.append(f"shared memory {before.shared_bytes} -> {now.shared_bytes}")
        if now.matrix != before.matrix:
            found.append(f"matrix instructions {before.matrix} -> {now.matrix}")
    return [f"{' '.join(map(str, key))}: {text}" for text in found]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--arch", type=int, nargs="*", default=ARCHITECTURES)
    parser.add_argument("--dim", type=int, nargs="*", default=DIMENSIONS)
    parser.add_argument("--dtype", nargs="*", default=DTYPES)
    parser.add_argument("--kernel", nargs="*")
    parser.add_argument("--missing", action="store_true")
    parser.add_argument("--stale", action="store_true")
    parser.add_argument("--jobs", type=int, default=2)
    chosen = parser.parse_args()
    table, failed = read(), []
    keys = list(instances(tuple(chosen.arch), tuple(chosen.dtype), tuple(chosen.dim)))
    if chosen.kernel:
        keys = [key for key in keys if key[0] in chosen.kernel]
    if chosen.missing:
        keys = [key for key in keys if key not in table]
    digests = read_digests()
    known = recorded(keys) if chosen.stale else [("", "")] * len(keys)
    measured = 0
    with ProcessPoolExecutor(chosen.jobs) as pool:
        for key, result in zip(keys, pool.map(measure_unless, keys, known)):
            if result is None:
                continue
            blocks, now, why_not, digest_now = result
            measured += 1
            if now is None:
                failed.append(f"{' '.join(map(str, key))}: {why_not}")
                print(failed[-1], flush=True)
                continue
            before = None if chosen.write else table.get(key, (blocks, None))[1]
            found = complaints(key, now, before)
            failed += found
            print(*key, blocks, *astuple(now), *found, flush=True)
            record(key, now, digest_now, found)
            table[key] = blocks, now
            if chosen.write:
                digests[key] = digest_now
                write(table, digests)
    print(f"Triton {triton.__version__}: {measured} instances, {len(failed)} complaints")
    print(*failed, sep="\n")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
