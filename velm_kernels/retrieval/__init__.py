"""Which rows of a database are nearest to a query."""

from velm_kernels.retrieval.index import ImageTextIndex, Neighbours
from velm_kernels.retrieval.merge_topk import merge_topk
from velm_kernels.retrieval.sharded import ShardedIndex
from velm_kernels.retrieval.topk_similarity import topk_similarity

__all__ = ["ImageTextIndex", "Neighbours", "ShardedIndex", "merge_topk", "topk_similarity"]
