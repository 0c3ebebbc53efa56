"""The operators inside models of open_clip, trained or not, without importing it::

    import open_clip
    from velm_kernels.integrations.open_clip import patch

    model, _, preprocess = open_clip.create_model_and_transforms("coca_ViT-L-14", pretrained="...")
    print(patch(model))

These are `velm_kernels.patch` and `velm_kernels.unpatch`, which know what is replaced in a model of open_clip by its
classes, as they know those of transformers (a text tower may be one): the attentional poolers of CoCa and the pooling
head of the residual networks (`attention_pool`: neither keys nor values are formed), the transformer blocks of all
towers and of CoCa's text decoder (attention, feed-forward block, residuals), and the mean over the text that
transformers' towers are pooled by (`masked_pool`). Blocks with normed queries, cosine attention or scaled heads are
left, and so are towers of timm.
"""

from .patching import patch, unpatch

__all__ = ["patch", "unpatch"]
