"""What is peculiar to rotary: every model's own function beside it, packed projections, memory, errors."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import velm_kernels
from tests.conftest import CUDA_KERNELS, Backend, every_backend_with_cuda, every_cpu_backend
from tests.numbers import assert_accurate
from velm_kernels.sequence.rotary import reference, tables

BATCH, HEADS, KV_HEADS, TOKENS, HEAD_DIM = 2, 4, 2, 21, 40


def drawn(dtype: torch.dtype = torch.float32, head_dim: int = HEAD_DIM, heads: int = HEADS) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(BATCH, TOKENS, heads, head_dim, generator=generator).to(dtype).transpose(1, 2)
    return query, torch.randn(BATCH, KV_HEADS, TOKENS, head_dim, generator=generator).to(dtype)


def frequencies(pairs: int) -> Tensor:
    return 1.0 / 1e4 ** (torch.arange(pairs) / pairs)


def positions(*shape: int) -> Tensor:
    return torch.randint(0, 60, shape, generator=torch.Generator().manual_seed(1))


def model(name: str) -> Any:
    pytest.importorskip("transformers")
    return importlib.import_module(f"transformers.models.{name}.modeling_{name}")


def angles(pairs: int, *leading: int) -> Tensor:
    return positions(*leading)[..., None] * frequencies(pairs)


def close(got: Any, wanted: Any) -> None:
    torch.testing.assert_close(got, wanted, rtol=2e-5, atol=2e-5)


# model: (layout, columns that are rotated)
TEXT = {
    "qwen2_vl": ("halves", HEAD_DIM),
    "qwen2_5_vl": ("halves", HEAD_DIM),
    "qwen3_vl": ("halves", HEAD_DIM),
    "pixtral": ("halves", HEAD_DIM),
    "glm4v": ("pairs", 20),
    "ernie4_5_vl_moe": ("pairs", HEAD_DIM),
    "minimax_m3_vl": ("halves", 12),
    "muse_spark": ("halves", HEAD_DIM),
    "molmo2": ("halves", HEAD_DIM),
}


@pytest.mark.parametrize("name", TEXT)
def test_text_of_transformers(name: str) -> None:
    (query, key), (layout, rotated) = drawn(), TEXT[name]
    table = tables.columns(angles(rotated // 2, BATCH, TOKENS), layout)
    close(
        velm_kernels.rotary(query, key, table.cos(), table.sin(), layout=layout),
        model(name).apply_rotary_pos_emb(query, key, table.cos(), table.sin()),
    )


# model: (layout, columns that are rotated)
TOWERS = {
    "qwen2_vl": ("halves", HEAD_DIM),
    "qwen3_vl": ("halves", HEAD_DIM),
    "glm4v": ("halves", HEAD_DIM),
    "ernie4_5_vl_moe": ("halves", HEAD_DIM),
    "kimi_k25": ("halves", HEAD_DIM),
    "inkling2": ("pairs", HEAD_DIM),
    "minimax_m3_vl": ("halves", 36),
}


@pytest.mark.parametrize("name", TOWERS)
def test_towers_of_transformers(name: str) -> None:
    """Packed pictures: (tokens, heads, head_dim), height and width as positions."""
    (query, key), (layout, rotated) = drawn(), TOWERS[name]
    two_d, inverse = positions(2, TOKENS), frequencies(rotated // 4)
    height, width = (two_d[axis, :, None] * inverse for axis in (0, 1))
    table = tables.columns(torch.cat([height, width], -1), layout)
    wanted = model(name).apply_rotary_pos_emb_vision(
        query[0].transpose(0, 1), key[0].transpose(0, 1), table.cos(), table.sin()
    )
    wanted = tuple(value.transpose(0, 1)[None] for value in wanted)
    close(velm_kernels.rotary(query[:1], key[:1], table.cos(), table.sin(), layout=layout), wanted)
    half = rotated // 4
    got = velm_kernels.rotary(
        query[:1], key[:1], positions=two_d, inverse_frequencies=inverse, layout=layout, sections=(half, half)
    )
    close(got, wanted)


def test_llama4_rotates_complex_numbers() -> None:
    llama4, (query, key), angle = model("llama4"), drawn(), angles(HEAD_DIM // 2, BATCH, TOKENS)
    complex_numbers = torch.polar(torch.ones_like(angle), angle)
    wanted = llama4.apply_rotary_emb(query.transpose(1, 2), key.transpose(1, 2), complex_numbers)
    got = velm_kernels.rotary(
        query,
        key,
        positions=positions(BATCH, TOKENS),
        inverse_frequencies=frequencies(HEAD_DIM // 2),
        layout="pairs",
    )
    close(got, tuple(value.transpose(1, 2) for value in wanted))
    of_picture = complex_numbers[0]
    wanted = llama4.vision_apply_rotary_emb(query.transpose(1, 2), key.transpose(1, 2), of_picture)
    table = tables.columns(angle[0], "pairs")
    got = velm_kernels.rotary(query, key, table.cos(), table.sin(), layout="pairs")
    close(got, tuple(value.transpose(1, 2) for value in wanted))


def test_gemma4_rotates_quarters() -> None:
    gemma4, (query, key), two_d = model("gemma4"), drawn(), positions(BATCH, TOKENS, 2)
    inverse = frequencies(HEAD_DIM // 4)
    height, width = (two_d[..., axis, None] * inverse for axis in (0, 1))
    table = torch.cat([height, height, width, width], -1)
    wanted = tuple(
        gemma4.apply_multidimensional_rope(x.transpose(1, 2), table.cos(), table.sin(), two_d).transpose(1, 2)
        for x in (query, key)
    )
    close(velm_kernels.rotary(query, key, table.cos(), table.sin(), layout="quarters"), wanted)
    given = {"positions": two_d.permute(2, 0, 1), "layout": "quarters"}
    close(velm_kernels.rotary(query, key, inverse_frequencies=inverse, **given), wanted)
    close(velm_kernels.rotary(query, key, inverse_frequencies=inverse.repeat(2), **given), wanted)


def test_sam3_and_dinov3() -> None:
    query, key = drawn()
    table = tables.columns(angles(HEAD_DIM // 2, TOKENS), "pairs")
    close(
        velm_kernels.rotary(query, key, table.cos(), table.sin(), layout="pairs"),
        model("sam3").apply_rotary_pos_emb_2d(query, key, table.cos(), table.sin()),
    )
    # The first tokens, without a position, stay as they are.
    table = tables.columns(angles(HEAD_DIM // 2, TOKENS - 5), "halves")
    wanted = model("dinov3_vit").apply_rotary_pos_emb(query, key, table.cos(), table.sin())
    got = velm_kernels.rotary(query[:, :, 5:], key[:, :, 5:], table.cos(), table.sin())
    close(got, tuple(value[:, :, 5:] for value in wanted))


@pytest.mark.parametrize("name", ["qwen2_vl", "glm4v", "qwen3_vl"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_several_axes_of_positions(name: str, dtype: torch.dtype) -> None:
    """M-RoPE: in chunks (Qwen2-VL, GLM-4V) and interleaved (Qwen3-VL), by the tables that the models make."""
    of, query_and_key, sections = model(name), drawn(), (8, 7, 5)
    interleaved, layout = name == "qwen3_vl", "pairs" if name == "glm4v" else "halves"
    kind = {"qwen2_vl": "Qwen2VLRotaryEmbedding", "glm4v": "Glm4vTextRotaryEmbedding"}
    angle = positions(3, BATCH, TOKENS)[..., None] * frequencies(HEAD_DIM // 2)

    embedding = SimpleNamespace(mrope_section=list(sections))
    recompose: Callable[..., Tensor] = getattr(
        of, kind.get(name, "Qwen3VLTextRotaryEmbedding")
    ).recomposition_frequencies
    cos, sin = recompose(embedding, angle.cos()), recompose(embedding, angle.sin())
    wanted = of.apply_rotary_pos_emb(*query_and_key, cos, sin)
    given: dict[str, Any] = {"sections": sections, "interleaved": interleaved, "layout": layout}
    got = velm_kernels.rotary(
        *query_and_key,
        positions=positions(3, BATCH, TOKENS).to(dtype),
        inverse_frequencies=frequencies(HEAD_DIM // 2),
        **given,
    )
    close(got, wanted)
    of_axes = tables.columns(angle, layout)
    close(velm_kernels.rotary(*query_and_key, of_axes.cos(), of_axes.sin(), **given), wanted)


def test_norms_of_transformers() -> None:
    """Qwen3-VL's over each head, InternVL's over the whole width, which has no rotation."""
    query, key = drawn()
    weight = 1 + 0.1 * torch.randn(HEAD_DIM, generator=torch.Generator().manual_seed(2))
    norm = model("qwen3_vl").Qwen3VLTextRMSNorm(HEAD_DIM, eps=1e-5)
    norm.weight.data = weight
    table = tables.columns(angles(HEAD_DIM // 2, BATCH, TOKENS), "halves")
    wanted = model("qwen3_vl").apply_rotary_pos_emb(norm(query), norm(key), table.cos(), table.sin())
    got = velm_kernels.rotary(
        query, key, table.cos(), table.sin(), query_norm_weight=weight, key_norm_weight=weight, norm_eps=1e-5
    )
    close(got, wanted)
    width = model("internvl").InternVLVisionRMSNorm(HEADS * HEAD_DIM, eps=1e-5)
    width.weight.data = torch.randn(HEADS * HEAD_DIM, generator=torch.Generator().manual_seed(3))
    wanted = width(query.transpose(1, 2).flatten(2)).view(BATCH, TOKENS, HEADS, HEAD_DIM).transpose(1, 2)
    got, nothing = velm_kernels.rotary(query, None, query_norm_weight=width.weight, norm_eps=1e-5)
    assert nothing is None
    close(got, wanted)


@pytest.mark.parametrize("heads_last", [True, False])
@every_backend_with_cuda
def test_packed_projections_are_read_where_they_lie(backend: Backend, heads_last: bool) -> None:
    """Views of (batch, tokens, 3, heads, head_dim), and results that the next view takes without a copy."""
    generator = torch.Generator().manual_seed(0)
    packed = torch.randn(BATCH, TOKENS, 3, HEADS, HEAD_DIM, generator=generator)
    if not heads_last:
        packed = packed.permute(0, 3, 2, 1, 4).contiguous().permute(0, 3, 2, 1, 4)
    table = angles(HEAD_DIM, TOKENS)
    found = []
    for exact in (False, True):
        leaf = packed.clone().requires_grad_()
        query, key, _ = leaf.permute(2, 0, 3, 1, 4).unbind(0)
        if exact:
            outs = reference.rotary(query, key, table.cos()[None], table.sin()[None])
        else:
            with backend.use():
                outs = velm_kernels.rotary(query, key, table.cos(), table.sin())
            strides = (HEAD_DIM * HEADS * TOKENS, HEAD_DIM, HEADS * HEAD_DIM, 1)
            for out in outs:
                assert (out.stride() == strides) if heads_last else out.is_contiguous()
        upstream = [torch.randn(out.shape, generator=torch.Generator().manual_seed(5)) for out in outs]
        found.append((outs, torch.autograd.grad(outs, leaf, upstream)))
    close(found[0], found[1])


@every_backend_with_cuda
def test_columns_that_are_not_rotated_are_copied(backend: Backend) -> None:
    """Bit by bit, NaN and infinity included, and they reach no other column."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        query, key = drawn(dtype)
        query[..., 24:] = torch.tensor([torch.nan, torch.inf, -torch.inf, 2.0**-100] * 4).to(dtype)
        table = angles(24, TOKENS)
        with backend.use():
            got, _ = velm_kernels.rotary(query, key, table.cos(), table.sin())
        assert torch.equal(got[..., 24:].nan_to_num(5.0), query[..., 24:].nan_to_num(5.0))
        assert got[..., :24].isfinite().all()


@every_cpu_backend
def test_subnormal_numbers_are_kept(backend: Backend) -> None:
    for dtype, value in ((torch.float32, 1e-40), (torch.bfloat16, 1e-40), (torch.float16, 1e-7)):
        query, _ = drawn(dtype)
        query.fill_(value)
        with backend.use():
            got, _ = velm_kernels.rotary(query, None, torch.ones(TOKENS, HEAD_DIM), torch.zeros(TOKENS, HEAD_DIM))
        assert query.count_nonzero() == query.numel() and torch.equal(got, query)


@pytest.mark.parametrize("head_dim", [2, 6, 14, 34, 66, 72, 96, 130])
@pytest.mark.parametrize("layout", ["halves", "pairs", "quarters"])
@every_backend_with_cuda
def test_head_dims_beside_whole_vectors(backend: Backend, layout: str, head_dim: int) -> None:
    query, key = drawn(head_dim=head_dim)
    rotated = head_dim // 4 * 4 if layout == "quarters" else head_dim
    table = torch.randn(2, 1, TOKENS, rotated, generator=torch.Generator().manual_seed(3))
    upstream = [torch.randn(x.shape, generator=torch.Generator().manual_seed(4)) for x in (query, key)]
    found = []
    for exact in (False, True):
        given = [x.clone().requires_grad_() for x in (query, key, table[0], table[1])]
        if exact:
            outs = reference.rotary(*given, layout=layout)
        else:
            with backend.use():
                outs = velm_kernels.rotary(*given, layout=layout)
        found.append((outs, torch.autograd.grad(outs, given, upstream)))
    close(found[0], found[1])


# Vectors of 16 bytes, of 8 and single columns; one norm over each head, or over all; more heads than a thread goes
# through, and more rows of a norm than a block has.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "norms", [(), (1, 1), (HEADS + 7, 1), (1, 0)], ids=["plain", "normed", "over_heads", "query_alone"]
)
@pytest.mark.parametrize(
    ("layout", "head_dim", "rotated"),
    [
        ("halves", 64, 64), ("halves", 40, 24), ("halves", 22, 8), ("halves", 320, 320), ("halves", 24, 0),
        ("pairs", 64, 32), ("pairs", 22, 18), ("quarters", 64, 64), ("quarters", 72, 48),
    ],
)  # fmt: skip
@pytest.mark.parametrize("backend", CUDA_KERNELS, ids=str)
def test_cuda_kernels(
    backend: Backend, layout: str, head_dim: int, rotated: int, norms: tuple[int, ...], dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(6)
    query = torch.randn(BATCH, TOKENS, HEADS + 7, head_dim, generator=generator).transpose(1, 2).to(dtype)
    # Of a wider tensor, whose rows begin at multiples of 16 bytes but for heads of 320.
    skipped = 1 if head_dim == 320 else 8
    key = torch.randn(BATCH, KV_HEADS, TOKENS, head_dim + skipped, generator=generator).to(dtype)[..., skipped:]
    cos, sin = torch.randn(2, 1, TOKENS, rotated, generator=generator).to(torch.float32 if rotated == 32 else dtype)
    names, leaves = ["query", "key", "cos", "sin"], [query, key, cos, sin]
    for name, heads in zip(("query", "key"), norms, strict=False):
        if heads:
            names.append(f"{name}_norm_weight")
            leaves.append(torch.randn(heads * head_dim, generator=generator).to(dtype))
    upstream = [torch.randn(x.shape, generator=generator).to(dtype) for x in (query, key)]
    found = []
    for number in (torch.float64, dtype, None):
        kinds = [x.dtype if number is None or number == dtype else number for x in leaves]
        given = [x.detach().to(kind).requires_grad_() for x, kind in zip(leaves, kinds, strict=True)]
        arguments = dict(zip(names, given, strict=True))
        if number is None:
            with backend.use():
                outs = velm_kernels.rotary(**arguments, layout=layout, norm_eps=1e-3)
        else:
            tables = (arguments.pop(name).expand(BATCH, -1, -1) for name in ("cos", "sin"))
            query_and_key = arguments.pop("query"), arguments.pop("key")
            outs = reference.rotary(*query_and_key, *tables, layout=layout, norm_eps=1e-3, **arguments)
        grads = torch.autograd.grad(outs, given, [g.to(out.dtype) for g, out in zip(upstream, outs, strict=True)])
        found.append([*(out.detach() for out in outs), *grads])
    for name, exact, plain, got in zip(("rotated_query", "rotated_key", *names), *found, strict=True):
        assert_accurate(name, got, plain, exact)


@pytest.mark.parametrize("backend", CUDA_KERNELS, ids=str)
def test_what_begins_at_odd_places(backend: Backend) -> None:
    """One of query, cos, sin and the norm's weight, beside others that are read 16 bytes at a time."""
    generator = torch.Generator().manual_seed(9)
    query, *table = (torch.randn(*size, 64, generator=generator) for size in ((2, 3, 5), (2, 5), (2, 5)))
    for weight in ((), (torch.randn(64, generator=generator),)):
        given, found = [query, *table, *weight], []
        for odd in (None, *range(len(given))):
            moved = [F.pad(x, (1, 3))[..., 1:-3] if i == odd else x for i, x in enumerate(given)]
            leaves = [x.detach().requires_grad_() for x in moved]
            with backend.use():
                out, _ = velm_kernels.rotary(leaves[0], None, *leaves[1:3], query_norm_weight=(*leaves[3:], None)[0])
                found.append([out.detach(), *torch.autograd.grad(out, leaves, query)])
        for other in found[1:]:
            close(other, found[0])


@pytest.mark.parametrize("backend", CUDA_KERNELS, ids=str)
def test_one_row_of_any_width(backend: Backend) -> None:
    """Whose strides say nothing of how many columns there are."""
    for layout, head_dim, rotated in (("halves", 13, 8), ("halves", 12, 12), ("pairs", 20, 20), ("quarters", 24, 24)):
        x = torch.randn(1, 1, 1, head_dim, generator=torch.Generator().manual_seed(7))
        table = torch.randn(2, 1, rotated, generator=torch.Generator().manual_seed(8))
        for dtype in (torch.float32, torch.bfloat16):
            for weight in (None, torch.ones(head_dim)):
                leaf = x.to(dtype).requires_grad_()
                given = {"layout": layout, "query_norm_weight": weight}
                wanted = reference.rotary(x.to(dtype).float(), x[:, :0], *table[:, None], **given)[0]
                with backend.use():
                    out, _ = velm_kernels.rotary(leaf, None, *table, **given)
                    (grad,) = torch.autograd.grad(out, leaf, out.detach())
                torch.testing.assert_close(out.float(), wanted, rtol=2**-7, atol=2**-7)
                assert grad.isfinite().all()


@pytest.mark.parametrize("backend", CUDA_KERNELS, ids=str)
def test_past_2_to_the_31_elements(backend: Backend) -> None:
    """Tokens as far apart as in a tensor too big to hold: memory that is not touched is not there."""
    query, key = (x[:1] for x in drawn(torch.bfloat16))
    table = torch.randn(2, 1, TOKENS, HEAD_DIM, generator=torch.Generator().manual_seed(3)).bfloat16()
    upstream, weight = torch.randn(query.shape).bfloat16(), torch.randn(HEAD_DIM)
    far = torch.empty(2**31 + 2**20, dtype=torch.bfloat16)

    def spread(x: Tensor) -> Tensor:
        *leading, tokens, dim = x.shape
        heads = leading[-1]
        apart = (far.numel() - heads * dim) // (tokens - 1) // 8 * 8
        strides = (far.numel(), dim, apart, 1) if x.dim() == 4 else (far.numel(), apart, 1)
        return far.as_strided(x.shape, strides).copy_(x)

    def results(query: Tensor, cos: Tensor, sin: Tensor, norm: Tensor | None, in_far: bool = False) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in (query, cos, sin)]
        with backend.use():
            out, _ = velm_kernels.rotary(leaves[0], key, *leaves[1:], query_norm_weight=norm)
            return [out, *torch.autograd.grad(out, leaves, spread(upstream) if in_far else upstream)]

    for norm in (None, weight):
        near = results(query, *table, norm)
        for place in range(2):
            given = [spread(x) if i == place else x for i, x in enumerate((query, *table))]
            assert all(map(torch.equal, near, results(*given, norm)))
        assert all(map(torch.equal, near, results(query, *table, norm, in_far=True)))


def test_what_backward_keeps() -> None:
    """cos and sin, and queries and keys only where something needs them."""
    query, key = (x.requires_grad_() for x in drawn())
    cos, sin, weight = torch.randn(TOKENS, HEAD_DIM), torch.randn(TOKENS, HEAD_DIM), torch.randn(HEAD_DIM)
    kept: list[Tensor] = []
    for change in ({}, {"sin": sin.clone().requires_grad_()}, {"query_norm_weight": weight}):
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
            velm_kernels.rotary(**({"query": query, "key": key, "cos": cos, "sin": sin} | change))
        assert any(x.shape == query.shape for x in kept) == bool(change)


def test_errors_name_what_does_not_fit() -> None:
    query, key = drawn()
    table, inverse, of_axis = torch.randn(TOKENS, HEAD_DIM), frequencies(HEAD_DIM // 2), positions(TOKENS)
    axes = torch.randn(3, 1, TOKENS, HEAD_DIM)
    wrong: list[tuple[str, dict[str, Any]]] = [
        ("cos: .* multiple of 2 .* given 7", {"cos": table[:, :7], "sin": table[:, :7]}),
        ("cos: .* multiple of 4 .* given 38", {"cos": table[:, :38], "sin": table[:, :38], "layout": "quarters"}),
        ("cos: .* at most head_dim = 40, given 80", {"cos": table.repeat(1, 2), "sin": table.repeat(1, 2)}),
        ("sin: .*None", {"cos": table}),
        ("cos: .*None", {"sin": table}),
        ("cos: .* batch 2 .* given", {"cos": table.expand(3, -1, -1), "sin": table.expand(3, -1, -1)}),
        ("sections: .*sum .* 20, given 18", {"cos": axes, "sin": axes, "sections": (6, 6, 6)}),
        ("sections: .* 3 axes, given 2", {"cos": axes, "sin": axes, "sections": (10, 10), "interleaved": True}),
        ("interleaved: .*sections", {"cos": table, "sin": table, "interleaved": True}),
        ("positions: .*None", {"inverse_frequencies": inverse}),
        ("inverse_frequencies: .*None", {"positions": of_axis}),
        ("cos: expected None", {"cos": table, "positions": of_axis, "inverse_frequencies": inverse}),
        ("inverse_frequencies: .* given 42", {"positions": of_axis, "inverse_frequencies": frequencies(21)}),
    ]
    for text, given in wrong:
        with pytest.raises((ValueError, TypeError), match=text):
            velm_kernels.rotary(query, key, **given)
