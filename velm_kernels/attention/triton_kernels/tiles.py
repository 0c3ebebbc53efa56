"""What the Triton attention kernels share: which rows and keys a tile holds, and its scores.

Blocks are written `b_...`, pointers `p_...`. A tile is addressed by query indices and key indices that were already
expanded to two dimensions, so that the same helpers serve tiles of queries x keys `[BM, BN]` and of keys x queries
`[BN, BM]`.

Two things that Triton 3.6 cannot do shape these files. A helper returns tensors and tuples of them: a constant that is
returned would become a tensor, and None an error. So what is known at compile time is asked where it is needed, or
handed down as a constant. And a tuple inside of a tuple loses its constants, 1 and None, in the body of a loop; so
tuples hold none.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from velm_kernels.triton.kernels import LOG2E, MAX_INDEX, sequence, tanh, to_int64

# The sign of a float32 among its bits.
SIGN = tl.constexpr(-(1 << 31))
# What stands for hidden keys must be no score, and -inf is one: a row that sees it reads whatever belongs to it. In
# forward, where the largest score is looked for, hidden ones are -inf, and LOWEST stands for a score of -inf; elsewhere
# LOWEST for hidden ones, which costs nothing. No score is that low, and none whose size is larger is one in base 2.
LOWEST = tl.constexpr(float.fromhex("-0x1.fffffap127"))
NOTHING = tl.constexpr(-float("inf"))
# A bias below this leaves nothing of a score, and counts as the next power of two: in base 2 that is exact, so that a
# row of nothing else, as masks of the smallest number of a type make it, is the mean of all values.
FAR_BIAS = tl.constexpr(-float(1 << 31))
SIGN_AND_EXPONENT = tl.constexpr(-(1 << 23))
# A logsumexp of this size says little of how many keys a row sees: its last place is 2^-11, and of a row that a finite
# bias hides altogether, log(keys) is less than that. `row_shift_kernel` knows what such rows are short of.
FAR_ROW = tl.constexpr(4096.0)
# A logsumexp of rows past the end, in front of which every score is nothing.
PAST_END = tl.constexpr(3e38)


class Strides(NamedTuple):
    """Strides in elements; the innermost one is 1. `batch` is 0 for packed sequences."""

    batch: Any
    head: Any
    row: Any


class MatrixStrides(NamedTuple):
    """Strides in elements of what broadcasts to (batch, heads, queries, keys): 0 where it broadcasts."""

    batch: Any
    head: Any
    row: Any
    column: Any


class Dropout(NamedTuple):
    """What draws the random numbers of dropout."""

    seed: Any
    # A word of the generator below this drops its element.
    drop_below: Any
    keep_scale: Any
    # 0, but for the second direction of bidirectional attention.
    direction: Any = 0


class Masks(NamedTuple):
    """Everything that restricts or shifts scores. Absent parts are None and cost nothing: a variant is compiled without
    them. `key_mask` (batch, words) and `mask` hold the bits of 64 keys a word (`pack_bits_kernel`); the rows of `bias`
    lie on multiples of 16 bytes, their elements one behind the other. What follows `mask` and `bias` are their strides:
    0 where they broadcast, `mask_word` that of the words of a row. `rel_height` and `rel_width` are the biases of the
    rows and of the columns of a grid of keys, `key_width` columns wide, for each query."""

    lengths: Any
    range_start: Any
    range_stop: Any
    key_mask: Any
    key_words: Any
    mask: Any
    mask_batch: Any
    mask_head: Any
    mask_row: Any
    mask_word: Any
    bias: Any
    bias_batch: Any
    bias_head: Any
    bias_row: Any
    rel_height: Any
    rel_height_batch: Any
    rel_height_head: Any
    rel_height_row: Any
    rel_width: Any
    rel_width_batch: Any
    rel_width_head: Any
    rel_width_row: Any
    key_width: Any


class Sizes(NamedTuple):
    """Numbers of heads, of query heads that share one key head, of queries and of keys. For packed sequences the last
    two are totals, and the pointers to the cumulative lengths are not None."""

    heads: Any
    group: Any
    queries: Any
    keys: Any
    cu_seqlens_q: Any
    cu_seqlens_k: Any


class Extents(NamedTuple):
    """First row and number of the queries and of the keys of a batch entry or packed sequence. `first_row` rows of the
    range arrays stand in front of it."""

    start_q: Any
    queries: Any
    start_k: Any
    keys: Any
    first_row: Any


class Block(NamedTuple):
    """A block of queries of one batch entry with `queries` queries and `keys` keys. Its rows see keys [b_lo, b_hi) each
    and [lo, hi) together."""

    b: Any
    b_head: Any
    b_m: Any
    b_lo: Any
    b_hi: Any
    lo: Any
    hi: Any
    queries: Any
    keys: Any


class Scaling(NamedTuple):
    """Without a softcap: `product` = scale, `cap` None. With one: `product` = scale / softcap, `cap` = softcap, so that
    s = cap * tanh(product * q.k)."""

    product: Any
    cap: Any


@triton.jit
def extents(sizes, b):
    """The `Extents` of batch entry or packed sequence `b`."""
    start_q, queries = sequence(sizes.cu_seqlens_q, b, sizes.queries)
    start_k, keys = sequence(sizes.cu_seqlens_k, b, sizes.keys)
    if sizes.cu_seqlens_q is None:
        return Extents(start_q, queries, start_k, keys, b * queries)
    else:
        return Extents(start_q, queries, start_k, keys, start_q)


@triton.jit
def row_bounds(masks, b, start_q, queries, keys, b_m, CAUSAL: tl.constexpr):
    """Keys [lo, hi) that each query row may see by its length, range and causality; (0, 0) for a row that sees none and
    for a row past the end. `start_q` counts the rows of the range arrays in front of this batch entry or sequence."""
    b_lo = tl.zeros_like(b_m)
    b_hi = tl.where(b_m < queries, keys, 0)
    if masks.lengths is not None:
        b_hi = tl.minimum(b_hi, tl.maximum(tl.load(masks.lengths + b), 0))
    if CAUSAL:
        b_hi = tl.minimum(b_hi, b_m + 1)
    if masks.range_start is not None:
        b_in = b_m < queries
        b_lo = tl.maximum(tl.load(masks.range_start + start_q + b_m, mask=b_in, other=0), 0)
        b_hi = tl.minimum(b_hi, tl.load(masks.range_stop + start_q + b_m, mask=b_in, other=0))
    b_some = b_lo < b_hi
    return tl.where(b_some, b_lo, 0), tl.where(b_some, b_hi, 0)


@triton.jit
def block_bounds(b_lo, b_hi, b_in):
    """-> (lo, hi, full_lo, full_hi): a block of rows needs keys [lo, hi) only, and all its rows see all of
    [full_lo, full_hi), which may be empty. Rows past the end (not `b_in`) do not count."""
    b_some = b_lo < b_hi
    lo = tl.min(tl.where(b_some, b_lo, MAX_INDEX), axis=0)
    hi = tl.max(b_hi, axis=0)
    full_lo = tl.max(b_lo, axis=0)
    full_hi = tl.min(tl.where(b_in, b_hi, MAX_INDEX), axis=0)
    return tl.minimum(lo, hi), hi, full_lo, full_hi


@triton.jit
def along_queries(b_x, KEYS_FIRST: tl.constexpr):
    """Expands what belongs to the queries of a tile, a vector or a number, to the tile's two dimensions."""
    if len(b_x.shape) == 0:
        return b_x
    else:
        return tl.expand_dims(b_x, 0 if KEYS_FIRST else 1)


@triton.jit
def along_keys(b_x, KEYS_FIRST: tl.constexpr):
    """The same of what belongs to the keys."""
    return tl.expand_dims(b_x, 1 if KEYS_FIRST else 0)


@triton.jit
def kept(dropout, b_head_index, b_m, start_n, BLOCK_N: tl.constexpr, KEYS_FIRST: tl.constexpr):
    """Which elements dropout keeps: Philox4x32-10 with the seed as key and (query, key // 4, batch * heads + head,
    direction) as counter; the four words serve four neighbouring keys. The tile starts at key `start_n`, a multiple
    of 4. -> [BM, BN], or [BN, BM] where KEYS_FIRST"""
    b_group = along_keys((start_n // 4) + tl.arange(0, BLOCK_N // 4), KEYS_FIRST)
    b_row = along_queries(b_m, KEYS_FIRST)
    seed = tl.load(dropout.seed)
    # Every word depends on both indices only after some rounds: start from full tiles.
    b_c0 = b_row + b_group * 0
    b_c1 = b_group + b_row * 0
    b_c2 = along_queries(b_head_index, KEYS_FIRST) + b_c0 * 0
    b_0, b_1, b_2, b_3 = tl.philox(seed, b_c0, b_c1, b_c2, b_c0 * 0 + dropout.direction)
    # Four bits travel to the layout of the tile, not four words.
    drop_below = tl.cast(dropout.drop_below, tl.uint32)
    b_bits = (b_0 >= drop_below).to(tl.int32) | ((b_1 >= drop_below).to(tl.int32) << 1)
    b_bits |= ((b_2 >= drop_below).to(tl.int32) << 2) | ((b_3 >= drop_below).to(tl.int32) << 3)
    if KEYS_FIRST:
        b_bits = b_bits[:, None, :] >> tl.arange(0, 4)[None, :, None]
        b_bits = tl.reshape(b_bits, (BLOCK_N, b_m.shape[0]))
    else:
        b_bits = b_bits[:, :, None] >> tl.arange(0, 4)[None, None, :]
        b_bits = tl.reshape(b_bits, (b_m.shape[0], BLOCK_N))
    return (b_bits & 1) != 0


@triton.jit
def matrix_rows(x, strides, b, b_head, b_m):
    """Pointers to the rows of what broadcasts to (batch, heads, queries, keys)."""
    return x + to_int64(b) * strides.batch + to_int64(b_head) * strides.head + to_int64(b_m) * strides.row


@triton.jit
def query_block(masks, b, b_head, first_row, queries, keys, b_m, CAUSAL: tl.constexpr):
    """The `Block` of the queries `b_m` and (full_lo, full_hi) of `block_bounds`. `first_row` rows of the range arrays
    stand in front of them."""
    b_lo, b_hi = row_bounds(masks, b, first_row, queries, keys, b_m, CAUSAL)
    lo, hi, full_lo, full_hi = block_bounds(b_lo, b_hi, b_m < queries)
    return Block(b, b_head, b_m, b_lo, b_hi, lo, hi, queries, keys), full_lo, full_hi


@triton.jit
def key_tiles(lo, hi, full_lo, full_hi, BLOCK_N: tl.constexpr, FIRST_PHASE: tl.constexpr):
    """Three phases of the key tiles of a block of queries, as the four numbers where they begin and end: those before
    and behind need masks, those between are seen whole by every row. With `FIRST_PHASE` 2 all are in the last phase,
    with 1 none is in the first (`Problem.first_phase`)."""
    first = lo // BLOCK_N
    last = tl.maximum(tl.cdiv(hi, BLOCK_N), first)
    if FIRST_PHASE == 2:
        return first, first, first, last
    else:
        full_first = tl.minimum(tl.maximum(tl.cdiv(full_lo, BLOCK_N), first), last)
        full_last = tl.maximum(tl.minimum(full_hi, hi) // BLOCK_N, full_first)
        return first, full_first, full_last, last


@triton.jit
def open_keys(p_words, stride, start_n, BLOCK_N: tl.constexpr, KEYS_FIRST: tl.constexpr):
    """Bits for the keys from `start_n` on of the words at `p_words`, pointers of a row each or one for all, `stride`
    apart. -> [BM, BN] or [1, BN], the other way round where KEYS_FIRST

    By halves of words: masks of 64 bits for every column would stay in registers."""
    tl.static_assert(BLOCK_N <= 128)
    b_j = along_keys(tl.arange(0, BLOCK_N), KEYS_FIRST)
    b_word = along_queries(tl.load(p_words + (start_n // 64) * stride), KEYS_FIRST)
    if BLOCK_N < 64:
        b_half = (b_word >> (start_n % 64)).to(tl.int32)
    else:
        b_half = tl.where(b_j % 64 < 32, b_word.to(tl.int32), (b_word >> 32).to(tl.int32))
    if BLOCK_N == 128:
        b_word = along_queries(tl.load(p_words + (start_n // 64 + 1) * stride), KEYS_FIRST)
        b_next = tl.where(b_j % 64 < 32, b_word.to(tl.int32), (b_word >> 32).to(tl.int32))
        b_half = tl.where(b_j < 64, b_half, b_next)
    return ((b_half >> (b_j % 32)) & 1) != 0


@triton.jit
def scores(
    masks,
    scaling,
    block,
    b_qk,
    b_ok,
    start_n,
    MASKED: tl.constexpr,
    KEYS_FIRST: tl.constexpr,
    FORWARD: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Scores of a tile of products `b_qk`, LOWEST where not visible. FORWARD: -inf where not visible, and in a tile
    that may hide something LOWEST instead of -inf where visible.

    `b_ok` [BN] is what `key_rows_ok` says of the keys; KEYS_FIRST: the tile is [BN, BM]. A tile that is not `MASKED`
    lies inside [b_lo, b_hi) of all of its rows."""
    b_s = b_qk * scaling.product
    if scaling.cap is not None:
        b_s = tanh(b_s) * scaling.cap
    b_j = tl.arange(0, BLOCK_N)
    b_n = along_keys(start_n + b_j, KEYS_FIRST)
    # Rows past the end see nothing; they read what the last one reads.
    b_m = tl.minimum(block.b_m, block.queries - 1)
    if masks.rel_height is not None:
        strides = Strides(masks.rel_height_batch, masks.rel_height_head, masks.rel_height_row)
        p_rows = matrix_rows(masks.rel_height, strides, block.b, block.b_head, b_m)
        b_there = b_n < block.keys
        p_tile = along_queries(p_rows, KEYS_FIRST) + b_n // masks.key_width
        b_rel = tl.load(p_tile, mask=b_there, other=0.0).to(tl.float32)
        strides = Strides(masks.rel_width_batch, masks.rel_width_head, masks.rel_width_row)
        p_rows = matrix_rows(masks.rel_width, strides, block.b, block.b_head, b_m)
        p_tile = along_queries(p_rows, KEYS_FIRST) + b_n % masks.key_width
        b_s += b_rel + tl.load(p_tile, mask=b_there, other=0.0).to(tl.float32)
    if masks.bias is not None:
        strides = Strides(masks.bias_batch, masks.bias_head, masks.bias_row)
        p_rows = matrix_rows(masks.bias, strides, block.b, block.b_head, b_m)
        p_tile = along_queries(p_rows + start_n, KEYS_FIRST) + along_keys(b_j, KEYS_FIRST)
        b_bias = tl.load(p_tile, mask=b_n < block.keys, other=0.0).to(tl.float32)
        b_power = (b_bias.to(tl.int32, bitcast=True) & SIGN_AND_EXPONENT).to(tl.float32, bitcast=True)
        b_s = b_s + tl.where(b_bias < FAR_BIAS, b_power, b_bias)
    HIDDEN: tl.constexpr = NOTHING if FORWARD else LOWEST
    if FORWARD and (MASKED or (masks.key_mask is not None)):
        b_s = tl.where(b_s == -float("inf"), LOWEST, b_s)
    if masks.bias is not None:
        # Selected, as what is hidden by -inf may be NaN.
        b_s = tl.where(b_bias == -float("inf"), HIDDEN, b_s)
    if masks.mask is not None:
        strides = Strides(masks.mask_batch, masks.mask_head, masks.mask_row)
        p_rows = matrix_rows(masks.mask, strides, block.b, block.b_head, b_m)
        b_s = tl.where(open_keys(p_rows, masks.mask_word, start_n, BLOCK_N, KEYS_FIRST), b_s, HIDDEN)
    if masks.key_mask is not None:
        b_s = tl.where(along_keys(b_ok, KEYS_FIRST), b_s, HIDDEN)
    if MASKED:
        b_visible = b_n < along_queries(block.b_hi, KEYS_FIRST)
        if masks.range_start is not None:
            b_visible = b_visible & (b_n >= along_queries(block.b_lo, KEYS_FIRST))
        b_s = tl.where(b_visible, b_s, HIDDEN)
    return b_s


@triton.jit
def open_rows(words, b, row_words, start, BLOCK: tl.constexpr):
    """Bits from `start` on in `words` (batch, row_words). -> [BLOCK]"""
    return tl.reshape(open_keys(words + to_int64(b) * row_words, 1, start, BLOCK, False), (BLOCK,))


@triton.jit
def key_rows_ok(masks, b, start_n, lo, hi, BLOCK_N: tl.constexpr, MASKED: tl.constexpr):
    """Which of the keys from `start_n` on may be read at all. -> [BN]"""
    b_ok = tl.full((BLOCK_N,), True, tl.int1)
    if MASKED:
        b_n = start_n + tl.arange(0, BLOCK_N)
        b_ok = (b_n >= lo) & (b_n < hi)
    if masks.key_mask is not None:
        b_ok = b_ok & open_rows(masks.key_mask, b, masks.key_words, start_n, BLOCK_N)
    return b_ok


@triton.jit
def unless_infinite(b_lse):
    """logsumexp for `probabilities`: NaN where it is infinite, as all weights of such a row are. An empty row is one of
    them, but hides all keys."""
    return tl.where(tl.abs(b_lse) == float("inf"), float("nan"), b_lse)


@triton.jit
def probabilities(
    b_s,
    b_lse,
    b_shift,
    dropout,
    b_head_index,
    b_m,
    start_n,
    SHIFTS: tl.constexpr,
    HIDES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    KEYS_FIRST: tl.constexpr,
):
    """exp(b_s - b_lse), where `b_lse` comes from `unless_infinite` and has the tile's two dimensions, as has `b_shift`,
    which with SHIFTS is what the weights of rows are short of, in base 2 (`row_shift_kernel`). The difference is
    rounded, not the scores in base 2, whose last place is larger the larger they are.

    With dropout the sign is set of what it drops, so that no mask stays live beside it. HIDES: the tile may hide
    something; that becomes -0.0, whatever stands in `b_lse`."""
    if SHIFTS:
        b_p = tl.exp2(tl.fma(b_s - b_lse, LOG2E, b_shift))
    else:
        b_p = tl.exp2((b_s - b_lse) * LOG2E)
    if dropout is not None:
        # By the bits: NaN has a sign too, and not always the same one.
        b_bits = b_p.to(tl.int32, bitcast=True)
        b_kept = kept(dropout, b_head_index, b_m, start_n, BLOCK_N, KEYS_FIRST)
        b_p = tl.where(b_kept, b_bits & ~SIGN, b_bits | SIGN).to(tl.float32, bitcast=True)
    if HIDES:
        b_p = tl.where(b_s == LOWEST, -0.0, b_p)
    return b_p


@triton.jit
def kept_weights(b_p, dropout):
    """The weights of values, of what `probabilities` says."""
    if dropout is not None:
        return tl.where(b_p.to(tl.int32, bitcast=True) < 0, 0.0, b_p * dropout.keep_scale)
    else:
        return b_p


@triton.jit
def grad_scores(b_p, b_dp, b_delta, dropout, HIDES: tl.constexpr):
    """With dp = grad_out . value and delta = sum(grad_out * out) - grad_logsumexp the gradient of a score is
    p * (dp - delta) (Dao et al., 2022). `b_p` and HIDES as in `probabilities`: of what is hidden, dp and delta may be
    NaN."""
    b_bits = b_p.to(tl.int32, bitcast=True)
    if dropout is not None:
        b_dp = tl.where(b_bits < 0, 0.0, b_dp * dropout.keep_scale)
    b_ds = tl.abs(b_p) * (b_dp - b_delta)
    if HIDES:
        b_ds = tl.where(b_bits == SIGN, 0.0, b_ds)
    return b_ds


@triton.jit
def grad_products(b_ds, b_p, b_qk, scaling, HIDES: tl.constexpr):
    """The gradient of the products, without the scale, from that of the scores behind a softcap and a bias."""
    if scaling.cap is not None:
        b_tanh = tanh(b_qk * scaling.product)
        b_ds = b_ds * (1.0 - b_tanh * b_tanh)
        if HIDES:
            b_ds = tl.where(b_p.to(tl.int32, bitcast=True) == SIGN, 0.0, b_ds)
    return b_ds


@triton.jit
def pack_bits_kernel(
    mask,
    words,
    strides,
    heads,
    queries,
    keys,
    rows,
    row_words,
    word_blocks,
    BLOCK_M: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Bytes that broadcast to nothing any more (batch, heads, queries, keys) to bits: `words` (rows, row_words) int64,
    key j at bit j % 64 of word j // 64."""
    b_row = (tl.program_id(0) // word_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    b_word = (tl.program_id(0) % word_blocks) * BLOCK_W + tl.arange(0, BLOCK_W)
    b_bit = tl.arange(0, 64)
    b_in = b_row < rows
    p_rows = matrix_rows(mask, strides, b_row // (heads * queries), (b_row // queries) % heads, b_row % queries)
    b_n = b_word[:, None] * 64 + b_bit[None, :]
    b_ok = b_in[:, None, None] & (b_n < keys)[None, :, :]
    b_x = tl.load(p_rows[:, None, None] + (to_int64(b_n) * strides.column)[None, :, :], mask=b_ok, other=0)
    b_packed = tl.sum((b_x != 0).to(tl.int64) << b_bit.to(tl.int64)[None, None, :], 2)
    p_words = words + to_int64(b_row)[:, None] * row_words + b_word[None, :]
    tl.store(p_words, b_packed, mask=b_in[:, None] & (b_word < row_words)[None, :])
