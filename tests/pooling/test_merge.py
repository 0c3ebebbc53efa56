"""merge_tokens: what goes where, means and sizes, gradients, ties and zeros, the published code, torch features."""

from __future__ import annotations

import pytest
import torch
import torch.utils.flop_counter
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import velm_kernels
from benchmarks.pooling import published_merge
from tests.conftest import INTERPRETED, every_backend_once, every_backend_with_cuda, every_kernel
from tests.numbers import assert_accurate
from velm_kernels import backends
from velm_kernels.pooling import merge_tokens, unmerge_tokens
from velm_kernels.pooling.merge_tokens import reference


def _draw(batch, tokens, dim, metric_dim, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, tokens, dim, generator=generator).to(dtype)
    metric = torch.randn(batch, metric_dim, tokens, generator=generator).to(dtype).transpose(1, 2)
    size = torch.randint(1, 9, (batch, tokens), generator=generator).float()
    return x, metric, size


def _results(function, x, size, upstream):
    x, size = x.detach().requires_grad_(), size.detach().requires_grad_()
    tokens, total = function(x, size)[:2]
    weight = upstream.to(tokens.dtype)
    ((tokens * weight).sum() + (total.to(tokens.dtype) * weight.square().mean(-1)).sum()).backward()
    return {"tokens": tokens.detach(), "size": total.detach(), "x": x.grad, "grad_size": size.grad}


@every_kernel
@given(data=st.data())
def test_any_shape(backend, data):
    """What goes where is judged by its similarities: of nearly equal ones either may be taken."""
    small = INTERPRETED or backend.name == "device_on_host"
    batch, tokens = data.draw(st.integers(0, 2)), data.draw(st.integers(0, 40 if small else 170), label="tokens")
    dim, metric_dim = data.draw(st.integers(1, 40), label="dim"), data.draw(st.sampled_from([1, 3, 40, 70, 133]))
    protected = data.draw(st.integers(0, min(tokens, 5)), label="protected")
    r = data.draw(st.integers(0, (tokens - protected) // 2), label="r")
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    x, metric, size = _draw(batch, tokens, dim, metric_dim, dtype, data.draw(st.integers(0, 99), label="seed"))
    with backend.use():
        tokens_out, total, index = merge_tokens(x, metric, r, size, protected)
    assert tokens_out.shape == (batch, tokens - r, dim) and tokens_out.dtype == dtype and tokens_out.is_contiguous()
    unit = torch.nn.functional.normalize(metric.double(), dim=2)
    first_a, first_b = protected + protected % 2, protected + 1 - protected % 2
    similarity = unit[:, first_a::2] @ unit[:, first_b::2].transpose(1, 2)
    for row in range(batch):
        went = index[row].tolist()
        count_a, count_b = similarity.shape[1:]
        begin_b = protected + count_a - r
        assert went[:protected] == list(range(protected))
        assert went[first_b::2] == list(range(begin_b, begin_b + count_b))
        merged = {i: to - begin_b for i, to in enumerate(went[first_a::2]) if to >= begin_b}
        left = [i for i in range(count_a) if i not in merged]
        assert len(merged) == r and [went[first_a::2][i] for i in left] == list(range(protected, begin_b))
        slack = 1e-5
        for i, to in merged.items():
            assert similarity[row, i, to] >= similarity[row, i].max() - slack
        if merged and left:
            least = min(similarity[row, i].max() for i in merged)
            assert least >= similarity[row, left].amax(1).max() - slack
    # Means and sizes, as the index has it.
    belongs = torch.zeros(batch, tokens - r, tokens).scatter_(1, index[:, None], 1.0)
    assert torch.equal(total, (belongs @ size[..., None])[..., 0])
    upstream = torch.randn(tokens_out.shape).to(dtype)

    def plain(x, size):
        weights = belongs.to(x.dtype) * size[:, None].to(x.dtype)
        return (weights @ x) / weights.sum(2, keepdim=True), weights.sum(2)

    with backend.use():
        got = _results(lambda x, size: merge_tokens(x, metric, r, size, protected), x, size, upstream)
    rounded = _results(plain, x, size, upstream)
    exact = _results(plain, x.double(), size.double(), upstream)
    # As fine as the inputs are, for size in float32 too.
    for name, value in got.items():
        assert_accurate(name, value, rounded[name], exact[name], dtype, floor=1e-3)


@pytest.mark.parametrize("protected", [0, 1, 2, 3])
def test_is_what_the_reference_says(protected):
    x, metric, size = _draw(2, 15, 6, 4, torch.float64, 3)
    for r in (0, 1, 6):
        for ours, theirs in zip(
            merge_tokens(x, metric, r, size.double(), protected),
            reference.merge_tokens(x, metric, r, size.double(), protected),
            strict=True,
        ):
            torch.testing.assert_close(ours, theirs)


@every_backend_once
@pytest.mark.parametrize("class_token", [False, True])
def test_is_the_published_merge(backend, class_token):
    x, metric, size = _draw(2, 26, 24, 16, torch.float32, 1)
    upstream = torch.randn(2, 26 - 11, 24)
    with backend.use():
        got = _results(lambda x, size: merge_tokens(x, metric, 11, size, int(class_token)), x, size, upstream)
    exact = _results(
        lambda x, size: published_merge(x, metric.double(), 11, size, class_token), x.double(), size.double(), upstream
    )
    plain = _results(lambda x, size: published_merge(x, metric, 11, size, class_token), x, size, upstream)
    for name, value in got.items():
        assert_accurate(name, value, plain[name], exact[name], torch.float32)


@every_backend_once
def test_preserves_sums_and_unmerges_to_the_means(backend):
    x, metric, size = _draw(2, 33, 10, 12, torch.float32, 5)
    with backend.use():
        first = merge_tokens(x, metric, 9, size, 1)
        second = merge_tokens(first.tokens, metric[:, :24], 7, first.size, 1)
        index = second.indices.gather(1, first.indices)
        merged = second.tokens.clone().requires_grad_()
        spread = unmerge_tokens(merged, index)
        upstream = torch.randn_like(spread)
        spread.backward(upstream)
    torch.testing.assert_close(second.size.sum(1), size.sum(1))
    weighted = (second.tokens * second.size[..., None]).sum(1)
    torch.testing.assert_close(weighted, (x * size[..., None]).sum(1), atol=1e-4, rtol=1e-5)
    assert torch.equal(spread, second.tokens.gather(1, index[..., None].expand(2, 33, 10)))
    expected = torch.zeros_like(merged).scatter_add_(1, index[..., None].expand(2, 33, 10), upstream)
    torch.testing.assert_close(merged.grad, expected)
    for row in range(2):
        for to in range(17):
            group = index[row] == to
            mean = (x[row, group] * size[row, group, None]).sum(0) / size[row, group].sum()
            torch.testing.assert_close(spread[row, group], mean.expand(int(group.sum()), 10), atol=1e-5, rtol=1e-5)


@every_backend_with_cuda
def test_ties_zeros_and_nan(backend):
    """Equal tokens everywhere: the first of A go, and all of them to the first of B. Zeros are similar to nothing, and
    NaN is merged last."""
    x = torch.arange(80.0).view(1, 80, 1).expand(1, 80, 5)
    ones = torch.ones(1, 80, 70)
    zeros = ones.clone()
    zeros[0, 0] = 0.0
    zeros[0, 1] = 0.0
    zeros[0, 2, 5] = torch.nan
    zeros[0, 3, 5] = torch.nan
    with backend.use():
        index = merge_tokens(x, ones, 4).indices[0]
        assert index[0:8:2].tolist() == [36] * 4 and index[8::2].tolist() == list(range(36))
        tokens, size, index = merge_tokens(x, zeros, 39)
        index = index[0]
        nothing = merge_tokens(x, 0 * ones, 3)
    assert index[2] == 0 and index[0] >= 1 and tokens.isfinite().all() and size.sum() == 80
    assert (index[4::2] == 1 + 2).all(), "to the first of B that is neither zero nor NaN"
    assert nothing.indices[0, :6:2].tolist() == [37] * 3 and nothing.tokens.isfinite().all()


@every_backend_with_cuda
def test_where_nothing_is_similar(backend):
    """All cosines are negative: what stands behind the last row of B is not taken for one of cosine 0."""
    metric = torch.rand(1, 82, 70)
    metric[:, ::2] *= -1.0
    unit = torch.nn.functional.normalize(metric[0].double(), dim=1)
    expected = (unit[::2] @ unit[1::2].T).argmax(1)
    with backend.use():
        indices = merge_tokens(metric, metric, 41).indices[0]
    assert torch.equal(indices[::2], expected)


def test_flops():
    x, metric, _ = _draw(2, 14, 8, 6, torch.float32, 0)
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        merge_tokens(x, metric, 4)
    assert counter.get_total_flops() == 2 * 2 * 7 * 7 * 6


def test_explain_names_the_operators_inside_and_computes_nothing(monkeypatch):
    x, metric, size = _draw(2, 14, 8, 6, torch.float32, 0)
    merged, indices, scores = x[:, :10], merge_tokens(x, metric, 4).indices, metric[..., 0]
    ran = []
    monkeypatch.setattr(backends, "run", lambda operator, *args: ran.append(operator))
    with Computed() as computed:
        merging = velm_kernels.explain("merge_tokens", x, metric, 4, size, protected=1).splitlines()
        unmerging = velm_kernels.explain("unmerge_tokens", merged, indices).splitlines()
        selecting = velm_kernels.explain("select_tokens", x, scores, 3).splitlines()
    assert ran == [] and computed.elements == 0
    for told, operators in (
        (merging, ["match_rows", "gather_rows"]),
        (unmerging, ["gather_rows"]),
        (selecting, ["gather_rows"]),
    ):
        assert [line.split()[0] for line in told[1:] if "->" in line] == operators
    assert merging[0] == "merge_tokens -> cpu" or INTERPRETED


class Computed(TorchDispatchMode):
    """Counts the elements of results that have values."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        for value in tree_leaves(results):
            if type(value) is torch.Tensor and not value.is_meta:
                self.elements += value.numel()
        return results
