"""Count sketches of the rows of two matrices: the operator below compact bilinear pooling, not a public one."""

from velm_kernels.fusion.count_sketches.op import OPERATOR as OPERATOR
