from __future__ import annotations

import pytest
import torch
import torch.utils.flop_counter
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import INTERPRETED, every_backend_with_cuda, every_kernel
from tests.numbers import assert_accurate
from velm_kernels.fusion import bilinear_attention, bilinear_attention_pool
from velm_kernels.fusion.bilinear_attention import reference

EXAMPLES = min(12, settings().max_examples)
NAMES = ("v", "q", "h", "bias")
POOL_NAMES = ("v", "q", "attention")


def _inputs(batch, glimpses, regions, words, k, dtype, scale=1.0, seed=0):
    """Logits of several sizes, so that the maps are neither uniform nor all at one pair."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((batch, regions, k), (batch, words, k), (glimpses, k), (glimpses,))
    values = [torch.randn(shape, generator=generator) for shape in shapes]
    values[2] = values[2] * scale * max(k, 1) ** -0.5
    return [value.to(dtype) for value in values]


def _masks(batch, regions, words, kind, seed=0):
    generator = torch.Generator().manual_seed(seed)
    if kind == "none":
        return {}
    if kind == "lengths":
        return {
            "v_lengths": torch.randint(0, regions + 1, (batch,), generator=generator),
            "q_lengths": torch.randint(0, words + 1, (batch,), generator=generator).int(),
        }
    return {
        "v_mask": torch.rand(batch, regions, generator=generator) < 0.6,
        "q_mask": torch.rand(batch, words, generator=generator) < 0.6,
        "q_lengths": torch.full((batch,), max(words - 1, 0)),
    }


def _live(v, q, v_lengths=None, q_lengths=None, v_mask=None, q_mask=None):
    live = []
    for x, lengths, mask in ((v, v_lengths, v_mask), (q, q_lengths, q_mask)):
        rows = torch.ones(x.shape[:2], dtype=torch.bool) if mask is None else mask
        live.append(rows if lengths is None else rows & (torch.arange(x.shape[1]) < lengths[:, None]))
    return live


def _written(v, q, h, bias, return_logits=True, **masks):
    return reference.bilinear_attention(v, q, h, bias, *_live(v, q, **masks))


def _written_pool(v, q, attention, **masks):
    return reference.bilinear_attention_pool(v, q, attention, *_live(v, q, **masks))


def _randn_like(x, seed, dtype):
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(x.dtype)


def _all_results(function, inputs, masks, dtype=None, wanted=(True,) * 4, uses=(True, True)):
    leaves = [x.detach().to(dtype or x.dtype).requires_grad_(want) for x, want in zip(inputs, wanted, strict=True)]
    results = function(*leaves, return_logits=True, **masks)
    used = [(x, _randn_like(x, seed, inputs[0].dtype)) for seed, x in enumerate(results) if uses[seed]]
    torch.autograd.backward([x for x, _ in used], [g for _, g in used])
    found = {"maps": results[0].detach(), "logits": results[1].detach()}
    return found | {name: leaf.grad for name, leaf in zip(NAMES, leaves, strict=True)}


def _all_pool_results(function, inputs, masks, dtype=None, wanted=(True,) * 3):
    leaves = [x.detach().to(dtype or x.dtype).requires_grad_(want) for x, want in zip(inputs, wanted, strict=True)]
    out = function(*leaves, **masks)
    out.backward(_randn_like(out, 1, inputs[0].dtype))
    return {"out": out.detach()} | {name: leaf.grad for name, leaf in zip(POOL_NAMES, leaves, strict=True)}


def _compare(got, plain, exact, dtype):
    for name, value in got.items():
        if value is None:
            assert exact[name] is None or not exact[name].any(), name
            continue
        assert value.is_contiguous() and value.dtype == dtype, name
        assert_accurate(name, value, plain[name], exact[name], dtype)


@every_kernel
@settings(max_examples=EXAMPLES)
@given(data=st.data())
def test_any_shape(backend, data):
    small = INTERPRETED
    sizes = [
        data.draw(st.integers(1, most), label=name)
        for name, most in (
            ("batch", 3),
            ("glimpses", 5),
            ("regions", 20 if small else 130),
            ("words", 20 if small else 40),
            ("k", 70 if small else 300),
        )
    ]
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    scale = data.draw(st.sampled_from([0.3, 1.0, 4.0]))
    wanted = data.draw(st.sampled_from([(True,) * 4, (True, False, False, False), (False, True, False, True)]))
    uses = data.draw(st.sampled_from([(True, True), (True, False), (False, True)]), label="uses")
    masks = _masks(sizes[0], sizes[2], sizes[3], data.draw(st.sampled_from(["none", "lengths", "masks"])))
    inputs = _inputs(*sizes, dtype, scale)
    with backend.use():
        got = _all_results(bilinear_attention, inputs, masks, wanted=wanted, uses=uses)
    plain, exact = (_all_results(_written, inputs, masks, d, wanted, uses) for d in (None, torch.float64))
    if not uses[1]:
        # The softmax does not see the bias.
        assert got["bias"] is None or not got["bias"].any()
        got.pop("bias")
    _compare(got, plain, exact, dtype)


@every_kernel
@settings(max_examples=min(8, EXAMPLES))
@given(data=st.data())
def test_pool_of_any_shape(backend, data):
    small = INTERPRETED
    batch, glimpses = data.draw(st.integers(1, 10), label="batch"), data.draw(st.integers(1, 4), label="glimpses")
    regions, words = (data.draw(st.integers(1, 20 if small else 60), label=name) for name in ("regions", "words"))
    k = data.draw(st.integers(1, 70 if small else 300), label="k")
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    masks = _masks(batch, regions, words, data.draw(st.sampled_from(["none", "lengths", "masks"])))
    wanted = data.draw(st.sampled_from([(True, True, True), (False, False, True), (True, False, False)]))
    inputs = [*_inputs(batch, glimpses, regions, words, k, dtype)[:2], torch.randn(batch, glimpses, regions, words)]
    inputs[2] = inputs[2].to(dtype)
    with backend.use():
        got = _all_pool_results(bilinear_attention_pool, inputs, masks, wanted=wanted)
    plain, exact = (_all_pool_results(_written_pool, inputs, masks, d, wanted) for d in (None, torch.float64))
    _compare(got, plain, exact, dtype)


@every_backend_with_cuda
@pytest.mark.skipif(INTERPRETED, reason="takes long, and is cut in no other way than what is small")
@pytest.mark.parametrize(
    "sizes",
    [
        (9, 2, 5, 3, 600),  # parts of the batch of different sizes, columns in chunks
        (1, 5, 200, 160, 130),  # glimpses in groups, regions in blocks
        (2, 1, 3, 700, 40),  # one glimpse wider than a group
        (2, 19, 5, 18, 70),  # many glimpses
    ],
)
def test_shapes_that_are_cut(backend, sizes):
    inputs = _inputs(*sizes, torch.float32)
    with backend.use():
        got = _all_results(bilinear_attention, inputs, {})
    plain, exact = (_all_results(_written, inputs, {}, dtype) for dtype in (None, torch.float64))
    _compare(got, plain, exact, torch.float32)


@every_backend_with_cuda
def test_what_does_not_count_is_not_read(backend):
    """NaN there changes nothing, nor does padding, and what counts is the same as without them."""
    v, q, h, bias = _inputs(5, 3, 11, 7, 40, torch.float32)
    attention = torch.randn(5, 3, 11, 7)
    v_mask, q_lengths, q_mask = torch.rand(5, 11) < 0.5, torch.tensor([7, 3, 0, 5, 7]), torch.ones(5, 7) > 0
    v_mask[:, 2], v_mask[3], q_mask[4] = True, False, False
    pairs = v_mask[:, None, :, None] & (q_mask & (torch.arange(7) < q_lengths[:, None]))[:, None, None]
    masks = {"v_mask": v_mask, "q_lengths": q_lengths, "q_mask": q_mask}
    # Where a side has nothing that counts, the other is in no pair.
    of_pairs = pairs[:, 0].any(-1), pairs[:, 0].any(1)
    clean, poisoned = [], []
    for results, poison in ((clean, 0.0), (poisoned, torch.nan)):
        hidden_v, hidden_q = (torch.where(live[..., None], x, poison) for live, x in zip(of_pairs, (v, q), strict=True))
        weights = torch.where(pairs, attention, poison)
        with backend.use():
            results.append(_all_results(bilinear_attention, [hidden_v, hidden_q, h, bias], masks))
            results.append(_all_pool_results(bilinear_attention_pool, [hidden_v, hidden_q, weights], masks))
    for a, b in zip(clean, poisoned, strict=True):
        for name in a:
            assert torch.equal(a[name], b[name]), name
    maps, logits = clean[0]["maps"], clean[0]["logits"]
    assert torch.equal(maps != 0, pairs.expand_as(maps)) and torch.equal(logits == -torch.inf, maps == 0)
    totals = torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0])[:, None].expand(5, 3)
    torch.testing.assert_close(maps.sum((2, 3)), totals)
    for found in clean:
        assert not found["v"][2:].any() and not found["q"][2:].any()
        assert not found["v"][~v_mask].any()
    with backend.use():
        alone = bilinear_attention(v[:1, v_mask[0]], q[:1], h, bias)
        # NaN in what counts is passed back to nothing that does not.
        inputs = [v, q.index_fill(1, torch.tensor(0), torch.nan), attention]
        of_v = _all_pool_results(bilinear_attention_pool, inputs, masks, wanted=(True, False, False))["v"]
    assert of_v[0, v_mask[0]].isnan().all() and not of_v[~pairs[:, 0].any(-1)].any()
    torch.testing.assert_close(alone, maps[:1][:, :, v_mask[0]])


@every_backend_with_cuda
def test_equal_to_the_materialised_product(backend):
    v, q, h, bias = _inputs(2, 3, 5, 4, 33, torch.float32)
    product = (h[:, None] * v[:, None]) @ q[:, None].transpose(2, 3) + bias[:, None, None]
    maps = product.flatten(2).softmax(2).view_as(product)
    with backend.use():
        got = bilinear_attention(v, q, h, bias, return_logits=True)
        pooled = bilinear_attention_pool(v, q, maps, factor=3)
        one = bilinear_attention_pool(v, q, maps[:, 1])
        assert torch.equal(bilinear_attention(v, q, h, bias), got[0])
    torch.testing.assert_close(got, (maps, product))
    outer = (maps[..., None] * (v[:, None, :, None] * q[:, None, None])).sum((2, 3))
    torch.testing.assert_close(pooled, outer.view(2, 3, 11, 3).sum(-1))
    torch.testing.assert_close(one, outer[:, 1])


def test_operations_are_counted():
    v, q, h, bias = (value.requires_grad_() for value in _inputs(2, 3, 4, 5, 6, torch.float32))
    product = 2 * 2 * 3 * 4 * 5 * 6
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        bilinear_attention(v, q, h, bias).square().sum().backward()
    assert counter.get_total_flops() == 3 * product
    attention = torch.rand(2, 3, 4, 5, requires_grad=True)
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        bilinear_attention_pool(v.detach(), q, attention).sum().backward()
    assert counter.get_total_flops() == 3 * product
