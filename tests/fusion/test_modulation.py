"""film and weighted_sum."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import INTERPRETED, every_backend_with_cuda, every_kernel
from tests.numbers import assert_accurate
from velm_kernels.fusion import FiLM, film, weighted_sum
from velm_kernels.fusion.film import reference as film_reference
from velm_kernels.fusion.weighted_sum import reference as sum_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def _randn(generator, *shape, scale=1.0, dtype=torch.float32):
    return (scale * torch.randn(shape, generator=generator)).to(dtype)


def _results(function, inputs, wanted, dtype=None):
    """The result and the gradients, in ``dtype``, of leaves that hold the values of ``inputs``."""
    leaves = [
        (x.detach() if dtype is None else x.detach().to(dtype)).requires_grad_(want)
        for x, want in zip(inputs, wanted, strict=True)
    ]
    out = function(*leaves)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(inputs[0].dtype).to(out.dtype)
    out.backward(grad)
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def _check(ours, meaning, inputs, wanted):
    # The results of plain torch round to the dtype once, as a fused kernel does: in float32.
    got = _results(ours, inputs, wanted)
    plain = _results(meaning, inputs, wanted, torch.float32)
    exact = _results(meaning, inputs, wanted, torch.float64)
    for i, (value, rounded, expected) in enumerate(zip(got, plain, exact, strict=True)):
        assert (value is None) == (expected is None), i
        if value is not None:
            dtype = inputs[0].dtype if i == 0 else inputs[i - 1].dtype
            assert value.dtype == dtype
            # Sums of terms that cancel are as inexact as the terms.
            floor = float(torch.linalg.vector_norm(expected.double())) or float(torch.finfo(dtype).tiny)
            assert_accurate(f"result {i}", value, rounded.to(dtype), expected, dtype, floor=floor)


@every_kernel
@settings(max_examples=min(12, settings().max_examples))
@given(data=st.data())
def test_film_of_any_shape(backend, data):
    small = INTERPRETED or backend.name == "device_on_host"
    batch, dim = (
        data.draw(st.integers(1, 3), label="batch"),
        data.draw(st.integers(1, 40 if small else 140), label="dim"),
    )
    regions = data.draw(st.sampled_from([(), (1,), (5,), (6, 7), (70,)]), label="regions")
    layout = data.draw(st.sampled_from(["last", "first", "channels_last"]), label="layout")
    shared = data.draw(st.booleans(), label="shared")
    dtype = data.draw(st.sampled_from(DTYPES))
    wanted = data.draw(st.tuples(*[st.booleans()] * 3).filter(any), label="wanted")
    offset = data.draw(st.sampled_from([0.0, 1.0]))
    generator = torch.Generator().manual_seed(0)
    if layout == "last":
        x = _randn(generator, batch, *regions, dim, dtype=dtype)
    elif layout == "first":
        x = _randn(generator, batch, dim, *regions, dtype=dtype)
    else:
        x = _randn(generator, batch, *regions, dim, dtype=dtype).movedim(-1, 1)
    gamma, beta = (_randn(generator, *[batch] * (not shared), dim, scale=3.0, dtype=dtype) for _ in range(2))
    first = layout != "last"

    def meaning(x, gamma, beta):
        shape = (-1, dim, *[1] * len(regions)) if first else (-1, *[1] * len(regions), dim)
        return film_reference.film(x, gamma.view(shape), beta.view(shape), offset)

    def ours(x, gamma, beta):
        with backend.use():
            out = film(x, gamma, beta, channels_first=first, gamma_offset=offset)
        if all(size > 1 for size in x.shape):
            assert out.stride() == x.stride()
        return out

    _check(ours, meaning, [x, gamma, beta], wanted)


@every_kernel
@settings(max_examples=min(12, settings().max_examples))
@given(data=st.data())
def test_weighted_sum_of_any_shape(backend, data):
    small = INTERPRETED or backend.name == "device_on_host"
    batch, dim = (
        data.draw(st.integers(1, 3), label="batch"),
        data.draw(st.integers(1, 40 if small else 140), label="dim"),
    )
    regions = data.draw(st.sampled_from([(), (1,), (5,), (2, 3), (70,)]), label="regions")
    count = data.draw(st.integers(1, 4), label="count")
    broadcast = [data.draw(st.booleans()) for _ in range(count)]
    per_row = data.draw(st.booleans(), label="per_row")
    dtype = data.draw(st.sampled_from(DTYPES))
    weights_dtype = data.draw(st.sampled_from([dtype, torch.float32]))
    wanted = data.draw(st.tuples(*[st.booleans()] * (count + 1)).filter(any), label="wanted")
    generator = torch.Generator().manual_seed(0)
    features = [
        _randn(generator, batch, *[] if less else regions, dim, scale=1.0 + i, dtype=dtype)
        for i, less in enumerate(broadcast)
    ]
    weights = _randn(generator, *[batch] * per_row, count, dtype=weights_dtype)
    dims = max(value.dim() for value in features)

    def meaning(*tensors):
        *features, weights = tensors
        features = [x.view(batch, *[1] * (dims - 2), dim) if x.dim() == 2 else x for x in features]
        weights = weights.expand(batch, count)
        return sum_reference.weighted_sum(features, weights.view(batch, *[1] * (dims - 2), count))

    def ours(*tensors):
        with backend.use():
            return weighted_sum(tensors[:-1], tensors[-1])

    _check(ours, meaning, [*features, weights], wanted)


@every_backend_with_cuda
def test_film_is_exact_where_it_can_be(backend):
    """Integers: a region left out or counted twice shows, whatever the tolerance."""
    x = torch.arange(2 * 67 * 35).view(2, 67, 35).remainder(13).sub(6).float()
    gamma, beta = torch.arange(70.0).view(2, 35).remainder(5), torch.arange(70.0).view(2, 35).remainder(7)
    for first in (False, True):
        leaves = [(x.transpose(1, 2).contiguous() if first else x), gamma, beta]
        leaves = [leaf.clone().requires_grad_() for leaf in leaves]
        with backend.use():
            out = film(*leaves, channels_first=first, gamma_offset=2.0)
            grad = out.detach().remainder(5) - 2
            out.backward(grad)
        got_x, got_out, grad = (
            value.transpose(1, 2) if first else value for value in (leaves[0].grad, out.detach(), grad)
        )
        assert torch.equal(got_out, (2 + gamma)[:, None] * x + beta[:, None])
        assert torch.equal(got_x, (2 + gamma)[:, None] * grad)
        assert torch.equal(leaves[1].grad, (grad * x).sum(1)) and torch.equal(leaves[2].grad, grad.sum(1))


@every_backend_with_cuda
def test_weighted_sum_is_exact_where_it_can_be(backend):
    x = torch.arange(2 * 67 * 35).view(2, 67, 35).remainder(13).sub(6).float()
    features = [x, x[:, 3] + 1, x.flip(1), x[:, :, :1].expand(2, 67, 35)]
    weights = torch.tensor([[1.0, 2.0, -1.0, 3.0], [0.0, 4.0, 2.0, 1.0]])
    leaves = [leaf.clone().requires_grad_() for leaf in (*features, weights)]
    with backend.use():
        out = weighted_sum(leaves[:4], leaves[4])
        grad = out.detach().remainder(5) - 2
        out.backward(grad)
    expanded = [value[:, None].expand(2, 67, 35) if value.dim() == 2 else value for value in features]
    assert torch.equal(out, sum(weights[:, i, None, None] * expanded[i] for i in range(4)))
    for i, value in enumerate(features):
        expected = weights[:, i, None, None] * grad
        assert torch.equal(leaves[i].grad, expected.sum(1) if value.dim() == 2 else expected), i
    assert torch.equal(leaves[4].grad, torch.stack([(grad * value).sum((1, 2)) for value in expanded], 1))


def test_film_module_begins_as_the_identity_and_learns():
    torch.manual_seed(0)
    for shape, first in (((3, 7, 6), False), ((3, 6, 4, 4), True)):
        module, x, condition = FiLM(5, 6, channels_first=first), torch.randn(shape), torch.randn(3, 5)
        assert torch.equal(module(x, condition), x)
        assert {name: tuple(p.shape) for name, p in module.state_dict().items()} == {
            "linear.weight": (12, 5),
            "linear.bias": (12,),
        }
        torch.nn.init.normal_(module.linear.weight)
        gamma, beta = torch.nn.functional.linear(condition, module.linear.weight, module.linear.bias).chunk(2, -1)
        view = (3, 6, 1, 1) if first else (3, 1, 6)
        torch.testing.assert_close(module(x, condition), gamma.view(view) * x + beta.view(view))
        module(x, condition).square().sum().backward()
        assert all((p.grad != 0).any() for p in module.parameters())
