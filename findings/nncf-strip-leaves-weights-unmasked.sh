#!/bin/sh
# nncf 3.4.0, torch backend. nncf.strip(...) is to leave a plain model. To NATIVE and to DQ it
# keeps the weights as they were before masking, with the masks in hook modules beside them; read as
# plain weights such a state dict is the dense network.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
"${PYTHON:-python3}" -m venv venv
venv/bin/python -m pip install -q nncf==3.4.0 torch==2.14.1 torchao==0.18.0 numpy==2.4.6
venv/bin/python -W ignore - <<'PYTHON'
import nncf
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)

    def forward(self, x):
        return self.second(self.first(x).relu())

torch.manual_seed(0)
example = torch.randn(1, 3, 8, 8)
pruned = nncf.prune(
    Net().eval(), mode=nncf.PruneMode.UNSTRUCTURED_MAGNITUDE_GLOBAL, ratio=0.5, examples_inputs=example
)
print("nncf", nncf.__version__, "torch", torch.__version__)
for form in (nncf.StripFormat.NATIVE, nncf.StripFormat.DQ):
    state = nncf.strip(
        pruned, do_copy=True, strip_format=form, example_input=example
    ).state_dict()
    weights = {k: v for k, v in state.items() if k.endswith(".weight") and v.ndim == 4}
    masks = {k: v for k, v in state.items() if "mask" in k}
    zeros = sum(int((v == 0).sum()) for v in weights.values())
    removed = sum(int((v == 0).sum()) for v in masks.values())
    print(f"{form.name}: zeros in the weights: {zeros}; removed by {len(masks)} masks: {removed}")
    assert zeros == 0 and removed > 0
PYTHON
