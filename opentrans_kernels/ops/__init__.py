"""The operators: contracts (schema, fake, autograd, autocast) with their reference kernels."""

from .. import dispatch
from .avg_pool2d import avg_pool2d
from .bottleneck_chain import bottleneck_chain
from .depthwise_conv2d import depthwise_conv2d
from .fused_stem import fused_stem
from .gram_eigenvalues import gram_eigenvalues
from .implicit_gemm_conv2d import implicit_gemm_conv2d
from .library import release_memory, scratch_bytes
from .mask_scores import mask_scores
from .max_pool2d import max_pool2d
from .ms_deform_attn import ms_deform_attn
from .powerlaw_fit import powerlaw_fit
from .sparse_bottleneck import sparse_bottleneck
from .sparse_conv2d import sparse_conv2d
from .sparse_conv2d_nhwc import sparse_conv2d_nhwc
from .sparse_linear import sparse_linear
from .sparse_mlp import sparse_mlp
from .sparse_stage import sparse_stage
from .window_avg_pool2d import window_avg_pool2d
from .winograd_conv2d import winograd_conv2d

__all__ = [
    "avg_pool2d",
    "bottleneck_chain",
    "depthwise_conv2d",
    "fused_stem",
    "gram_eigenvalues",
    "implicit_gemm_conv2d",
    "mask_scores",
    "max_pool2d",
    "ms_deform_attn",
    "powerlaw_fit",
    "release_memory",
    "scratch_bytes",
    "sparse_bottleneck",
    "sparse_conv2d",
    "sparse_conv2d_nhwc",
    "sparse_linear",
    "sparse_mlp",
    "sparse_stage",
    "window_avg_pool2d",
    "winograd_conv2d",
]

# Look the kernels up now, so that torch.compile meets no import while tracing a first call.
for _row in dispatch.TABLE:
    if _row.needs != "triton":  # imported at first use, on a machine that has it
        dispatch.Resolution(_row, ()).function()
