"""Exact, measurably faster inference for pruned networks.

The public names are imported when they are first used, so ``import opentrans_kernels`` touches
neither CUDA nor triton nor the compiled extension::

    import opentrans_kernels as otk

    masks = otk.load_masks("mask.pth")
    plan = otk.make_plan(model, masks, input_size=(512, 512))
    print(plan)
    report = otk.accelerate(model, masks, plan=plan)
    print(report)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .lazy import lazy_exports

__version__ = "0.1.0"

# Public name -> the module that defines it.
_EXPORTS = {
    "MaskSet": "masks",
    "load_masks": "masks",
    "Plan": "plan",
    "make_plan": "plan",
    "Report": "accelerate",
    "accelerate": "accelerate",
    "accelerate_heads": "heads",
    "install_ms_deform_attn": "heads",
    "restore_heads": "heads",
    "uninstall_ms_deform_attn": "heads",
    "restore": "accelerate",
    "load_accelerated": "checkpoint",
    "save_accelerated": "checkpoint",
    "round_to_half": "half",
    "AlphaTable": "spectrum",
    "estimate_alpha": "spectrum",
    "TokenPlan": "tokens",
    "TokenState": "tokens",
    "reduce_tokens": "tokens",
    "restore_tokens": "tokens",
    "token_state": "tokens",
    "SparseConv2d": "nn",
    "SparseWeight": "pack",
    "backends": "dispatch",
    "explain": "dispatch",
    "lazy_masks": "heads",
    "mask_scores": "ops",
    "ms_deform_attn": "ops",
    "release_memory": "ops",
    "sparse_bottleneck": "ops",
    "sparse_conv2d": "ops",
    "sparse_linear": "ops",
    "sparse_mlp": "ops",
    "sparse_stage": "ops",
    "BuildMismatch": "errors",
    "CheckpointError": "errors",
    "KernelUnavailable": "errors",
    "MaskError": "errors",
    "OpenTransError": "errors",
    "PlanError": "errors",
    "UnsupportedModelError": "errors",
}

__all__ = ["__version__", *sorted(_EXPORTS)]

if TYPE_CHECKING:  # "as" marks a re-export for type checkers
    from .accelerate import Report as Report
    from .accelerate import accelerate as accelerate
    from .accelerate import restore as restore
    from .checkpoint import load_accelerated as load_accelerated
    from .checkpoint import save_accelerated as save_accelerated
    from .dispatch import backends as backends
    from .dispatch import explain as explain
    from .errors import BuildMismatch as BuildMismatch
    from .errors import CheckpointError as CheckpointError
    from .errors import KernelUnavailable as KernelUnavailable
    from .errors import MaskError as MaskError
    from .errors import OpenTransError as OpenTransError
    from .errors import PlanError as PlanError
    from .errors import UnsupportedModelError as UnsupportedModelError
    from .half import round_to_half as round_to_half
    from .heads import accelerate_heads as accelerate_heads
    from .heads import install_ms_deform_attn as install_ms_deform_attn
    from .heads import lazy_masks as lazy_masks
    from .heads import restore_heads as restore_heads
    from .heads import uninstall_ms_deform_attn as uninstall_ms_deform_attn
    from .masks import MaskSet as MaskSet
    from .masks import load_masks as load_masks
    from .nn import SparseConv2d as SparseConv2d
    from .ops import mask_scores as mask_scores
    from .ops import ms_deform_attn as ms_deform_attn
    from .ops import release_memory as release_memory
    from .ops import sparse_bottleneck as sparse_bottleneck
    from .ops import sparse_conv2d as sparse_conv2d
    from .ops import sparse_linear as sparse_linear
    from .ops import sparse_mlp as sparse_mlp
    from .ops import sparse_stage as sparse_stage
    from .pack import SparseWeight as SparseWeight
    from .plan import Plan as Plan
    from .plan import make_plan as make_plan
    from .spectrum import AlphaTable as AlphaTable
    from .spectrum import estimate_alpha as estimate_alpha
    from .tokens import TokenPlan as TokenPlan
    from .tokens import TokenState as TokenState
    from .tokens import reduce_tokens as reduce_tokens
    from .tokens import restore_tokens as restore_tokens
    from .tokens import token_state as token_state

__getattr__, __dir__ = lazy_exports(__name__, _EXPORTS)
