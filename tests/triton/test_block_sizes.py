"""The choice of block sizes: the table, and autotuning with a stopwatch that needs no GPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from velm_kernels.backends import triton as backend
from velm_kernels.backends.triton import Config


@pytest.fixture
def tuning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("VELM_AUTOTUNE", "1")
    monkeypatch.setenv("VELM_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(backend, "_tuned", {})
    monkeypatch.setattr(backend, "architecture", lambda device: 80)
    return tmp_path


def choose(runs: list[Config], shape: tuple[int, ...] = (8, 12, 500, 500), variant: str = "causal") -> Config:
    return backend.choose(
        "forward", "plain", torch.float16, 64, torch.device("cpu"), shape, variant, lambda config: runs.append(config)
    )


def stopwatch(fastest: Config, seen: list[Config]) -> Callable[[Config, Callable[[], None]], float]:
    def measure(config: Config, run: Callable[[], None]) -> float:
        seen.append(config)
        run()
        return 1.0 if config == fastest else 2.0

    return measure


def test_the_table_is_used_without_a_stopwatch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VELM_AUTOTUNE", raising=False)
    monkeypatch.setattr(backend, "architecture", lambda device: 80)
    runs: list[Config] = []
    assert choose(runs) == backend.default_config("forward", "plain", torch.float16, 64, torch.device("cpu"))
    assert runs == []


def test_the_fastest_is_kept_on_disk(tuning: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    default = backend.default_config("forward", "plain", torch.float16, 64, torch.device("cpu"))
    tried = backend.candidates(default, torch.float16)
    assert tried[0] == default and len(tried) == len(set(tried)) > 4
    wanted, seen, runs = tried[3], list[Config](), list[Config]()
    monkeypatch.setattr(backend, "measure", stopwatch(wanted, seen))
    assert choose(runs) == wanted
    assert set(seen) == set(runs) == set(tried)
    assert len(list((tuning / "autotune").glob("*.json"))) == 1

    # The same class of shapes is not timed again, neither in this process nor in the next one.
    seen.clear()
    assert choose(runs, (8, 12, 512, 400)) == wanted
    monkeypatch.setattr(backend, "_tuned", {})
    assert choose(runs) == wanted
    assert seen == []
    # Another class, or another variant of the kernel, is.
    choose(runs, (8, 12, 5000, 500))
    choose(runs, variant="")
    assert len(seen) == 2 * len(tried)


def test_products_of_float32_stay_short() -> None:
    from velm_kernels.triton.kernels import LONGEST_CHAIN

    for config in backend.candidates(Config(64, 64, 4, 1), torch.float32):
        assert max(config.block_m, config.block_n) <= LONGEST_CHAIN.value
    assert any(config.block_n == 128 for config in backend.candidates(Config(64, 64, 4, 1), torch.float16))


def test_a_damaged_file_is_tuned_again(tuning: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = backend.candidates(
        backend.default_config("forward", "plain", torch.float16, 64, torch.device("cpu")), torch.float16
    )[2]
    seen: list[Config] = []
    monkeypatch.setattr(backend, "measure", stopwatch(wanted, seen))
    choose([])
    (path,) = (tuning / "autotune").glob("*.json")
    path.write_text("{")
    monkeypatch.setattr(backend, "_tuned", {})
    seen.clear()
    assert choose([]) == wanted and seen


def test_every_kernel_has_an_entry_for_every_architecture() -> None:
    for kind, level in backend.TABLE:
        for dtype in backend.DTYPES:
            for head_dim in (1, 16, 17, 64, 80, 128, 200, 256, 320, 512):
                for arch in (80, 90, 100, 120):
                    config = backend._lookup(kind, level, dtype, head_dim, arch)
                    for size in (config.block_m, config.block_n):
                        assert size >= 16 and size & (size - 1) == 0
                    assert config.num_warps in (4, 8)


@pytest.mark.parametrize("arch", [0, 80, 90, 100, 120])
def test_wide_rows_of_16_bits_are_refused_where_they_have_no_blocks(arch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "architecture", lambda device: arch)
    for dtype in backend.DTYPES:
        for columns in (256, 257):
            rows = {"query": torch.empty(1, 1, 1, 8, dtype=dtype), "value": torch.empty(1, 1, 1, columns, dtype=dtype)}
            refused = bool(backend.too_wide(rows, "query", "value"))
            assert refused == (columns == 257 and dtype != torch.float32 and arch in (90, 100, 120))
