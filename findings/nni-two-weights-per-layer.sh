#!/bin/sh
# nni 3.0. While a pruner's wrappers are in place, state_dict() holds the weight of a layer twice:
# under its own name and under `_nni_wrapper`, with the mask beside the latter. The one in the wrapper
# is the parameter that an optimizer trains; the other is a plain buffer.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
"${PYTHON:-python3}" -m venv venv
venv/bin/python -m pip install -q nni==3.0 torch==2.14.1 setuptools==80.9.0 numpy==2.4.6
venv/bin/python -W ignore - <<'PYTHON'
import nni
import torch
from nni.compression.pruning import LevelPruner
from torch import nn

torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)).eval()
pruner = LevelPruner(model, [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}])
pruner.compress()
names = sorted(k for k in model.state_dict() if k.startswith("0.") and "weight" in k)
trained = sorted(k for k, _ in model.named_parameters() if k.startswith("0.") and "weight" in k)
print("nni", nni.__version__, "torch", torch.__version__)
print("state_dict:", names)
print("parameters:", trained)
print("buffers:", sorted(k for k, _ in model.named_buffers() if k.startswith("0.")))
assert "0.weight" in names and "0._nni_wrapper.weight" in names
assert trained == ["0._nni_wrapper.weight"]
PYTHON
