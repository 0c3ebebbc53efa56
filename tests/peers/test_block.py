"""The fusions of block-bootstrap-pytorch beside ours, with the same weights."""

from __future__ import annotations

import pytest
import torch

import velm_kernels
from benchmarks.peers import block_fusions
from tests.numbers import assert_accurate


@pytest.fixture(scope="module")
def peers():
    return block_fusions() or pytest.skip("block.bootstrap.pytorch is not installed")


DIMS, OUT = [7, 9], 5
SMOOTH = {"activ_input": "tanh", "activ_output": "softplus"}
OPTIONS = {
    "LinearSum": [{}, {"mm_dim": 12, "normalize": True, **SMOOTH}, {"activ_input": "", "activ_output": None}],
    "ConcatMLP": [{}, {"dimensions": [6], "activation": "tanh"}],
    "MLB": [{}, {"mm_dim": 12, "normalize": True, **SMOOTH}, {"activ_input": None, "activ_output": ""}],
    "MFB": [{}, {"mm_dim": 12, "factor": 5, "normalize": True, **SMOOTH}],
    "MFH": [{}, {"mm_dim": 12, "factor": 3, "normalize": True, **SMOOTH}],
    "Mutan": [{"mm_dim": 12}, {"mm_dim": 12, "rank": 3, "normalize": True}, {"mm_dim": 12, "shared": True}],
    "Tucker": [{"mm_dim": 12}, {"mm_dim": 12, "normalize": True, "shared": True}],
    "BlockTucker": [{"mm_dim": 22, "chunks": 4}, {"mm_dim": 13, "chunks": 5, "pos_norm": "after_cat"}],
    "Block": [
        {"mm_dim": 22, "chunks": 4},
        {"mm_dim": 12, "chunks": 5, "rank": 3, "pos_norm": "after_cat"},
        # The last of equal chunks would have fewer than no features, or none.
        {"mm_dim": 13, "chunks": 8, "rank": 2},
        {"mm_dim": 10, "chunks": 6, "rank": 2, "shared": True},
    ],
}
CASES = [(kind, options) for kind, variants in OPTIONS.items() for options in variants]
every_case = pytest.mark.parametrize(("kind", "options"), CASES, ids=lambda value: str(value))


def _pair(peers, kind, options):
    dims = [9, 9] if options.get("shared") else DIMS
    torch.manual_seed(0)
    peer = getattr(peers, kind)(dims, OUT, **options)
    module = getattr(velm_kernels, kind)(dims, OUT, **options)
    module.load_state_dict(peer.state_dict(), strict=True)
    return peer, module, [torch.randn(6, dims[0]), torch.randn(6, dims[1])]


def _results(module, x, dtype):
    """The result, and the gradients of the inputs and of every weight that took part."""
    module = module.to(dtype)
    x = [value.to(dtype).requires_grad_() for value in x]
    out = module(list(x))
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    weights = dict(module.named_parameters())
    grads = torch.autograd.grad(out, [*x, *weights.values()], grad)
    return dict(zip(["out", "x0", "x1", *weights], [out.detach(), *grads], strict=True))


@every_case
def test_results_and_gradients_are_those_of_the_peer(peers, kind, options):
    peer, module, x = _pair(peers, kind, options)
    plain, got = _results(peer, x, torch.float32), _results(module, x, torch.float32)
    exact, got_exact = _results(peer, x, torch.float64), _results(module, x, torch.float64)
    assert plain.keys() == got.keys()
    for name, expected in exact.items():
        floor = float(expected.numel()) ** 0.5
        torch.testing.assert_close(got_exact[name], expected, msg=lambda text, name=name: f"{name}: {text}")
        assert_accurate(name, got[name], plain[name], expected, torch.float32, ulps=16, floor=floor)


@every_case
def test_regions_are_rows(peers, kind, options):
    """What the peer gives for every row, also where it fails for regions or normalises another dimension."""
    peer, module, _ = _pair(peers, kind, options)
    peer, module = peer.double(), module.double()
    dims = module.input_dims
    questions, regions = torch.randn(3, dims[0]).double(), torch.randn(3, 4, dims[1]).double()
    rows = [questions.repeat_interleave(4, 0), regions.flatten(0, 1)]
    expected = peer(rows).view(3, 4, OUT)
    torch.testing.assert_close(module([questions, regions]), expected)
    if dims[0] == dims[1]:
        swapped = peer(rows[::-1]).view(3, 4, OUT)
        torch.testing.assert_close(module([regions, questions]), swapped)
