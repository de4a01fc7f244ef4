"""The operators: contracts (schema, fake, autograd, autocast) with their reference kernels."""

from .avg_pool2d import avg_pool2d
from .sparse_bottleneck import sparse_bottleneck
from .sparse_conv2d import sparse_conv2d

__all__ = ["avg_pool2d", "sparse_bottleneck", "sparse_conv2d"]
