#!/bin/sh
# torch 2.14.1, torch.ao.pruning. A model prepared by a sparsifier computes with masked weights, but
# its state_dict() holds the weights before masking and no mask: a checkpoint of it is dense. The
# masks are in sparsifier.state_dict().
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
"${PYTHON:-python3}" -m venv venv
venv/bin/python -m pip install -q torch==2.14.1 numpy==2.4.6
venv/bin/python -W ignore - <<'PYTHON'
import torch
from torch import nn
from torch.ao.pruning import BaseSparsifier

class Magnitude(BaseSparsifier):
    def update_mask(self, module, tensor_name, **options):
        made = getattr(module.parametrizations, tensor_name)
        made[0].mask.copy_(made.original.abs() > made.original.abs().median())

torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(4, 8, 3))
sparsifier = Magnitude(defaults={})
sparsifier.prepare(model, [{"tensor_fqn": "0.weight"}])
sparsifier.step()
state = model.state_dict()
kept = int((model[0].weight != 0).sum())
held = int((state["0.parametrizations.weight.original"] != 0).sum())
print("torch", torch.__version__)
print("names:", sorted(state))
print("weights the model computes with:", kept, "of 288; weights in state_dict():", held)
print("keys of sparsifier.state_dict():", sorted(sparsifier.state_dict()))
assert sorted(state) == ["0.bias", "0.parametrizations.weight.original"]
assert (kept, held) == (144, 288)
PYTHON
# Seen:
#   torch 2.14.1+cu130
#   names: ['0.bias', '0.parametrizations.weight.original']
#   weights the model computes with: 144 of 288; weights in state_dict(): 288
