"""The backend ``torch``: it computes what the others do, and says no to everything else."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

import velm_kernels
from tests.numbers import assert_accurate
from velm_kernels.backends import NoBackendError
from velm_kernels.linear.linear import reference, torch_products

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def both_passes(function, inputs, grads):
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    results = function(*leaves)
    results = results if isinstance(results, tuple) else (results,)
    found = torch.autograd.grad(results[0], leaves, grads.to(results[0].dtype))
    return [*(result.detach() for result in results), *found]


def eager(query, key, value, is_causal, scale):
    key, value = (t.repeat_interleave(query.shape[1] // key.shape[1], 1) for t in (key, value))
    scores = query @ key.mT * scale
    if is_causal:
        scores = scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), -torch.inf)
    return scores.softmax(-1) @ value, scores.logsumexp(-1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("queries", "keys", "kv_heads", "is_causal"),
    [(5, 9, 4, False), (9, 5, 2, True), (5, 9, 1, True), (130, 130, 2, True), (1, 70, 4, False)],
)
def test_attention(dtype, queries, keys, kv_heads, is_causal) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 4, queries, 24), (2, kv_heads, keys, 24), (2, kv_heads, keys, 24), (2, 4, queries, 24))
    *inputs, grads = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)
    # One layout is that of a projection, one is not.
    inputs[0] = inputs[0].transpose(1, 2).contiguous().transpose(1, 2)

    def ours(query, key, value):
        return velm_kernels.cross_attention(query, key, value, is_causal=is_causal, scale=0.3, return_logsumexp=True)

    with velm_kernels.use_backend("torch"):
        got = both_passes(ours, inputs, grads)
    exact = both_passes(lambda *args: eager(*args, is_causal, 0.3), [t.double() for t in inputs], grads)
    plain = both_passes(lambda *args: eager(*args, is_causal, 0.3), inputs, grads)
    names = ("out", "logsumexp", "gradient of query", "gradient of key", "gradient of value")
    for name, *results in zip(names, got, plain, exact, strict=True):
        assert_accurate(name, *results, dtype=dtype)
    assert got[1].dtype == torch.float32
    # The memory that torch.compile is told.
    assert got[0].transpose(1, 2).is_contiguous()


def test_attention_passes_opcheck_and_compiles() -> None:
    query, key = torch.randn(2, 4, 5, 16, requires_grad=True), torch.randn(2, 2, 9, 16, requires_grad=True)
    with velm_kernels.use_backend("torch"):
        arguments = velm_kernels.backends._public_functions["cross_attention"].canonical(query, key, key)
        torch.library.opcheck(
            torch.ops.velm.attention_forward.default,
            (*arguments.values(), "torch"),
            # The others take the gradient of every result.
            test_utils=("test_schema", "test_faketensor"),
        )
        expected = both_passes(velm_kernels.cross_attention, (query, key, key), torch.ones(2, 4, 5, 16))
        compiled = torch.compile(velm_kernels.cross_attention, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(both_passes(compiled, (query, key, key), torch.ones(2, 4, 5, 16)), expected)


def test_backward_of_its_results_by_another_backend() -> None:
    """What forward saved serves everybody: the gradient of logsumexp, which torch does not take, goes on."""
    query = torch.randn(2, 4, 5, 16, requires_grad=True)
    with velm_kernels.use_backend("reference"):
        out, logsumexp = velm_kernels.cross_attention(query, query, query, return_logsumexp=True)
        expected = torch.autograd.grad(out.sum() + logsumexp.sum(), query)
    with velm_kernels.use_backend("torch"):
        out, logsumexp = velm_kernels.cross_attention(query, query, query, return_logsumexp=True)
        with pytest.raises(NoBackendError, match="no gradient of logsumexp"):
            torch.autograd.grad(out.sum() + logsumexp.sum(), query, retain_graph=True)
    arguments = velm_kernels.backends._public_functions["cross_attention"].canonical(query, query, query)
    values = [value.detach() if isinstance(value, torch.Tensor) else value for value in arguments.values()][:-1]
    grads = torch.ops.velm.attention_backward(
        *(torch.ones_like(out), torch.ones_like(logsumexp), *values[:16], out.detach(), logsumexp.detach()),
        *(*values[16:], 7, ""),
    )
    torch.testing.assert_close(sum(grads[:3]), expected[0])


@pytest.mark.parametrize(
    "more",
    [
        {"softcap": 3.0},
        {"key_mask": torch.ones(2, 9, dtype=torch.bool)},
        {"bias": torch.zeros(2, 4, 5, 9)},
        {"dropout_p": 0.5},
        {"return_key_mass": True},
        {"query_norm_weight": torch.ones(16)},
    ],
    ids=lambda more: next(iter(more)),
)
def test_attention_with_extras_is_refused(more) -> None:
    query, key = torch.ones(2, 4, 5, 16), torch.ones(2, 2, 9, 16)
    with velm_kernels.use_backend("torch"), pytest.raises(NoBackendError, match="torch's attention has no"):
        velm_kernels.cross_attention(query, key, key, **more)


@pytest.mark.parametrize("scale", [-0.5, 0.0])
def test_a_scale_that_turns_the_order_of_scores_is_left_to_others(scale) -> None:
    query = 30 * torch.randn(2, 4, 5, 16)
    with velm_kernels.use_backend("torch"), pytest.raises(NoBackendError, match="is not greater than 0"):
        velm_kernels.cross_attention(query, query, query, scale=scale)
    exact = eager(query.double(), query.double(), query.double(), False, scale)[0]
    torch.testing.assert_close(
        velm_kernels.cross_attention(query, query, query, scale=scale).double(), exact, rtol=1e-4, atol=1e-4
    )


def test_attention_over_nothing_is_left_to_others() -> None:
    query, key = torch.ones(2, 4, 5, 16), torch.ones(2, 2, 0, 16)
    with velm_kernels.use_backend("torch"), pytest.raises(NoBackendError, match="a dimension is 0"):
        velm_kernels.cross_attention(query, key, key)
    assert not velm_kernels.cross_attention(query, key, key).any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", [None, *reference.ACTIVATIONS[1:]])
def test_linear(dtype, activation) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": (7, 16), "weight": (24, 16), "bias": (24,), "residual": (7, 24)}
    made = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    grads = torch.randn(7, 24, generator=generator)
    for has_bias, has_residual in itertools.product((False, True), repeat=2):
        names = ["x", "weight"] + ["bias"] * has_bias + ["residual"] * has_residual
        inputs = [made[name] for name in names]

        def eager(*args, names=names):
            given = dict(zip(names, args, strict=True))
            out = reference.activate(F.linear(given["x"], given["weight"], given.get("bias")), activation or "")
            return out if "residual" not in given else out + given["residual"]

        def ours(*args, names=names):
            return velm_kernels.linear(**dict(zip(names, args, strict=True)), activation=activation)

        with velm_kernels.use_backend("torch"):
            got = both_passes(ours, inputs, grads)
            with torch.no_grad():
                assert_accurate("inference", ours(*inputs), eager(*inputs), eager(*(t.double() for t in inputs)))
        exact = both_passes(eager, [t.double() for t in inputs], grads)
        for name, *results in zip(["out", *names], got, both_passes(eager, inputs, grads), exact, strict=True):
            assert_accurate(name, *results)


def test_linear_uses_the_epilogue_that_torch_has(monkeypatch) -> None:
    """On the CPU for relu alone: its GELU there is the one by erf, on GPUs that by tanh."""
    x, weight, bias = torch.randn(7, 16), torch.randn(24, 16), torch.randn(24)
    seen = []
    original = torch._addmm_activation
    monkeypatch.setattr(torch, "_addmm_activation", lambda *a, **k: seen.append(k["use_gelu"]) or original(*a, **k))
    for activation in reference.ACTIVATIONS:
        torch_products.linear_forward(x, weight, bias, None, activation, "", torch.empty(7, 24), None)
    assert seen == [False]
    assert torch_products._has_epilogue("gelu_tanh", torch.device("cuda"))
    assert not torch_products._has_epilogue("gelu", torch.device("cuda"))


def test_float64_stays_with_the_reference() -> None:
    x = torch.ones(2, 3, dtype=torch.float64)
    with velm_kernels.use_backend("torch"), pytest.raises(NoBackendError, match="float64"):
        velm_kernels.linear(x, torch.ones(4, 3, dtype=torch.float64))
