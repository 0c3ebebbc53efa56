"""Triton code of tiles of scores, which the operators of attention share."""
