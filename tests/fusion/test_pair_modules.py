"""What the published fusions are not compared in with their peers (tests/peers/test_block.py)."""

from __future__ import annotations

import pytest
import torch

from velm_kernels import MFB, MFH, MLB, Block, BlockTucker, ConcatMLP, LinearSum, Mutan, Tucker

DIMS, OUT = [7, 9], 5
SMOOTH = {"activ_input": "tanh", "activ_output": None}
# Every kind, its sizes, and where it drops.
KINDS = [
    (MLB, {"mm_dim": 12, **SMOOTH}, ("dropout_input", "dropout_pre_lin", "dropout_output")),
    (MFB, {"mm_dim": 12, **SMOOTH}, ("dropout_input", "dropout_pre_norm", "dropout_output")),
    (MFH, {"mm_dim": 12, **SMOOTH}, ("dropout_input", "dropout_pre_lin", "dropout_output")),
    (LinearSum, {"mm_dim": 12, **SMOOTH}, ("dropout_input", "dropout_pre_lin", "dropout_output")),
    (Mutan, {"mm_dim": 12, "rank": 2}, ("dropout_input", "dropout_pre_lin", "dropout_output")),
    (Tucker, {"mm_dim": 12}, ("dropout_input", "dropout_pre_lin", "dropout_output")),
    (BlockTucker, {"mm_dim": 12, "chunks": 3}, ("dropout_input", "dropout_pre_lin", "dropout_output")),
    (Block, {"mm_dim": 12, "chunks": 3, "rank": 2}, ("dropout_input", "dropout_pre_lin", "dropout_output")),
    (ConcatMLP, {"dimensions": [12], "activation": "tanh"}, ("dropout",)),
]
every_kind = pytest.mark.parametrize(("kind", "sizes", "dropouts"), KINDS, ids=[kind.__name__ for kind, *_ in KINDS])


@every_kind
def test_dropout_in_training_alone(kind, sizes, dropouts):
    x = [torch.randn(4, 7), torch.randn(4, 9)]
    plain = kind(DIMS, OUT, **sizes)
    for name in dropouts:
        module = kind(DIMS, OUT, **sizes, **{name: 0.5})
        module.load_state_dict(plain.state_dict())
        torch.manual_seed(0)
        first = module(x)
        assert not torch.equal(first, module(x)), name
        torch.manual_seed(0)
        assert torch.equal(first, module(x)), name
        # The mean over draws is the result without dropout.
        if name == "dropout_output":
            drawn = torch.stack([module(x) for _ in range(400)]).mean(0)
            torch.testing.assert_close(drawn, plain(x), rtol=0.3, atol=0.3)
        module.eval()
        assert torch.equal(module(x), plain.eval()(x)), name
        plain.train()
        with pytest.raises(ValueError, match=rf"{name}: expected a probability in \[0, 1\), given 1.0"):
            kind(DIMS, OUT, **sizes, **{name: 1.0})


@pytest.mark.parametrize("kind", [MLB, MFB, MFH, LinearSum])
def test_gradients_where_relu_leaves_nothing(kind):
    """Sums of exactly 0, whose root has no finite slope: the published form gives NaN."""
    torch.manual_seed(0)
    module = kind(DIMS, OUT, mm_dim=12, normalize=True)
    x = [torch.randn(20, 7, requires_grad=True), torch.randn(20, 9, requires_grad=True)]
    module(x).sum().backward()
    assert all(leaf.grad.isfinite().all() for leaf in (*x, *module.parameters()))


def test_second_block_of_mfh_sees_what_the_first_dropped():
    module = MFH(DIMS, 2 * 12, mm_dim=12, factor=1, activ_output=None, dropout_pre_lin=0.5)
    torch.nn.init.eye_(module.linear_out.weight)
    torch.nn.init.zeros_(module.linear_out.bias)
    for side in ("0_0", "1_0", "0_1", "1_1"):
        torch.nn.init.ones_(getattr(module, f"linear{side}").weight)
    first, second = module([torch.ones(50, 7), torch.ones(50, 9)]).split(12, -1)
    assert (first == 0).any() and (second == 0).any()
    assert ((second != 0) & (first == 0)).sum() == 0 and ((second == 0) & (first != 0)).any()


@every_kind
def test_bad_arguments(kind, sizes, dropouts):
    with pytest.raises(ValueError, match="input_dims: expected 2 sizes, given list of 1"):
        kind([3], OUT, **sizes)
    module = kind(DIMS, OUT, **sizes)
    with pytest.raises(ValueError, match="x: expected 2 tensors, given list of 1"):
        module([torch.ones(2, 7)])
    with pytest.raises(TypeError, match=r"x: expected a sequence of tensors, given \(2, 7\)"):
        module(torch.ones(2, 7))
    with pytest.raises(ValueError, match=r"x\[1\]: expected \(..., d_1\) with 9 features, given \(2, 8\)"):
        module([torch.ones(2, 7), torch.ones(2, 8)])


def test_bad_options():
    with pytest.raises(ValueError, match="activ_input: expected the name of a function"):
        MLB(DIMS, OUT, activ_input="nothing")
    with pytest.raises(ValueError, match="shared: expected equal input_dims"):
        Mutan(DIMS, OUT, shared=True)
    with pytest.raises(ValueError, match="pos_norm: expected one of before_cat, after_cat, given 'middle'"):
        Block([7, 7], OUT, pos_norm="middle")
    with pytest.raises(ValueError, match="chunks: expected 1 to mm_dim = 4, given 5"):
        BlockTucker(DIMS, OUT, mm_dim=4, chunks=5)
