#!/bin/sh
# torch 2.14.1, CPU. Tokens [1, H * W, C] of one image are a map [1, C, H, W] by a view, and so they
# are used by models with a transformer and a feature pyramid. Made with transpose and view, that map
# says of itself that it is channels_last contiguous; `F.interpolate` returns a planar result for it
# all the same, and takes many times as long as for a copy of the map, whose result is channels_last.
# The view's batch stride, which means nothing for one image, makes the difference. The numbers agree.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
"${PYTHON:-python3}" -m venv venv
venv/bin/python -m pip install -q torch==2.14.1 numpy==2.4.6
venv/bin/python -W ignore - <<'PYTHON'
import time

import torch
import torch.nn.functional as F

torch.set_num_threads(1)
last = torch.channels_last
tokens = torch.randn(1, 4096, 256)
view = tokens.transpose(1, 2).view(1, 256, 64, 64)
copied = view.clone(memory_format=last)

def double(x):
    return F.interpolate(x, size=(128, 128), mode="bilinear", align_corners=False)

def seconds(x):
    found = []
    for _ in range(9):
        began = time.thread_time()
        double(x)
        found.append(time.thread_time() - began)
    return min(found)

print("torch", torch.__version__)
for name, x in (("view of tokens", view), ("its copy", copied)):
    out = double(x)
    print(f"{name}: channels_last {x.is_contiguous(memory_format=last)}, strides {x.stride()};",
          f"result channels_last {out.is_contiguous(memory_format=last)}, planar {out.is_contiguous()}")
ratio = seconds(view) / seconds(copied)
print(f"time of the view over time of the copy: {ratio:.0f}x")
assert view.is_contiguous(memory_format=last) and copied.is_contiguous(memory_format=last)
assert double(view).is_contiguous() and double(copied).is_contiguous(memory_format=last)
assert torch.equal(double(view), double(copied)) and ratio > 3
PYTHON
