"""film and weighted_sum."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import INTERPRETED, every_backend_with_cuda, every_cpu_backend
from tests.numbers import assert_accurate
from velm_kernels.fusion import FiLM, film, reference, weighted_sum

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


@every_backend_with_cuda
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
        return reference.film(x, gamma.view(shape), beta.view(shape), offset)

    def ours(x, gamma, beta):
        with backend.use():
            out = film(x, gamma, beta, channels_first=first, gamma_offset=offset)
        if all(size > 1 for size in x.shape):
            assert out.stride() == x.stride()
        return out

    _check(ours, meaning, [x, gamma, beta], wanted)


@every_backend_with_cuda
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
        return reference.weighted_sum(features, weights.view(batch, *[1] * (dims - 2), count))

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
    wide = [value[:, None].expand(2, 67, 35) if value.dim() == 2 else value for value in features]
    assert torch.equal(out, sum(weights[:, i, None, None] * wide[i] for i in range(4)))
    for i, value in enumerate(features):
        expected = weights[:, i, None, None] * grad
        assert torch.equal(leaves[i].grad, expected.sum(1) if value.dim() == 2 else expected), i
    assert torch.equal(leaves[4].grad, torch.stack([(grad * value).sum((1, 2)) for value in wide], 1))


@every_backend_with_cuda
def test_strided_expanded_and_empty(backend):
    x = torch.randn(5, 3, 44).transpose(0, 1)[..., :40]
    pair = torch.randn(3, 80)
    gamma, beta = pair.chunk(2, -1)
    with backend.use():
        assert torch.equal(film(x, gamma, beta), film(x.contiguous(), gamma.contiguous(), beta.contiguous()))
        one = torch.randn(1, 5, 40).expand(3, 5, 40).requires_grad_()
        weights = torch.randn(2)
        out = weighted_sum([x, one], weights)
        assert torch.equal(out, weighted_sum([x.contiguous(), one.contiguous()], weights))
        for shape in ((0, 4, 8), (2, 0, 8), (2, 4, 0)):
            leaves = [torch.zeros(shape), torch.zeros(shape[0], shape[2]), torch.zeros(shape[0], shape[2])]
            leaves = [leaf.requires_grad_() for leaf in leaves]
            film(*leaves).sum().backward()
            weighted_sum(leaves[:2], torch.ones(2)).sum().backward()
            assert all(leaf.grad.shape == leaf.shape and (leaf.grad == 0).all() for leaf in leaves)


@every_cpu_backend
def test_same_bits_for_any_number_of_threads(backend):
    generator = torch.Generator().manual_seed(0)
    x, gamma, beta = _randn(generator, 3, 300, 64), _randn(generator, 3, 64), _randn(generator, 3, 64)
    weights = _randn(generator, 3, 2)
    results = []
    with backend.use():
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(
                _results(film, [x, gamma, beta], [True] * 3)
                + _results(lambda *t: weighted_sum(t[:2], t[2]), [x, beta, weights], [True] * 3)
            )
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_operator_checks_and_compile():
    x, gamma, beta = torch.randn(2, 5, 20), torch.randn(2, 20), torch.randn(2, 20)
    leaves = [leaf.requires_grad_() for leaf in (x, gamma, beta)]
    operators, only = torch.ops.velm, ("test_schema", "test_faketensor")
    pixels = torch.randn(2, 20, 5).transpose(1, 2).requires_grad_()
    for rows in (x, pixels):
        arguments = (rows, gamma, beta, rows is pixels, 1.0, "")
        all_checks = {"test_utils": only} if rows is pixels else {}
        torch.library.opcheck(operators.film_forward.default, arguments, **all_checks)
        grad = torch.empty_like(rows)
        torch.library.opcheck(
            operators.film_backward.default, (grad, rows.detach(), None, rows is pixels, 1.0, 6, ""), test_utils=only
        )
    weights = torch.randn(2, 2, requires_grad=True)
    features = [x, gamma[:, None].detach().requires_grad_()]
    torch.library.opcheck(operators.weighted_sum_forward.default, (features, weights, ""))
    backward = (
        torch.randn(2, 5, 20),
        [f.detach() for f in features],
        weights.detach(),
        [False, True],
        3,
        [False, True],
        "",
    )
    torch.library.opcheck(operators.weighted_sum_backward.default, backward, test_utils=only)

    def function(x, gamma, beta):
        return weighted_sum([film(x, gamma, beta), gamma], beta[0, :2])

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    grads = []
    for f in (compiled, function):
        out = f(*leaves)
        grads.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_autocast():
    x, gamma = torch.randn(2, 5, 8), torch.randn(2, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert film(x, gamma, gamma.bfloat16()).dtype == torch.bfloat16
        assert weighted_sum([x, gamma.bfloat16()], torch.rand(2)).dtype == torch.bfloat16


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


X = torch.ones(2, 5, 6)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([1.0], X[:, 0], X[:, 0]), TypeError, "x: expected a tensor"),
        ((X[0, 0], X[:, 0], X[:, 0]), ValueError, r"x: expected \(batch, ..., dim\), given \(6,\)"),
        ((X, X[:, 0].half(), X[:, 0]), TypeError, "gamma: expected dtype torch.float32, given torch.float16"),
        ((X, X[:, 0], X), ValueError, r"beta: expected \(batch, dim\) = \(2, 6\) or .*given \(2, 5, 6\)"),
        ((X, X[:, 0, :5], X[:, 0]), ValueError, r"gamma: .*\(2, 6\).*given \(2, 5\)"),
    ],
)
def test_bad_arguments_of_film(arguments, error, message):
    with pytest.raises(error, match=message):
        film(*arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((X, torch.ones(1)), TypeError, "features: expected a sequence of tensors"),
        (([], torch.ones(0)), ValueError, "features: expected 1 to 60 tensors, given list of 0"),
        (([X, 1.0], torch.ones(2)), TypeError, r"features\[1\]: expected a tensor"),
        (([X, X.half()], torch.ones(2)), TypeError, r"features\[1\]: expected dtype torch.float32"),
        (([X, X[:, :3]], torch.ones(2)), ValueError, r"features: .*given \(2, 5, 6\), \(2, 3, 6\)"),
        (([X, X[..., :1]], torch.ones(2)), ValueError, "features: expected .*of one batch and dim"),
        (([X], torch.ones(2)), ValueError, r"weights: expected \(n,\) = \(1,\) or .*given \(2,\)"),
        (([X], torch.ones(1).half()), TypeError, "weights: expected dtype"),
    ],
)
def test_bad_arguments_of_weighted_sum(arguments, error, message):
    with pytest.raises(error, match=message):
        weighted_sum(*arguments)
