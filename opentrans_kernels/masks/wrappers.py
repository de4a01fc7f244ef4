"""Names that wrappers put inside the names of modules; a network is the same without them."""

from __future__ import annotations

#: torch.compile of a part, NNI's wrapper, fully sharded and checkpointed modules.
WRAPPERS = frozenset(
    ("_orig_mod", "_nni_wrapper", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
)


def without_wrappers(name: str) -> str:
    """ "layer1.0._orig_mod.conv1" -> "layer1.0.conv1"."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)
