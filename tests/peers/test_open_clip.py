"""The poolers of open_clip beside ours with the same weights, and its models patched and unpatched."""

from __future__ import annotations

import copy
import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import velm_kernels
from tests.integrations.image_text_models import randomise
from tests.integrations.running import Named, assert_equal, assert_near, assert_same, exact_run, run
from velm_kernels.integrations.open_clip import patch, unpatch

from .packages import open_clip as import_open_clip

TEXT = {"context_length": 9, "vocab_size": 50, "width": 32, "heads": 4, "layers": 2}


@pytest.fixture(scope="module")
def open_clip() -> Any:
    return import_open_clip()


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _poolers(open_clip: Any, name: str) -> tuple[nn.Module, nn.Module, Tensor]:
    """(theirs, ours, tokens or pixels)."""
    generator = torch.Generator().manual_seed(3)
    if name == "AttentionPool2d":
        made = [kind.AttentionPool2d(4, 24, 3, 10) for kind in (open_clip.modified_resnet, velm_kernels)]
        x = torch.randn(3, 24, 4, 4, generator=generator)
    else:
        context, queries = (24, 5) if name == "AttentionalPooler, other width" else (16, 1)
        made = [kind.AttentionalPooler(16, context, 4, queries) for kind in (open_clip.transformer, velm_kernels)]
        x = torch.randn(3, 11, context, generator=generator)
    theirs, ours = made
    randomise(theirs)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return Named(theirs), Named(ours.eval()), x


@pytest.mark.parametrize("name", ["AttentionPool2d", "AttentionalPooler", "AttentionalPooler, other width"])
def test_poolers(name: str, open_clip: Any) -> None:
    theirs, ours, x = _poolers(open_clip, name)
    exact = exact_run(theirs, {"x": x})
    assert_same(run(ours, {"x": x}), run(theirs, {"x": x}), exact)
    assert_near(exact_run(ours, {"x": x}), exact, 1e-12)
    assert ours.state_dict().keys() == theirs.state_dict().keys()


def test_our_pooler_with_the_mask_that_theirs_lacks(open_clip: Any) -> None:
    theirs, ours, x = _poolers(open_clip, "AttentionalPooler, other width")
    got = ours.module(torch.where(torch.arange(11)[:, None] < 7, x, torch.nan), lengths=torch.full((3,), 7))
    torch.testing.assert_close(got, theirs.module(x[:, :7]))


def _coca(open_clip: Any) -> tuple[nn.Module, dict[str, Any]]:
    """With padded texts, layer scales in the decoder, and QuickGELU everywhere."""
    vision = {"image_size": 16, "patch_size": 4, "width": 32, "head_width": 8, "layers": 2, "attentional_pool": True}
    model = open_clip.CoCa(
        embed_dim=32,
        vision_cfg={**vision, "attn_pooler_queries": 5, "attn_pooler_heads": 4, "output_tokens": True},
        text_cfg={**TEXT, "embed_cls": True, "output_tokens": True},
        multimodal_cfg={**TEXT, "ls_init_value": 0.5},
        quick_gelu=True,
    )
    text = torch.randint(1, 50, (3, 9), generator=torch.Generator().manual_seed(0))
    text[1, 4:] = 0
    return randomise(model), {"image": torch.randn(3, 3, 16, 16), "text": text}


def _resnet(open_clip: Any) -> tuple[nn.Module, dict[str, Any]]:
    vision = {"image_size": 64, "layers": (1, 1, 1, 1), "width": 8}
    model = open_clip.CLIP(embed_dim=32, vision_cfg=vision, text_cfg=TEXT, output_dict=True)
    randomise(model)
    with torch.no_grad():
        for weight in (weight for weight in model.parameters() if weight.dim() == 4):
            weight.div_((weight.shape[1] * weight.shape[2]) ** 0.5)
    text = torch.randint(1, 50, (3, 9), generator=torch.Generator().manual_seed(0))
    return model, {"image": torch.randn(3, 3, 64, 64), "text": text}


MODELS = {"coca": _coca, "resnet": _resnet}


@pytest.mark.parametrize("name", MODELS)
def test_models(name: str, open_clip: Any) -> None:
    model, inputs = MODELS[name](open_clip)
    classes, keys = [type(module) for module in model.modules()], list(model.state_dict())
    plain, exact = run(model, inputs), exact_run(model, inputs)
    report = patch(model, strict=True)
    assert {entry.class_name for entry in report.replaced} == {
        "AttentionalPooler" if name == "coca" else "AttentionPool2d",
        "ResidualAttentionBlock",
        "Linear",
    }
    assert_same(run(model, inputs), plain, exact)
    assert_near(exact_run(model, inputs), exact, 1e-12)
    assert not report.fallbacks, report
    assert list(model.state_dict()) == keys
    twin = copy.deepcopy(model)
    twin.load_state_dict(model.state_dict(), strict=True)
    assert_equal(run(twin, inputs), run(model, inputs))
    unpatch(model)
    assert [type(module) for module in model.modules()] == classes
    assert_equal(run(model, inputs), plain)


def _speaking(base: Any, path: str, heard: list[str]) -> type:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        heard.append(path)
        return base.forward(self, *args, **kwargs)

    return type(base.__name__, (base,), {"forward": forward})


@pytest.mark.parametrize("how", ["hooks", "forwards", "classes"])
@pytest.mark.parametrize("name", MODELS)
def test_who_listens_to_a_submodule_hears_what_it_heard(name: str, how: str, open_clip: Any) -> None:
    model, inputs = MODELS[name](open_clip)
    heard: list[str] = []
    for path, module in list(model.named_modules()):
        if how == "hooks":
            module.register_forward_hook(lambda module, args, out, path=path: heard.append(f"{path} {type(out)}"))
        elif not path or isinstance(module, nn.ModuleList):
            continue
        elif how == "forwards":

            def forward(*args: Any, own: Any = module.forward, path: str = path, **kwargs: Any) -> Any:
                heard.append(path)
                return own(*args, **kwargs)

            module.forward = forward  # type: ignore[assignment]
        elif not list(module.children()):
            module.__class__ = _speaking(type(module), path, heard)
    plain = run(model, inputs, backward=False)
    expected = sorted(heard)
    heard.clear()
    patch(model)
    assert_near(run(model, inputs, backward=False), plain)
    assert sorted(heard) == expected != []
    unpatch(model)
    assert_equal(run(model, inputs, backward=False), plain)


def test_nothing_is_left_in_an_unpatched_model(open_clip: Any) -> None:
    model, inputs = _coca(open_clip)
    before = pickle.dumps(model)
    patch(model)
    run(model, inputs, backward=False)
    unpatch(model)
    assert pickle.dumps(model) == before


def test_a_pooler_and_a_block_compile_without_graph_breaks(open_clip: Any) -> None:
    model, _ = _coca(open_clip)
    patch(model)
    pooler, block = model.visual.attn_pool, model.text_decoder.cross_attn[0]
    x, picture = torch.randn(2, 6, 32), torch.randn(2, 17, 32)

    def decode(x: Tensor, picture: Tensor) -> Tensor:
        pooled = pooler(picture)
        return block(x, pooled, pooled)

    with torch.no_grad():
        expected = decode(x, picture)
        compiled = torch.compile(decode, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x, picture), expected)


def test_checkpoints(open_clip: Any) -> None:
    model, inputs = _coca(open_clip)
    patch(model)
    plain = run(model, inputs)
    model.set_grad_checkpointing(True)
    assert_near(run(model.train(), inputs), plain)


def test_masks_of_texts_become_ranges(open_clip: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = _coca(open_clip)
    patch(model)
    operator, calls = velm_kernels.cross_attention, []

    def recording(*args: Any, **kwargs: Any) -> Any:
        calls.append((args, kwargs))
        return operator(*args, **kwargs)

    monkeypatch.setattr(velm_kernels, "cross_attention", recording)
    with torch.no_grad():
        model(**inputs)
    # Two layers each: the picture's, the text's, and the decoder's two kinds.
    assert len(calls) == 8
    assert not [kwargs for _, kwargs in calls if "bias" in kwargs or "mask" in kwargs]
    causal = [kwargs["key_ranges"][1].tolist() for _, kwargs in calls if "key_ranges" in kwargs]
    decoded = list(range(1, 9))
    assert causal[2:] == [[decoded] * 3] * 2
    # The padded text: its class token comes last, and is hidden where the padding begins, as published weights have it.
    assert [rows[1] for rows in causal[:2]] == [[1, 2, 3, 4, 5, 5, 5, 5, 5, 5]] * 2
    crossing = [args for args, _ in calls if args[0].shape[2] != args[1].shape[2]]
    assert [(query.shape[2], key.shape[2]) for query, key, _ in crossing] == [(8, 4)] * 2


def test_mean_over_the_text(open_clip: Any) -> None:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pooler = open_clip.hf_model.MeanPooler()

        def forward(self, x: Tensor, mask: Tensor) -> dict[str, Tensor]:
            return {"out": self.pooler(SimpleNamespace(last_hidden_state=x), mask)}

    inputs = {"x": torch.randn(3, 7, 12), "mask": (torch.arange(7) < torch.tensor([[7], [4], [1]])).long()}
    model = Pooled()
    plain, exact = run(model, inputs), exact_run(model, inputs)
    report = patch(model)
    assert_same(run(model, inputs), plain, exact)
    assert_near(exact_run(model, inputs), exact, 1e-12)
    assert not report.fallbacks
    halves = run(model, {"x": inputs["x"], "mask": inputs["mask"] * 0.5})
    assert torch.equal(halves.outputs["out"], plain.outputs["out"])
    assert report.fallbacks[0].reason == "a mask that is not 0 or 1 for each token"


def _hook(block: Any) -> str:
    block.attn.register_forward_hook(lambda module, args, output: (output[0] * 2.0, output[1]))
    return "hooks on the attention"


def _other_values(block: Any) -> str:
    block.ln_1_kv = nn.LayerNorm(32)
    return "keys and values of different tokens"


@pytest.mark.parametrize("change", [_hook, _other_values])
def test_blocks_leave_the_rest_to_the_original(change: Any, open_clip: Any) -> None:
    block = randomise(open_clip.transformer.ResidualAttentionBlock(32, 4))
    x, other = torch.randn(2, 5, 32), torch.randn(2, 5, 32)
    report = patch(block)
    # Without a norm for them, other tokens are not looked at.
    with torch.no_grad():
        assert torch.equal(block(x, other, x), block(x))
        reason = change(block)
        got = block(x, other, x)
        assert [entry.reason for entry in report.fallbacks] == [reason]
        unpatch(block)
        assert torch.equal(got, block(x, other, x))


@pytest.mark.parametrize("path", ["ls_1", "ls_2", "mlp", "mlp.gelu", "mlp.c_proj"])
def test_hooks_inside_of_a_block_run(path: str, open_clip: Any) -> None:
    block = randomise(open_clip.transformer.ResidualAttentionBlock(32, 4))
    block.get_submodule(path).register_forward_hook(lambda module, args, output: output * 1.5)
    x = torch.randn(2, 5, 32)
    with torch.no_grad():
        expected = block(x)
        patch(block)
        torch.testing.assert_close(block(x), expected)


def test_dropout_of_attention_weights_follows_training_mode(open_clip: Any) -> None:
    block = randomise(open_clip.transformer.ResidualAttentionBlock(32, 4))
    patch(block)
    x = torch.randn(2, 5, 32)
    with torch.no_grad():
        expected = block(x)
        block.attn.dropout = 0.5
        assert torch.equal(block(x), expected)
        block.train()
        assert not torch.allclose(block(x), expected)
