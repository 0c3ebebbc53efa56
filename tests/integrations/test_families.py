"""A patched model computes what it computed before: outputs, gradients, with padding, in every family."""

from __future__ import annotations

import copy

import pytest
import torch

import velm_kernels
from velm_kernels.integrations.patching import is_replaced

from .models import FAMILIES, build, error, tensors, to_float64


def _run(model, inputs, backward=True):
    """Return the floating-point outputs, and the gradients of all parameters and floating-point inputs."""
    torch.manual_seed(7)  # ViLT draws the order of its patches
    inputs = {
        name: value.clone().requires_grad_() if backward and value.is_floating_point() and value.dim() > 2 else value
        for name, value in inputs.items()
    }
    with torch.set_grad_enabled(backward):
        returned = dict(model(**inputs))
    # BridgeTower with eager attention returns attention weights that nobody asked for.
    returned.pop("attentions", None)
    outputs = [t for t in tensors(returned) if t.is_floating_point()]
    gradients = {}
    if backward:
        model.zero_grad(set_to_none=True)
        generator = torch.Generator().manual_seed(1)
        loss = sum(
            (t.double() * torch.randn(t.shape, generator=generator, dtype=torch.float64)).sum()
            for t in outputs
            if t.requires_grad
        )
        loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        gradients |= {name: value.grad for name, value in inputs.items() if value.grad is not None}
    return [t.detach() for t in outputs], gradients


def _close(actual, expected, all_gradients):
    """Equal up to rounding, relative to the tensor's own scale unless that is itself rounding."""
    largest = max(gradient.square().mean().sqrt().item() for gradient in all_gradients.values())
    return (actual - expected).square().mean().sqrt() <= 1e-4 * expected.square().mean().sqrt() + 1e-6 * largest


def _compare(patched, plain, exact, floor):
    """Each error may be twice that of the unpatched model, plus `floor` of the tensor's own scale."""
    assert len(patched[0]) == len(plain[0]) == len(exact[0]) > 0
    for index, (a, b, c) in enumerate(zip(*(run[0] for run in (patched, plain, exact)), strict=True)):
        assert a.dtype is b.dtype and a.shape == b.shape
        assert error(a, c) <= 2 * error(b, c) + floor, f"output {index}"
    assert patched[1].keys() == plain[1].keys()
    largest = max((g.double().square().mean().sqrt().item() for g in exact[1].values()), default=0.0)
    for name in plain[1]:
        a, b, c = (run[1][name] for run in (patched, plain, exact))
        # A gradient that is zero but for rounding has no scale (a key bias shifts all scores of a row alike).
        if c.double().square().mean().sqrt().item() < 1e-6 * largest:
            assert a.double().square().mean().sqrt().item() < max(floor, 1e-6) * 10 * largest, name
        else:
            assert error(a, c) <= 2 * error(b, c) + floor, name


@pytest.mark.parametrize("name", FAMILIES)
def test_same_outputs_and_gradients(name):
    model, inputs = build(name)
    exact = _run(copy.deepcopy(model).double(), to_float64(inputs))
    plain = _run(model, inputs)
    report = velm_kernels.patch(model, strict=True)
    assert report.replaced and not report.left
    patched = _run(model, inputs)
    assert not report.fallbacks, report
    # Where attention is almost uniform, as in this LXMERT, a query's gradient is a small difference of large terms, and
    # less exact than eager's: here as in SDPA.
    _compare(patched, plain, exact, floor=4e-6 if name == "lxmert" else 2e-6)


@pytest.mark.parametrize("name", FAMILIES)
def test_replacing_changes_something_and_unpatch_nothing(name):
    model, inputs = build(name)
    types = {path: type(module) for path, module in model.named_modules()}
    keys = list(model.state_dict())
    before = _run(model, inputs)
    report = velm_kernels.patch(model)
    assert list(model.state_dict()) == keys
    swapped = {path for path, module in model.named_modules() if is_replaced(module)}
    assert all(
        (type(m) is types[path]) == (path not in swapped or types[path] is torch.nn.Linear)
        for path, m in model.named_modules()
    )
    assert swapped == {entry.path for entry in report.replaced} != set()
    assert all(isinstance(module, types[path]) for path, module in model.named_modules())
    assert velm_kernels.unpatch(model) == len(swapped)
    assert {path: type(module) for path, module in model.named_modules()} == types
    after = _run(model, inputs)
    for a, b in zip(before[0], after[0], strict=True):
        assert torch.equal(a, b)
    for path, gradient in before[1].items():
        assert torch.equal(gradient, after[1][path]), path


@pytest.mark.parametrize("name", FAMILIES)
def test_bfloat16(name):
    model, inputs = build(name)
    exact = _run(copy.deepcopy(model).double(), to_float64(inputs), backward=False)
    model = model.bfloat16()
    inputs = {k: v.bfloat16() if v.is_floating_point() else v for k, v in inputs.items()}
    plain = _run(model, inputs, backward=False)
    report = velm_kernels.patch(model)
    patched = _run(model, inputs, backward=False)
    assert not report.fallbacks
    _compare(patched, plain, exact, floor=8e-3)


@pytest.mark.parametrize("name", FAMILIES)
def test_output_attentions_come_from_the_original(name):
    model, inputs = build(name)
    with torch.no_grad():
        torch.manual_seed(7)
        before = model(**inputs, output_attentions=True)
        report = velm_kernels.patch(model)
        torch.manual_seed(7)
        after = model(**inputs, output_attentions=True)
        assert report.fallbacks or "sdpa" in name
        assert {fallback.reason for fallback in report.fallbacks} <= {"output_attentions=True"}
        assert "output_attentions=True" in str(report) or "sdpa" in name
        without = model(**inputs)
    count = len(tensors(before))
    assert len(tensors(after)) == count
    for a, b in zip(tensors(before), tensors(after), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    if "sdpa" not in name:
        assert len(tensors(without)) < count


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("name", ["visual_bert", "lxmert", "clip_eager", "clip_sdpa", "bridgetower"])
def test_rows_in_which_every_key_is_masked(name, backward):
    """Eager models attend evenly there and sdpa gives zeros; the patched model does what its original does."""
    model, inputs = build(name)
    inputs["attention_mask"][0] = 0
    if name == "visual_bert":
        inputs["visual_attention_mask"][0] = 0
    plain = _run(model, inputs, backward)
    report = velm_kernels.patch(model)
    patched = _run(model, inputs, backward)
    reasons = {fallback.reason for fallback in report.fallbacks}
    expected = {"gradient through a row in which every key is masked"}
    assert reasons == (expected if backward and name != "clip_sdpa" else set())
    for a, b in zip(patched[0], plain[0], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    for path, gradient in plain[1].items():
        assert _close(patched[1][path], gradient, plain[1]), path


@pytest.mark.parametrize("name", ["visual_bert", "vilt", "flava", "blip_retrieval", "clip_sdpa"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(name, reentrant):
    model, inputs = build(name)
    plain = _run(model, inputs)
    velm_kernels.patch(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.train()
    patched = _run(model, inputs)
    for a, b in zip(patched[0], plain[0], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    for path, gradient in plain[1].items():
        assert _close(patched[1][path], gradient, plain[1]), path


def test_generation_with_a_cache_gives_the_same_tokens():
    model, inputs = build("blip_captioning")
    pixels = inputs["pixel_values"]
    settings = {
        "pixel_values": pixels,
        "max_new_tokens": 8,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    before = model.generate(**settings)
    report = velm_kernels.patch(model)
    after = model.generate(**settings)
    assert not report.fallbacks
    assert torch.equal(before.sequences, after.sequences)
    for a, b in zip(before.logits, after.logits, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_dropout_of_attention_weights_follows_training_mode():
    from .models import visual_bert

    torch.manual_seed(0)
    model, _inputs = visual_bert(dropout=0.4)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    attention = model.encoder.layer[0].attention.self
    attention.dropout.p = 0.4
    velm_kernels.patch(model)
    assert is_replaced(attention)
    x = torch.randn(1, 12, 32)
    with torch.no_grad():
        expected = attention.eval()(x)[0]
        assert torch.equal(attention(x)[0], expected)
        draws = attention.train()(x.expand(2000, -1, -1))[0]
    assert not torch.equal(draws[0], draws[1])
    # What is kept is divided by the probability of keeping it, so the mean over draws is the output without dropout.
    deviation = (draws.mean(0) - expected[0]) / (draws.std(0) / len(draws) ** 0.5)
    assert deviation.abs().max() < 5.5
    torch.manual_seed(3)
    first = attention(x)[0]
    torch.manual_seed(3)
    assert torch.equal(attention(x)[0], first)


def test_torch_compile_of_a_patched_model():
    model, inputs = build("lxmert")
    velm_kernels.patch(model)
    plain = _run(model, inputs)
    compiled = _run(torch.compile(model, fullgraph=True, backend="aot_eager"), inputs)
    for a, b in zip(compiled[0], plain[0], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert len(compiled[1]) == len(plain[1])
    for path, gradient in plain[1].items():
        assert _close(compiled[1].get("_orig_mod." + path, compiled[1].get(path)), gradient, plain[1]), path


@pytest.mark.parametrize("projection", ["attention.output", "output"])
def test_dropout_before_the_residual_follows_training_mode(projection):
    from .models import visual_bert

    torch.manual_seed(0)
    model, _ = visual_bert(dropout=0.4)
    block = model.encoder.layer[0].get_submodule(projection)
    block.LayerNorm = torch.nn.Identity()
    velm_kernels.patch(model)
    assert is_replaced(block)
    x, residual = torch.randn(1, 6, block.dense.in_features), torch.randn(1, 6, 32)
    with torch.no_grad():
        expected = block.eval()(x, residual)
        torch.testing.assert_close(expected, block.dense(x) + residual)
        draws = block.train()(x.expand(2000, -1, -1), residual.expand(2000, -1, -1))
    dropped = draws == residual
    share, deviation = dropped.double().mean().item(), (0.4 * 0.6 / dropped.numel()) ** 0.5
    assert abs(share - 0.4) < 5 * deviation
    kept = residual + (expected - residual) / 0.6
    torch.testing.assert_close(draws[~dropped], kept.expand_as(draws)[~dropped], rtol=1e-4, atol=1e-5)
