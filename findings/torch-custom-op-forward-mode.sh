#!/bin/sh
# torch 2.14.1. A custom op with torch.library.register_autograd has a backward and nothing else.
# Asked for a forward-mode derivative (torch.func.jvp), torch does not raise: it gives zero.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
"${PYTHON:-python3}" -m venv venv
venv/bin/python -m pip install -q torch==2.14.1 numpy==2.4.6
venv/bin/python -W ignore - <<'PYTHON'
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
