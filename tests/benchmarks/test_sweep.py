"""The sweep over sizes lists what is slower than it may be, and says so by its exit status."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from benchmarks import __main__ as command
from benchmarks import sweep


def test_lists_what_is_slower(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = ["sweep", "--operator", "film", "--dtype", "fp32", "--direction", "fwd", "--every", "1000", "--rounds", "1"]
    assert command.main([*one, "--minimum", "0", "--out", str(tmp_path)]) == 0
    assert "film" in capsys.readouterr().out.splitlines()[-2]
    assert command.main([*one, "--minimum", "1e9", "--out", str(tmp_path)]) == 1
    assert "x of eager  film" in capsys.readouterr().out
    rows = list(csv.DictReader((tmp_path / "sweep.csv").open()))
    assert {row["way"] for row in rows} == {"eager", "velm"}


def test_goes_on_where_it_stopped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    some = ["sweep", "--operator", "film", "--dtype", "fp32", "--direction", "fwd", "--every", "20", "--rounds", "1"]
    some += ["--out", str(tmp_path), "--no-check", "--minimum", "0"]
    assert command.main([*some, "--seconds", "0"]) == 0
    assert not (tmp_path / "sweep.csv").exists()
    assert command.main(some) == 0
    measured = sweep.measured(tmp_path / "sweep.csv")
    assert len(measured) > 1 and {len(runs) for runs in measured.values()} == {1}
    assert command.main([*some, "--resume"]) == 0
    assert sweep.measured(tmp_path / "sweep.csv") == measured
    middle = sorted(runs[0].ratio for runs in measured.values())[1]
    again = [*some[:-1], str(middle), "--again"]
    assert command.main(again) in (0, 1)
    found = sweep.measured(tmp_path / "sweep.csv")
    assert sorted(map(len, found.values())) == [1] * (len(found) - 1) + [2]
    capsys.readouterr()
    assert command.main([*some[:-1], "1e9", "--report"]) == 1
    listed = capsys.readouterr().out
    assert listed.count("x of eager  film") == len(found) and f"{len(found)} of {len(found)} cases" in listed


def test_covers_every_operator_from_one_row_up() -> None:
    found = {case.operator: case for _, case in reversed(list(sweep.cases(list(sweep.OPERATORS))))}
    assert found.keys() >= {
        "attention_pool",
        "bidirectional_attention",
        "bilinear",
        "bilinear_attention",
        "bilinear_attention_pool",
        "compact_bilinear",
        "cross_attention",
        "cross_attention_varlen",
        "factorized_pool",
        "film",
        "gated_residual",
        "linear",
        "low_rank_fusion",
        "masked_pool",
        "merge_tokens",
        "outer_product_fusion",
        "segment_pool",
        "select_tokens",
        "tensor_fusion",
        "weighted_sum",
    }
