#!/bin/sh
# compressed-tensors 0.10.2, BitmaskCompressor. `row_offsets` of a matrix say where the values of each
# row begin in `compressed`. Of a convolution's weight (four dimensions) they are running counts along
# the first dimension only, one for each place of the others: no offsets into the values. The
# package's own decompression does not use them.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
"${PYTHON:-python3}" -m venv venv
venv/bin/python -m pip install -q compressed-tensors==0.10.2 torch==2.14.1 numpy==2.4.6
venv/bin/python -W ignore - <<'PYTHON'
import compressed_tensors
import torch
from compressed_tensors.compressors import BitmaskCompressor

def offsets(*shape):
    torch.manual_seed(0)
    weight = torch.randn(shape) * (torch.rand(shape) < 0.5)
    found = BitmaskCompressor().compress({"w.weight": weight}, compression_targets={"w"})
    rows = weight.reshape(-1, shape[-1])
    true = torch.cat([torch.zeros(1), (rows != 0).sum(-1).cumsum(0)[:-1]]).long()
    held = next(v for k, v in found.items() if k.endswith("row_offsets"))
    return held, true

print("compressed-tensors", compressed_tensors.__version__, "torch", torch.__version__)
held, true = offsets(4, 8)
print("matrix 4x8:", held.flatten().tolist(), "true:", true.tolist())
assert torch.equal(held.flatten().long(), true)
held, true = offsets(2, 2, 3, 3)
print("weight 2x2x3x3:", held.flatten().tolist(), "true:", true.tolist())
assert not torch.equal(held.flatten().long(), true)
PYTHON
