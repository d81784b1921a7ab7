"""Which decoder layer's output a published SAE was trained on."""

import re

from microedit_vllm.errors import MicroEditError

_TRANSFORMER_LENS = re.compile(r"blocks\.(\d{1,4})\.hook_resid_(pre|post)")
_MODULE = re.compile(r"(?:[a-z_]+\.)*(?:layers|h)\.(\d{1,4})")


def layer_of(hook: str) -> int:
    """Our layer number of a hook point.

    Args:
        hook: TransformerLens' name (`blocks.5.hook_resid_post`; the input of a layer,
            `hook_resid_pre`, is the output of the one below) or a module's (`model.layers.5`).

    Raises:
        MicroEditError: it is not a decoder layer's output.
    """
    if found := _TRANSFORMER_LENS.fullmatch(hook):
        layer = int(found[1]) - (found[2] == "pre")
        if layer >= 0:
            return layer
    elif found := _MODULE.fullmatch(hook):
        return int(found[1])
    raise MicroEditError(
        f"the SAE was trained on {hook}; edits need one of the residual stream behind a decoder "
        "layer (blocks.N.hook_resid_post)"
    )
