"""The table of bytes that CUDA attention moves at the benchmark shapes is that of the kernels as they are."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks import static
from tests.conftest import DEVICE_ON_HOST
from tests.cuda import traffic

pytestmark = list(DEVICE_ON_HOST.marks)


# The largest one takes 20 times as long as these.
@pytest.mark.parametrize("case", ["q-former", "idefics-4-images", "decode"])
def test_traffic_is_no_worse_than_the_table(case: str) -> None:
    shape = next(shape for shape in static.SHAPES if shape[0] == case)
    counted = static.count(*shape, torch.bfloat16)
    assert traffic.worse([counted]) == []
    assert counted.ratio >= 1.0
    assert traffic.worse([replace(counted, read=counted.read + 1)])


def test_table_has_every_shape_within_the_limit() -> None:
    table = traffic.written()
    assert {case for case, _ in table} == {shape[0] for shape in static.SHAPES}
    assert all(float(row["ratio"]) <= traffic.LIMIT and row["bank_conflicts"] == "0" for row in table.values())
