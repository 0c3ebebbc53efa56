"""merge_topk: equal values, NaN, what is nothing, parts of different sizes."""

from __future__ import annotations

import pytest
import torch

from velm_kernels import merge_topk

INF, NAN = torch.inf, torch.nan


def test_equal_values_and_nan() -> None:
    values = torch.tensor([[[NAN, 3.0, -INF]], [[3.0, 1.0, INF]]])
    indices = torch.tensor([[[4, 9, -1]], [[6, 0, -1]]])
    found, index = merge_topk(values, indices, 6)
    assert index.tolist() == [[4, 6, 9, 0, -1, -1]]
    torch.testing.assert_close(found, torch.tensor([[NAN, 3.0, 3.0, 1.0, -INF, -INF]]), equal_nan=True)
    # The least first, and NaN behind all that is there; more than there are.
    found, index = merge_topk(values, indices, 7, largest=False)
    assert index.tolist() == [[0, 6, 9, 4, -1, -1, -1]]
    torch.testing.assert_close(found, torch.tensor([[1.0, 3.0, 3.0, NAN, INF, INF, INF]]), equal_nan=True)


def test_parts_of_different_sizes() -> None:
    values = [torch.tensor([[2.0], [5.0]]), torch.empty(2, 0), torch.tensor([[9.0, 1.0], [7.0, 6.0]])]
    indices = [torch.tensor([[0], [1]]), torch.empty(2, 0, dtype=torch.int64), torch.tensor([[12, 10], [11, 13]])]
    found, index = merge_topk(values, indices, 2)
    assert index.tolist() == [[12, 0], [11, 13]]
    assert found.tolist() == [[9.0, 2.0], [7.0, 6.0]]
    with pytest.raises(ValueError, match="indices: expected 3 parts as in values, given 2"):
        merge_topk(values, indices[:2], 2)
    with pytest.raises(ValueError, match=r"indices\[2\]: expected the shape of values\[2\]"):
        merge_topk(values, [*indices[:2], indices[2][:, :1]], 2)
    with pytest.raises(ValueError, match="values: expected one part or more"):
        merge_topk(torch.empty(0, 2, 3), torch.empty(0, 2, 3, dtype=torch.int64), 2)
