"""Whole models: a training step and an inference, as they are, patched, compiled, and both."""

from __future__ import annotations

import copy
import datetime
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import velm_kernels
from benchmarks.harness import Failure, Row, Settings, compare, instruction_set
from velm_kernels import measure
from velm_kernels.integrations import zoo

# Through many layers rounding errors grow alike for everybody; the few ulps allowed on top grow too.
ULPS = 64.0
OURS = ("patched", "patched+compiled")
DIRECTIONS = ("inference", "training step")


@dataclass(frozen=True)
class ModelCase:
    name: str
    batch: int
    layers: int | None = None

    @property
    def shape(self) -> str:
        depth = "" if self.layers is None else f", {self.layers} layers"
        return f"batch {self.batch}, {zoo.MODELS[self.name].description}{depth}"


def cases() -> list[ModelCase]:
    return [
        ModelCase("vilt", 4),
        ModelCase("visual_bert", 4),
        ModelCase("lxmert", 8),
        ModelCase("blip_2_qformer", 8),
        ModelCase("flava", 2),
        ModelCase("blip", 1),
        ModelCase("bridgetower", 1),
        ModelCase("clip", 4),
    ]


def loss_of(outs: Sequence[Tensor]) -> Tensor:
    return torch.stack([out.float().square().mean() for out in outs if out.numel()]).sum()


def step(model: nn.Module, inputs: zoo.Inputs, optimizer: torch.optim.Optimizer | None, seed: int) -> list[Tensor]:
    """One inference, or, with an optimizer, one training step; returns the outputs."""
    torch.manual_seed(seed)  # ViLT draws the order of its patches
    if optimizer is None:
        with torch.inference_mode():
            return zoo.outputs(model(**inputs))
    outs = zoo.outputs(model(**inputs))
    loss_of(outs).backward()
    optimizer.step()
    optimizer.zero_grad()
    return outs


def gradients(model: nn.Module, inputs: zoo.Inputs, seed: int) -> list[Tensor]:
    """The outputs, and the gradients of all parameters as one vector."""
    torch.manual_seed(seed)
    outs = zoo.outputs(model(**inputs))
    loss_of(outs).backward()
    found = [parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad(set_to_none=True)
    return [*(out.detach() for out in outs), torch.cat(found)]


def outputs_only(model: nn.Module, inputs: zoo.Inputs, seed: int) -> list[Tensor]:
    return step(model, inputs, None, seed)


def measure_model(
    case: ModelCase,
    dtype: torch.dtype,
    direction: str,
    limits: measure.Limits,
    settings: Settings,
) -> tuple[list[Row], list[Failure]]:
    training = direction == "training step"
    original, inputs = zoo.build(case.name, batch=case.batch, layers=case.layers, dtype=dtype, seed=settings.seed)
    original.to(settings.device)
    inputs = {name: value.to(settings.device) for name, value in inputs.items()}
    patched = copy.deepcopy(original)
    velm_kernels.patch(patched)
    models: dict[str, nn.Module] = {"eager": original, "patched": patched}
    if settings.compile:
        models["compiled"] = torch.compile(copy.deepcopy(original), dynamic=False)  # type: ignore[assignment]
        models["patched+compiled"] = torch.compile(copy.deepcopy(patched), dynamic=False)  # type: ignore[assignment]

    look: Callable[[nn.Module, zoo.Inputs, int], list[Tensor]] = gradients if training else outputs_only
    exact_inputs = {key: value.double() if value.is_floating_point() else value for key, value in inputs.items()}
    exact = look(copy.deepcopy(original).double(), exact_inputs, settings.seed)
    limit_error = 2 * measure.relative_rms(look(original, inputs, settings.seed), exact)
    limit_error += ULPS * torch.finfo(dtype).eps
    dtype_name = str(dtype).removeprefix("torch.")
    errors, failures = {}, []
    for way, model in list(models.items()):
        try:
            errors[way] = measure.relative_rms(look(model, inputs, settings.seed), exact)
            reason = f"relative RMS error {errors[way]:.2e} is above {limit_error:.2e}"
            wrong = not errors[way] <= limit_error
        except Exception as error:
            reason, wrong = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}", True
        if wrong:
            failures.append(Failure(case.name, dtype_name, direction, way, reason))
            del models[way]
    del exact

    runs = {}
    for way, model in models.items():
        model.train(training)
        # A rate of 0: everybody keeps the same weights, whatever the number of steps.
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True) if training else None
        runs[way] = functools.partial(step, model, inputs, optimizer, settings.seed)
    timings = measure.alternate(runs, rounds=settings.rounds, device=settings.device)
    rows = []
    for way, timing in timings.items():
        saved = peak = None
        if settings.memory:
            peak = measure.peak_memory(runs[way], settings.device)
            if training:
                torch.manual_seed(settings.seed)
                known = [*models[way].parameters(), *models[way].buffers(), *inputs.values()]
                saved = measure.saved_for_backward(functools.partial(models[way], **inputs), known)
        lower, upper = timing.quartiles
        rows.append(
            Row(
                date=datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
                torch=torch.__version__,
                device=limits.device,
                threads=limits.threads,
                instruction_set=instruction_set(settings.device),
                peak_fp32=limits.fp32,
                peak_bf16=limits.bf16,
                copy_bandwidth=limits.copy,
                read_bandwidth=limits.read,
                family="models",
                operator="model",
                case=case.name,
                shape=case.shape,
                dtype=dtype_name,
                direction=direction,
                way=way,
                samples=len(timing.samples),
                median_ms=timing.median * 1e3,
                lower_quartile_ms=lower * 1e3,
                upper_quartile_ms=upper * 1e3,
                best_ms=timing.best * 1e3,
                clock=timing.clock,
                host_ms=None if timing.host_median is None else timing.host_median * 1e3,
                error=errors[way],
                error_limit=limit_error,
                exact="float64",
                saved_bytes=saved,
                peak_bytes=peak,
            )
        )
    compare(rows, OURS)
    return rows, failures
