"""Using the operators inside models people already have.

`patch(model)` replaces modules in place, `unpatch(model)` takes the replacements out again, and
`velm_kernels.integrations.transformers.register()` offers the attention operator to the attention interface of
transformers. `velm_kernels.integrations.open_clip` says what is replaced in models of open_clip. How a new model family
is written stands at the top of `patching.py`.
"""

from .patching import patch, supported_families, unpatch
from .report import Entry, Fallback, Report

__all__ = ["Entry", "Fallback", "Report", "patch", "supported_families", "unpatch"]
