"""Time and memory of whole models at realistic sizes, before and after ``patch``."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch

import velm_kernels
from velm_kernels import measure
from velm_kernels.integrations import zoo

# Model and batch size, in the order in which they are measured.
FAMILIES = {"siglip": 1, "blip_2_qformer": 2, "vilt": 1, "visual_bert": 1, "lxmert": 2}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# What rounding may add to twice the unpatched model's own error.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Comparison:
    """One model, the same weights and inputs, unpatched and patched; every pair is (before, after).

    Attributes:
        family, batch, size, dtype: what was measured.
        replaced: number of modules that ``patch`` replaced.
        errors: relative RMS difference of the outputs from those of the unpatched model in float32.
        inference_ms, step_ms: medians of alternating runs; a step is forward and backward. None where no run was timed.
        saved_bytes: that forward keeps for backward.
        peak_bytes: that a step allocates at once beyond weights and inputs.
    """

    family: str
    batch: int
    size: str
    dtype: str
    replaced: int
    errors: tuple[float, float]
    inference_ms: tuple[float, float] | None
    step_ms: tuple[float, float] | None
    saved_bytes: tuple[int, int]
    peak_bytes: tuple[int, int]

    @property
    def is_right(self) -> bool:
        before, after = self.errors
        return after <= 2 * before + TOLERANCE


def training_step(model: torch.nn.Module, inputs: zoo.Inputs) -> None:
    """Forward and backward; the optimizer is left out, since it is the same for both."""
    torch.manual_seed(0)
    outs = zoo.outputs(model(**inputs))
    torch.stack([out.float().square().mean() for out in outs]).sum().backward()
    model.zero_grad()


def inference(model: torch.nn.Module, inputs: zoo.Inputs) -> list[torch.Tensor]:
    torch.manual_seed(0)
    with torch.inference_mode():
        return [out.float() for out in zoo.outputs(model(**inputs))]


def compare(family: str, batch: int, layers: int | None, rounds: int) -> Iterator[Comparison]:
    """Measure one model in each of ``DTYPES``, in ``rounds`` timed runs each; 0 times nothing."""
    original, given = zoo.build(family, batch=batch, layers=layers)
    exact = inference(original, given)
    size = zoo.MODELS[family].description + ("" if layers is None else f", layers cut to {layers}")
    for name, dtype in DTYPES.items():
        original = original.eval().to(dtype)
        inputs = {key: value.to(dtype) if value.is_floating_point() else value for key, value in given.items()}
        patched = copy.deepcopy(original)
        report = velm_kernels.patch(patched)
        models = {"before": original, "after": patched}
        errors = [measure.relative_rms(inference(model, inputs), exact) for model in models.values()]
        inferences = _times({way: partial(inference, model, inputs) for way, model in models.items()}, rounds)
        for model in models.values():
            model.train()
        steps = {way: partial(training_step, model, inputs) for way, model in models.items()}
        saved, peak = [], []
        for way, model in models.items():
            torch.manual_seed(0)
            known = [*model.parameters(), *model.buffers(), *inputs.values()]
            saved.append(measure.saved_for_backward(partial(model, **inputs), known))
            peak.append(measure.peak_memory(steps[way]))
        yield Comparison(
            family,
            batch,
            size,
            name,
            len(report.replaced),
            (errors[0], errors[1]),
            inferences,
            _times(steps, rounds),
            (saved[0], saved[1]),
            (peak[0], peak[1]),
        )


def _times(runs: Mapping[str, measure.Run], rounds: int) -> tuple[float, float] | None:
    """Milliseconds, before and after."""
    if not rounds:
        return None
    timings = measure.alternate(runs, rounds=rounds, warm_up=1)
    return timings["before"].median * 1e3, timings["after"].median * 1e3


def comparisons(layers: int | None, rounds: int, seconds: float) -> Iterator[Comparison]:
    """Measure ``FAMILIES`` one after the other; none is begun once ``seconds`` have passed."""
    begin = time.perf_counter()
    for family, batch in FAMILIES.items():
        for one in compare(family, batch, layers, rounds):
            yield one
            if time.perf_counter() - begin > seconds:
                return
