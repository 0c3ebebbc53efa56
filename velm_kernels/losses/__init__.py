"""What models are trained by: losses whose scores never exist whole."""

from velm_kernels.losses.contrastive_loss import contrastive_loss
from velm_kernels.losses.linear_cross_entropy import linear_cross_entropy
from velm_kernels.losses.maxsim import maxsim
from velm_kernels.losses.maxsim_contrastive_loss import maxsim_contrastive_loss
from velm_kernels.losses.modules import CoCaLoss, ContrastiveLoss, LinearCrossEntropyLoss, SigmoidLoss
from velm_kernels.losses.mutual_information import mutual_information
from velm_kernels.losses.sample_hard_negatives import sample_hard_negatives
from velm_kernels.losses.sigmoid_loss import sigmoid_loss

__all__ = [
    "CoCaLoss",
    "ContrastiveLoss",
    "LinearCrossEntropyLoss",
    "SigmoidLoss",
    "contrastive_loss",
    "linear_cross_entropy",
    "maxsim",
    "maxsim_contrastive_loss",
    "mutual_information",
    "sample_hard_negatives",
    "sigmoid_loss",
]
