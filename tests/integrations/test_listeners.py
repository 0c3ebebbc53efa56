"""Whoever listens to a submodule, or puts another in its place, meets what the unpatched model would show."""

from __future__ import annotations

import functools
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.modules import module as torch_module

import velm_kernels

from . import image_text_models, models, running
from .models import tensors

Built = tuple[nn.Module, dict[str, Any]]


def _builders() -> dict[str, Callable[[], Built]]:
    builders: dict[str, Callable[[], Built]] = {name: functools.partial(models.build, name) for name in models.FAMILIES}
    for name, builder in image_text_models.BUILDERS.items():
        for attention in image_text_models.ATTENTION:
            if attention == "eager" or not ("dino" in name or name == "instructblipvideo_qformer"):
                builders[f"{name}-{attention}"] = functools.partial(builder, attention)
    return builders


ALL = _builders()


def _run(model: nn.Module, inputs: dict[str, Any]) -> list[torch.Tensor]:
    torch.manual_seed(7)  # ViLT draws the order of its patches
    with torch.no_grad():
        returned = dict(model(**inputs))
    returned.pop("attentions", None)  # BridgeTower with eager attention returns those of its cross-modal layers
    return [t for t in tensors(returned) if t.is_floating_point()]


def _assert_close(a: list[torch.Tensor], b: list[torch.Tensor]) -> None:
    assert len(a) == len(b) > 0
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", ALL)
def test_hooks_on_every_submodule(name: str, when: str) -> None:
    """They run as often as before, and see the same kinds of results."""
    model, inputs = ALL[name]()
    seen: Counter[tuple[str, str]] = Counter()

    def kind(value: Any) -> str:
        parts = [kind(part) for part in value] if isinstance(value, (tuple, list)) else []
        return f"({', '.join(parts)})" if parts else type(value).__name__

    def hook(path: str) -> Callable[..., None]:
        return lambda module, args, kwargs, out: seen.update([(path, kind(out), tuple(sorted(kwargs)))])

    def listen() -> list[Any]:
        named = list(model.named_modules())
        return [module.register_forward_hook(hook(path), with_kwargs=True) for path, module in named]

    handles = listen()
    expected = _run(model, inputs)
    plain, seen = seen, Counter()
    if when == "after":
        for handle in handles:
            handle.remove()
    report = velm_kernels.patch(model, strict=True)
    if when == "after":
        handles = listen()
    _assert_close(_run(model, inputs), expected)
    assert seen == plain
    for handle in handles:
        handle.remove()
    calls = sum(fallback.calls for fallback in report.fallbacks)
    _run(model, inputs)
    assert sum(fallback.calls for fallback in report.fallbacks) == calls


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward"])
@pytest.mark.parametrize("name", ["visual_bert", "blip_captioning", "clip_eager", "mllama-sdpa", "idefics-eager"])
def test_hooks_for_all_modules_of_the_process(name: str, kind: str) -> None:
    if (name, kind) == ("blip_captioning", "full_backward"):
        pytest.skip("the unpatched model modifies a view in place, which torch refuses under backward hooks")
    model, inputs = ALL[name]()
    paths = {module: path for path, module in model.named_modules()}
    seen: Counter[str] = Counter()
    register = getattr(torch_module, f"register_module_{kind}_hook")
    with warnings.catch_warnings(), register(lambda module, *rest: seen.update([paths.get(module, "")])):
        warnings.simplefilter("ignore")  # of backward hooks on modules that return no tensor, or have no gradient
        expected = running.run(model, inputs)
        plain, seen = seen, Counter()
        velm_kernels.patch(model)
        running.assert_near(running.run(model, inputs), expected, 1e-4)
    assert seen == plain != Counter()


@pytest.mark.parametrize("name", ALL)
def test_norms_activations_and_dropouts_with_a_forward_of_their_own(name: str) -> None:
    """Replaced on the instance, as Liger-Kernel and offloading do it."""
    model, inputs = ALL[name]()
    calls: Counter[str] = Counter()
    for path, module in model.named_modules():
        if not list(module.children()) and not isinstance(module, (nn.Linear, nn.Conv2d)):

            def forward(*args: Any, own: Any = module.forward, path: str = path, **kwargs: Any) -> Any:
                calls[path] += 1
                return own(*args, **kwargs)

            module.forward = forward
    expected = _run(model, inputs)
    plain, calls = calls, Counter()
    velm_kernels.patch(model)
    _assert_close(_run(model, inputs), expected)
    assert calls == plain


class _Doubled(nn.Module):
    """In a dropout's place; it is no dropout, and does something."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2.0 * x


@pytest.mark.parametrize(("kind", "when"), [(nn.Identity, "after"), (_Doubled, "before")])
@pytest.mark.parametrize("name", ALL)
def test_dropouts_are_replaced(name: str, when: str, kind: Callable[[], nn.Module]) -> None:
    model, inputs = ALL[name]()
    for module in model.modules():  # whatever else drops; the parts in question are gone anyway
        for attribute in ("dropout", "attention_dropout"):
            if isinstance(getattr(module, attribute, None), float) and not isinstance(module, nn.MultiheadAttention):
                setattr(module, attribute, 0.0)
    if when == "after":
        velm_kernels.patch(model)
    for module in list(model.modules()):
        for child, inner in list(module.named_children()):
            if isinstance(inner, nn.Dropout):
                setattr(module, child, kind())
    if when == "before":
        velm_kernels.patch(model)
    for mode in (True, False):
        model.train(mode)
        velm_kernels.unpatch(model)
        try:
            expected = _run(model, inputs)
        except AttributeError:  # BridgeTower reads the probability of its dropout
            velm_kernels.patch(model)
            with pytest.raises(AttributeError):
                _run(model, inputs)
            continue
        velm_kernels.patch(model)
        _assert_close(_run(model, inputs), expected)
