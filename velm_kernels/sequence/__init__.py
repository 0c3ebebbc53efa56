"""Around a sequence of tokens: the rotary embedding of queries and keys."""

from velm_kernels.sequence.rotary import rotary

__all__ = ["rotary"]
