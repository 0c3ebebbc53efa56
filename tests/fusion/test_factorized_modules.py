from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from velm_kernels.fusion import MFB, MLB

SIZES = {"input_dims": [7, 9], "output_dim": 5, "mm_dim": 12}


def _published(module, x):
    """The published forward, on rows, without dropout."""
    a, b = (layer(value) for layer, value in zip((module.linear0, module.linear1), x, strict=True))
    if module.activ_input:
        a, b = getattr(F, module.activ_input)(a), getattr(F, module.activ_input)(b)
    z = (a * b).view(len(a), module.mm_dim, module.factor).sum(2)
    if module.normalize:
        z = torch.sqrt(F.relu(z)) - torch.sqrt(F.relu(-z))
        z = F.normalize(z, p=2)
    z = module.linear_out(z)
    return getattr(F, module.activ_output)(z) if module.activ_output else z


@pytest.mark.parametrize("kind", [MLB, MFB])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("activation", [None, "tanh", "softplus"])
def test_equals_the_published_form(kind, normalize, activation):
    torch.manual_seed(0)
    module = kind(**SIZES, activ_input=activation, activ_output=activation, normalize=normalize).double()
    x = [torch.randn(4, 7).double().requires_grad_(), torch.randn(4, 9).double().requires_grad_()]
    leaves = [*x, *module.parameters()]
    got, expected = module(x), _published(module, x)
    torch.testing.assert_close(got, expected)
    grad = torch.randn_like(got)
    for a, b in zip(torch.autograd.grad(got, leaves, grad), torch.autograd.grad(expected, leaves, grad), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("kind", "factor"), [(MLB, 1), (MFB, 2)])
def test_names_and_shapes_of_weights(kind, factor):
    wide = 12 * factor
    shapes = {name: tuple(value.shape) for name, value in kind(**SIZES).state_dict().items()}
    assert shapes == {
        "linear0.weight": (wide, 7),
        "linear0.bias": (wide,),
        "linear1.weight": (wide, 9),
        "linear1.bias": (wide,),
        "linear_out.weight": (5, 12),
        "linear_out.bias": (5,),
    }


def test_question_beside_regions():
    module = MFB(**SIZES, normalize=True, activ_input="tanh")
    question, regions = torch.randn(3, 7), torch.randn(3, 4, 9)
    out = module([question, regions])
    rows = module([question[:, None].expand(3, 4, 7).reshape(12, 7), regions.reshape(12, 9)])
    torch.testing.assert_close(out, rows.view(3, 4, 5))


def test_gradients_where_relu_leaves_nothing():
    torch.manual_seed(0)
    x = [torch.randn(20, 7), torch.randn(20, 9)]
    for kind in (MLB, MFB):
        module = kind(**SIZES, normalize=True)
        module(x).sum().backward()
        assert all(parameter.grad.isfinite().all() for parameter in module.parameters())
        grads = {name: parameter.grad.clone() for name, parameter in module.named_parameters()}
        module.zero_grad()
        _published(module, x).sum().backward()
        for name, parameter in module.named_parameters():
            torch.testing.assert_close(grads[name], parameter.grad, rtol=1e-4, atol=1e-5)


def test_dropout_in_training_alone():
    x = [torch.randn(4, 7), torch.randn(4, 9)]
    for kind, names in (
        (MLB, ("dropout_input", "dropout_pre_lin", "dropout_output")),
        (MFB, ("dropout_input", "dropout_pre_norm", "dropout_output")),
    ):
        for name in names:
            module = kind(**SIZES, activ_input="tanh", activ_output=None, **{name: 0.5})
            assert not torch.equal(module(x), module(x)), name
            module.eval()
            torch.testing.assert_close(module(x), _published(module, x))


def test_bad_arguments():
    with pytest.raises(ValueError, match="input_dims: expected 2 sizes"):
        MLB([3], 4)
    with pytest.raises(ValueError, match="x: expected a pair"):
        MLB(**SIZES)([torch.ones(2, 7)])
