"""``use_backend`` and ``use_isa`` are for the thread or task that calls them, also under torch.compile."""

from __future__ import annotations

import asyncio
import contextlib
import threading

import pytest
import torch

import velm_kernels
from velm_kernels import backends, products
from velm_kernels.backends import cpu


def seen_by_another_thread(ask) -> object:
    found = []
    thread = threading.Thread(target=lambda: found.append(ask()))
    thread.start()
    thread.join()
    return found[0]


@pytest.mark.parametrize(
    ("use", "ask", "inside"),
    [
        (lambda: velm_kernels.use_backend("reference"), backends.forced, "reference"),
        (lambda: cpu.use_isa(str(cpu.in_use())), cpu._asked_for.get, cpu.in_use()),
        (lambda: products.use_product("torch"), products.forced_product, "torch"),
    ],
    ids=["use_backend", "use_isa", "use_product"],
)
@pytest.mark.skipif(cpu.in_use() is None, reason="no CPU library")
def test_other_threads_choose_for_themselves(use, ask, inside) -> None:
    outside = ask()
    with use():
        assert ask() == inside
        assert seen_by_another_thread(ask) == outside
        with pytest.raises(ZeroDivisionError), use():
            raise ZeroDivisionError
        assert ask() == inside
    assert ask() == outside


def test_two_threads_at_a_time() -> None:
    """Each enters and leaves while the other is inside: a stack for all of them would end in disorder."""
    turns = threading.Barrier(2, timeout=30)
    seen: dict[str, list[str]] = {"reference": [], "cpu": []}

    def work(name: str) -> None:
        for _ in range(3):
            turns.wait()
            with velm_kernels.use_backend(name):
                turns.wait()
                seen[name].append(backends.forced())
                turns.wait()
                if name == "cpu":
                    turns.wait()
            if name == "reference":
                turns.wait()
            seen[name].append(backends.forced())

    threads = [threading.Thread(target=work, args=(name,)) for name in seen]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    before = backends.forced()
    assert seen == {name: [name, before] * 3 for name in seen}


def test_tasks_choose_for_themselves() -> None:
    async def work(name: str) -> list[str]:
        with velm_kernels.use_backend(name):
            await asyncio.sleep(0)
            first = backends.forced()
            await asyncio.sleep(0)
            return [first, backends.forced()]

    async def both() -> list[list[str]]:
        return await asyncio.gather(work("reference"), work("cpu"))

    assert asyncio.run(both()) == [["reference"] * 2, ["cpu"] * 2]


@pytest.mark.skipif(cpu.in_use() is None, reason="no CPU library")
def test_a_compiled_function_follows_the_choice_of_its_caller(monkeypatch) -> None:
    ran: list[str] = []
    original = backends.run

    def run(operator, values, wanted="", *rest):
        ran.append(wanted)
        return original(operator, values, wanted, *rest)

    monkeypatch.setattr(backends, "run", run)

    def f(x: torch.Tensor) -> torch.Tensor:
        return velm_kernels.gated_residual(x, x, torch.ones(1))

    def inside(x: torch.Tensor) -> torch.Tensor:
        with velm_kernels.use_backend("reference"):
            return velm_kernels.gated_residual(x, x, torch.ones(1))

    torch._dynamo.reset()
    compiled = torch.compile(f, backend="eager", fullgraph=True)
    x = torch.ones(2, 3, 4)
    for name in ("", "reference", "cpu", "reference", ""):
        with velm_kernels.use_backend(name) if name else contextlib.nullcontext():
            compiled(x)
    asked = backends.forced()
    assert ran == [asked, "reference", "cpu", "reference", asked]
    ran.clear()
    torch.compile(inside, backend="eager", fullgraph=True)(x)
    assert ran == ["reference"]
    assert backends.forced() == asked
