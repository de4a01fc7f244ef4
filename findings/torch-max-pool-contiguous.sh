#!/bin/sh
# torch 2.14.1, CPU. `max_pool2d` of a contiguous NCHW tensor takes more than five times as long as of
# the same tensor with channels last (one thread: more than ten times).
# Results are equal.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
"${PYTHON:-python3}" -m venv venv
venv/bin/python -m pip install -q torch==2.14.1 numpy==2.4.6
cat >pool.py <<'PYTHON'
import time

import torch
import torch.nn.functional as F

torch.set_num_threads(1)
planes = torch.randn(1, 64, 112, 112)
last = planes.to(memory_format=torch.channels_last)


def fastest(x, window):
    times = []
    for _ in range(40):
        start = time.thread_time()
        F.max_pool2d(x, *window)
        times.append(time.thread_time() - start)
    return min(times)


print("torch", torch.__version__.split("+")[0])
with torch.no_grad():
    for window in ((3, 2, 1), (2, 2, 0)):
        same = torch.equal(F.max_pool2d(planes, *window), F.max_pool2d(last, *window))
        ratio = fastest(planes, window) / fastest(last, window)
        print("window, stride, padding", window, "equal", same, "ratio", round(ratio, 1))
        print("slow" if same and ratio > 5 else "not slow")
PYTHON
venv/bin/python -W ignore pool.py | tee said
test "$(grep -c '^slow$' said)" = 2
