"""`velm check` passes where the numbers are right, and fails where a backend's are not."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest
import torch

import velm_kernels
from velm_kernels import backends, cases
from velm_kernels.cli import main

SMALL = ["check", "--backend", "reference", "--operator", "gated_residual"]


def test_right_numbers_exit_with_0(capsys):
    assert main(SMALL) == 0
    assert "6 of 6 checks passed" in capsys.readouterr().out


def test_nothing_of_a_progress_bar_lands_in_a_pipe():
    done = subprocess.run([sys.executable, "-m", "velm_kernels", *SMALL], capture_output=True, check=False)
    assert done.returncode == 0
    assert done.stderr == b""
    assert done.stdout.splitlines()[0] == b"reference"
    assert b"\x1b" not in done.stdout


def breaking(name, change):
    """The reference implementation of ``name`` with ``change`` applied to its results."""
    original = backends._implementations[name]["reference"]
    return dataclasses.replace(original, call=lambda *args: change(original.call(*args)))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("gated_residual_forward", lambda out: out * 1.01),
        ("gated_residual_forward", lambda out: torch.full_like(out, torch.nan)),
        ("gated_residual_forward", lambda out: out + 1e-5 * torch.rand_like(out)),
        ("gated_residual_backward", lambda grads: (grads[0], grads[1] * 0.99)),
    ],
)
def test_wrong_numbers_exit_with_1(name, change, monkeypatch, capsys):
    monkeypatch.setitem(backends._implementations[name], "reference", breaking(name, change))
    assert main(SMALL) == 1
    assert "FAILED gated_residual" in capsys.readouterr().out


def test_exception_is_a_failure(monkeypatch, capsys):
    def broken(out):
        raise ZeroDivisionError("planted")

    name = "gated_residual_forward"
    monkeypatch.setitem(backends._implementations[name], "reference", breaking(name, broken))
    assert main(SMALL) == 1
    assert "planted" in capsys.readouterr().out


def test_reading_a_masked_row_is_a_failure(monkeypatch, capsys):
    name = "gated_residual_forward"
    original = backends._implementations[name]["reference"]

    def reads(residual, x, gate, row_mask):
        return original.call(residual, x, gate, row_mask) + 0 * x

    monkeypatch.setitem(backends._implementations[name], "reference", dataclasses.replace(original, call=reads))
    assert main(SMALL) == 1
    assert "FAILED" in capsys.readouterr().out


def test_unknown_operator_is_named(capsys):
    assert main(["check", "--operator", "nothing"]) == 2
    shown, said = capsys.readouterr()
    assert shown == ""
    assert "cross_attention" in said


def test_every_public_operator_has_a_check():
    covered = {case.operator for case in cases.every()}
    # Others are made of these.
    assert set(backends._public_functions) <= covered <= set(velm_kernels.__all__)
