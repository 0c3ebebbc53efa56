"""Cross-attention inside torch: opcheck, compile, export, autocast, checkpointing, memory saved, flop counter."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import velm_kernels
from tests.attention.cases import Case
from tests.conftest import Backend, every_backend_once
from velm_kernels.attention.cross_attention import canonical
from velm_kernels.attention.cross_attention_varlen import canonical as canonical_varlen

FULL = Case(
    group=2, bias_shape=(False, True, True, True), masks=frozenset({"key_lengths", "key_ranges"}), norms=(True, True),
    dropout_p=0.2, softcap=5.0, poison=False, value_dim=6,
)  # fmt: skip


def leaves(case: Case) -> dict[str, torch.Tensor]:
    tensors = case.tensors()
    if "bias" in tensors:
        tensors["bias"] = tensors["bias"].masked_fill(tensors["bias"].isinf(), 0.0)
    return {name: tensor.requires_grad_() for name, tensor in tensors.items()}


@every_backend_once
def test_opcheck(backend: Backend) -> None:
    dtype = torch.bfloat16
    case = Case(**{**FULL.__dict__, "dtype": dtype})
    arguments = canonical(**leaves(case), **case.masking(), **case.settings(), seed=3, return_key_mass=True)
    plain = canonical(**leaves(Case(dtype=dtype)))
    packed = canonical_varlen(
        *(torch.randn(5, 2, 8, requires_grad=True) for _ in range(3)), torch.tensor([0, 2, 5]), torch.tensor([0, 5, 5])
    )
    with backend.use():
        for given in (arguments, plain, packed):
            torch.library.opcheck(torch.ops.velm.attention_forward.default, (*given.values(), backend.name))


@every_backend_once
def test_compile_and_checkpoint_give_the_eager_gradients(backend: Backend) -> None:
    masking = FULL.masking()

    def function(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        out, logsumexp, key_mass = velm_kernels.cross_attention(
            **tensors, **masking, **FULL.settings(), seed=5, return_logsumexp=True, return_key_mass=True
        )
        return out.square().sum() + torch.where(logsumexp.isinf(), 0, logsumexp).sum() + key_mass.sum()

    def gradients(function: Any) -> list[torch.Tensor]:
        tensors = leaves(FULL)
        return list(torch.autograd.grad(function(tensors), list(tensors.values())))

    with backend.use():
        eager = gradients(function)
        for other in (
            torch.compile(function, fullgraph=True, backend="aot_eager"),
            lambda tensors: checkpoint(function, tensors, use_reentrant=False),
        ):
            for ours, theirs in zip(gradients(other), eager, strict=True):
                assert torch.equal(ours, theirs)


@every_backend_once
def test_dropout_without_a_seed_draws_one_from_torch(backend: Backend) -> None:
    case = Case(queries=20, keys=30)
    with backend.use():
        torch.manual_seed(7)
        first = velm_kernels.cross_attention(**case.tensors(), dropout_p=0.5)
        other = velm_kernels.cross_attention(**case.tensors(), dropout_p=0.5)
        torch.manual_seed(7)
        again = velm_kernels.cross_attention(**case.tensors(), dropout_p=0.5)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@every_backend_once
def test_checkpoint_redraws_the_same_dropout(backend: Backend) -> None:
    def function(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return velm_kernels.cross_attention(query, key, value, dropout_p=0.5).square().sum()

    grads = []
    with backend.use():
        for call in (function, lambda *tensors: checkpoint(function, *tensors, use_reentrant=False)):
            torch.manual_seed(3)
            tensors = list(leaves(Case()).values())
            grads.append(torch.autograd.grad(call(*tensors), tensors))
    for ours, theirs in zip(*grads, strict=True):
        assert torch.equal(ours, theirs)


def test_export() -> None:
    class Model(torch.nn.Module):
        def forward(self, query: torch.Tensor, key: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
            return velm_kernels.cross_attention(query, key, key, key_lengths=lengths)

    inputs = (torch.randn(2, 2, 5, 8), torch.randn(2, 2, 7, 8), torch.tensor([3, 7]))
    program = torch.export.export(Model(), inputs)
    assert "velm.attention_forward" in program.graph_module.code
    assert torch.equal(program.module()(*inputs), Model()(*inputs))


@every_backend_once
def test_saves_inputs_output_and_one_float_a_row(backend: Backend) -> None:
    case = Case(queries=31, keys=65, head_dim=16, value_dim=16, bias_shape=(True, True, True, True), norms=(True, True))
    tensors = leaves(case)
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with backend.use(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = velm_kernels.cross_attention(**tensors)
    rows = case.batch * case.heads * case.queries
    expected = sum(t.untyped_storage().nbytes() for t in tensors.values()) + out.nbytes + 4 * rows
    assert sum(saved.values()) <= expected


def test_flops() -> None:
    tensors = leaves(Case(queries=5, keys=7, head_dim=8, value_dim=6))
    with FlopCounterMode(display=False) as counter:
        velm_kernels.cross_attention(**tensors).sum().backward()
    pairs = 2 * 2 * 5 * 7
    assert counter.get_total_flops() == 2 * pairs * (8 + 6) + 2 * pairs * (3 * 8 + 2 * 6)
