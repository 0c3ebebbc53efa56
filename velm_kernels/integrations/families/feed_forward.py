"""Feed-forward blocks: BERT's intermediate and output layers, and CLIP's two-layer perceptron, in every family."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..patching import Replacement, replaces
from ..projections import project


class Intermediate(Replacement):
    dense: nn.Module
    intermediate_act_fn: Any

    def forward(self, hidden_states: Tensor) -> Tensor:
        return project(self.dense, hidden_states, self.intermediate_act_fn)


class PostNormOutput(Replacement):
    """Projection, dropout, residual, layer norm."""

    dense: nn.Module
    dropout: nn.Dropout
    LayerNorm: nn.Module

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        return self.LayerNorm(project(self.dense, hidden_states, residual=input_tensor, dropout=self.dropout))


class PreNormOutput(Replacement):
    """Projection, dropout, residual."""

    dense: nn.Module
    dropout: nn.Dropout

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        return project(self.dense, hidden_states, residual=input_tensor, dropout=self.dropout)


class MLP(Replacement):
    fc1: nn.Module
    fc2: nn.Module
    activation_fn: Any

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.fc2(project(self.fc1, hidden_states, self.activation_fn))


_CLASSES: list[tuple[str, str, str, type[Replacement]]] = [
    ("visual_bert", "visual_bert.modeling_visual_bert", "VisualBertIntermediate", Intermediate),
    ("visual_bert", "visual_bert.modeling_visual_bert", "VisualBertSelfOutput", PostNormOutput),
    ("visual_bert", "visual_bert.modeling_visual_bert", "VisualBertOutput", PostNormOutput),
    ("lxmert", "lxmert.modeling_lxmert", "LxmertIntermediate", Intermediate),
    ("lxmert", "lxmert.modeling_lxmert", "LxmertAttentionOutput", PostNormOutput),
    ("lxmert", "lxmert.modeling_lxmert", "LxmertOutput", PostNormOutput),
    ("vilt", "vilt.modeling_vilt", "ViltIntermediate", Intermediate),
    ("vilt", "vilt.modeling_vilt", "ViltOutput", PreNormOutput),
    ("flava", "flava.modeling_flava", "FlavaIntermediate", Intermediate),
    ("flava", "flava.modeling_flava", "FlavaOutput", PreNormOutput),
    ("blip", "blip.modeling_blip", "BlipMLP", MLP),
    ("blip", "blip.modeling_blip_text", "BlipTextIntermediate", Intermediate),
    ("blip", "blip.modeling_blip_text", "BlipTextSelfOutput", PostNormOutput),
    ("blip", "blip.modeling_blip_text", "BlipTextOutput", PostNormOutput),
    ("bridgetower", "bridgetower.modeling_bridgetower", "BridgeTowerIntermediate", Intermediate),
    ("bridgetower", "bridgetower.modeling_bridgetower", "BridgeTowerSelfOutput", PostNormOutput),
    ("bridgetower", "bridgetower.modeling_bridgetower", "BridgeTowerOutput", PostNormOutput),
    ("clip", "clip.modeling_clip", "CLIPMLP", MLP),
    ("siglip", "siglip.modeling_siglip", "SiglipMLP", MLP),
    ("siglip2", "siglip2.modeling_siglip2", "Siglip2MLP", MLP),
    ("idefics2", "idefics2.modeling_idefics2", "Idefics2VisionMLP", MLP),
    ("idefics3", "idefics3.modeling_idefics3", "Idefics3VisionMLP", MLP),
    ("smolvlm", "smolvlm.modeling_smolvlm", "SmolVLMVisionMLP", MLP),
]

for _family, _module, _name, _replacement in _CLASSES:
    _by = "linear with activation" if _replacement in (Intermediate, MLP) else "linear with residual"
    replaces(f"transformers.models.{_module}", _name, family=_family, by=_by)(_replacement)
