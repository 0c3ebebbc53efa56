"""What every operator promises about tensors, whatever it computes: without values, without elements, in any layout,
changed in place."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from tests.conftest import Backend, every_backend_once
from tests.modules import MODULES, ModuleCall, call_module
from tests.operators import CALLS, Arguments, Call, differentiable_results, results
from velm_kernels.backends import NoBackendError

every_call = pytest.mark.parametrize("call", CALLS, ids=str)


@contextlib.contextmanager
def on(backend: Backend) -> Iterator[None]:
    """Operators inside run on the backend; one that it does not have is skipped."""
    try:
        with backend.use():
            yield
    except NoBackendError as error:
        if "has no" not in str(error):
            raise
        pytest.skip(str(error))


def forward_and_backward(call: Call, arguments: Arguments) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The results, and the gradients of their sums: incoming gradients with strides of 0."""
    found = results(call.function(**arguments))
    sums = [result.sum() for result in found if result.requires_grad]
    return found, torch.autograd.grad(sums, call.leaves(arguments)) if sums else ()


def looks(tensors: tuple[Tensor, ...]) -> list[tuple[object, ...]]:
    return [(tuple(tensor.shape), tensor.dtype, tensor.stride(), tensor.requires_grad) for tensor in tensors]


@every_call
@pytest.mark.parametrize("how", ["meta", "fake", "flops"])
def test_tensors_without_values_give_results_and_gradients_that_look_the_same(call: Call, how: str) -> None:
    wanted = [looks(tensors) for tensors in forward_and_backward(call, call.requiring_gradients(call.arguments()))]
    if how == "fake":
        with FakeTensorMode() as mode:
            fake: Arguments = tree_map_only(Tensor, mode.from_tensor, call.arguments())
            got = forward_and_backward(call, call.requiring_gradients(fake))
    else:
        counter = FlopCounterMode(display=False) if how == "flops" else contextlib.nullcontext()
        with counter:
            got = forward_and_backward(call, call.requiring_gradients(call.arguments(device="meta")))
    assert [looks(tensors) for tensors in got] == wanted


@pytest.mark.parametrize("call", MODULES, ids=str)
def test_modules_without_values(call: ModuleCall) -> None:
    """As accelerate's init_empty_weights and torchinfo run them."""
    real = call.module()
    with torch.device("meta"):
        module = call.module()
    assert {name: (p.shape, p.dtype) for name, p in module.state_dict().items()} == {
        name: (p.shape, p.dtype) for name, p in real.state_dict().items()
    }
    arguments = call.arguments()
    meta = tree_map_only(Tensor, lambda x: x.to("meta"), arguments)
    found = []
    for of, given in ((real, arguments), (module, meta)):
        outs = results(call_module(of, given))
        grads = []
        if parameters := list(of.parameters()):
            sums = [out.sum() for out in outs if out.requires_grad]
            grads = [g for g in torch.autograd.grad(sums, parameters, allow_unused=True) if g is not None]
        found.append((looks(outs), looks(tuple(grads))))
    assert found[1] == found[0]


@every_call
@every_backend_once
def test_any_size_may_be_0(call: Call, backend: Backend) -> None:
    for name in call.sizes:
        if name in call.not_zero:
            continue
        arguments = call.requiring_gradients(call.arguments(**{name: 0}))
        exact_arguments = call.requiring_gradients(call.arguments(torch.float64, **{name: 0}))
        exact = call.exact(exact_arguments)
        with on(backend):
            got = results(call.function(**arguments))
            for result, want in zip(got, exact, strict=True):
                torch.testing.assert_close(
                    result.double(), want.double(), rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
                )
            differentiable = [result.requires_grad for result in got]
            leaves, exact_leaves = call.leaves(arguments), call.leaves(exact_arguments)
            grads = torch.autograd.grad([result.sum() for result in differentiable_results(got)], leaves)
        sums = [want.sum() for want, has_gradient in zip(exact, differentiable, strict=True) if has_gradient]
        wanted = torch.autograd.grad(sums, exact_leaves, allow_unused=True)
        for grad, want, leaf in zip(grads, wanted, leaves, strict=True):
            want = leaf.new_zeros(leaf.shape).double() if want is None else want
            torch.testing.assert_close(
                grad.double(), want, rtol=1e-4, atol=1e-4, msg=lambda text, name=name: f"gradient, {name}: {text}"
            )


def spread(x: Tensor) -> Tensor:
    """The values of ``x`` in every second place of a row, with NaN between them."""
    if x.dim() == 0:
        return x
    filler = torch.full_like(x, torch.nan) if x.is_floating_point() else torch.zeros_like(x)
    return torch.stack([x, filler], -1).flatten(-2)[..., ::2]


def turned(x: Tensor) -> Tensor:
    """The values of ``x`` with its dimensions in memory the other way round."""
    order = tuple(reversed(range(x.dim())))
    return x.permute(order).contiguous().permute(order)


def shifted(x: Tensor) -> Tensor:
    """The values of ``x`` one element behind the beginning of their memory, with rows one element apart."""
    if x.dim() == 0:
        return x
    filler = torch.full_like(x[..., :1], torch.nan) if x.is_floating_point() else torch.zeros_like(x[..., :1])
    return torch.cat([filler, x], -1)[..., 1:]


def first_everywhere(x: Tensor) -> Tensor:
    """The first entry of ``x``, expanded over the others."""
    return x if x.dim() == 0 else x[:1].expand(x.shape)


LAYOUTS = [spread, turned, shifted, first_everywhere]


@every_call
@every_backend_once
def test_arguments_of_any_layout(call: Call, backend: Backend) -> None:
    for layout in LAYOUTS:
        arguments = call.arguments()
        other = tree_map_only(Tensor, layout, arguments)
        if layout is first_everywhere:
            # Only where it may change values without changing what is valid.
            other = call.with_leaves(arguments, [layout(leaf) for leaf in call.leaves(arguments)])
            arguments = tree_map_only(Tensor, lambda x: x.clone(memory_format=torch.contiguous_format), other)
        with on(backend):
            found = []
            for given in (arguments, other):
                leaves = [leaf.detach().requires_grad_() for leaf in call.leaves(given)]
                found.append(forward_and_backward(call, call.with_leaves(given, leaves)))
        for kind, wants, gots in zip(("result", "gradient"), *found, strict=True):
            for want, got in zip(wants, gots, strict=True):
                torch.testing.assert_close(
                    got, want, rtol=1e-5, atol=1e-5, msg=lambda text, at=(kind, layout.__name__): f"{at}: {text}"
                )


@every_call
@every_backend_once
def test_one_argument_of_another_layout(call: Call, backend: Backend) -> None:
    """Each is read by its own strides, and none faster than the one that does not lie on whole vectors allows."""
    arguments = call.arguments()
    leaves = call.leaves(arguments)
    with on(backend):
        wants = forward_and_backward(call, call.requiring_gradients(arguments))
        for place, name in enumerate(call.leaf_names(arguments)):
            given = [shifted(leaf) if n == place else leaf for n, leaf in enumerate(leaves)]
            given = [leaf.detach().requires_grad_() for leaf in given]
            gots = forward_and_backward(call, call.with_leaves(arguments, given))
            for kind, want, got in zip(("result", "gradient"), wants, gots, strict=True):
                torch.testing.assert_close(
                    got, want, rtol=1e-5, atol=1e-5, msg=lambda text, at=(kind, name): f"{at}: {text}"
                )


@every_call
@every_backend_once
def test_gradients_of_any_layout(call: Call, backend: Backend) -> None:
    with on(backend):
        arguments = call.requiring_gradients(call.arguments())
        outs = differentiable_results(call.function(**arguments))
        leaves = call.leaves(arguments)
        generator = torch.Generator().manual_seed(1)
        plain = [torch.randn(out.shape, generator=generator, dtype=out.dtype) for out in outs]
        given = [(layout.__name__, plain, [layout(grad) for grad in plain]) for layout in LAYOUTS[:3]]
        expanded = [first_everywhere(grad) for grad in plain]
        given.append(("expanded", [grad.contiguous() for grad in expanded], expanded))
        given.append(("float64", plain, [grad.double() for grad in plain]))
        for name, grads, others in given:
            want, got = (torch.autograd.grad(outs, leaves, of, retain_graph=True) for of in (grads, others))
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
        # One result at a time: the others have no gradient, or zeros.
        for n, out in enumerate(outs):
            alone = torch.autograd.grad(out, leaves, plain[n], retain_graph=True, allow_unused=True)
            zeros = [grad if m == n else torch.zeros_like(grad) for m, grad in enumerate(plain)]
            together = torch.autograd.grad(outs, leaves, zeros, retain_graph=True)
            for got, want in zip(alone, together, strict=True):
                torch.testing.assert_close(torch.zeros_like(want) if got is None else got, want)


# Their backward reads the result, as that of torch's scaled_dot_product_attention, softmax and logsumexp does: torch
# then says so instead of computing a wrong gradient.
READ_BY_BACKWARD = {
    ("cross_attention", 0),
    ("cross_attention", 1),
    ("cross_attention_varlen", 0),
    ("bidirectional_attention", 0),
    ("bidirectional_attention", 1),
    ("bidirectional_attention", 2),
    ("bidirectional_attention", 3),
    ("merge_attention", 1),
    ("bilinear_attention", 0),
}


@every_call
@every_backend_once
@pytest.mark.parametrize("change", ["add_", "mul_", "relu_"])
def test_results_may_be_changed_in_place(call: Call, backend: Backend, change: str) -> None:
    operand = () if change == "relu_" else (2.0,)
    with on(backend):
        count = len(differentiable_results(call.function(**call.requiring_gradients(call.arguments()))))
        for n in range(count):
            arguments = call.requiring_gradients(call.arguments())
            leaves = call.leaves(arguments)
            out = differentiable_results(call.function(**arguments))[n]
            changed = getattr(out.clone(), change)(*operand)
            wanted = torch.autograd.grad(changed.sum(), leaves, retain_graph=True, allow_unused=True)
            in_place = getattr(out, change)(*operand)
            torch.testing.assert_close(in_place, changed)
            if (call.operator, n) in READ_BY_BACKWARD:
                with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                    torch.autograd.grad(in_place.sum(), leaves, allow_unused=True)
            else:
                got = torch.autograd.grad(in_place.sum(), leaves, allow_unused=True)
                torch.testing.assert_close(got, wanted)
