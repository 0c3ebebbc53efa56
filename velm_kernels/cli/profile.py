"""``velm profile MODEL``: what ``patch`` buys a model of transformers on this machine."""

from __future__ import annotations

import argparse
import copy
from functools import partial

import torch
from torch import nn

HELP = "Build a transformers model with random weights, patch it, compare outputs, time and memory."
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a model type (see --list) or the path of a config.json", nargs="?")
    parser.add_argument("--list", action="store_true", help="name the model types that can be built by name")
    parser.add_argument("--batch", type=int, default=2, help="examples (default 2)")
    parser.add_argument("--layers", type=int, help="cut every stack to so many layers (default: as configured)")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--rounds", type=int, default=5, help="timed runs of each (default 5)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="threads of torch (default: as torch chooses)")


def run(args: argparse.Namespace) -> int:
    try:
        import transformers  # noqa: F401
    except ImportError:
        print("velm profile needs transformers: pip install transformers")
        return 2
    from velm_kernels.integrations import zoo

    if args.list or args.model is None:
        print("\n".join(zoo.names()))
        return 0 if args.list else 2
    if args.threads:
        torch.set_num_threads(args.threads)
    dtype, device = DTYPES[args.dtype], torch.device(args.device)
    try:
        original, inputs = zoo.build(args.model, batch=args.batch, layers=args.layers, dtype=dtype)
    except ValueError as error:
        print(error)
        return 2
    return _compare(original.to(device), {name: value.to(device) for name, value in inputs.items()}, dtype, args.rounds)


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
    report = velm_kernels.patch(patched)
    error = measure.relative_rms(_infer(patched, inputs), _infer(original, inputs))
    models = {"before": original, "after": patched}
    inference = measure.alternate(
        {name: partial(_infer, model, inputs) for name, model in models.items()}, rounds=rounds, device=device
    )
    training = measure.alternate(
        {name: partial(_train, model, inputs) for name, model in models.items()}, rounds=rounds, device=device
    )
    saved = [_saved(model, inputs) / 2**20 for model in models.values()]
    peaks = [measure.peak_memory(partial(_train, model, inputs), device) / 2**20 for model in models.values()]
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
