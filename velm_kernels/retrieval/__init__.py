"""Which rows of a database are nearest to a query."""

from velm_kernels.retrieval.merge_topk import merge_topk
from velm_kernels.retrieval.topk_similarity import topk_similarity

__all__ = ["merge_topk", "topk_similarity"]
