"""Losses over all pairs and over a vocabulary."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import velm_kernels
from benchmarks import peers
from benchmarks.harness import Case, Function, Inputs, published


def _randn(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _pairs(generator: torch.Generator, pairs: int, dim: int) -> Inputs:
    """Normalised features, as models hand them over; those that belong together are alike."""
    image = _randn(generator, pairs, dim)
    text = image + _randn(generator, pairs, dim)
    return {"image": F.normalize(image, dim=1), "text": F.normalize(text, dim=1)}


def contrastive_case(pairs: int, dim: int) -> Case:
    def eager(image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
        scores = logit_scale * image @ text.t()
        own = torch.arange(pairs, device=image.device)
        return (F.cross_entropy(scores, own) + F.cross_entropy(scores.t(), own)) / 2

    def velm(image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
        return velm_kernels.contrastive_loss(image, text, logit_scale, normalize=False)

    ways: dict[str, Function] = {"eager": eager, "velm": velm}
    if (clip_loss := peers.open_clip_loss("ClipLoss")) is not None:
        ways["open_clip"] = lambda image, text, logit_scale: clip_loss(image, text, logit_scale)
    return _of_pairs(
        "contrastive_loss",
        "clip",
        pairs,
        dim,
        lambda generator: _pairs(generator, pairs, dim) | {"logit_scale": torch.tensor(14.3, dtype=torch.float64)},
        ("image", "text", "logit_scale"),
        ways,
    )


def sigmoid_case(pairs: int, dim: int) -> Case:
    def eager(image: Tensor, text: Tensor, logit_scale: Tensor, logit_bias: Tensor) -> Tensor:
        scores = logit_scale * image @ text.t() + logit_bias
        signs = 2 * torch.eye(pairs, dtype=image.dtype, device=image.device) - 1
        return -F.logsigmoid(signs * scores).sum() / pairs

    def velm(image: Tensor, text: Tensor, logit_scale: Tensor, logit_bias: Tensor) -> Tensor:
        return velm_kernels.sigmoid_loss(image, text, logit_scale, logit_bias, normalize=False)

    ways: dict[str, Function] = {"eager": eager, "velm": velm}
    if (siglip_loss := peers.open_clip_loss("SigLipLoss")) is not None:
        ways["open_clip"] = lambda image, text, logit_scale, logit_bias: siglip_loss(
            image, text, logit_scale, logit_bias
        )
    factors = {"logit_scale": torch.tensor(10.0).double(), "logit_bias": torch.tensor(-10.0).double()}
    return _of_pairs(
        "sigmoid_loss",
        "siglip",
        pairs,
        dim,
        lambda generator: _pairs(generator, pairs, dim) | factors,
        ("image", "text", "logit_scale", "logit_bias"),
        ways,
    )


def mutual_information_case(pairs: int, dim: int) -> Case:
    def eager(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        """InfoNCE."""
        scores = scale * x @ y.t()
        return (scores.diagonal() - scores.logsumexp(1)).mean() + torch.tensor(float(pairs)).log()

    def make(generator: torch.Generator) -> Inputs:
        drawn = _pairs(generator, pairs, dim)
        return {"x": drawn["image"], "y": drawn["text"], "scale": torch.tensor(14.3, dtype=torch.float64)}

    ways: dict[str, Function] = {
        "eager": eager,
        "velm": lambda x, y, scale: velm_kernels.mutual_information(x, y, scale),
    }
    return _of_pairs("mutual_information", "mine", pairs, dim, make, ("x", "y", "scale"), ways)


def _of_pairs(
    operator: str, name: str, pairs: int, dim: int, make: Any, wanted: tuple[str, ...], ways: dict[str, Function]
) -> Case:
    product, features = 2.0 * pairs * pairs * dim, 2.0 * pairs * dim
    return Case(
        operator=operator,
        name=name,
        shape=f"{pairs} pairs x {dim}",
        make=make,
        wanted=wanted,
        ways=ways,
        flops=product,
        traffic=features,
        # Of the scores, which nobody can keep without their memory, nothing is counted.
        backward_flops=2 * product,
        backward_traffic=2 * features,
        work=float(pairs * pairs),
    )


def maxsim_case(queries: int, tokens: int, documents: int, length: int, dim: int) -> Case:
    def eager(queries: Tensor, documents: Tensor) -> Tensor:
        """As ColPali's processor has it, in float32 as there; scores of 16 bits would leave ties."""
        wide = torch.promote_types(queries.dtype, torch.float32)
        scores = torch.einsum("bnd,csd->bcns", queries.to(wide), documents.to(wide))
        return scores.max(3).values.sum(2)

    product = 2.0 * queries * tokens * documents * length * dim
    traffic = float((queries * tokens + documents * length) * dim)
    return Case(
        operator="maxsim",
        name="colpali",
        shape=f"{queries} x {tokens} beside {documents} x {length}, {dim}",
        make=lambda generator: {
            "queries": F.normalize(_randn(generator, queries, tokens, dim), dim=2),
            "documents": F.normalize(_randn(generator, documents, length, dim), dim=2),
        },
        wanted=("queries", "documents"),
        ways={"eager": eager, "velm": velm_kernels.maxsim},
        flops=product,
        traffic=traffic,
        # Of each token one row.
        backward_flops=4.0 * queries * tokens * documents * dim,
        backward_traffic=2 * traffic,
        work=float(queries * tokens * documents * length),
    )


def linear_cross_entropy_case(share: int, batch: int, tokens: int, dim: int, vocabulary: int) -> Case:
    """``share``: one of so many tokens has a label, those of an answer at the end."""
    rows = batch * tokens

    def make(generator: torch.Generator) -> Inputs:
        targets = torch.randint(0, vocabulary, (batch, tokens), generator=generator)
        targets[:, : tokens - tokens // share] = -100
        return {
            "hidden": _randn(generator, batch, tokens, dim),
            "weight": dim**-0.5 * _randn(generator, vocabulary, dim),
            "targets": targets,
        }

    def eager(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        """As transformers has it: logits in float32."""
        logits = F.linear(hidden, weight).view(-1, vocabulary)
        wide = torch.promote_types(logits.dtype, torch.float32)
        return F.cross_entropy(logits.to(wide), targets.view(-1))

    product = 2.0 * rows // share * dim * vocabulary
    traffic = float(rows * dim + vocabulary * dim)
    return Case(
        operator="linear_cross_entropy",
        name="captions" if share == 1 else f"captions-one-of-{share}",
        shape=f"{rows // share} of {rows} x {dim}, vocabulary {vocabulary}",
        make=make,
        wanted=("hidden", "weight"),
        ways={"eager": eager, "velm": velm_kernels.linear_cross_entropy},
        flops=product,
        traffic=traffic,
        backward_flops=2 * product,
        backward_traffic=2 * traffic,
        work=float(rows * vocabulary),
    )


def cases() -> list[Case]:
    """At the sizes of the operators' own cases."""
    size: Any = published()
    return [
        contrastive_case(**size["clip"]),
        sigmoid_case(**size["siglip"]),
        mutual_information_case(**size["mine"]),
        maxsim_case(**size["colpali"]),
        linear_cross_entropy_case(1, **size["captions"]),
        linear_cross_entropy_case(8, **size["captions"]),
    ]
