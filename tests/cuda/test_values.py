"""NaN, infinities and large numbers in the CUDA kernels on threads of the host: where plain torch has them, and nowhere
else; and sums that nearly cancel."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import velm_kernels
from tests.attention.cases import Case
from tests.conftest import DEVICE_ON_HOST, Backend
from tests.numbers import assert_accurate, relative_rms
from velm_kernels.attention.cross_attention import reference as attention_reference
from velm_kernels.attention.merge_attention import reference as merge_reference
from velm_kernels.fusion.bilinear_attention import reference as bilinear_attention_reference
from velm_kernels.pooling.pool import reference as pooling_reference

pytestmark = list(DEVICE_ON_HOST.marks)

NAN, INF = torch.nan, torch.inf
BACKEND = Backend("device_on_host")


def with_gradients(function: Any, *tensors: Tensor, upstream: Tensor | None = None, **given: Any) -> list[Tensor]:
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    out = function(*leaves, **given)
    out = out[0] if isinstance(out, tuple) else out
    upstream = torch.ones_like(out) if upstream is None else upstream.to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]


def with_bias(function: Any) -> Any:
    return lambda query, key, value, bias: function(query, key, value, bias=bias)


def same(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, equal_nan=True, rtol=1e-5, atol=1e-5)


# One row, several blocks of rows, and keys that are split among blocks.
@pytest.mark.parametrize(("queries", "keys"), [(5, 7), (70, 70), (2, 600)])
@pytest.mark.parametrize("per_head", [True, False])
def test_nan_in_one_bias_entry(queries: int, keys: int, per_head: bool) -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 2, rows, 16) for rows in (queries, keys, keys))
    bias = torch.randn(1, 2 if per_head else 1, queries, keys)
    row = queries - 1
    holed = bias.clone()
    holed[0, 0, row, keys - 1] = NAN
    with BACKEND.use():
        good = with_gradients(with_bias(velm_kernels.cross_attention), query, key, value, bias)
        got = with_gradients(with_bias(velm_kernels.cross_attention), query, key, value, holed)
        _, lse, mass = velm_kernels.cross_attention(
            query, key, value, bias=holed, return_logsumexp=True, return_key_mass=True
        )
    heads = [0] if per_head else [0, 1]
    _, exact_lse, exact_mass = attention_reference.cross_attention(query, key, value, bias=holed)
    assert lse.isnan().sum() == len(heads)
    same(lse, exact_lse)
    same(mass, exact_mass)
    for with_nan, without in zip(got[:2], good[:2], strict=True):
        assert with_nan[0, heads, row].isnan().all()
        with_nan[0, heads, row] = without[0, heads, row]
        assert torch.equal(with_nan, without)
    # Every key gets a part of the row's gradient.
    assert got[2][0, heads].isnan().all() and got[3][0, heads].isnan().all()
    plain = with_gradients(with_bias(attention_reference.cross_attention), query, key, value, holed)
    same(got[4], plain[4])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_nan_in_a_key_and_in_a_gradient(dtype: torch.dtype) -> None:
    """Rows of the first batch entry do not see the key, those of the second do."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 2, 40, 16).to(dtype) for _ in range(3))
    key[:, :, 3] = NAN
    shown = torch.ones(2, 40, dtype=torch.bool)
    shown[0, 3] = False
    upstream = torch.randn(2, 2, 40, 16)
    with BACKEND.use():
        out, *grads = with_gradients(velm_kernels.cross_attention, query, key, value, key_mask=shown, upstream=upstream)
    for one in (out, *grads):
        assert one[0].isfinite().all() and one[1].isnan().all()
    # The gradient of a row that is NaN comes to all keys that it sees.
    upstream[0, 0, 7] = NAN
    key[:, :, 3] = 0
    with BACKEND.use():
        out, *grads = with_gradients(velm_kernels.cross_attention, query, key, value, key_mask=shown, upstream=upstream)
    assert out.isfinite().all()
    assert grads[0].isnan().any(3).nonzero().tolist() == [[0, 0, 7]]
    for grad in grads[1:]:
        assert torch.equal(grad.isnan().all(3), torch.zeros(2, 2, 40, dtype=torch.bool).index_put(
            (torch.tensor(0), torch.tensor(0)), shown[0]))  # fmt: skip
        assert torch.equal(grad.isnan().any(3), grad.isnan().all(3))


def test_nan_where_a_weight_is_nothing() -> None:
    """dp of NaN is the gradient of all scores of its row, also of those whose weight is 0 in float32."""
    torch.manual_seed(0)
    query, key, value = torch.full((1, 1, 1, 8), 10.0), torch.randn(1, 1, 4, 8), torch.randn(1, 1, 4, 8)
    key[0, 0, 0] = 20.0
    value[0, 0, 0, 0] = NAN
    expected = with_gradients(attention_reference.cross_attention, query, key, value)
    with BACKEND.use():
        got = with_gradients(velm_kernels.cross_attention, query, key, value)
    assert expected[2].isnan().all()
    for one, plain in zip(got, expected, strict=True):
        same(one, plain)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_merge(value: float) -> None:
    torch.manual_seed(0)
    outs, lses = torch.randn(3, 1, 2, 5, 16), torch.randn(3, 1, 2, 5)
    lses[1, 0, 0, 2] = value
    lses[0, 0, 1, 3] = -INF
    lses[2, 0, 1, 4] = lses[0, 0, 1, 4] = 90.0
    with BACKEND.use():
        got = velm_kernels.merge_attention(outs.unbind(), lses.unbind())
    for one, plain in zip(got, merge_reference.merge_attention(outs, lses), strict=True):
        same(one, plain)


@pytest.mark.parametrize("channels_first", [False, True])
@pytest.mark.parametrize("mode", pooling_reference.MODES)
def test_pool(mode: str, channels_first: bool) -> None:
    """Each column another mixture, in every order: what there is, and where a reduction comes to it."""
    torch.manual_seed(0)
    mixtures = [[NAN], [INF], [-INF], [INF, INF], [INF, -INF], [NAN, INF], [NAN, -INF], [3e38, 3e38], [1e-30]]
    columns = []
    for mixture in mixtures:
        for places in ([0, 1], [8, 3], [5, 8], [4, 8]):
            column = torch.randn(9)
            for place, value in zip(places, mixture, strict=False):
                column[place] = value
            columns.append(column)
    columns += [torch.full((9,), value) for value in (INF, -INF, NAN, -5.0, 0.0)]
    x = torch.stack(columns, 1)[None]
    layout = {"channels_first": True} if channels_first else {}
    if channels_first:
        x = x.transpose(1, 2).contiguous()
    with velm_kernels.use_backend("reference"):
        expected = with_gradients(lambda leaf: velm_kernels.masked_pool(leaf, mode=mode, **layout), x)
    if mode == "gem":
        # Its powers overflow in float32, and here only where the mean does.
        expected[0] = pooling_reference.masked_pool(x.double(), mode=mode, **layout).float()
    with BACKEND.use():
        got = with_gradients(lambda leaf: velm_kernels.masked_pool(leaf, mode=mode, **layout), x)
    same(got[0], expected[0])
    if mode != "gem":
        assert torch.equal(got[1].isnan(), expected[1].isnan())


@pytest.mark.parametrize("channels_first", [False, True])
@pytest.mark.parametrize("p", [0.5, 3.0, 20.0, 200.0])
@pytest.mark.parametrize("size", [1e-5, 1.0, 100.0, 1e20, 1e38])
def test_gem_of_any_size(size: float, p: float, channels_first: bool) -> None:
    """Of which most powers are no floats, some not even in float64: there as many times as large as those near 1."""
    torch.manual_seed(0)
    x = size * (0.5 + torch.rand(2, 37, 5))
    out, expected = with_gradients(pooling_reference.masked_pool, x.double() / size, mode="gem", p=p)
    if channels_first:
        x = x.transpose(1, 2).contiguous()
    with BACKEND.use():
        got = with_gradients(velm_kernels.masked_pool, x, mode="gem", p=p, channels_first=channels_first)
    gradient = got[1].transpose(1, 2) if channels_first else got[1]
    assert relative_rms(got[0], size * out) < 1e-6
    # (x / out)^(p - 1): the rounding of the ratio is taken to the power too.
    assert relative_rms(gradient, expected) < 1e-6 + 1e-7 * p


def test_attention_pool() -> None:
    torch.manual_seed(0)
    x, query = torch.randn(3, 40, 16), torch.randn(3, 4, 16)
    mask = torch.ones(3, 40, dtype=torch.bool)
    mask[:, 5] = False
    upstream = torch.randn(3, 4, 16)
    # Queries times weight are the rows that the tokens are multiplied by.
    weight = torch.eye(16)

    def pool(x: Tensor, query: Tensor) -> Tensor:
        return velm_kernels.attention_pool(x, query, weight, weight, heads=1, mask=mask)

    with BACKEND.use():
        good = with_gradients(pool, x, query, upstream=upstream)
    x[0, 5] = x[1, 7] = NAN
    upstream[2, 1] = NAN
    with BACKEND.use():
        got = with_gradients(pool, x, query, upstream=upstream)
    assert got[0][1].isnan().all() and torch.equal(got[0][[0, 2]], good[0][[0, 2]])
    for one, other in zip(got[1:], good[1:], strict=True):
        assert torch.equal(one[0], other[0])
    assert got[2][1].isnan().all() and torch.equal(got[2].isnan().any(2)[2], torch.arange(4) == 1)
    assert torch.equal(got[1].isnan().all(2)[1:], mask[1:]) and not got[1][:, 5].any()


@pytest.mark.parametrize("value", [NAN, INF])
def test_bilinear_attention(value: float) -> None:
    torch.manual_seed(0)
    v, q, h = torch.randn(2, 20, 24).abs(), torch.randn(2, 6, 24).abs(), torch.randn(3, 24).abs()
    v_live, q_live = torch.arange(20).expand(2, 20) < 18, torch.arange(6).expand(2, 6) < 5
    v[0, 2, 0] = value
    expected = bilinear_attention_reference.bilinear_attention(v, q, h, None, v_live, q_live)[0]
    with BACKEND.use():
        maps = velm_kernels.bilinear_attention(v, q, h, v_mask=v_live, q_mask=q_live)
    maps = maps[0] if isinstance(maps, tuple) else maps
    same(maps, expected)
    assert maps[0, 0, 0, 0].isnan() and maps[0, 0, 19, 5] == 0


# A few units in the last place more, whatever the size of the scores: here they reach 30 and 120.
@pytest.mark.parametrize("input_scale", [3.0, 6.0])
@pytest.mark.parametrize(
    "sizes",
    [{}, {"softcap": 30.0}, {"queries": 3, "group": 2, "keys": 700}, {"bias_shape": (True, False, True, True)}],
    ids=str,
)
def test_large_scores(input_scale: float, sizes: dict[str, Any]) -> None:
    case = Case(**({"batch": 1, "queries": 40, "keys": 70, "head_dim": 64, "value_dim": 16} | sizes))
    case.generator.manual_seed(0)
    tensors = case.tensors()
    tensors |= {name: input_scale * tensors[name] for name in ("query", "key")}
    options: dict[str, Any] = {"softcap": case.softcap}
    upstream = case.upstream()[0]
    names = list(tensors)

    def run(function: Any, dtype: torch.dtype, **more: Any) -> list[Tensor]:
        leaves = [tensors[name].to(dtype).requires_grad_() for name in names]
        out, lse, mass = function(**dict(zip(names, leaves, strict=True)), **options, **more)
        return [out.detach(), lse.detach(), mass.detach(), *torch.autograd.grad(out, leaves, upstream.to(dtype))]

    exact = run(attention_reference.cross_attention, torch.float64)
    plain = run(attention_reference.cross_attention, torch.float32)
    with BACKEND.use():
        got = run(velm_kernels.cross_attention, torch.float32, return_logsumexp=True, return_key_mass=True)
    for name, one, other, true in zip(["out", "logsumexp", "mass", *names], got, plain, exact, strict=True):
        assert_accurate(name, one, other, true)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("queries", "group", "dropout_p"), [(1, 1, 0.0), (3, 4, 0.0), (60, 1, 0.2), (130, 1, 0.0)])
def test_rows_whose_weight_is_on_one_key(dtype: torch.dtype, queries: int, group: int, dropout_p: float) -> None:
    """dp - delta is small beside either there: delta from a rounded output leaves nothing but the rounding."""
    torch.manual_seed(0)
    heads, keys, dim = 2, 50, 256
    query, upstream = torch.randn(2, 1, heads * group, queries, dim)
    key, value = torch.randn(2, 1, heads, keys, dim)
    # Twelve above all others: the rest of the weight is some 1e-4.
    best = key.repeat_interleave(group, 1)[:, :, torch.arange(queries) % keys]
    query = (query * 0.3 + best * 0.8).to(dtype)
    key, value, upstream = key.to(dtype), value.to(dtype), upstream.to(dtype)
    seed = torch.tensor(5)
    given = {"dropout_p": dropout_p, "seed": seed}
    exact = with_gradients(
        attention_reference.cross_attention, *(t.double() for t in (query, key, value)), upstream=upstream, **given
    )
    plain = with_gradients(attention_reference.cross_attention, query, key, value, upstream=upstream, **given)
    with BACKEND.use():
        got = with_gradients(
            velm_kernels.cross_attention, query, key, value, upstream=upstream, dropout_p=dropout_p, seed=5
        )
    for name, one, other, true in zip(("out", "query", "key", "value"), got, plain, exact, strict=True):
        assert_accurate(name, one, other, true)


# On both sides of where delta comes from the result, `attention_sums_rows` in csrc/attention/cuda_backward.h.
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("queries", "keys"), [(64, 257), (65, 256), (65, 257)])
def test_gradients_of_many_rows_and_keys(dtype: torch.dtype, queries: int, keys: int) -> None:
    torch.manual_seed(0)
    query, upstream = torch.randn(2, 1, 1, queries, 40).to(dtype)
    key, value = torch.randn(2, 1, 1, keys, 40).to(dtype)
    exact = with_gradients(
        attention_reference.cross_attention, *(t.double() for t in (query, key, value)), upstream=upstream
    )
    plain = with_gradients(attention_reference.cross_attention, query, key, value, upstream=upstream)
    with BACKEND.use():
        got = with_gradients(velm_kernels.cross_attention, query, key, value, upstream=upstream)
    for name, one, other, true in zip(("out", "query", "key", "value"), got, plain, exact, strict=True):
        assert_accurate(name, one, other, true)


@pytest.mark.parametrize("value", [INF, -INF])
def test_infinity_in_float32_products(value: float) -> None:
    """A float is the sum of two of tf32, and what the small one makes of an infinity is not what the whole makes."""
    torch.manual_seed(0)
    query, key, values = (torch.randn(1, 1, rows, 16) for rows in (20, 30, 30))
    for place in (key, values):
        holed = place.clone()
        holed[0, 0, 3, 2] = value
        tensors = (query, holed, values) if place is key else (query, key, holed)
        with BACKEND.use():
            out = velm_kernels.cross_attention(*tensors)
        expected = attention_reference.cross_attention(*tensors)[0]
        if place is key:
            # Where the key's score is infinite; where it is -inf, the others share the row.
            assert 0 < expected.isnan().sum() < expected.numel()
        same(out, expected)
    x, y, weight = torch.randn(70, 64), torch.randn(70, 48), torch.randn(40, 64, 48)
    weight[3, 4, 5] = value
    with BACKEND.use():
        out = velm_kernels.bilinear(x, y, weight)
    assert torch.equal(out.isinf().nonzero()[:, 1], torch.full((70,), 3)) and not out.isnan().any()
