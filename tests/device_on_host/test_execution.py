"""The execution model of csrc/device_on_host: what it computes, what it reports, and what sanitizers find in it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.device_on_host.building import MISSING, build, names_in, run
from velm_kernels.philox import philox4x32

pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")

PLAIN = names_in("test_threads", "test_memory", "test_matrix", "test_numbers", "planted_faults")
# AddressSanitizer guards the red zones itself, and ends the program.
ADDRESS = [
    name
    for name in names_in(
        "test_memory", "planted_faults", "test_fusion", "test_kernels", "test_pooling", "test_sequence"
    )
    if name != "fault_red_zones"
]
# Which thread comes first, and is named in a message, is up to the host there; the last three repeat other tests.
THREAD = [
    name
    for name in names_in(
        "test_threads",
        "test_memory",
        "test_matrix",
        "planted_faults",
        "test_fusion",
        "test_kernels",
        "test_pooling",
        "test_sequence",
    )
    if not name.startswith("fault_")
    and name not in ("runs_on_after_a_fault", "as_real_threads", "the_order_of_threads_does_not_matter")
]


@pytest.fixture(scope="module")
def plain() -> Path:
    return build("plain")


@pytest.fixture(scope="module")
def address() -> Path:
    return build("address")


@pytest.fixture(scope="module")
def thread() -> Path:
    return build("thread")


@pytest.mark.parametrize("name", PLAIN)
def test_model(plain: Path, name: str) -> None:
    done = run(plain, name)
    assert done.returncode == 0, done.stderr


def test_every_test_is_run(plain: Path) -> None:
    assert sorted(run(plain).stdout.split()) == sorted(PLAIN)


def test_under_address_sanitizer(address: Path) -> None:
    done = run(address, *ADDRESS)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", THREAD)
def test_under_thread_sanitizer(thread: Path, name: str) -> None:
    done = run(thread, name)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("global_overflow", "AddressSanitizer: heap-buffer-overflow"),
        ("shared_overflow", "AddressSanitizer: use-after-poison"),
        ("stack_overflow", "AddressSanitizer: stack-buffer-overflow"),
        ("shift", "runtime error: shift exponent 32"),
    ],
)
def test_planted_faults_that_address_and_undefined_behaviour_sanitizers_catch(
    address: Path, name: str, message: str
) -> None:
    done = run(address, f"planted_{name}")
    assert done.returncode != 0
    assert message in done.stderr


@pytest.mark.parametrize(
    "name", ["missing_barrier", "missing_syncwarp", "missing_second_barrier", "race_between_blocks"]
)
def test_planted_faults_that_thread_sanitizer_catches(thread: Path, name: str) -> None:
    done = run(thread, f"planted_{name}")
    assert done.returncode != 0
    assert "ThreadSanitizer: data race" in done.stderr


@pytest.mark.parametrize("seed", [0, 0x123456789ABCDEF0, 2**64 - 1])
def test_philox_is_that_of_the_library(plain: Path, seed: int) -> None:
    words = [int(word) for word in run(plain, "philox", PHILOX_SEED=str(seed)).stdout.split()]
    index = torch.arange(32)
    counter = ((index * 0x9E3779B9) & 0xFFFFFFFF, index, 0xFFFFFFFF - index, 0x80000000 + index)
    signed = seed - 2**64 if seed >= 2**63 else seed
    expected = torch.stack(philox4x32(torch.tensor(signed), counter), 1).flatten()
    assert words == expected.tolist()
