"""Random calls of cross-attention for the tests: hypothesis draws a :class:`Case`, which makes the tensors."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st

from velm_kernels.attention.cross_attention import reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MASKS = ("key_lengths", "key_ranges", "key_mask", "mask")


@dataclass(frozen=True)
class Case:
    batch: int = 2
    kv_heads: int = 2
    group: int = 1
    queries: int = 5
    keys: int = 7
    head_dim: int = 8
    value_dim: int = 8
    dtype: torch.dtype = torch.float32
    masks: frozenset[str] = frozenset()
    mask_shape: tuple[bool, bool, bool, bool] = (True, True, True, True)  # False: broadcast
    bias_shape: tuple[bool, bool, bool, bool] | None = None
    bias_float32: bool = False
    key_height: int = 0  # of a grid of keys with rel_pos_height and rel_pos_width; 0: none
    rel_pos_float32: bool = False
    is_causal: bool = False
    softcap: float | None = None
    norms: tuple[bool, bool] = (False, False)
    dropout_p: float = 0.0
    input_scale: float = 1.0
    scale: float | None = None
    layout: str = "heads first"
    poison: bool = True
    seed: int = 0
    generator: torch.Generator = field(default_factory=torch.Generator, compare=False, repr=False)

    def randn(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def randint(self, low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=self.generator)

    @property
    def heads(self) -> int:
        return self.kv_heads * self.group

    def laid_out(self, tensor: torch.Tensor) -> torch.Tensor:
        """The same values in memory as a model would have them."""
        tensor = tensor.to(self.dtype)
        if self.layout == "queries first":
            return tensor.transpose(1, 2).contiguous().transpose(1, 2)
        if self.layout == "sliced":
            around = torch.full((*tensor.shape[:-1], 2 * tensor.shape[-1] + 3), torch.nan, dtype=self.dtype)
            around[..., 3 : 3 + tensor.shape[-1]] = tensor
            return around[..., 3 : 3 + tensor.shape[-1]]
        if self.layout == "columns first":
            return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)
        return tensor.contiguous()

    def masking(self) -> dict[str, Any]:
        self.generator.manual_seed(self.seed + 1)
        given: dict[str, Any] = {}
        if "key_lengths" in self.masks:
            given["key_lengths"] = self.randint(0, self.keys + 1, self.batch)
        if "key_ranges" in self.masks:
            ends = self.randint(0, self.keys + 1, 2, self.batch, self.queries)
            given["key_ranges"] = (ends[0], ends[1]) if self.seed % 2 else tuple(ends.sort(0).values)
        if "key_mask" in self.masks:
            given["key_mask"] = self.randn(self.batch, self.keys) > -0.5
        if "mask" in self.masks:
            given["mask"] = self.randn(*self.broadcast(self.mask_shape)) > -0.5
        return given

    def upstream(self) -> list[torch.Tensor]:
        """Gradients of out and logsumexp."""
        self.generator.manual_seed(self.seed + 2)
        rows = (self.batch, self.heads, self.queries)
        return [self.randn(*rows, self.value_dim), self.randn(*rows)]

    def broadcast(self, kept: tuple[bool, ...]) -> list[int]:
        full = (self.batch, self.heads, self.queries, self.keys)
        return [size if keep else 1 for size, keep in zip(full, kept, strict=True)]

    def settings(self) -> dict[str, Any]:
        return {
            "is_causal": self.is_causal,
            "softcap": self.softcap,
            "scale": self.scale,
            "dropout_p": self.dropout_p,
            "norm_eps": 1e-5,
        }

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything that has a gradient, on its dtype's grid, before poisoning."""
        self.generator.manual_seed(self.seed)
        size = self.input_scale
        tensors = {
            "query": self.laid_out(size * self.randn(self.batch, self.heads, self.queries, self.head_dim)),
            "key": self.laid_out(size * self.randn(self.batch, self.kv_heads, self.keys, self.head_dim)),
            "value": self.laid_out(self.randn(self.batch, self.kv_heads, self.keys, self.value_dim)),
        }
        if self.bias_shape is not None:
            bias = 2 * self.randn(*self.broadcast(self.bias_shape))
            bias[self.randn(*bias.shape) > 1.5] = -torch.inf
            tensors["bias"] = bias.to(torch.float32 if self.bias_float32 else self.dtype)
        if self.key_height:
            for name, size in (("height", self.key_height), ("width", self.keys // self.key_height)):
                rel_pos = 2 * self.randn(self.batch, self.heads, self.queries, size)
                dtype = torch.float32 if self.rel_pos_float32 else self.dtype
                tensors[f"rel_pos_{name}"] = self.laid_out(rel_pos).to(dtype)
        for name, wanted in zip(("query_norm_weight", "key_norm_weight"), self.norms, strict=True):
            if wanted:
                tensors[name] = (1 + 0.3 * self.randn(self.head_dim)).to(self.dtype)
        return tensors

    def visible(self, masking: dict[str, Any], bias: torch.Tensor | None) -> torch.Tensor:
        """Bool ``(batch, heads, queries, keys)``."""
        visible = reference.visible_keys(
            self.batch, self.queries, self.keys, torch.empty(0).device, is_causal=self.is_causal, **masking
        ).expand(self.batch, self.heads, self.queries, self.keys)
        return visible if bias is None else visible & (bias != -torch.inf)

    def poisoned(self, tensors: dict[str, torch.Tensor], visible: torch.Tensor) -> dict[str, torch.Tensor]:
        """Copies with NaN and infinity wherever no (query, key) pair is visible."""
        poisoned = {name: tensor.clone() for name, tensor in tensors.items()}
        if not self.poison or not visible.numel():
            return poisoned
        poisoned["query"][~visible.any(3)] = torch.nan
        unseen = ~visible.view(self.batch, self.kv_heads, self.group, self.queries, self.keys).any(3).any(2)
        poisoned["key"][unseen] = torch.inf
        poisoned["value"][unseen] = torch.nan
        if self.key_height:
            on_grid = visible.unflatten(3, (self.key_height, -1))
            poisoned["rel_pos_height"][~on_grid.any(4)] = torch.nan
            poisoned["rel_pos_width"][~on_grid.any(3)] = torch.nan
        return poisoned | {name: self.laid_out(poisoned[name]) for name in ("query", "key", "value")}

    def floors(
        self, tensors: dict[str, torch.Tensor], visible: torch.Tensor, upstream: torch.Tensor
    ) -> dict[str, float]:
        """Half of the results' sizes if their terms did not cancel, with even attention weights."""
        query, key, value = (tensors[name].double() for name in ("query", "key", "value"))
        rms = [tensor.square().mean(-1, keepdim=True).add(1e-5).sqrt() for tensor in (query, key)]
        normed = [tensor / size if wanted else tensor for tensor, size, wanted in zip((query, key), rms, self.norms)]
        spread = (upstream.abs() @ value.abs().repeat_interleave(self.group, 1).transpose(-1, -2) + 1) * visible
        spread = 0.5 / (1 - self.dropout_p) * spread / visible.sum(-1, keepdim=True).clamp(min=1)
        scores = spread * (self.head_dim**-0.5 if self.scale is None else self.scale)
        grad_query = scores @ normed[1].abs().repeat_interleave(self.group, 1)
        grad_key = (scores.transpose(-1, -2) @ normed[0].abs()).unflatten(1, (self.kv_heads, self.group)).sum(2)
        sizes = {"query_norm_weight": grad_query * normed[0].abs(), "key_norm_weight": grad_key * normed[1].abs()}
        sizes = {name: size.sum((0, 1, 2)) for name, size in sizes.items()}
        sizes["query"] = grad_query / rms[0] if self.norms[0] else grad_query
        sizes["key"] = grad_key / rms[1] if self.norms[1] else grad_key
        if self.bias_shape is not None:
            sizes["bias"] = spread.sum([dim for dim, kept in enumerate(self.bias_shape) if not kept], keepdim=True)
        if self.key_height:
            on_grid = spread.unflatten(3, (self.key_height, -1))
            sizes |= {"rel_pos_height": on_grid.sum(4), "rel_pos_width": on_grid.sum(3)}
        sizes = {f"grad_{name}": size for name, size in sizes.items()}
        seen = 0.5 * visible.double() / visible.sum(-1, keepdim=True).clamp(min=1)
        sizes["out"] = seen @ value.abs().repeat_interleave(self.group, 1)
        return {name: float(torch.linalg.vector_norm(size)) for name, size in sizes.items()}


@st.composite
def cases(draw: st.DrawFn, *, largest: int = 150, dtypes: tuple[torch.dtype, ...] = DTYPES) -> Case:
    flags = st.tuples(*[st.booleans()] * 4)
    norms = draw(st.sampled_from([(False, False)] * 3 + [(True, True), (True, False), (False, True)]))
    return Case(
        batch=draw(st.integers(1, 3)),
        kv_heads=draw(st.integers(1, 2)),
        group=draw(st.sampled_from([1, 1, 2, 4])),
        queries=draw(st.one_of(st.integers(0, 10), st.integers(0, largest))),
        keys=draw(st.one_of(st.integers(0, 10), st.integers(0, 2 * largest))),
        head_dim=draw(st.one_of(st.sampled_from([8, 16, 64]), st.integers(1, 100))),
        value_dim=draw(st.one_of(st.sampled_from([8, 16, 64]), st.integers(1, 100))),
        dtype=draw(st.sampled_from(dtypes)),
        masks=draw(st.frozensets(st.sampled_from(MASKS), max_size=2)),
        mask_shape=draw(flags),
        bias_shape=draw(st.none() | flags),
        bias_float32=draw(st.booleans()),
        is_causal=draw(st.booleans()) and draw(st.booleans()),
        softcap=draw(st.sampled_from([None, None, 3.0, 30.0])),
        norms=norms,
        dropout_p=draw(st.sampled_from([0.0, 0.0, 0.2, 0.9])),
        input_scale=draw(st.sampled_from([0.1, 1.0, 3.0])),
        scale=draw(st.sampled_from([None, None, 0.05, 1.0])),
        layout=draw(st.sampled_from(["heads first", "queries first", "sliced", "columns first"])),
        seed=draw(st.integers(0, 2**16)),
    )
