"""The arguments of attention as the Triton kernels take them, and how their launches are chosen."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from velm_kernels.attention.triton_kernels.tiles import (
    Dropout,
    Masks,
    MatrixStrides,
    Scaling,
    Sizes,
    Strides,
    pack_bits_kernel,
)
from velm_kernels.backends import triton as backend
from velm_kernels.backends.triton import Config, architecture, choose, dimension_class, launch, piece, precision
from velm_kernels.layout import unit_last_stride
from velm_kernels.triton.launches import cdiv

# Offsets inside one tile are 32-bit up to this row stride.
INT32_STRIDE = 1 << 23
# Columns of a row that GUARDED launches multiply at a time; of rows that are wider than two of these, half of a row
# where they sum over queries.
GUARDED_PIECE = 64


def row_strides(x: torch.Tensor) -> Strides:
    """Strides of (batch, heads, rows, dim), or of packed (tokens, heads, dim)."""
    if x.dim() == 4:
        return Strides(x.stride(0), x.stride(1), x.stride(2))
    return Strides(0, x.stride(1), x.stride(0))


def matrix_strides(x: torch.Tensor | None) -> MatrixStrides | None:
    """Strides of what broadcasts to (batch, heads, queries, keys)."""
    if x is None:
        return None
    return MatrixStrides(*(0 if size == 1 else stride for size, stride in zip(x.shape, x.stride())))


def _masks_strides(name: str, dimensions: tuple[str, ...], x: torch.Tensor | None) -> dict[str, Any]:
    """The strides of `mask` or `bias` as fields of `Masks`."""
    strides = matrix_strides(x) or (None,) * len(dimensions)
    return {f"{name}_{dimension}": stride for dimension, stride in zip(dimensions, strides)}


def aligned_empty(shape: torch.Size, like: torch.Tensor) -> torch.Tensor:
    """A matrix (..., queries, keys) whose rows begin at multiples of 16 bytes."""
    step = 16 // like.element_size()
    return like.new_empty((*shape[:-1], cdiv(shape[-1], step) * step))[..., : shape[-1]]


def aligned_like(x: torch.Tensor) -> torch.Tensor:
    """`x`, which is contiguous, where its rows begin so, else memory of this kind."""
    return x if x.shape[-1] * x.element_size() % 16 == 0 else aligned_empty(x.shape, x)


def aligned_rows(bias: torch.Tensor, keys: int) -> torch.Tensor:
    """`bias` with rows that kernels can copy 16 bytes at a time: itself, or a copy where its strides are others, such
    as those of 577 keys behind one another. Element by element, its loads would take more registers and instructions
    than the rest of a tile, for every head and in every kernel."""
    step = 16 // bias.element_size()
    strides = [stride for size, stride in zip(bias.shape[:-1], bias.stride()) if size > 1]
    is_aligned = bias.data_ptr() % 16 == 0 and all(stride % step == 0 for stride in strides)
    if is_aligned and bias.shape[-1] == keys and (keys == 1 or bias.stride(-1) == 1):
        return bias
    return aligned_empty(torch.Size((*bias.shape[:-1], keys)), bias).copy_(bias)


def dropout_of(seed: torch.Tensor | None, dropout_p: float, direction: int = 0) -> Dropout | None:
    """Dropout of attention weights, None where there is no seed."""
    return None if seed is None else Dropout(seed, int(dropout_p * 2**32), 1.0 / (1.0 - dropout_p), direction)


def pack_bits(mask: torch.Tensor) -> torch.Tensor:
    """Bool (batch, heads, queries, keys), or (batch, keys), to int64 words of 64 keys each along its last dimension: an
    eighth of what every kernel and every head would read again, and no tile of booleans in registers."""
    full = mask if mask.dim() == 4 else mask[:, None, None, :]
    batch, heads, queries, keys = full.shape
    # A tile of 128 keys reads two words.
    row_words, stride = 2 * cdiv(keys, 128), full.stride(3)
    if mask.dim() == 4 and keys == 1:
        # It may broadcast along keys: one word for all of them.
        row_words, stride, keys = 1, 0, 64
    strides = MatrixStrides(full.stride(0), full.stride(1), full.stride(2), stride)
    rows = batch * heads * queries
    words = mask.new_empty((*mask.shape[:-1], row_words), dtype=torch.int64)
    config = Config(16, min(8, 1 << (row_words - 1).bit_length()), 4, 1)
    word_blocks = cdiv(row_words, config.block_n)
    launch(
        "pack_bits",
        pack_bits_kernel,
        cdiv(rows, config.block_m) * word_blocks,
        (full.view(torch.uint8), words, strides, heads, queries, keys, rows, row_words, word_blocks),
        {"BLOCK_M": config.block_m, "BLOCK_W": config.block_n},
        config,
    )
    return words


@dataclass
class Problem:
    """The arguments of an attention operator in the form the kernels take them."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    masks: Masks
    dropout: Dropout | None
    scaling: Scaling
    sizes: Sizes
    batch: int
    heads: int
    kv_heads: int
    # Longest sequences; totals of tokens are in `sizes`.
    queries: int
    keys: int
    causal: bool
    packed: bool
    variant: str

    @property
    def device(self) -> torch.device:
        return self.query.device

    @property
    def dtype(self) -> torch.dtype:
        return self.query.dtype

    @property
    def head_dim(self) -> int:
        return self.query.shape[-1]

    @property
    def value_dim(self) -> int:
        return self.value.shape[-1]

    @property
    def rows(self) -> int:
        """Rows of logsumexp."""
        return self.heads * self.sizes.queries * (1 if self.packed else self.batch)

    @property
    def logsumexp_strides(self) -> Strides:
        return Strides(0 if self.packed else self.heads * self.queries, self.sizes.queries, self.rows)

    @property
    def hides_columns(self) -> bool:
        """Whether keys between the first and the last one that a block of queries sees may be seen by none of them."""
        m = self.masks
        return m.range_start is not None or m.mask is not None or m.bias is not None

    @property
    def first_phase(self) -> int:
        """The first phase of `key_tiles` that there can be. Where a mask or a bias is read in any case, all tiles are
        treated alike, one loop instead of three; without ranges every block begins with keys that all its rows see."""
        m = self.masks
        if m.mask is not None or m.bias is not None:
            return 2
        return 1 if m.range_start is None else 0

    @property
    def level(self) -> str:
        """How much the kernels do beside the products, which decides how large their tiles may be."""
        if self.hides_columns or self.dropout is not None or self.scaling.cap is not None:
            return "loaded"
        return "plain" if self.masks.rel_height is None else "grid"

    @property
    def widest(self) -> int:
        """Columns of a row of query, key or value."""
        return max(self.head_dim, self.value_dim)

    @property
    def is_empty(self) -> bool:
        return self.rows == 0 or self.batch == 0 or self.queries == 0

    def flags(self, rows: int) -> torch.Tensor | None:
        """Where programs report NaN in the rows of all of their blocks (see `report_nan`); None where they need not, as
        all queries see the same keys."""
        return self.query.new_empty((rows,), dtype=torch.int8) if self.causal or self.hides_columns else None

    def launch_guarded(
        self,
        kind: str,
        kernel: Any,
        grid: int,
        flags: torch.Tensor | None,
        arguments: tuple[Any, ...],
        constants: dict[str, Any],
        config: Config,
    ) -> None:
        """Launch `kernel`, which sums over keys, and what has reported NaN in `flags` again."""
        launch(kind, kernel, grid, arguments, constants | {"GUARDED": False, "FIRST_PHASE": self.first_phase}, config)
        if flags is not None:
            self.launch_again(kind, kernel, grid, arguments, constants, config, "block_n")

    def launch_again(
        self,
        kind: str,
        kernel: Any,
        grid: int,
        arguments: tuple[Any, ...],
        constants: dict[str, Any],
        config: Config,
        sums_over: str,
    ) -> None:
        """The GUARDED launch of a `kernel` that sums over keys ("block_n") or queries ("block_m"). It rarely has
        anything to do: smaller tiles that are not prefetched, rows in pieces and more warps make room for adding rows
        one by one, and cost nothing."""
        num_warps = 8 if self.dtype == torch.float32 or sums_over == "block_m" else config.num_warps
        if sums_over == "block_m" and self.dtype != torch.float32 and config.block_n >= 64:
            # Four warps read tensor memory; with eight, some of 128 registers were spilled. For keys of more than 64
            # columns Triton 3.6 spills with four.
            is_spilled = backend.version() < (3, 7) and kind == "grad_key" and self.widest > 64
            num_warps = 4 if architecture(self.device) == 100 and not is_spilled else num_warps
        # Of the few rows of decoding, what is prefetched is not held in registers.
        num_stages = config.num_stages if config.block_m < 32 and sums_over == "block_n" else 1
        smaller = {sums_over: max(16, getattr(config, sums_over) // 2)}
        config = replace(config, **smaller, num_warps=num_warps, num_stages=num_stages)
        most = GUARDED_PIECE
        older = backend.before(f"{kind}_guarded", self.level, self.dtype, self.widest, architecture(self.device))
        if older is not None:
            # The grid is that of the first launch.
            other = "block_n" if sums_over == "block_m" else "block_m"
            config = replace(older, **{other: getattr(config, other)})
            most = older.columns or most
        widths = {name: constants[name] for name in ("BLOCK_D", "BLOCK_DV")}
        halves = {name: width // 2 if sums_over == "block_m" else 0 for name, width in widths.items()}
        pieces = {name: min(width, max(most, halves[name])) for name, width in widths.items()}
        constants = constants | pieces | {"GUARDED": True, "FIRST_PHASE": 2}
        constants |= {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n}
        launch(f"{kind}_guarded", kernel, grid, arguments, constants, config)

    def choose(self, kind: str, run: Any, adjust: Any = lambda config: config) -> Config:
        shape = (self.batch, self.heads, self.kv_heads, self.queries, self.keys, self.value_dim)
        return choose(kind, self.level, self.dtype, self.widest, self.device, shape, self.variant, run, adjust)

    def constants(self, config: Config, *tensors: torch.Tensor) -> dict[str, Any]:
        """What the kernels over query-key tiles are compiled for."""
        strides = [stride for x in (self.query, self.key, self.value, *tensors) for stride in row_strides(x)]
        return {
            "CAUSAL": self.causal,
            "HEAD_DIM": self.head_dim,
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "BLOCK_D": piece(self.dtype, self.head_dim),
            "INT64": max(strides) >= INT32_STRIDE,
            "PRECISION": precision(self.dtype),
        }

    def value_constants(self) -> dict[str, Any]:
        return {"VALUE_DIM": self.value_dim, "BLOCK_DV": piece(self.dtype, self.value_dim)}

    def value_rows(self) -> dict[str, Any]:
        """For kernels that hold whole rows."""
        return {"VALUE_DIM": self.value_dim, "BLOCK_DV": dimension_class(self.value_dim)}


def prepare(a: Any, query: torch.Tensor, key: torch.Tensor) -> Problem:
    """From the arguments of the operator attention by name, with `query` and `key` as their norms leave them."""
    value = unit_last_stride(a.value)
    packed = a.cu_seqlens_q is not None
    heads, kv_heads = query.shape[1], key.shape[1]
    if packed:
        batch = a.cu_seqlens_q.shape[0] - 1
        total_q, total_k = query.shape[0], key.shape[0]
        queries, keys = min(a.max_seqlen_q, total_q), min(a.max_seqlen_k, total_k)
    else:
        batch, queries, keys = query.shape[0], query.shape[2], key.shape[2]
        total_q, total_k = queries, keys
    drops = a.dropout_p > 0
    bias = None if a.bias is None else aligned_rows(a.bias, keys)
    key_mask, mask = (None if bits is None else pack_bits(bits) for bits in (a.key_mask, a.mask))
    masks = Masks(
        lengths=a.key_lengths,
        range_start=a.range_start,
        range_stop=a.range_stop,
        key_mask=key_mask,
        key_words=None if key_mask is None else key_mask.stride(0),
        mask=mask,
        **_masks_strides("mask", ("batch", "head", "row", "word"), mask),
        bias=bias,
        **_masks_strides("bias", ("batch", "head", "row"), bias),
        rel_height=a.rel_pos_height,
        **_masks_strides("rel_height", ("batch", "head", "row"), a.rel_pos_height),
        rel_width=a.rel_pos_width,
        **_masks_strides("rel_width", ("batch", "head", "row"), a.rel_pos_width),
        key_width=None if a.rel_pos_width is None else a.rel_pos_width.shape[3],
    )
    softcap, scale = a.softcap, a.scale
    if softcap > 0:
        scaling = Scaling(product=scale / softcap, cap=softcap)
    else:
        scaling = Scaling(product=scale, cap=None)
    hiding = ("key_lengths", "range_start", "key_mask", "mask", "bias", "rel_pos_height")
    present = [name for name in hiding if getattr(a, name) is not None]
    present += [
        name
        for name, there in (
            ("causal", a.is_causal),
            ("softcap", softcap > 0),
            ("dropout", drops),
            ("packed", packed),
        )
        if there
    ]
    return Problem(
        query=query,
        key=key,
        value=value,
        masks=masks,
        dropout=dropout_of(a.seed, a.dropout_p) if drops else None,
        scaling=scaling,
        sizes=Sizes(heads, heads // kv_heads if kv_heads else 1, total_q, total_k, a.cu_seqlens_q, a.cu_seqlens_k),
        batch=batch,
        heads=heads,
        kv_heads=kv_heads,
        queries=queries,
        keys=keys,
        causal=a.is_causal,
        packed=packed,
        variant=",".join(present),
    )
