"""The harness: its statistics, its memory figures, its refusal of wrong numbers, and its CSV."""

from __future__ import annotations

import csv

import pytest
import torch

from benchmarks import attention, harness
from benchmarks.harness import Case, Settings
from velm_kernels import measure

LIMITS = measure.Limits("cpu", 2, fp32=1e12, bf16=None, copy=1e11)
SETTINGS = Settings(torch.device("cpu"), rounds=3, compile=False)


def scale_case(velm) -> Case:
    return Case(
        operator="twice",
        name="twice",
        shape="100 x 100",
        make=lambda generator: {"x": torch.randn(100, 100, generator=generator, dtype=torch.float64)},
        wanted=("x",),
        ways={"eager": lambda x: 2 * x, "velm": velm},
        flops=1e4,
        traffic=2e4,
        backward_flops=1e4,
        backward_traffic=2e4,
    )


def test_quartiles_of_known_samples():
    timing = measure.Timing((5.0, 1.0, 2.0, 4.0, 3.0))
    assert (timing.median, timing.quartiles, timing.best) == (3.0, (2.0, 4.0), 1.0)
    assert measure.Timing((7.0,)).quartiles == (7.0, 7.0)


def test_runs_alternate():
    calls: list[str] = []
    runs = {name: lambda name=name: calls.append(name) for name in "ab"}
    timings = measure.alternate(runs, rounds=4, warm_up=1, sample_seconds=0.0)
    assert "".join(calls) == "ab" + "ab" * 4
    assert all(len(timing.samples) == 4 for timing in timings.values())


def test_slow_call_is_its_own_only_sample():
    import time

    runs = {"slow": lambda: time.sleep(0.03), "fast": lambda: None}
    timings = measure.alternate(runs, rounds=3, longest=0.02)
    assert len(timings["slow"].samples) == 1
    assert len(timings["fast"].samples) == 3
    assert timings["slow"].median >= 0.03


def test_saved_for_backward_counts_each_storage_once_and_no_input():
    x = torch.randn(1000, requires_grad=True)

    def run():
        y = x * 2
        return (y * y).sum() + y.view(10, 100).square().sum() + (x * x).sum()

    assert measure.saved_for_backward(run, [x]) == 4000


def test_peak_memory_sees_what_was_freed():
    x = torch.ones(1000)
    assert measure.peak_memory(lambda: (x * 2 + 1).sum()) == pytest.approx(8000, abs=200)


def test_relative_rms():
    one, other = torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.5])
    assert measure.relative_rms([other], [one]) == pytest.approx(0.1)
    assert measure.relative_rms([torch.tensor([torch.nan, 4.0])], [one]) == float("inf")
    assert measure.relative_rms([torch.zeros(3)], [one]) == float("inf")
    masked = torch.tensor([-torch.inf, 3.0])
    assert measure.relative_rms([masked], [masked]) == 0
    for other in (-masked, torch.tensor([2.0, 3.0])):
        assert measure.relative_rms([other], [masked]) == float("inf")
        assert measure.relative_rms([masked], [other]) == float("inf")


def test_limit_is_the_slower_of_arithmetic_and_memory():
    assert LIMITS.seconds(2e12, 0, torch.float32) == 2.0
    assert LIMITS.seconds(0, 3e11, torch.float32) == 3.0
    assert LIMITS.flops(torch.bfloat16) == 1e12


@pytest.mark.parametrize("direction", ["fwd", "fwd+bwd"])
def test_right_numbers_get_a_row(direction):
    rows, failures = harness.measure_case(
        scale_case(lambda x: x + x), "test", torch.float32, direction, LIMITS, SETTINGS
    )
    assert not failures
    assert {row.way for row in rows} == {"eager", "velm"}
    ours = next(row for row in rows if row.way == "velm")
    eager = next(row for row in rows if row.way == "eager")
    assert ours.best_other == "eager"
    assert ours.speedup_over_best_other == pytest.approx(eager.median_ms / ours.median_ms)
    assert eager.speedup_over_best_other is None
    assert ours.fraction_of_limit == pytest.approx(ours.limit_ms / ours.median_ms)
    assert ours.samples == 3
    assert ours.lower_quartile_ms <= ours.median_ms <= ours.upper_quartile_ms


@pytest.mark.parametrize("wrong", [lambda x: 2.001 * x, lambda x: x[:50], lambda x: 2 * x.detach() + 0 * x])
def test_wrong_numbers_get_none(wrong):
    rows, failures = harness.measure_case(scale_case(wrong), "test", torch.float32, "fwd+bwd", LIMITS, SETTINGS)
    assert [row.way for row in rows] == ["eager"]
    assert [failure.way for failure in failures] == ["velm"]


def test_csv_has_the_documented_columns(tmp_path):
    rows, _ = harness.measure_case(scale_case(lambda x: x + x), "test", torch.float32, "fwd", LIMITS, SETTINGS)
    path = tmp_path / "bench.csv"
    harness.write_csv(path, rows[:1])
    harness.write_csv(path, rows[1:])
    with path.open(newline="") as file:
        read = list(csv.DictReader(file))
    assert len(read) == 2
    assert float(read[0]["median_ms"]) == rows[0].median_ms
    documented = (harness.Path(harness.__file__).parent / "README.md").read_text()
    for name in harness.columns():
        assert f"`{name}`" in documented
    path.write_text("other,columns\n")
    with pytest.raises(ValueError, match="other columns"):
        harness.write_csv(path, rows)


def test_ways_of_every_attention_case_agree_on_their_meaning():
    """At the benchmarks' own shapes only names and directions are looked at; numbers are checked when they run."""
    cases = attention.cases()
    assert len({case.name for case in cases}) == len(cases)
    for case in cases:
        assert {"eager", "velm"} <= set(case.ways)
        assert case.backward_flops is None or case.wanted
