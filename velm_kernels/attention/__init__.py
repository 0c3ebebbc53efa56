"""Cross-modal attention: operators and modules."""

from velm_kernels.attention.ops import cross_attention, cross_attention_varlen

__all__ = ["cross_attention", "cross_attention_varlen"]
