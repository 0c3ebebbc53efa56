"""docs/figures.md and the table of README.md are what the stored results say."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from benchmarks import figures


def test_the_documents_are_what_the_command_writes() -> None:
    found = figures.runs()
    assert figures.PAGE.read_text() == figures.page(found), "run python -m benchmarks figures"
    text = figures.README.read_text()
    assert text == figures.with_table(text, figures.telling(found)), "run python -m benchmarks figures"


def test_every_telling_case_is_shown_once() -> None:
    shown = figures.telling(figures.runs())
    for name in figures.TELLING.values():
        assert shown.count(f"| {name} (") == 1


def _stored(folder: Path, date: str, rows: list[tuple[str, str, str, str]]) -> None:
    folder.mkdir(parents=True)
    told = {"title": date, "date": date, "machine": "a machine", "torch": "2.13", "commands": ["a command"]}
    (folder / figures.RUN).write_text(json.dumps(told))
    with (folder / figures.BENCH).open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["family", "case", "shape", "dtype", "direction", "way", "median_ms"])
        writer.writerows(["fusion", case, "s", "float32", *rest] for case, *rest in rows)


def test_the_speed_up_is_over_the_best_other_way_and_the_newest_run_is_shown(tmp_path: Path) -> None:
    old = [("ban", "fwd", "eager", "9"), ("ban", "fwd", "velm", "1"), ("ban", "fwd+bwd", "eager", "9")]
    _stored(tmp_path / "a", "2026-01-01", [*old, ("ban", "fwd+bwd", "velm", "1")])
    new = [("ban", way, name, ms) for way in ("fwd", "fwd+bwd") for name, ms in (("eager", "8"), ("velm", "4"))]
    # The second measurement of a way counts, and one that was measured alone is not shown.
    new += [("ban", "fwd", "sdpa", "6"), ("ban", "fwd", "velm", "12"), ("alone", "fwd", "velm", "1")]
    _stored(tmp_path / "b", "2026-02-01", new)
    found = figures.runs(tmp_path)
    assert [run.date for run in found] == ["2026-02-01", "2026-01-01"]
    by_direction = {line.direction: line for line in figures.lines(found[0].rows)}
    assert by_direction["fwd"].best_other == "sdpa" and by_direction["fwd"].speedup == 0.5
    assert by_direction["fwd+bwd"].best_other == "eager" and by_direction["fwd+bwd"].speedup == 2
    assert "| 8.0 | 8.0 (eager) | 4.0 | 2.0x | 0.50x |" in figures.telling(found)
    assert "alone" not in figures.page(found)


def test_a_folder_without_figures_is_an_error(tmp_path: Path) -> None:
    _stored(tmp_path / "a", "2026-01-01", [])
    with pytest.raises(ValueError, match="has a row"):
        figures.runs(tmp_path)


@pytest.mark.parametrize(("value", "told"), [(0.649, "0.65x"), (1.04, "1.0x"), (13.2, "13x"), (273.4, "273x")])
def test_ratios_have_two_digits(value: float, told: str) -> None:
    assert figures.ratio(value) == told
