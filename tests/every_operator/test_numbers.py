"""Numbers of every operator, result and gradient, by the rule of ``velm_kernels/cases.py``.

Three dtypes, inputs of three magnitudes, small sizes and those at which work is divided; the same bits for any number
of threads.

More draws: ``VELM_TEST_DRAWS=20 python -m pytest tests/every_operator/test_numbers.py``.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Mapping

import pytest
import torch

from tests.conftest import EXPLORES, INTERPRETED, Backend, every_backend_with_cuda, every_cpu_backend
from tests.operators import CALLS, FOR_NUMBERS, IN_FLOAT32, Call
from velm_kernels import cases

DRAWS = int(os.environ.get("VELM_TEST_DRAWS", "1"))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# What CUDA does not have, by operator, or by operator and case: linear, and pixel_shuffle_tokens and patch_embed, which
# are made of it, losses, and what is listed below.
NOT_THERE = {"linear", "pixel_shuffle_tokens", "contrastive_loss", "linear_cross_entropy", "maxsim", "sigmoid_loss"}
NOT_THERE |= {
    "patch_embed",
    "maxsim_contrastive_loss",
    "mutual_information",
    "interpolated_embedding",
    "merge_patches",
    "pool_grid",
    "topk_similarity",
    "cross_attention-rel_pos",
}


def skip_what_is_not_there(backend: Backend, call: Call) -> None:
    if backend.name in ("cuda", "device_on_host") and {call.operator, str(call)} & NOT_THERE:
        pytest.skip("not on this backend")
    if backend.name in ("cuda", "device_on_host") and call.name == "wide heads":
        pytest.skip("not yet on this backend")


def faults(expected: cases.Expected, got: dict[str, torch.Tensor], where: str) -> list[str]:
    found = [
        f"{where}, {name}: error {error:.2g}, limit {limit:.2g}"
        for name, (error, limit) in expected.errors(got).items()
        if not error <= limit
    ]
    wide = expected.case.operator in IN_FLOAT32
    if got["output_0"].dtype != (torch.float32 if wide else expected.dtype):
        found.append(f"{where}: the result is {got['output_0'].dtype}")
    return found


def tried(call: Call) -> Iterator[tuple[torch.dtype, float, Mapping[str, int]]]:
    """Dtypes, magnitudes of the inputs, and other sizes than those of the case."""
    if INTERPRETED:
        # It is slow, and its tiles are of 16.
        yield torch.float32, 1.0, call.crossing
        yield torch.bfloat16, 1.0, {}
        yield torch.float16, 1.0 if call.numbers_only else 3.0, {}
        if not call.numbers_only:
            yield torch.float32, 0.1, {}
        return
    for dtype in DTYPES:
        for magnitude in (1.0,) if call.numbers_only else (0.1, 1.0, 3.0):
            yield dtype, magnitude, {}


@functools.cache
def small(
    call: Call, dtype: torch.dtype, magnitude: float, sizes: tuple[tuple[str, int], ...], seed: int, device: str
) -> cases.Expected:
    """What is expected on all backends of ``device``, where tensors are made."""
    arguments = call.scaled_by(call.arguments(dtype, seed=seed, **dict(sizes)), magnitude)
    return cases.expected(call, arguments, dtype, seed)


@pytest.mark.quick
@pytest.mark.parametrize("call", FOR_NUMBERS, ids=str)
@every_backend_with_cuda
def test_numbers(backend: Backend, call: Call) -> None:
    skip_what_is_not_there(backend, call)
    found = []
    for seed in range(DRAWS):
        for dtype, magnitude, sizes in tried(call):
            expected = small(call, dtype, magnitude, tuple(sizes.items()), seed, backend.device)
            with backend.use():
                got = call.run(expected.arguments)
            found += faults(expected, got, f"{dtype}, size {magnitude}, draw {seed}")
    assert not found, "\n".join(found)


@functools.cache
def larger(call: Call, dtype: torch.dtype) -> cases.Expected:
    return cases.expected(call, call.larger_arguments(dtype), dtype)


@pytest.mark.parametrize("call", FOR_NUMBERS, ids=str)
@every_cpu_backend
def test_work_that_is_divided(backend: Backend, call: Call) -> None:
    """Among tiles, blocks and threads: numbers, what may not be read, and the same bits however many threads share it.

    ``velm check`` runs the same sizes in every dtype, on every backend.
    """
    expected = larger(call, torch.float32)
    given, runs = call.poisoned(expected.arguments), []
    for threads in (1, 2, 3) if EXPLORES else (1, 3):
        torch.set_num_threads(threads)
        with backend.use():
            runs.append(call.run(given))
    assert not (found := faults(expected, runs[0], "one thread")), "\n".join(found)
    for other in runs[1:]:
        assert all(torch.equal(value, other[name]) for name, value in runs[0].items())


@pytest.mark.parametrize("call", [call for call in FOR_NUMBERS if call.unread], ids=str)
@every_backend_with_cuda
def test_what_may_not_be_read_changes_no_bit(backend: Backend, call: Call) -> None:
    skip_what_is_not_there(backend, call)
    for dtype in (torch.float32, torch.bfloat16):
        arguments = call.arguments(dtype)
        with backend.use():
            clean, got = call.run(arguments), call.run(call.poisoned(arguments))
        for name, value in clean.items():
            assert torch.equal(got[name], value), (dtype, name)


@pytest.mark.parametrize("call", CALLS, ids=str)
@every_backend_with_cuda
def test_one_gradient_alone(backend: Backend, call: Call) -> None:
    """What is wanted is what it is beside the others; of the others there is none."""
    skip_what_is_not_there(backend, call)
    arguments = call.arguments()
    names = call.leaf_names(arguments)
    with backend.use():
        everything = call.run(arguments)
        for place, name in enumerate(names):
            leaves = [leaf.detach().clone() for leaf in call.leaves(arguments)]
            leaves[place].requires_grad_()
            outs = cases.results(call.function(**call.with_leaves(arguments, leaves)))
            upstream = [weights for out, weights in zip(outs, cases.incoming(outs), strict=True) if out.requires_grad]
            torch.autograd.backward([out for out in outs if out.requires_grad], upstream)
            assert [leaf.grad is not None for leaf in leaves] == [other == name for other in names]
            torch.testing.assert_close(
                leaves[place].grad, everything[name], msg=lambda text, name=name: f"{name}: {text}"
            )
