#!/bin/sh
# triton 3.9.0, interpreter (TRITON_INTERPRET=1). `block & single`, a block of comparisons and one
# comparison of a loaded number, holds int32 values while its declared type is int1. A block and a
# block stays boolean.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
"${PYTHON:-python3}" -m venv venv
venv/bin/python -m pip install -q triton==3.9.0 torch==2.15.0 numpy==2.4.6
cat >kernel.py <<'PYTHON'
import torch
import triton
import triton.language as tl

@triton.jit
def both(numbers, count, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    block = at < BLOCK // 2
    single = tl.load(numbers) > 0
    print("block", block.handle.data.dtype, "single", single.handle.data.dtype)
    print("block & block", (block & (at < count)).handle.data.dtype)
    print("block & single", (block & single).handle.data.dtype)
    print("type that is declared", (block & single).dtype)

print("triton", triton.__version__, "torch", torch.__version__)
both[(1,)](torch.ones(1, dtype=torch.int32), 3, BLOCK=16)
PYTHON
TRITON_INTERPRET=1 venv/bin/python -W ignore kernel.py | tee said
grep -q '^block bool single bool$' said
grep -q '^block & block bool$' said
grep -q '^block & single int32$' said
grep -q '^type that is declared int1$' said
