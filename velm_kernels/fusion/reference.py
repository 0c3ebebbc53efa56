"""The written meaning of the fusion operators, in plain torch."""

from velm_kernels.fusion.bilinear.reference import bilinear as bilinear
from velm_kernels.fusion.bilinear_attention.reference import bilinear_attention as bilinear_attention
from velm_kernels.fusion.bilinear_attention.reference import bilinear_attention_pool as bilinear_attention_pool
from velm_kernels.fusion.compact_bilinear.reference import compact_bilinear as compact_bilinear
from velm_kernels.fusion.count_sketches.reference import count_sketch as count_sketch
from velm_kernels.fusion.dropout_residual.reference import dropout_residual as dropout_residual
from velm_kernels.fusion.dropout_residual.reference import kept as kept
from velm_kernels.fusion.factorized_pool.reference import factorized_pool as factorized_pool
from velm_kernels.fusion.factorized_pool.reference import factorized_pool_gradient as factorized_pool_gradient
from velm_kernels.fusion.film.reference import film as film
from velm_kernels.fusion.low_rank_fusion.reference import low_rank_fusion as low_rank_fusion
from velm_kernels.fusion.outer_product_fusion.reference import outer_product_fusion as outer_product_fusion
from velm_kernels.fusion.tensor_fusion.reference import tensor_fusion as tensor_fusion
from velm_kernels.fusion.weighted_sum.reference import weighted_sum as weighted_sum
