"""What an operator is tried with: the :class:`Case` objects of ``cases.py`` beside each operator, and the numbers rule.

A case is one way to call a public function: its arguments by name for sizes by name, its written meaning, which
arguments have a gradient and which of their values nobody may read. The tests, ``velm check``, the benchmarks and the
runs under guards and sanitizers read the same cases. Nothing here is imported by ``import velm_kernels``.

Example::

    CASES = [
        Case(
            "film", "",
            make=lambda draw, batch, regions, dim: {
                "x": draw(batch, regions, dim), "gamma": draw(batch, dim), "beta": draw(batch, dim),
            },
            meaning=lambda x, gamma, beta: reference.film(x, gamma[:, None], beta[:, None]),
            differentiable=("x", "gamma", "beta"),
            sizes={"batch": 2, "regions": 5, "dim": 12},
            larger={"batch": 3, "regions": 75, "dim": 90},
            published={"film": {"batch": 32, "regions": 196, "dim": 768}},
        )
    ]
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

import velm_kernels

Arguments = dict[str, Any]

FACTOR, ULPS = 2.0, 4.0
"""The numbers rule: an error is at most ``FACTOR`` times that of plain torch and ``ULPS`` units in the last place."""


class Draw:
    """Draws tensors on the CPU, the same values in every dtype.

    ``draw(2, 3)`` is a normally distributed tensor ``(2, 3)`` in the dtype of the case.
    """

    def __init__(self, dtype: torch.dtype, seed: int) -> None:
        self._dtype, self._generator = dtype, torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int, wide: bool = False) -> Tensor:
        """``wide``: in float32 where the dtype is narrower."""
        values = torch.randn(shape, generator=self._generator, dtype=torch.float64)
        return values.to(torch.promote_types(self._dtype, torch.float32) if wide else self._dtype)

    def mask(self, *shape: int, share: float = 0.7) -> Tensor:
        """Bool, True for about ``share`` of the elements; from the third entry on for none of an entry's."""
        values = torch.rand(shape, generator=self._generator) < share
        values[2:] = False
        return values

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """int64 from ``low`` to ``high - 1``."""
        return torch.randint(low, max(high, low + 1), shape, generator=self._generator)


@dataclass(frozen=True)
class Case:
    """One way to call a public function.

    Attributes:
        operator: name of the public function; name: which of its features, "" for its plainest call.
        make: makes the arguments by name, from a :class:`Draw` and the sizes.
        meaning: plain torch, differentiable to any order; takes the same arguments, those of ``seed`` as tensors.
        differentiable: the arguments with a gradient; of a list of tensors, each of them has one.
        sizes: by name, so small that tests can try everything; the first one is of a batch.
        larger: sizes at which work is divided: among tiles, blocks and threads.
        published: by the name of a paper or model, the sizes that it has; what benchmarks measure.
        not_zero: sizes that must not be 0.
        unread: puts NaN and infinity where nothing may be read, into copies of the arguments.
        vanishing: the arguments whose exact gradient is 0, as a sum of terms that cancel; its error is looked at beside
            the largest of the other gradients.
        scaled: the arguments whose magnitude tests vary, if not all that are differentiable.
        numbers_only: its other promises are those of another case of the operator: only its numbers are looked at.
    """

    operator: str
    name: str
    make: Callable[..., Arguments]
    meaning: Callable[..., Any]
    differentiable: tuple[str, ...]
    sizes: Mapping[str, int] = field(hash=False)
    larger: Mapping[str, int] = field(hash=False)
    published: Mapping[str, Mapping[str, int]] = field(default_factory=dict, hash=False)
    not_zero: tuple[str, ...] = ()
    unread: Callable[[Arguments], Arguments] | None = None
    vanishing: tuple[str, ...] = ()
    scaled: tuple[str, ...] = ()
    numbers_only: bool = False

    def __str__(self) -> str:
        return f"{self.operator}-{self.name}" if self.name else self.operator

    @property
    def function(self) -> Callable[..., Any]:
        found: Callable[..., Any] = getattr(velm_kernels, self.operator)
        return found

    def arguments(
        self,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        seed: int = 0,
        **sizes: int,
    ) -> Arguments:
        """Arguments in ``dtype`` (integers, masks and what must be wider aside), no gradients asked for."""
        return moved(self.make(Draw(dtype, seed), **{**self.sizes, **sizes}), device)

    @property
    def crossing(self) -> dict[str, int]:
        """Odd sizes past one block of 16, of as many entries and heads as :attr:`sizes`: for where work is slow."""
        kept = {next(iter(self.sizes)), "heads", "group"}
        return {name: size if name in kept else 2 * size + 7 for name, size in self.sizes.items()}

    def larger_arguments(self, dtype: torch.dtype = torch.float32) -> Arguments:
        """Arguments of the :attr:`larger` sizes, on the CPU."""
        return self.make(Draw(dtype, 0), **self.larger)

    def leaves(self, arguments: Arguments) -> list[Tensor]:
        """The tensors of ``arguments`` that have a gradient."""
        return [leaf for name in self.differentiable for leaf in tree_flatten(arguments[name])[0]]

    def leaf_names(self, arguments: Arguments) -> list[str]:
        """What :meth:`leaves` lists: ``"x"``, or ``"features[0]"`` of a list."""
        return [
            f"{name}[{place}]" if isinstance(arguments[name], (list, tuple)) else name
            for name in self.differentiable
            for place in range(len(tree_flatten(arguments[name])[0]))
        ]

    def with_leaves(self, arguments: Arguments, leaves: Sequence[Tensor]) -> Arguments:
        """``arguments`` with other tensors in place of those that :meth:`leaves` lists."""
        left, changed = iter(leaves), dict(arguments)
        for name in self.differentiable:
            flat, spec = tree_flatten(arguments[name])
            changed[name] = tree_unflatten([next(left) for _ in flat], spec)
        return changed

    def requiring_gradients(self, arguments: Arguments) -> Arguments:
        return self.with_leaves(arguments, [leaf.detach().clone().requires_grad_() for leaf in self.leaves(arguments)])

    def scaled_by(self, arguments: Arguments, factor: float) -> Arguments:
        """``arguments`` of another magnitude."""
        names = self.scaled or self.differentiable
        return arguments | {name: _of_tensors(lambda value: factor * value, arguments[name]) for name in names}

    def poisoned(self, arguments: Arguments) -> Arguments:
        """``arguments`` with NaN and infinity in what may not be read."""
        return arguments if self.unread is None else self.unread(arguments)

    def exact(self, arguments: Arguments) -> tuple[Tensor, ...]:
        """The results by the written meaning, as the public function orders them."""
        given = dict(arguments)
        if isinstance(given.get("seed"), int):
            given["seed"] = torch.tensor(given["seed"])
        return results(self.meaning(**given))

    def run(self, arguments: Arguments, exact: bool = False) -> dict[str, Tensor]:
        """Results and gradients by name, of the public function or, with ``exact``, of the written meaning."""
        given = self.requiring_gradients(arguments)
        found = self.exact(given) if exact else results(self.function(**given))
        outs = [out for out in found if out.requires_grad]
        upstream = [weights for out, weights in zip(found, incoming(found), strict=True) if out.requires_grad]
        gradients = torch.autograd.grad(outs, self.leaves(given), upstream, materialize_grads=True)
        named = {f"output_{place}": out.detach() for place, out in enumerate(found)}
        return named | dict(zip(self.leaf_names(given), gradients, strict=True))


def results(value: Any) -> tuple[Tensor, ...]:
    """The tensors of what a function returned, in order."""
    return tuple(leaf for leaf in tree_flatten(value)[0] if isinstance(leaf, Tensor))


def incoming(outs: Sequence[Tensor]) -> list[Tensor]:
    """What comes in backward, drawn: the same values in every dtype, as bfloat16 has them."""
    generator = torch.Generator().manual_seed(1)
    drawn = [torch.randn(out.shape, generator=generator, dtype=torch.float64).bfloat16() for out in outs]
    return [weights.to(out.device, out.dtype) for out, weights in zip(outs, drawn, strict=True)]


def cast(arguments: Arguments, dtype: torch.dtype) -> Arguments:
    """``arguments`` with all that is floating point in ``dtype``."""
    return _of_tensors(lambda value: value.to(dtype) if value.is_floating_point() else value, arguments)


def moved(arguments: Arguments, device: str | torch.device) -> Arguments:
    """``arguments`` with all tensors on ``device``."""
    return _of_tensors(lambda value: value.to(device), arguments)


def _of_tensors(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    return tree_map(lambda leaf: change(leaf) if isinstance(leaf, Tensor) else leaf, value)


def relative_rms(got: Tensor, exact: Tensor, floor: float = 0.0) -> float:
    """``|got - exact| / |exact|`` in the Frobenius norm, in float64; ``|got|`` where exact and ``floor`` are zero.

    ``floor`` is the least size that errors are compared with: a sum whose terms cancel is as inexact as its terms.
    """
    got, exact = got.double(), exact.double()
    size = max(float(torch.linalg.vector_norm(exact)), floor)
    return float(torch.linalg.vector_norm(got - exact)) / (size or 1.0)


def error_and_limit(
    got: Tensor,
    exact: Tensor,
    ways: Sequence[Tensor],
    dtype: torch.dtype,
    *,
    factor: float = FACTOR,
    ulps: float = ULPS,
    floor: float = 0.0,
) -> tuple[float, float]:
    """The error of ``got`` and what the numbers rule allows; infinite if ``got`` is not finite where ``exact`` is.

    Args:
        ways: what plain torch makes of the same in ``dtype``, which the arithmetic is done in. Where it has several
            ways to compute it, the worst counts; where it overflows it sets no measure.
        floor: as in :func:`relative_rms`.
    """
    if got.shape != exact.shape or not torch.equal(got.isinf(), exact.isinf()):
        return float("inf"), 0.0
    infinite = exact.isinf()
    got, exact, *plain = (value.masked_fill(infinite, 0.0) for value in (got, exact, *ways))
    plain = [torch.where(way.isfinite(), way.double(), exact.double()) for way in plain]
    limit = factor * max(relative_rms(way, exact, floor) for way in plain) + ulps * torch.finfo(dtype).eps
    error = relative_rms(got, exact, floor)
    return (error if error == error else float("inf")), limit


@dataclass(frozen=True)
class Expected:
    """What a case has to give for ``arguments``: see :func:`expected`."""

    case: Case
    arguments: Arguments
    dtype: torch.dtype
    exact: dict[str, Tensor]
    ways: list[dict[str, Tensor]]

    def errors(self, got: Mapping[str, Tensor]) -> dict[str, tuple[float, float]]:
        """(error, limit) by the numbers rule for each result and gradient; integers are right or wrong."""
        found = {}
        leaves = self.case.leaf_names(self.arguments)
        largest = max(float(torch.linalg.vector_norm(self.exact[name])) for name in leaves)
        for name, exact in self.exact.items():
            value, floor = got[name].cpu(), largest if name in self.case.vanishing else 0.0
            if not exact.is_floating_point():
                found[name] = 0.0 if torch.equal(value, exact.to(value.dtype)) else float("inf"), 0.0
            elif exact.numel() or value.shape != exact.shape:
                found[name] = error_and_limit(value, exact, [way[name] for way in self.ways], self.dtype, floor=floor)
        return found


def expected(case: Case, arguments: Arguments, dtype: torch.dtype, seed: int = 0) -> Expected:
    """The exact results and gradients for ``arguments`` on the CPU, and how plain torch in ``dtype`` rounds them.

    A sum whose terms cancel is as inexact as its terms: as what it would be of other roundings of the arguments.
    """
    doubles = cast(arguments, torch.float64)
    exact = case.run(doubles, exact=True)
    generator = torch.Generator().manual_seed(seed)
    moved = []
    for leaf in case.leaves(doubles):
        noise = torch.rand(leaf.shape, generator=generator, dtype=torch.float64) - 0.5
        moved.append(leaf * (1 + torch.finfo(dtype).eps * noise.to(leaf.device)))
    ways = [case.run(case.with_leaves(doubles, moved), exact=True)]
    try:
        ways.append(case.run(arguments, exact=True))
    except RuntimeError:
        # There is no plain form in 16 bits where torch has none, as of Fourier transforms, or where some arguments are
        # wider.
        with velm_kernels.use_backend("reference"):
            ways.append(case.run(arguments))
    return Expected(case, arguments, dtype, exact, ways)


@functools.cache
def every() -> tuple[Case, ...]:
    """The cases of all operators: those of every ``cases.py`` in the package, ``CASES``."""
    return tuple(case for module in _modules() for case in importlib.import_module(module).CASES)


def of(operator: str) -> list[Case]:
    """The cases of one public function."""
    return [case for case in every() if case.operator == operator]


def _modules() -> Iterator[str]:
    root = Path(velm_kernels.__file__).parent
    for path in sorted(root.glob("*/**/cases.py")):
        yield ".".join((velm_kernels.__name__, *path.relative_to(root).with_suffix("").parts))
