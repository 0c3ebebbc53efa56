"""Masks of models keep their meaning as lengths, ranges and the rest, and take the cheapest form that has it."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor

from velm_kernels.integrations import masks
from velm_kernels.integrations.interface import masked_attention

SMALLEST = torch.finfo(torch.float32).min


def _seen(visible: masks.Visible, shape: tuple[int, int, int, int]) -> Tensor:
    """What the arguments of `cross_attention` let through, as a dense mask."""
    batch, _, queries, keys = shape
    arguments = dict(visible.arguments or {})
    seen = torch.ones(shape, dtype=torch.bool)
    position = torch.arange(keys)
    if "key_lengths" in arguments:
        seen &= (position < arguments.pop("key_lengths")[:, None])[:, None, None]
    if "key_mask" in arguments:
        seen &= arguments.pop("key_mask")[:, None, None]
    if "key_ranges" in arguments:
        start, stop = arguments.pop("key_ranges")
        assert start.shape == stop.shape == (batch, queries)
        seen &= ((position >= start[..., None]) & (position < stop[..., None]))[:, None]
    if "mask" in arguments:
        seen &= arguments.pop("mask")
    assert not arguments
    return seen


@st.composite
def _masks(draw: st.DrawFn) -> tuple[Tensor, tuple[int, int, int, int]]:
    shape = tuple(draw(st.integers(low, high)) for low, high in ((1, 3), (1, 2), (1, 5), (1, 9)))
    batch, heads, queries, keys = shape
    kind = draw(st.sampled_from(["dense", "rows", "causal", "keys", "padding", "all", "heads"]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    if kind == "dense":
        seen = torch.rand(batch, 1, queries, keys, generator=generator) < 0.6
    elif kind == "heads":
        seen = torch.rand(batch, heads, queries, keys, generator=generator) < 0.6
    elif kind == "causal":
        seen = torch.ones(1, 1, queries, keys, dtype=torch.bool).tril(keys - queries).expand(batch, -1, -1, -1)
    elif kind == "rows":
        ends = torch.randint(0, keys + 1, (2, batch, 1, queries, 1), generator=generator)
        seen = (torch.arange(keys) >= ends[0]) & (torch.arange(keys) < ends[1])
    elif kind == "keys":
        seen = torch.rand(batch, 1, 1, keys, generator=generator) < 0.6
    elif kind == "padding":
        seen = torch.arange(keys) < torch.randint(0, keys + 1, (batch, 1, 1, 1), generator=generator)
    else:
        seen = torch.ones(batch, 1, 1, keys, dtype=torch.bool)
    if draw(st.booleans()):
        seen = seen.expand(
            batch, draw(st.sampled_from([seen.shape[1], heads])) if seen.shape[1] == 1 else -1, queries, -1
        )
    if draw(st.booleans()):
        seen = seen.clone()
    return seen, shape  # type: ignore[return-value]


@given(_masks())
def test_boolean_masks_keep_their_meaning(case: tuple[Tensor, tuple[int, int, int, int]]) -> None:
    seen, shape = case
    visible = masks.translate(seen, shape[0], shape[2])
    assert visible.hidden_rows is None
    assert torch.equal(_seen(visible, shape), seen.expand(shape))


@given(_masks(), st.booleans())
def test_additive_masks_that_only_hide_become_boolean_ones(
    case: tuple[Tensor, tuple[int, int, int, int]], binary: bool
) -> None:
    seen, shape = case
    added = torch.where(seen, 0.0, SMALLEST)
    visible = masks.translate(added, shape[0], shape[2], binary)
    empty = ~seen.any(-1, keepdim=True)
    if binary:
        assert visible.hidden_rows is None
        assert torch.equal(_seen(visible, shape), seen.expand(shape))
    else:
        hidden = torch.zeros((), dtype=torch.bool) if visible.hidden_rows is None else visible.hidden_rows
        assert torch.equal(hidden.expand(*shape[:3], 1), empty.expand(*shape[:3], 1))
        assert torch.equal(_seen(visible, shape), (seen | empty).expand(shape))


@given(_masks())
def test_unread_masks_keep_their_meaning(case: tuple[Tensor, tuple[int, int, int, int]]) -> None:
    seen, shape = case
    visible = masks._translate(seen, shape[0], shape[2], binary=False, may_read_values=False)
    assert torch.equal(_seen(visible, shape), seen.expand(shape))
    added = torch.where(seen, 0.0, SMALLEST)
    assert masks._translate(added, shape[0], shape[2], binary=False, may_read_values=False).arguments is None
    known = masks._translate(added, shape[0], shape[2], binary=True, may_read_values=False)
    assert torch.equal(_seen(known, shape), seen.expand(shape))


def _forms(mask: Tensor, batch: int = 2, queries: int = 4) -> set[str]:
    arguments = masks.translate(mask, batch, queries).arguments
    return {"bias"} if arguments is None else set(arguments)


def test_the_cheapest_form_is_taken() -> None:
    causal = torch.ones(4, 6, dtype=torch.bool).tril(2).expand(2, 1, 4, 6)
    holes = causal.clone()
    holes[0, 0, 3, 1] = False
    padding = (torch.arange(6) < torch.tensor([[6], [4]]))[:, None, None].expand(2, 3, 4, 6)
    assert _forms(torch.zeros(2, 1, 4, 6)) == set()
    assert _forms(torch.ones(2, 1, 4, 6, dtype=torch.bool)) == set()
    assert _forms(causal) == {"key_ranges"}
    assert _forms(holes) == {"key_ranges", "mask"}
    assert _forms(padding) == {"key_lengths"}
    assert _forms(padding.flip(3)) == {"key_mask"}
    # Written out for every head and every query, as Grounding DINO's decoder has it.
    assert _forms(torch.where(padding, 0.0, SMALLEST).contiguous()) == {"key_lengths"}
    assert _forms(torch.randn(2, 1, 4, 6)) == {"bias"}
    assert _forms(torch.where(causal, 0.0, -1.0)) == {"bias"}
    assert _forms(torch.where(causal, 0.0, SMALLEST).requires_grad_()) == {"bias"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("value", ["smallest", "infinite"])
def test_what_hides_in_every_dtype(dtype: torch.dtype, value: str) -> None:
    hides = torch.finfo(dtype).min if value == "smallest" else -torch.inf
    causal = torch.ones(4, 6, dtype=torch.bool).tril(2).expand(2, 1, 4, 6)
    added = torch.zeros(2, 1, 4, 6, dtype=dtype).masked_fill(~causal, hides)
    assert _forms(added) == {"key_ranges"}


def test_a_mask_is_looked_at_once_until_it_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    looked = []
    translate = masks._translate
    monkeypatch.setattr(masks, "_translate", lambda *args: looked.append(args[0]) or translate(*args))
    mask = torch.ones(2, 1, 4, 6, dtype=torch.bool)
    assert masks.translate(mask, 2, 4) is masks.translate(mask, 2, 4)
    assert len(looked) == 1
    mask[:, :, :, 5] = False
    assert masks.translate(mask, 2, 4).arguments["key_lengths"].tolist() == [5, 5]  # type: ignore[index]
    assert len(looked) == 2
    with torch.inference_mode():  # no version counter there
        mask = torch.ones(2, 1, 4, 6, dtype=torch.bool)
        assert masks.translate(mask, 2, 4).arguments == {}
        mask[:, :, :, 5] = False
        assert "key_lengths" in masks.translate(mask, 2, 4).arguments  # type: ignore[operator]


@pytest.mark.parametrize("added", [False, True], ids=["hides", "adds"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_rows_in_which_every_key_is_hidden_are_eager_forward_and_backward(added: bool, kv_heads: int) -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(2, 4, 5, 8), torch.randn(2, kv_heads, 7, 8), torch.randn(2, kv_heads, 7, 3)]
    inputs = [x.double().requires_grad_() for x in inputs]
    mask = torch.zeros(2, 1, 5, 7, dtype=torch.float64)
    if added:
        mask += torch.randn(mask.shape)
    mask[0, :, 1] = torch.finfo(torch.float64).min
    mask[1, :, 3] = torch.finfo(torch.float64).min
    mask[0, :, 2, 3:] = torch.finfo(torch.float64).min
    visible = masks.translate(mask, 2, 5)
    assert (visible.arguments is None) == added
    query, key, value = inputs
    key, value = (x.repeat_interleave(4 // kv_heads, 1) for x in (key, value))
    expected = ((query @ key.transpose(2, 3) * 0.3 + mask).softmax(-1) @ value).transpose(1, 2).flatten(2)
    out = masked_attention(*inputs, mask, scale=0.3)
    torch.testing.assert_close(out, expected)
    weights = torch.randn(expected.shape, dtype=torch.float64)
    for got, want in zip(
        torch.autograd.grad((out * weights).sum(), inputs),
        torch.autograd.grad((expected * weights).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(got, want)


def test_masks_that_cannot_be_translated_are_named() -> None:
    assert masks.why_not(None) is None
    assert masks.why_not(torch.zeros(1, 1, 2, 3)) is None
    assert "2 dimensions" in str(masks.why_not(torch.zeros(2, 3)))
    assert "int64" in str(masks.why_not(torch.zeros(1, 1, 2, 3, dtype=torch.long)))
    assert "dict" in str(masks.why_not({}))
