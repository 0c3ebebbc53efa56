"""linear_cross_entropy by chunks: products by torch, and between them the passes of a backend over logits.

A chunk is some rows with the whole vocabulary: a row's probabilities are known only when its last logit is. Its logits
are made, and its gradients multiplied, some of the vocabulary at a time, so that what a pass reads is what a product
has just left in the cache.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from velm_kernels.losses.linear_cross_entropy.op import factor, factors, made_in_forward, scale_into


class Passes(Protocol):
    """What a backend has to give, for logits ``z (rows, columns)`` of the columns from ``first`` on, any row stride."""

    def fresh(self, x: Tensor) -> None:
        """Is told of memory that nobody has touched yet, and that will be written whole."""

    def sums(
        self,
        z: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        first: int,
        softcap: float,
        smooths: bool,
        details: bool,
        sums: Tensor,
    ) -> None:
        """Takes the logits into ``sums (5, rows)``, float32: the largest; the sum of ``e^(z - largest)``; the logit of
        the target; with ``smooths`` the sum of all; with ``details`` that of ``e^(z - largest) (z - largest)``."""

    def gradient(
        self,
        z: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        first: int,
        softcap: float,
        details: bool,
        weights: Tensor,
    ) -> None:
        """In place of the logits their gradients, from ``weights (6, rows)``, see :func:`_weights`; 0 in a row whose
        target is negative."""


class Sizes(NamedTuple):
    """How much there is at a time.

    Attributes:
        bytes: of the logits in a chunk, unless ``least_rows`` have more.
        least_rows: rows of a chunk; products of fewer are bound by reading weights.
        columns: of the vocabulary between two passes; 0 for all.
        gathers: only rows with a label are multiplied, whose number is read; else all are.
        converts: by dtype, whether products are of float32 copies.
    """

    bytes: int
    least_rows: int
    columns: int
    gathers: bool
    converts: frozenset[torch.dtype] = frozenset()


class _Work:
    """Rows of one call, in chunks."""

    def __init__(
        self,
        passes: Passes,
        sizes: Sizes,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        softcap: float,
    ) -> None:
        self.passes, self.weight, self.bias, self.softcap = passes, weight, bias, softcap
        self.vocabulary, self.dim = weight.shape
        # Where they are in the rows of the call; None for all of them.
        self.places: Tensor | None = None
        if sizes.gathers:
            places = (targets >= 0).nonzero().view(-1)
            if len(places) < len(targets):
                self.places, hidden, targets = places, hidden.index_select(0, places), targets.index_select(0, places)
        self.hidden, self.targets, self.gathers = hidden, targets, sizes.gathers
        self.rows = len(targets)
        self.dtype = torch.float32 if weight.dtype in sizes.converts else weight.dtype
        most = sizes.bytes // (self.dtype.itemsize * max(1, self.vocabulary))
        self.step = min(max(1, self.rows), max(sizes.least_rows, most))
        self.columns = sizes.columns or max(1, self.vocabulary)
        self.logits = hidden.new_empty((self.step if self.rows else 0, self.vocabulary), dtype=self.dtype)
        passes.fresh(self.logits)

    def chunks(self) -> range:
        return range(0, self.rows if self.vocabulary else 0, self.step)

    def parts(self) -> range:
        return range(0, self.vocabulary, self.columns)

    def rows_from(self, start: int) -> tuple[Tensor, Tensor]:
        """(rows, dim) of hidden as they are multiplied, and their targets."""
        hidden, targets = self.hidden[start : start + self.step], self.targets[start : start + self.step]
        if not self.gathers:
            hidden = hidden.masked_fill((targets < 0)[:, None], 0.0)
        return readable(hidden.to(self.dtype)), targets

    def weight_from(self, first: int) -> Tensor:
        return readable(self.weight[first : first + self.columns].to(self.dtype))

    def bias_from(self, first: int) -> Tensor | None:
        return None if self.bias is None else self.bias[first : first + self.columns]

    def multiply(self, hidden: Tensor, first: int) -> Tensor:
        """The logits of some rows and columns, without their bias and cap."""
        z = self.logits[: len(hidden), first : first + self.columns]
        torch.mm(hidden, self.weight_from(first).t(), out=z)
        return z

    def all_rows(self, values: Tensor, to: Tensor) -> None:
        """What there is for each row that was multiplied, and 0 for the others."""
        if self.places is None:
            to.copy_(values)
        else:
            to.zero_().index_copy_(0, self.places, values.to(to.dtype))

    def mine(self, values: Tensor | None) -> Any:
        """Of what there is for each row, that of the rows that are multiplied."""
        return values if values is None or self.places is None else values.index_select(0, self.places)


class _Gradients:
    """Sums over chunks in float32: of hidden (rows, dim), weight and bias. What one chunk is all of is a product, and
    no sum: torch rounds it into its place."""

    def __init__(self, work: _Work, hidden: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> None:
        self._work, self._to = work, (hidden, weight, bias)
        like = work.hidden
        gathered = work.places is not None
        products = {torch.float32, work.dtype} if len(work.chunks()) == 1 else {torch.float32}

        def sums(place: int, shape: tuple[int, ...]) -> Tensor | None:
            to = self._to[place]
            fits = to is not None and to.dtype in (products if place < 2 else (torch.float32,))
            if to is None or (fits and not (gathered and place == 0)):
                return to
            return like.new_empty(shape, dtype=torch.float32)

        self.hidden = sums(0, (work.rows, work.dim))
        self.weight = sums(1, (work.vocabulary, work.dim))
        self.bias = sums(2, (work.vocabulary,))
        for value in (self.weight, self._to[1]):
            if value is not None:
                work.passes.fresh(value)
        if not work.chunks():
            for value in (self.hidden, self.weight, self.bias):
                if value is not None:
                    value.zero_()

    def add_columns(self, z: Tensor, hidden: Tensor, start: int, first: int) -> None:
        """What the gradients of some logits add to those of weight and bias, and where weights are converted to those
        of hidden."""
        work, columns = self._work, slice(first, first + z.shape[1])
        if self.weight is not None:
            _add_product(z.t(), hidden, self.weight[columns], start == 0)
        if self.bias is not None:
            if start == 0:
                torch.sum(z, 0, dtype=torch.float32, out=self.bias[columns])
            else:
                self.bias[columns] += z.sum(0, dtype=torch.float32)
        if self.hidden is not None and work.dtype != work.weight.dtype:
            _add_product(z, work.weight_from(first), self.hidden[start : start + len(z)], first == 0)

    def add_rows(self, z: Tensor, start: int) -> None:
        """The gradient of hidden of a whole chunk."""
        work = self._work
        if self.hidden is not None and work.dtype == work.weight.dtype:
            _add_product(z, readable(work.weight), self.hidden[start : start + len(z)], True)

    def finish(self) -> None:
        if self.hidden is not None and not self._work.gathers:
            # Zeros times an infinite weight.
            self.hidden.masked_fill_((self._work.targets < 0)[:, None], 0.0)
        for place, value in enumerate((self.hidden, self.weight, self.bias)):
            to = self._to[place]
            if to is None or value is None or value is to:
                continue
            if place == 0:
                self._work.all_rows(value, to)
            else:
                to.copy_(value)


def _add_product(a: Tensor, b: Tensor, sums: Tensor, is_first: bool) -> None:
    """``sums = a b``, or ``+= a b`` in float32."""
    if a.dtype == sums.dtype:
        torch.addmm(sums, a, b, beta=0.0 if is_first else 1.0, out=sums)
    elif is_first:
        sums.copy_(a @ b)
    else:
        sums += a @ b


def readable(matrix: Tensor) -> Tensor:
    """``matrix`` as torch may read it: by AMX it takes bfloat16 in pairs, and where a row has an odd number of them
    what lies behind the row in memory too, whose NaN would come out."""
    odd = matrix.dtype == torch.bfloat16 and matrix.shape[1] % 2 == 1
    return matrix.contiguous() if odd else matrix


def _weights(
    targets: Tensor,
    logsumexp: Tensor,
    label_smoothing: float,
    vocabulary: int,
    of_loss: Tensor | float | None,
    of_logprobs: Tensor | None = None,
    of_entropy: Tensor | None = None,
    entropy: Tensor | None = None,
) -> Tensor:
    """(6, rows): a, b, u, e, logsumexp L and entropy H of the gradient of a logit z with probability p = e^(z - L),

    ``p (a - e (z - L + H)) - u``, and ``- b`` for the target's, from the gradients of loss, log-probability, entropy.
    """
    found = logsumexp.new_zeros((6, len(targets)))
    if of_loss is not None:
        found[0] = of_loss
        found[1] = (1 - label_smoothing) * of_loss
        found[2] = label_smoothing / vocabulary * of_loss
    if of_logprobs is not None:
        found[:2] -= of_logprobs
    if of_entropy is not None:
        found[3] = of_entropy
    found[4] = logsumexp
    if entropy is not None:
        found[5] = entropy
    return found


def forward(
    passes: Passes,
    sizes: Sizes,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    label_smoothing: float,
    softcap: float,
    reduction: str,
    details: bool,
    records: int,
    loss: Tensor,
    logprobs: Tensor | None,
    entropy: Tensor | None,
    statistics: Tensor | None,
    made_hidden: Tensor | None,
    made_weight: Tensor | None,
    made_bias: Tensor | None,
) -> None:
    work = _Work(passes, sizes, hidden, weight, bias, targets, softcap)
    makes = made_in_forward(reduction, details, records) != 0
    gradients = _Gradients(work, made_hidden, made_weight, made_bias) if makes else None
    # The loss, log-probability, entropy and logsumexp of each row.
    of_rows = hidden.new_zeros((4, work.rows), dtype=torch.float32)
    for start in work.chunks():
        h, t = work.rows_from(start)
        sums = h.new_zeros((5, len(t)), dtype=torch.float32)
        sums[0] = -torch.inf
        # A target that is not in the vocabulary has no logit.
        sums[2] = torch.nan
        for first in work.parts():
            z = work.multiply(h, first)
            passes.sums(z, work.bias_from(first), t, first, softcap, label_smoothing > 0, details, sums)
        found = of_rows[:, start : start + len(t)]
        _of_sums(sums, t, label_smoothing, work.vocabulary, details, found)
        if gradients is None:
            continue
        weights = _weights(t, found[3], label_smoothing, work.vocabulary, 1.0)
        for first in work.parts():
            z = work.logits[: len(t), first : first + work.columns]
            passes.gradient(z, work.bias_from(first), t, first, softcap, False, weights)
            gradients.add_columns(z, h, start, first)
        gradients.add_rows(work.logits[: len(t)], start)
    if gradients is not None:
        gradients.finish()
    if reduction == "none":
        work.all_rows(of_rows[0], loss)
    else:
        total = of_rows[0].sum(dtype=torch.float64)
        if reduction == "mean":
            total = total / ((work.targets >= 0).sum() if not work.gathers else work.rows)
        loss.copy_(total)
    kept = (None, None) if statistics is None else (statistics[0], statistics[1] if details else None)
    for row, to in ((1, logprobs), (2, entropy), (3, kept[0]), (2, kept[1])):
        if to is not None:
            work.all_rows(of_rows[row], to)


def _of_sums(
    sums: Tensor, targets: Tensor, label_smoothing: float, vocabulary: int, details: bool, found: Tensor
) -> None:
    highest, total, of_target, of_all, weighted = sums
    # Where all logits are -inf nothing was taken off them.
    base = highest.masked_fill(highest == -torch.inf, 0.0)
    log_total = total.log()
    torch.sub(of_target - base, log_total, out=found[1])
    torch.neg(found[1], out=found[0])
    if label_smoothing:
        found[0] *= 1 - label_smoothing
        found[0] -= label_smoothing * (of_all / vocabulary - base - log_total)
    if details:
        torch.sub(log_total, weighted / total, out=found[2])
    torch.add(base, log_total, out=found[3])
    # Selected: what is not labelled may be anything.
    found.masked_fill_(targets < 0, 0.0)


def backward(
    passes: Passes,
    sizes: Sizes,
    grad_loss: Tensor | None,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    statistics: Tensor | None,
    made_hidden: Tensor | None,
    made_weight: Tensor | None,
    made_bias: Tensor | None,
    label_smoothing: float,
    softcap: float,
    reduction: str,
    details: bool,
    records: int,
    grad_hidden: Tensor | None,
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
) -> None:
    of_sum = None if grad_loss is None or reduction == "none" else factor(targets, grad_loss, reduction)
    if statistics is None:
        assert of_sum is not None
        made = (made_hidden, made_weight, made_bias)
        to_all = (grad_hidden, grad_weight, grad_bias)
        for value, by, to in zip(made, factors(targets, of_sum), to_all, strict=True):
            if to is not None and value is not None:
                scale_into(value, by, to)
        return
    work = _Work(passes, sizes, hidden, weight, bias, targets, softcap)
    gradients = _Gradients(work, grad_hidden, grad_weight, grad_bias)
    of_loss = of_sum if of_sum is not None else work.mine(grad_loss)
    logsumexp, *entropy = (work.mine(row) for row in statistics)
    weights = _weights(
        work.targets,
        logsumexp,
        label_smoothing,
        max(1, work.vocabulary),
        of_loss,
        work.mine(grad_logprobs),
        work.mine(grad_entropy),
        *entropy,
    )
    for start in work.chunks():
        h, t = work.rows_from(start)
        for first in work.parts():
            z = work.multiply(h, first)
            # The rows of this chunk, one behind the other.
            of_rows = weights[:, start : start + len(t)].contiguous()
            passes.gradient(z, work.bias_from(first), t, first, softcap, grad_entropy is not None, of_rows)
            gradients.add_columns(z, h, start, first)
        gradients.add_rows(work.logits[: len(t)], start)
    gradients.finish()
