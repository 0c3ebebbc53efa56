"""Qwen2-VL and what comes from it: patches that a processor has flattened, embedded by a convolution of one position.

Torch's three-dimensional convolution takes 6 times as long as the product that it is in float32 on a CPU, and 80 times
as long in bfloat16.
"""

from __future__ import annotations

from torch import Tensor, nn

from velm_kernels.linear import patch_embed
from velm_kernels.linear.modules import why_no_patch_embedding

from ..patching import Replacement, replaces
from ..plain import are_plain


class PatchEmbed(Replacement):
    velm_absorbs = (("proj", (nn.Conv3d,)),)
    proj: nn.Conv3d

    @classmethod
    def why_not(cls, module: nn.Module) -> str | None:
        proj = module.proj
        if type(proj) is not nn.Conv3d:
            return f"proj is a {type(proj).__name__}"
        reason = why_no_patch_embedding(proj)
        return None if reason is None else f"proj is no patch embedding: {reason}"

    def forward(self, hidden_states: Tensor) -> Tensor:
        weight, bias = self.proj.weight, self.proj.bias
        reason = why_no_patch_embedding(self.proj)
        if not are_plain(weight, bias):
            reason = f"the weight of proj is a {type(weight).__name__}"
        if reason is not None:
            return self.velm_original(reason, hidden_states)
        rows = hidden_states.view(-1, weight[0].numel())
        return patch_embed(rows.to(dtype=weight.dtype), weight, bias)


# By the name of the model: the class, of which all have the same forward.
_CLASSES = {
    "cohere_compass": "CohereCompassVisionPatchEmbed",
    "exaone4_5": "Exaone4_5_PatchEmbed",
    "glm4v": "Glm4vVisionPatchEmbed",
    "glm4v_moe": "Glm4vMoeVisionPatchEmbed",
    "glm5_next": "Glm5NextVisionPatchEmbed",
    "glm_ocr": "GlmOcrVisionPatchEmbed",
    "minimax_m3_vl": "MiniMaxM3VLVisionEmbeddings",
    "qwen2_5_omni": "Qwen2_5_VisionPatchEmbed",
    "qwen2_5_vl": "Qwen2_5_VisionPatchEmbed",
    "qwen2_vl": "PatchEmbed",
    "qwen3_5": "Qwen3_5VisionPatchEmbed",
    "qwen3_5_moe": "Qwen3_5MoeVisionPatchEmbed",
    "qwen3_omni_moe": "Qwen3OmniMoeVisionPatchEmbed",
    "qwen3_vl": "Qwen3VLVisionPatchEmbed",
    "qwen3_vl_moe": "Qwen3VLMoeVisionPatchEmbed",
    "qwen4_exp": "Qwen4ExpVisionPatchEmbed",
}

for _model, _name in _CLASSES.items():
    replaces(f"transformers.models.{_model}.modeling_{_model}", _name, family=_model, by="patch_embed")(PatchEmbed)
