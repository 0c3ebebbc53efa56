"""The library's modules in plain PyTorch, as their papers' code computes them, with the same parameters."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import velm_kernels


def root_and_norm(z: Tensor) -> Tensor:
    z = torch.sqrt(F.relu(z)) - torch.sqrt(F.relu(-z))
    return F.normalize(z, dim=-1)


class _Projected:
    """Both projected, joined by `fuse`, and projected again, without dropout."""

    def forward(self, x: Sequence[Tensor]) -> Tensor:
        a, b = (self.activated(layer(value), self.activ_input) for layer, value in zip(self._inputs(), x, strict=True))
        return self.activated(self.linear_out(self.fuse(a, b)), self.activ_output)

    def _inputs(self) -> tuple[nn.Linear, nn.Linear]:
        return self.linear0, self.linear1

    @staticmethod
    def activated(x: Tensor, name: str) -> Tensor:
        return getattr(F, name)(x) if name else x

    def normalized(self, z: Tensor) -> Tensor:
        return root_and_norm(z) if self.normalize else z


class LinearSum(_Projected, velm_kernels.LinearSum):
    def fuse(self, a: Tensor, b: Tensor) -> Tensor:
        return self.normalized(a + b)


class MFB(_Projected, velm_kernels.MFB):
    def fuse(self, a: Tensor, b: Tensor) -> Tensor:
        return self.normalized((a * b).unflatten(-1, (self.mm_dim, self.factor)).sum(-1))


class MLB(_Projected, velm_kernels.MLB):
    def fuse(self, a: Tensor, b: Tensor) -> Tensor:
        return self.normalized(a * b)


class MFH(_Projected, velm_kernels.MFH):
    def forward(self, x: Sequence[Tensor]) -> Tensor:
        product, sums = 1.0, []
        for layers in ((self.linear0_0, self.linear1_0), (self.linear0_1, self.linear1_1)):
            a, b = (self.activated(layer(value), self.activ_input) for layer, value in zip(layers, x, strict=True))
            product = a * b * product
            sums.append(self.normalized(product.unflatten(-1, (self.mm_dim, self.factor)).sum(-1)))
        return self.activated(self.linear_out(torch.cat(sums, -1)), self.activ_output)


class Mutan(_Projected, velm_kernels.Mutan):
    def fuse(self, a: Tensor, b: Tensor) -> Tensor:
        product = self.merge_linear0(a) * self.merge_linear1(b)
        return self.normalized(product.unflatten(-1, (self.rank, self.mm_dim)).sum(-2))


class Tucker(_Projected, velm_kernels.Tucker):
    def fuse(self, a: Tensor, b: Tensor) -> Tensor:
        return self.normalized(self.bilinear(a, b))


class _Chunks(_Projected):
    def fuse(self, a: Tensor, b: Tensor) -> Tensor:
        joined = []
        for chunk, pair in enumerate(zip(a.split(self.sizes_list, -1), b.split(self.sizes_list, -1), strict=True)):
            z = self.fuse_chunk(chunk, *pair)
            joined.append(root_and_norm(z) if self.pos_norm == "before_cat" else z)
        z = torch.cat(joined, -1)
        return root_and_norm(z) if self.pos_norm == "after_cat" else z


class BlockTucker(_Chunks, velm_kernels.BlockTucker):
    def fuse_chunk(self, chunk: int, a: Tensor, b: Tensor) -> Tensor:
        return self.bilinears[chunk](a, b)


class Block(_Chunks, velm_kernels.Block):
    def fuse_chunk(self, chunk: int, a: Tensor, b: Tensor) -> Tensor:
        product = self.merge_linears0[chunk](a) * self.merge_linears1[chunk](b)
        return product.unflatten(-1, (self.rank, a.shape[-1])).sum(-2)


class ConcatMLP(velm_kernels.ConcatMLP):
    def forward(self, x: Sequence[Tensor]) -> Tensor:
        z = torch.cat(tuple(x), -1)
        *inner, last = self.mlp["linears"]
        for layer in inner:
            z = getattr(F, self.activation)(layer(z))
        return last(z)


class TensorFusion(velm_kernels.TensorFusion):
    def forward(self, *inputs: Tensor) -> Tensor:
        first, *others = (F.pad(x, (1, 0), value=1.0) for x in inputs)
        for other in others:
            first = (first[..., :, None] * other[..., None, :]).flatten(-2)
        return F.linear(first, self.weight, self.bias)


class LowRankFusion(velm_kernels.LowRankFusion):
    def forward(self, *inputs: Tensor) -> Tensor:
        product = 1.0
        for x, factor in zip(inputs, self.factors, strict=True):
            product = product * (F.pad(x, (1, 0), value=1.0) @ factor)
        return torch.einsum("r,rbo->bo", self.weight, product) + self.bias


class FiLM(velm_kernels.FiLM):
    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        gamma, beta = self.linear(condition).chunk(2, -1)
        return gamma * x + beta


class MCB(_Projected, velm_kernels.MCB):
    def forward(self, x: Sequence[Tensor]) -> Tensor:
        spectra = []
        for value, sketch in zip(x, (self.mcb.sketch1, self.mcb.sketch2), strict=True):
            sums = value.new_zeros(*value.shape[:-1], self.mm_dim).index_add(-1, sketch.h.long(), value * sketch.s)
            spectra.append(torch.fft.rfft(sums))
        return self.activated(self.linear_out(torch.fft.irfft(spectra[0] * spectra[1], self.mm_dim)), self.activ_output)


def _weight_normed(projection: nn.Module, x: Tensor) -> Tensor:
    (layer,) = projection.main.values()
    return F.relu(F.linear(x, layer.weight_v * (layer.weight_g / layer.weight_v.norm()), layer.bias))


class BilinearAttention(velm_kernels.BilinearAttention):
    def forward(self, v: Tensor, q: Tensor, v_mask: None = None) -> tuple[Tensor, Tensor]:
        parts = self.logits
        v, q = _weight_normed(parts.v_net, v), _weight_normed(parts.q_net, q)
        h = parts.h_mat_v * (parts.h_mat_g / parts.h_mat_v.norm())
        logits = (h * v[:, None]) @ q[:, None].transpose(2, 3) + parts.h_bias
        return logits.flatten(2).softmax(-1).view_as(logits), logits


class BilinearAttentionPool(velm_kernels.BilinearAttentionPool):
    def forward(self, v: Tensor, q: Tensor, attention: Tensor) -> Tensor:
        v, q = _weight_normed(self.v_net, v), _weight_normed(self.q_net, q)
        return torch.einsum("bvk,bgvq,bqk->bgk", v, attention, q)


class AttentionPool(velm_kernels.AttentionPool):
    def forward(self, x: Tensor) -> Tensor:
        query = self.query.expand(len(x), *self.query.shape)
        return self.attention(query, x, x, need_weights=False)[0]


class PerceiverResampler(velm_kernels.PerceiverResampler):
    def forward(self, x: Tensor) -> Tensor:
        latents = self.latents.expand(len(x), *self.latents.shape)
        for attention, layers in self.blocks:
            normed = attention.latents_layer_norm(latents)
            states = torch.cat([normed, attention.context_layer_norm(x)], 1)
            query, key, value = (
                layer(rows).unflatten(2, (-1, attention.head_dim)).transpose(1, 2)
                for rows, layer in ((normed, attention.q_proj), (states, attention.k_proj), (states, attention.v_proj))
            )
            weights = (query @ key.transpose(2, 3) * attention.head_dim**-0.5).softmax(-1)
            latents = latents + attention.output_proj((weights @ value).transpose(1, 2).flatten(2))
            latents = latents + layers.c_proj(F.relu(layers.fc(layers.ln(latents))))
        return self.layer_norm(latents)


class TokenMerge(velm_kernels.TokenMerge):
    """Of tokens that have not been merged before, all of them free to be."""

    def forward(self, x: Tensor) -> tuple[Tensor]:
        r, normed = int(self.ratio * x.shape[1]), F.normalize(x.detach(), dim=-1)
        best, partner = (normed[:, ::2] @ normed[:, 1::2].transpose(1, 2)).max(-1)
        order = best.argsort(-1, descending=True)

        def rows(index: Tensor) -> Tensor:
            return index[..., None].expand(-1, -1, x.shape[2])

        kept = x[:, ::2].gather(1, rows(order[:, r:]))
        merged, into = x[:, ::2].gather(1, rows(order[:, :r])), partner.gather(1, order[:, :r])
        joined = x[:, 1::2].scatter_reduce(1, rows(into), merged, reduce="mean")
        return (torch.cat([kept, joined], 1),)


def mean(x: Tensor) -> Tensor:
    return x.mean(-2)


def max(x: Tensor) -> Tensor:
    return x.amax(-2)


def logsumexp(x: Tensor) -> Tensor:
    return x.logsumexp(-2)


def gem(x: Tensor) -> Tensor:
    return x.clamp_min(1e-6).pow(3).mean(-2).pow(1 / 3)
