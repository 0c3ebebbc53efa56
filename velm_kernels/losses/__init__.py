"""What models are trained by: losses whose scores never exist whole."""

from velm_kernels.losses.contrastive_loss import contrastive_loss

__all__ = ["contrastive_loss"]
