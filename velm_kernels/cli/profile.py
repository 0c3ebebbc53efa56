"""``velm profile MODEL``: what ``patch`` buys a model of transformers on this machine."""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import TypeVar

import torch
from torch import nn

HELP = "Build a transformers model with random weights, patch it, compare outputs, time and memory."
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
Found = TypeVar("Found")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError
    return value


# What argparse calls the type in its message.
_positive.__name__ = "positive number"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a model type (see --list) or the path of a config.json", nargs="?")
    parser.add_argument("--list", action="store_true", help="name the model types that can be built by name")
    parser.add_argument("--batch", type=_positive, default=2, help="examples (default 2)")
    parser.add_argument("--layers", type=_positive, help="cut every stack to so many layers (default: as configured)")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--rounds", type=_positive, default=5, help="timed runs of each (default 5)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=_positive, help="threads of torch (default: as torch chooses)")


def _doing(what: str, function: Callable[[], Found]) -> Found:
    """``function()``, said before and after: each part takes from seconds to minutes."""
    print(f"velm profile: {what} ...", end="", file=sys.stderr, flush=True)
    begin = time.perf_counter()
    try:
        found = function()
    except BaseException:
        print(file=sys.stderr)
        raise
    print(f" {time.perf_counter() - begin:.1f} s", file=sys.stderr, flush=True)
    return found


def _error(text: object) -> int:
    print(f"velm profile: {text}", file=sys.stderr)
    return 2


def run(args: argparse.Namespace) -> int:
    try:
        import transformers  # noqa: F401
    except ImportError:
        return _error("needs transformers: pip install transformers")
    from velm_kernels.integrations import zoo

    if args.list:
        print("\n".join(zoo.names()))
        return 0
    if args.model is None:
        return _error(f"model: expected a path or one of {', '.join(zoo.names())}")
    if args.threads:
        torch.set_num_threads(args.threads)
    dtype = DTYPES[args.dtype]
    try:
        torch.zeros((), device=args.device)
    except (RuntimeError, AssertionError) as error:
        return _error(f"--device {args.device}: {str(error).partition(chr(10))[0]}")
    try:
        original, inputs = _doing(
            f"building {args.model} with random weights",
            lambda: zoo.build(args.model, batch=args.batch, layers=args.layers, dtype=dtype),
        )
    except (ValueError, OSError) as error:
        return _error(error)
    inputs = {name: value.to(args.device) for name, value in inputs.items()}
    return _compare(original.to(args.device), inputs, dtype, args.rounds)


def _infer(model: nn.Module, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    from velm_kernels.integrations import zoo

    torch.manual_seed(0)
    with torch.inference_mode():
        return zoo.outputs(model(**inputs))


def _train(model: nn.Module, inputs: dict[str, torch.Tensor]) -> None:
    from velm_kernels.integrations import zoo

    torch.manual_seed(0)
    outs = zoo.outputs(model(**inputs))
    torch.stack([out.float().square().mean() for out in outs if out.numel()]).sum().backward()
    model.zero_grad()


def _compare(original: nn.Module, inputs: dict[str, torch.Tensor], dtype: torch.dtype, rounds: int) -> int:
    import velm_kernels
    from velm_kernels import measure

    device = next(iter(inputs.values())).device
    patched = copy.deepcopy(original)
    report = _doing("patching a copy of it", lambda: velm_kernels.patch(patched))
    error = _doing(
        "comparing the outputs", lambda: measure.relative_rms(_infer(patched, inputs), _infer(original, inputs))
    )
    models = {"before": original, "after": patched}
    alternate = partial(measure.alternate, rounds=rounds, device=device)
    inference = _doing(
        f"timing inference, {rounds} rounds",
        lambda: alternate({name: partial(_infer, model, inputs) for name, model in models.items()}),
    )
    training = _doing(
        f"timing forward and backward, {rounds} rounds",
        lambda: alternate({name: partial(_train, model, inputs) for name, model in models.items()}),
    )
    saved, peaks = _doing(
        "measuring memory",
        lambda: (
            [_saved(model, inputs) / 2**20 for model in models.values()],
            [measure.peak_memory(partial(_train, model, inputs), device) / 2**20 for model in models.values()],
        ),
    )
    rows = {
        "inference ms": [timing.median * 1e3 for timing in inference.values()],
        "forward + backward ms": [timing.median * 1e3 for timing in training.values()],
        "kept for backward MiB": saved,
        "peak MiB": peaks,
    }
    print(report)
    print(f"{'':24}{'before':>12}{'after':>12}{'ratio':>10}")
    for name, (before, after) in rows.items():
        print(f"{name:24}{before:>12.1f}{after:>12.1f}" + (f"{before / after:>9.2f}x" if after else ""))
    limit = TOLERANCE[dtype]
    print(f"relative RMS difference of the outputs: {error:.1e} (at most {limit:.0e} expected)")
    return 0 if error <= limit else 1


def _saved(model: nn.Module, inputs: dict[str, torch.Tensor]) -> int:
    from velm_kernels import measure

    torch.manual_seed(0)
    return measure.saved_for_backward(
        lambda: model(**inputs), [*model.parameters(), *model.buffers(), *inputs.values()]
    )
