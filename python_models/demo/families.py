"""Time and memory of whole models at realistic sizes, before and after ``patch``."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

import velm_kernels
from velm_kernels import measure
from velm_kernels.integrations import zoo

FAMILIES = {"vilt": 2, "visual_bert": 2, "lxmert": 4, "blip_2_qformer": 4}


@dataclass(frozen=True)
class Comparison:
    """One model, the same weights and inputs, unpatched and patched. Milliseconds are medians of alternating runs."""

    family: str
    size: str
    replaced: int
    error: float
    inference_ms: tuple[float, float]
    step_ms: tuple[float, float]
    saved_bytes: tuple[int, int]
    peak_bytes: tuple[int, int]

    @property
    def inference_speedup(self) -> float:
        return self.inference_ms[0] / self.inference_ms[1]

    @property
    def step_speedup(self) -> float:
        return self.step_ms[0] / self.step_ms[1]


def training_step(model: torch.nn.Module, inputs: zoo.Inputs) -> None:
    """Forward and backward; the optimizer is left out, since it is the same for both."""
    torch.manual_seed(0)
    outs = zoo.outputs(model(**inputs))
    torch.stack([out.float().square().mean() for out in outs]).sum().backward()
    model.zero_grad()


def inference(model: torch.nn.Module, inputs: zoo.Inputs) -> list[torch.Tensor]:
    torch.manual_seed(0)
    with torch.inference_mode():
        return zoo.outputs(model(**inputs))


def compare(family: str, batch: int, layers: int | None, rounds: int) -> Comparison:
    original, inputs = zoo.build(family, batch=batch, layers=layers)
    patched = copy.deepcopy(original)
    report = velm_kernels.patch(patched)
    models = {"before": original, "after": patched}
    error = measure.relative_rms(inference(patched, inputs), inference(original, inputs))
    times = measure.alternate(
        {name: lambda model=model: inference(model, inputs) for name, model in models.items()}, rounds=rounds
    )
    for model in models.values():
        model.train()
    steps = measure.alternate(
        {name: lambda model=model: training_step(model, inputs) for name, model in models.items()},
        rounds=rounds,
        warm_up=1,
    )
    saved, peak = [], []
    for model in models.values():
        torch.manual_seed(0)
        known = [*model.parameters(), *model.buffers(), *inputs.values()]
        saved.append(measure.saved_for_backward(lambda model=model: model(**inputs), known))
        peak.append(measure.peak_memory(lambda model=model: training_step(model, inputs)))
    depth = "" if layers is None else f", {layers} layers"
    return Comparison(
        family,
        f"batch {batch}, {zoo.MODELS[family].description}{depth}",
        len(report.replaced),
        error,
        (times["before"].median * 1e3, times["after"].median * 1e3),
        (steps["before"].median * 1e3, steps["after"].median * 1e3),
        (saved[0], saved[1]),
        (peak[0], peak[1]),
    )


def comparisons(names: Sequence[str], layers: int | None, rounds: int) -> Iterator[Comparison]:
    for name in names:
        yield compare(name, FAMILIES[name], layers, rounds)
