#!/bin/sh
# torch 2.14.1. A custom op with torch.library.register_autograd has a backward and nothing else.
# Asked for a forward-mode derivative (torch.func.jvp), torch does not raise: it gives zero.
. "$(dirname "$0")/lib.sh"
environment torch==2.14.1 numpy
finding <<'PYTHON'
import torch

@torch.library.custom_op("demo::double", mutates_args=())
def double(x: torch.Tensor) -> torch.Tensor:
    return 2 * x

double.register_fake(torch.empty_like)
double.register_autograd(lambda ctx, grad: 2 * grad)
x = torch.ones(3, requires_grad=True)
double(x).sum().backward()
value, tangent = torch.func.jvp(double, (torch.ones(3),), (torch.ones(3),))
print("torch", torch.__version__)
print("backward:", x.grad.tolist(), "forward mode:", tangent.tolist())
assert x.grad.tolist() == [2.0, 2.0, 2.0]
assert tangent.tolist() == [0.0, 0.0, 0.0]
PYTHON
