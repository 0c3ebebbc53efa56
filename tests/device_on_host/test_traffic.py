"""Bytes of global memory that the kernels ask for, against the least possible, as the execution model counts them."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
import torch
from torch import Tensor

import velm_kernels
from tests.conftest import DEVICE_ON_HOST
from tests.cuda.resources import ROOT, block_threads, dynamic_shared
from velm_kernels.backends import cuda

pytestmark = list(DEVICE_ON_HOST.marks)

ROWS, DIM = 256, 512


def count(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def traffic() -> tuple[int, int]:
    launches = cuda.launches()
    assert launches
    return sum(int(one["global_bytes_read"]) for one in launches), sum(
        int(one["global_bytes_written"]) for one in launches
    )


def check(least_read: int, least_written: int, limit: float) -> None:
    read, written = traffic()
    assert least_read <= read <= limit * least_read, f"{read / least_read:.3f} times the least possible read"
    assert least_written <= written <= limit * least_written, f"{written / least_written:.3f} times the least written"


# As large as to have as many rows a thread as there may be; for bfloat16 that of the benchmark.
@pytest.mark.parametrize(("dtype", "rows"), [(torch.float32, 512), (torch.bfloat16, 2048)], ids=str)
def test_gated_residual(dtype: torch.dtype, rows: int) -> None:
    dim = 4096
    residual, x, grad = (torch.randn(rows, dim).to(dtype) for _ in range(3))
    gate, mask = torch.randn(dim), torch.ones(rows, dtype=torch.bool)
    mask[::4] = False
    live = count(x) * 3 // 4
    x.requires_grad_()
    gate.requires_grad_()
    cuda.launches()
    with velm_kernels.use_backend("device_on_host"):
        out = velm_kernels.gated_residual(residual, x, gate, mask)
        # Beyond the least: the gate for the rows of a thread, and the mask for every thread along a row.
        check(count(residual, gate, mask) + live, count(out), 1.15)
        out.backward(grad)
        # Masked rows are read neither of grad nor of x. Beyond that: sums for the gate.
        check(count(gate, mask) + 2 * live, count(x, gate), 1.15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merge_attention(dtype: torch.dtype) -> None:
    outs, lses = torch.randn(3, 2, 4, 32, 128).to(dtype), torch.randn(3, 2, 4, 32)
    grad, grad_lse = torch.randn(2, 4, 32, 128).to(dtype), torch.randn(2, 4, 32)
    lses[1, :, 2] = -torch.inf
    live = count(outs) - count(outs[1, :, 2])
    outs.requires_grad_()
    lses.requires_grad_()
    cuda.launches()
    with velm_kernels.use_backend("device_on_host"):
        out, lse = velm_kernels.merge_attention(outs, lses)
        check(live + count(lses), count(out, lse), 1.01)
        torch.autograd.backward([out, lse], [grad, grad_lse])
        # Beyond the least: the total logsumexp for every lane.
        check(live + count(grad, lses, lse, grad_lse), count(outs, lses), 1.15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dropout_residual(dtype: torch.dtype) -> None:
    x, residual = (torch.randn(ROWS, DIM).to(dtype) for _ in range(2))
    cuda.launches()
    with velm_kernels.use_backend("device_on_host"):
        out = velm_kernels.dropout_residual(x, residual, 0.1, seed=1)
    # Beyond the least: the seed, 8 bytes for every 16 elements.
    check(count(x, residual), count(out), 1.13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels_first", [False, True])
def test_film(dtype: torch.dtype, channels_first: bool) -> None:
    x, gamma, beta = torch.randn(2, 160, 512).to(dtype), torch.randn(2, 512).to(dtype), torch.randn(2, 512).to(dtype)
    if channels_first:
        x = x.transpose(1, 2).contiguous()
    leaves = [leaf.requires_grad_() for leaf in (x, gamma, beta)]
    grad = torch.randn(x.shape).to(dtype)
    cuda.launches()
    with velm_kernels.use_backend("device_on_host"):
        out = velm_kernels.film(*leaves, channels_first=channels_first)
        # Beyond the least: gamma and beta for each run of regions, and in backward their sums. Next to each other
        # regions have one gamma, which all lanes of a warp ask for.
        lanes = 32 if channels_first else 1
        check(count(x) + lanes * count(gamma, beta), count(out), 1.08)
        out.backward(grad)
        check(count(x, grad) + lanes * count(gamma), count(x, gamma, beta), 1.15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weighted_sum(dtype: torch.dtype) -> None:
    a, b, grad = (torch.randn(2, 160, 512).to(dtype) for _ in range(3))
    row, weights = torch.randn(2, 512).to(dtype), torch.randn(2, 3)
    leaves = [leaf.requires_grad_() for leaf in (a, b, row, weights)]
    cuda.launches()
    with velm_kernels.use_backend("device_on_host"):
        out = velm_kernels.weighted_sum(leaves[:3], weights)
        # The row for every region, and the weights for every thread of it: from a cache.
        one_row = count(out) + count(weights) * out.shape[1] * 512 * dtype.itemsize // 16
        check(count(a, b) + one_row, count(out), 1.08)
        out.backward(grad)
        # The gradient once for each feature and once for its sum over regions, after the first time from a cache.
        check(count(a, b, row) + 3 * count(grad), count(a, b, row, weights), 1.15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_features_at_tokens(dtype: torch.dtype) -> None:
    dim, tokens = 2048 // dtype.itemsize, 256
    mask = torch.arange(tokens)[None] % 4 == 1
    hidden, features = torch.randn(1, tokens, dim).to(dtype), torch.randn(tokens // 4, dim).to(dtype)
    weight, token_ids = torch.randn(tokens, dim).to(dtype), torch.arange(tokens).masked_fill(mask, -1)[None]
    with velm_kernels.use_backend("device_on_host"), torch.no_grad():
        cuda.launches()
        # Beyond the least: the number of each row for every lane.
        out = velm_kernels.splice_into(hidden, features, mask)
        check(count(out), count(out), 1.08)
        out = velm_kernels.splice_tokens(token_ids, weight, features, -1)
        check(count(out), count(out), 1.13)
        out = velm_kernels.add_at_tokens(hidden, features, mask)
        check(count(out, features), count(out), 1.08)
        velm_kernels.add_at_tokens(hidden, features, mask, inplace=True)
        check(2 * count(features), count(features), 1.08)
    leaves = [weight.requires_grad_(), features.requires_grad_()]
    with velm_kernels.use_backend("device_on_host"):
        out = velm_kernels.splice_tokens(token_ids, *leaves, -1)
        cuda.launches()
        torch.autograd.grad(out, leaves, torch.randn_like(out))
        # The id and the number of each row for every lane, beside its 16 bytes.
        check(count(out), count(out), 1.45)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim", [64, 72])
def test_rotary(dtype: torch.dtype, head_dim: int) -> None:
    query, key = torch.randn(1, 40, 16, head_dim).to(dtype), torch.randn(1, 40, 8, head_dim).to(dtype)
    leaves = [x.transpose(1, 2).requires_grad_() for x in (query, key)]
    cos, sin = torch.randn(2, 40, head_dim)
    weight = torch.ones(head_dim)
    both = count(query, key)
    cuda.launches()
    with velm_kernels.use_backend("device_on_host"):
        outs = velm_kernels.rotary(*leaves, cos, sin)
        # Tables once for every 8 heads.
        check(both + 3 * count(cos, sin), both, 1.001)
        torch.autograd.grad(outs, leaves, [x.detach() for x in leaves])
        check(both + 3 * count(cos, sin), both, 1.001)
        # From caches: what is normalised a second time, and tables and weight for every head.
        outs = velm_kernels.rotary(*leaves, cos, sin, query_norm_weight=weight, key_norm_weight=weight)
        check(2 * both + 24 * (count(cos, sin) + 40 * count(weight)), both, 1.001)
        torch.autograd.grad(outs, leaves, [x.detach() for x in leaves])
        # Of two passes, the second has the weight once for 8 rows.
        check(4 * both + 24 * (2 * count(cos, sin) + 40 * count(weight)), both, 1.1)


def test_bilinear() -> None:
    rows, dx, dy, out = 64, 64, 128, 64
    x, y, grad = (torch.randn(rows, dim).bfloat16() for dim in (dx, dy, out))
    weight, bias = torch.randn(out, dx, dy).bfloat16(), torch.randn(out).bfloat16()
    leaves = [tensor.requires_grad_() for tensor in (x, y, weight, bias)]
    cuda.launches()
    with velm_kernels.use_backend("device_on_host"):
        z = velm_kernels.bilinear(*leaves)
        forward, added = cuda.launches()
        torch.autograd.grad(z, leaves, grad)
    inputs, added_x, added_y, of_weight, of_bias = cuda.launches()
    # The weight is read once, by parts of 16 i; the other side of each part for it, as tiles of 64 columns.
    parts, columns = dx // 16, dy // 64
    assert forward["blocks"] == parts
    assert forward["global_bytes_read"] == count(weight, x) + parts * count(y)
    assert forward["global_bytes_written"] == parts * 4 * z.numel()
    assert added["global_bytes_read"] == parts * 4 * z.numel() + rows * count(bias)
    assert added["global_bytes_written"] == count(z)
    # With an out of half dy parts are twice as long, but tiles of columns are two.
    parts = dx // 32
    assert inputs["blocks"] == parts * columns
    # grad for every 16 i.
    assert inputs["global_bytes_read"] == count(weight, x, x) + parts * (count(y) + columns * 2 * count(grad))
    assert inputs["global_bytes_written"] == 4 * (columns * x.numel() + parts * y.numel())
    assert int(added_x["global_bytes_read"]) + int(added_y["global_bytes_read"]) == inputs["global_bytes_written"]
    # Nothing is written but the gradient, and of what is read a block has one tile for all its i, here four.
    assert of_weight["global_bytes_written"] == count(weight)
    assert of_weight["global_bytes_read"] == dx // 4 * (columns * count(grad) + count(y)) + columns * count(x)
    assert of_bias["global_bytes_read"] == count(grad) and of_bias["global_bytes_written"] == count(bias)


def test_bilinear_attention() -> None:
    batch, glimpses, regions, words, k = 1, 8, 36, 7, 640
    v, q = (torch.randn(batch, rows, k).bfloat16() for rows in (regions, words))
    h, bias = torch.randn(glimpses, k).bfloat16() / 8, torch.randn(glimpses).bfloat16()
    leaves = [tensor.requires_grad_() for tensor in (v, q, h, bias)]
    cuda.launches()
    with velm_kernels.use_backend("device_on_host"):
        maps, logits = velm_kernels.bilinear_attention(*leaves, return_logits=True)
        scores, softmax = cuda.launches()
        torch.autograd.backward([maps, logits], [torch.randn_like(maps), torch.randn_like(logits)])
    slopes, of_v, of_q, of_h, of_bias = cuda.launches()
    # Both sides and h once for all glimpses, in two parts of k, which leave their sums.
    pairs = batch * glimpses * regions * words
    assert scores["global_bytes_read"] == count(v, q, h)
    assert scores["global_bytes_written"] == 2 * 4 * pairs
    # The sum of the parts is written, and read for the second time; the bias is read by all threads.
    assert softmax["global_bytes_read"] == 3 * 4 * pairs + batch * glimpses * 512 * bias.itemsize
    assert softmax["global_bytes_written"] == 4 * pairs + count(maps, logits)
    assert slopes["global_bytes_read"] == 2 * 3 * count(maps)
    assert slopes["global_bytes_written"] == count(maps) + 4 * batch * glimpses
    # Each side once, and weights for each tile of 64 columns.
    assert of_v["global_bytes_read"] == count(v, q, h) + k // 64 * count(maps)
    assert of_v["global_bytes_written"] == count(v) + 4 * batch * glimpses * k
    assert of_h["global_bytes_read"] == 4 * batch * glimpses * k and of_h["global_bytes_written"] == count(h)
    # A tile of regions serves 256 columns, of 7 words.
    assert of_q["blocks"] == -(-k // 256)
    assert of_q["global_bytes_read"] == count(v, h) + k // 64 * count(maps)
    assert of_q["global_bytes_written"] == count(q)
    assert of_bias["global_bytes_read"] == 4 * batch * glimpses and of_bias["global_bytes_written"] == count(bias)
    # Rows that do not count are not read, nor are the sums of what is behind the lengths written.
    v_mask, q_mask = (torch.arange(rows)[None] % 3 > 0 for rows in (regions, words))
    lengths = torch.tensor([5])
    with velm_kernels.use_backend("device_on_host"):
        velm_kernels.bilinear_attention(*leaves, v_mask=v_mask, q_mask=q_mask, q_lengths=lengths)
        scores, _ = cuda.launches()
    q_mask = q_mask[:, :5]
    # Of both parts of k all threads read the length.
    of_masks = 2 * (count(v_mask, q_mask) + 128 * 4)
    assert scores["global_bytes_read"] == count(v[v_mask], q[:, :5][q_mask], h) + of_masks
    assert scores["global_bytes_written"] == 2 * 4 * glimpses * regions * 5


def test_low_rank_fusion() -> None:
    entries, regions, rank, out = 2, 64, 3, 128
    rows, threads, tiles = entries * regions, 128, 64
    inputs = [torch.randn(entries, 64).bfloat16(), torch.randn(entries, regions, 192).bfloat16()]
    factors = [torch.randn(rank, 1 + x.shape[-1], out).bfloat16() for x in inputs]
    weight, bias = torch.randn(rank).bfloat16(), torch.randn(out).bfloat16()
    leaves = [tensor.requires_grad_() for tensor in (*inputs, *factors, weight, bias)]
    cuda.launches()
    with velm_kernels.use_backend("device_on_host"):
        z = velm_kernels.low_rank_fusion(inputs, factors, weight, bias)
        projected, fused, added = cuda.launches()
        torch.autograd.grad(z, leaves, torch.randn_like(z))
    (gradients,) = cuda.launches()
    row_blocks, column_blocks = rows // tiles, out // tiles

    def of_tiles(x: Tensor, factor: Tensor, row_blocks: int) -> int:
        # The row of the 1 by every lane that has one of its columns: eight in each half of the rows.
        of_one = 16 * count(factor[:, 0])
        return column_blocks * rank * count(x) + row_blocks * (count(factor[:, 1:]) + of_one)

    # The input of one row for many once for each of its own rows, and the other once for each of the result.
    numbers = rank * out * entries, rank * out * rows
    assert projected["global_bytes_read"] == of_tiles(inputs[0], factors[0], 1)
    assert projected["global_bytes_written"] == 4 * numbers[0]
    # A part for each rank; every thread asks for its weight.
    weights = row_blocks * column_blocks * threads * count(weight)
    assert fused["blocks"] == row_blocks * column_blocks * rank
    assert fused["global_bytes_read"] == of_tiles(inputs[1], factors[1], row_blocks) + 4 * numbers[1] + weights
    assert fused["global_bytes_written"] == 4 * rank * z.numel() + 4 * numbers[1]
    assert added["global_bytes_read"] == 4 * rank * z.numel() + rows * count(bias)
    assert added["global_bytes_written"] == count(z)
    # Everything once but grad, which each rank reads, and what one row for many has, once for every eight of these.
    blocks, numbers = int(gradients["blocks"]), (numbers[0] * regions // 8, numbers[1])
    assert gradients["global_bytes_read"] == 4 * sum(numbers) + rank * count(z) + blocks * threads * weight.itemsize
    assert gradients["global_bytes_written"] == sum(numbers) * z.itemsize + 4 * blocks
    assert int(projected["matrix_instructions"]) and int(fused["matrix_instructions"])


def test_multiscale_deformable_attention() -> None:
    sides, queries, heads, d, points = [(6, 10), (3, 5)], 48, 2, 32, 4
    shapes, tokens, lanes = torch.tensor(sides), 75, 4
    value = torch.randn(1, tokens, heads, d).bfloat16()
    # All four corners are inside.
    locations = 0.3 + 0.4 * torch.rand(1, queries, heads, len(sides), points, 2)
    weights = torch.rand(1, queries, heads, len(sides), points)
    leaves = [leaf.requires_grad_() for leaf in (value, locations, weights)]
    cuda.launches()
    with velm_kernels.use_backend("device_on_host"):
        out = velm_kernels.multiscale_deformable_attention(leaves[0], shapes, *leaves[1:])
        (forward,) = cuda.launches()
        torch.autograd.grad(out, leaves, torch.randn_like(out))
    samples, counted, _, placed, of_value = launches = cuda.launches()
    for launch in (forward, *launches):
        check_shared_bytes(launch)
    # Four lanes have a row, and all of them read where its samples lie.
    corners = 4 * weights.numel() * d * value.itemsize
    of_rows = lanes * (count(locations, weights) + queries * heads * count(shapes))
    assert forward["global_bytes_read"] == corners + of_rows and forward["global_bytes_written"] == count(out)
    assert samples["global_bytes_read"] == corners + of_rows + count(out)
    assert samples["global_bytes_written"] == count(locations, weights)
    # A sample is counted once, and once more placed as four numbers.
    assert counted["global_bytes_written"] == 4 * weights.numel()
    written = int(placed["global_bytes_written"]) - 4 * 4 * weights.numel()
    assert 0 < written <= 4 * weights.numel()
    # Each corner is read with what comes in; all lanes read the sizes of levels up to that of their token, and the ends
    # of six cells, of which that before the first one is none.
    of_tokens = 60 * 16 + 15 * 32 + 75 * 6 * 4 - len(sides) * 4
    assert of_value["global_bytes_read"] == corners + 4 * weights.numel() * lanes * 16 + heads * 32 * of_tokens
    assert of_value["global_bytes_written"] == count(value)


HEADS, QUERIES, KEYS = 2, 130, 300
# Rows of a block: each of them reads the keys and values that its rows see.
BLOCK_ROWS = 64


def name_of(kernel: str | int) -> str:
    return re.sub(r".*?(\w+)<.*", r"\1", str(kernel))


def check_shared_bytes(launch: dict[str, str | int]) -> None:
    """That the table of resources knows what a launch asks for."""
    kernel = re.sub(r"\(velm::cuda::\w+::Kind\)|velm::cuda::", "", str(launch["kernel"]))
    assert launch["shared_bytes"] == dynamic_shared(kernel), kernel
    assert launch["threads"] == block_threads(kernel), kernel


@pytest.mark.parametrize(
    ("dtype", "dim"),
    [(torch.bfloat16, 64), (torch.float16, 128), (torch.bfloat16, 256), *((torch.float32, d) for d in (64, 128, 256))],
    ids=str,
)
def test_attention_forward(dtype: torch.dtype, dim: int) -> None:
    query = torch.randn(1, HEADS, QUERIES, dim).to(dtype)
    key, value = torch.randn(2, 1, HEADS, KEYS, dim).to(dtype)
    mask = torch.randn(1, KEYS) > -1
    # The rows of the first block see nothing but the first keys.
    stop = torch.full((1, QUERIES), KEYS)
    stop[:, :BLOCK_ROWS] = 100
    ranges = (torch.zeros_like(stop), stop)
    seen = sum(int(stop[0, row]) for row in range(0, QUERIES, BLOCK_ROWS))
    cuda.launches()
    with velm_kernels.use_backend("device_on_host"):
        out, lse = velm_kernels.cross_attention(
            query, key, value, key_ranges=ranges, key_mask=mask, return_logsumexp=True
        )
    (launch,) = cuda.launches()
    check_shared_bytes(launch)
    # Ranges are 32-bit integers, one pair a row and head.
    least_read = count(query) + HEADS * (seen * 2 * dim * key.element_size() + 8 * QUERIES + seen)
    read, written = int(launch["global_bytes_read"]), int(launch["global_bytes_written"])
    # Beyond the least: key_mask for each of the four warps.
    assert least_read <= read <= 1.15 * least_read, f"{read / least_read:.3f} times the least possible read"
    assert written == count(out, lse)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_split_keys(dtype: torch.dtype) -> None:
    query = torch.randn(1, 4, 1, 128).to(dtype)
    key, value = torch.randn(2, 1, 1, 1024, 128).to(dtype)
    cuda.launches()
    with velm_kernels.use_backend("device_on_host"):
        out, lse = velm_kernels.cross_attention(query, key, value, return_logsumexp=True)
    split, merged = cuda.launches()
    check_shared_bytes(split)
    splits = int(split["blocks"])
    # Beside the results a logsumexp and what it is short of.
    partials = splits * 4 * (128 + 2) * 4
    # Keys and values once for all heads, queries for every split.
    assert splits == 4 and split["global_bytes_read"] == count(key, value) + splits * count(query)
    assert split["global_bytes_written"] == merged["global_bytes_read"] == partials
    assert merged["global_bytes_written"] == count(out, lse)


@pytest.mark.parametrize(
    ("dtype", "dim", "keys"),
    [(torch.bfloat16, 64, 70), (torch.float16, 128, 70), (torch.bfloat16, 256, 70), (torch.float32, 64, 70),
     (torch.float32, 128, 70), (torch.bfloat16, 64, 257)],
    ids=str,
)  # fmt: skip
def test_attention_backward(dtype: torch.dtype, dim: int, keys: int) -> None:
    heads, queries = 2, 130
    query, grad = torch.randn(2, 1, heads, queries, dim).to(dtype)
    key, value = torch.randn(2, 1, 1, keys, dim).to(dtype)
    leaves = [t.requires_grad_() for t in (query, key, value)]
    with velm_kernels.use_backend("device_on_host"):
        out = velm_kernels.cross_attention(*leaves)
        cuda.launches()
        grads = torch.autograd.grad(out, leaves, grad)
    launches = cuda.launches()
    for launch in launches:
        check_shared_bytes(launch)
    rows, query_blocks, key_blocks = heads * queries * 4, -(-queries // BLOCK_ROWS), -(-keys // BLOCK_ROWS)
    tiles = heads * query_blocks * count(key, value)
    # Keys and values for each tile of queries; queries and their gradients for each tile of keys.
    of_sums = count(query, grad) + rows + tiles if keys <= 256 else count(out, grad) + rows
    least = {
        "row_sums" if keys <= 256 else "delta": (of_sums, 2 * rows),
        "grad_query": (count(query, grad) + 3 * rows + tiles, count(query)),
        "grad_key": (count(key, value) + key_blocks * (count(query, grad) + 3 * rows), count(key)),
        "grad_value": (count(key) + key_blocks * (count(query, grad) + 2 * rows), count(value)),
    }
    assert name_of(launches[0]["kernel"]) == next(iter(least)) + "_kernel"
    assert len(launches) == len(least)
    for launch, (name, (read, written)) in zip(launches, least.items(), strict=True):
        # Beyond the least: what belongs to a row, for each lane that holds a part of it.
        ratio = int(launch["global_bytes_read"]) / read
        assert 1 <= ratio <= 1.15, f"{name}: {ratio:.3f} times the least possible read"
        assert launch["global_bytes_written"] == written, name
    assert [g.shape for g in grads] == [t.shape for t in leaves]


@pytest.mark.parametrize(
    ("dtype", "dim", "rows_of_block"),
    [(torch.bfloat16, 64, 64), (torch.float16, 128, 64), (torch.bfloat16, 256, 32), (torch.float32, 64, 64),
     (torch.float32, 128, 32)],
    ids=str,
)  # fmt: skip
def test_bidirectional_attention(dtype: torch.dtype, dim: int, rows_of_block: int) -> None:
    query_a, value_a, grad_a = torch.randn(3, 1, 1, 70, dim).to(dtype)
    query_b, value_b, grad_b = torch.randn(3, 1, 1, 130, dim).to(dtype)
    leaves = [t.requires_grad_() for t in (query_a, query_b, value_a, value_b)]
    with velm_kernels.use_backend("device_on_host"):
        cuda.launches()
        outs = velm_kernels.bidirectional_attention(*leaves)
        # In forward a pass for each direction.
        for launch, rows, columns in zip(cuda.launches(), (70, 130), (130, 70), strict=True):
            tiles = -(-rows // BLOCK_ROWS) * columns * 2 * dim * dtype.itemsize
            assert launch["global_bytes_read"] == rows * dim * dtype.itemsize + tiles
        torch.autograd.grad(outs, leaves, (grad_a, grad_b))
    launches = cuda.launches()
    for launch in launches:
        check_shared_bytes(launch)
    sides = [one for one in launches if "grad_side" in str(one["kernel"])]
    # After the sums of rows of each direction; then the gradient of value of each.
    assert len(launches) == 6 and launches[2:4] == sides
    for launch, query, rows, columns in zip(sides, (query_a, query_b), (70, 130), (130, 70), strict=True):
        # Three tensors of its rows once, three of the others for each tile of rows, and three floats of each.
        blocks = -(-rows // rows_of_block)
        least = (rows + blocks * columns) * (3 * dim * dtype.itemsize + 12)
        ratio = int(launch["global_bytes_read"]) / least
        # Beyond the least: what belongs to a row, for each lane that holds a part of it.
        assert 1 <= ratio <= 1.15, f"{ratio:.3f} times the least possible read"
        assert launch["global_bytes_written"] == count(query)


def test_bidirectional_attention_splits() -> None:
    query_a, value_a = torch.randn(2, 1, 1, 20, 16)
    query_b, value_b = torch.randn(2, 1, 1, 1024, 16)
    leaves = [t.requires_grad_() for t in (query_a, query_b)]
    with velm_kernels.use_backend("device_on_host"):
        out_a, out_b = velm_kernels.bidirectional_attention(query_a, query_b, value_a, value_b)
        cuda.launches()
        torch.autograd.grad(out_a.sum() + out_b.sum(), leaves)
    of_a, added, of_b = cuda.launches()[2:]
    partials = 4 * count(query_a)
    assert of_a["blocks"] == 4 and of_a["global_bytes_written"] == added["global_bytes_read"] == partials
    assert added["global_bytes_written"] == count(query_a)
    assert of_b["blocks"] == 1024 // BLOCK_ROWS and of_b["global_bytes_written"] == count(query_b)


@pytest.mark.parametrize(("dtype", "dim"), [(torch.bfloat16, 64), (torch.float32, 256)], ids=str)
def test_tiles_hidden_by_key_mask(dtype: torch.dtype, dim: int) -> None:
    """They cost nothing but the look at their mask, and the results are those without them, to the bit."""
    heads, queries, tile = 1, 40, 64
    shown = torch.tensor([True, False, True, False, False]).repeat_interleave(tile)
    query, grad = torch.randn(2, 1, heads, queries, dim).to(dtype)
    # Of what no row attends to, nothing is read.
    key, value = torch.where(shown[:, None], torch.randn(2, 1, 1, len(shown), dim), torch.nan).to(dtype)
    bias = torch.randn(1, 1, 1, len(shown))
    some = shown.clone()
    some[5:40] = False

    def run(
        keys: Tensor, mask: Tensor
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], dict[str, dict[str, str | int]]]:
        leaves = [t.detach().requires_grad_() for t in (query, key[:, :, keys], value[:, :, keys], bias[..., keys])]
        cuda.launches()
        with velm_kernels.use_backend("device_on_host"):
            out, mass = velm_kernels.cross_attention(
                *leaves[:3], bias=leaves[3], key_mask=mask[None, keys], return_key_mass=True
            )
            grads = torch.autograd.grad(out, leaves, grad)
        # Numbered, as the gradients of key and value have kernels of one name.
        return (out, mass), grads, {f"{name_of(one['kernel'])} {i}": one for i, one in enumerate(cuda.launches())}

    outputs, grads, launches = run(torch.ones_like(shown), some)
    expected, expected_grads, without = run(shown, some)
    assert torch.equal(outputs[0], expected[0]) and torch.equal(grads[0], expected_grads[0])
    with velm_kernels.use_backend("reference"):
        plain = velm_kernels.cross_attention(query, key[:, :, shown], value[:, :, shown], bias=bias[..., shown],
                                             key_mask=some[None, shown])  # fmt: skip
    torch.testing.assert_close(outputs[0], plain, atol=0.02, rtol=0.02)
    for whole, part in zip((outputs[1], *grads[1:]), (expected[1], *expected_grads[1:]), strict=True):
        along = whole.shape.index(len(shown))
        assert torch.equal(whole.index_select(along, shown.nonzero()[:, 0]), part)
        assert not whole.index_select(along, (~shown).nonzero()[:, 0]).any()
    assert list(launches) == list(without)
    # A byte for each hidden key, row block and warp. The parts of the gradient of the bias are as many as its keys.
    hidden = int((~shown).sum())
    for name, launch in launches.items():
        if name.startswith("sum_partials"):
            continue
        threads = int(launch["threads"])
        blocks = -(-queries // (threads // 2)) * heads
        more = int(launch["global_bytes_read"]) - int(without[name]["global_bytes_read"])
        assert 0 <= more <= hidden * blocks * threads // 32, name
        assert launch["matrix_instructions"] == without[name]["matrix_instructions"], name
        assert launch["matrix_instructions"], name


CONFLICTS = """
import torch, velm_kernels
from velm_kernels.backends import cuda
for dtype, dims in ((torch.float16, (40, 128, 256)), (torch.float32, (20, 256))):
    for dim in dims:
        leaves = [torch.randn(1, 1, rows, dim).to(dtype).requires_grad_() for rows in (33, 40, 40)]
        leaves.append(torch.randn(1, 1, 1, 40, requires_grad=True))
        mask = torch.arange(40)[None] != 3
        with velm_kernels.use_backend("device_on_host"):
            out, mass = velm_kernels.cross_attention(*leaves[:3], bias=leaves[3], key_mask=mask, return_key_mass=True)
            torch.autograd.grad(out, leaves, torch.randn_like(out))
        if dtype == torch.float16 or dim <= 128:
            sides = [torch.randn(1, 1, rows, dim).to(dtype).requires_grad_() for rows in (33, 40, 33, 40)]
            with velm_kernels.use_backend("device_on_host"):
                outs = velm_kernels.bidirectional_attention(*sides)
                torch.autograd.grad(outs, sides, [torch.randn_like(out) for out in outs])
for one in cuda.launches():
    print(one["kernel"], one["bank_conflicts"], one["matrix_instructions"], sep="\\t")
"""


def test_no_kernel_of_attention_has_bank_conflicts() -> None:
    """Of every head_dim; that conflicts are seen, test_memory.cpp and test_matrix.cpp show."""
    environment = {**os.environ, "DEVICE_ON_HOST_BANK_CONFLICTS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", CONFLICTS], env=environment, capture_output=True, text=True, check=True
    )
    launches = [line.split("\t") for line in done.stdout.splitlines()]
    products = {name_of(kernel) for kernel, _, instructions in launches if int(instructions)}
    assert products == {
        "forward_kernel", "key_mass_kernel", "grad_query_kernel", "grad_key_value_kernel", "grad_bias_kernel",
        "grad_side_kernel", "row_sums_kernel",
    }  # fmt: skip
    assert [kernel for kernel, conflicts, _ in launches if int(conflicts)] == []
