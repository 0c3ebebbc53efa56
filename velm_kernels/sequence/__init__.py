"""Around a sequence of tokens: features of pictures among its embeddings, rotary embeddings of its queries and keys."""

from velm_kernels.sequence.add_at_tokens import add_at_tokens
from velm_kernels.sequence.rotary import rotary
from velm_kernels.sequence.splice_into import splice_into
from velm_kernels.sequence.splice_tokens import splice_tokens

__all__ = ["add_at_tokens", "rotary", "splice_into", "splice_tokens"]
