"""Damaged packs and odd arguments against every op on the CPU: an error or the right answer, and
never a crash.

    python tests/fuzz_ops.py --seconds 600 --seed 1
    python tests/fuzz_ops.py --isa avx2 --seed 1 --first 1200 --cases 100 --trace

Runs once per instruction set of this CPU, each in a process of its own. A case depends on the seed
and its number only. Exit code 1: a case failed or a process died.
"""

from __future__ import annotations

import argparse
import faulthandler
import itertools
import math
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from fuzz_arguments import KINDS as ARGUMENTS
from kernel_cases import assert_within, layouts, masked_weight
from linear_cases import dense_linear
from test_isa import supported

from opentrans_kernels import native
from opentrans_kernels.activations import Activation, Kind
from opentrans_kernels.errors import OpenTransError, PlanError
from opentrans_kernels.ops.folded_conv2d import sparse as _sparse  # noqa: F401  (defines its ops)
from opentrans_kernels.pack import Header, SparseWeight

OPS = torch.ops.opentrans_kernels
REFUSED = (OpenTransError, RuntimeError)
HEADER = 13  # words
LARGEST = 1 << 20  # floats of a result that a case may ask for


def random_pack(rng: random.Random, kernel: int = 0, cin: int = 0, cout: int = 0) -> SparseWeight:
    cin, cout = cin or rng.randint(1, 40), cout or rng.randint(1, 40)
    free = kernel == 0
    kernel = kernel or rng.choice((1, 1, 2, 3, 3, 5, 7))
    weight = masked_weight(cout, cin, kernel, rng.choice((0.0, 0.05, 0.3, 1.0)), rng.randrange(99))
    return SparseWeight.from_dense(
        weight, torch.randn(cout),
        rng.choice((1, 1, 2, 3)) if free else 1,
        rng.choice((0, kernel // 2, 3)) if free else kernel // 2,
        chunk=rng.choice((None, 1, 3, 16)), row_block=rng.choice((None, 1, 5)),
    )  # fmt: skip


def damaged(rng: random.Random, structure: torch.Tensor) -> torch.Tensor:
    """A copy with a few words changed, or cut, or longer."""
    words = structure.clone()
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        # Half of the changes are to the header and the first blocks, where most depends on a word.
        at = rng.randrange(min(HEADER + 8, len(words)) if rng.random() < 0.5 else len(words))
        now = int(words[at])
        new = rng.choice((
            now + rng.choice((-2, -1, 1, 2)), now ^ (1 << rng.randrange(32)), -now,
            rng.getrandbits(32), int(words[rng.randrange(len(words))]), 2**31 - 1, -(2**31), 0,
        ))  # fmt: skip
        words[at] = (new + 2**31) % 2**32 - 2**31
    if rng.random() < 0.05:
        words = words[: rng.randrange(len(words))].clone()
    if rng.random() < 0.05:
        words = torch.cat([words, words[: rng.randint(1, 3)]])
    return words


def header_of(structure: torch.Tensor) -> Header | None:
    return Header(*structure[2:HEADER].tolist()) if len(structure) >= HEADER else None


def attempt(call: Callable[[], object]) -> object:
    """The call's result; None if it was refused. Anything else is a failure of the case."""
    try:
        return call()
    except REFUSED as error:
        if len(str(error)) < 20:
            raise AssertionError(f"an error that says nothing: {error!r}") from error
        return None


def image_for(rng: random.Random, header: Header | None, packed: SparseWeight) -> torch.Tensor:
    cin = header.cin if header and 0 < header.cin <= 256 and rng.random() < 0.8 else packed.cin
    x = torch.randn(rng.choice((0, 1, 1, 2)), cin, rng.randint(1, 17), rng.randint(1, 17))
    return x if not x.numel() else rng.choice(list(layouts(x)))[1]


def one_convolution(rng: random.Random) -> None:
    packed = random_pack(rng)
    structure = packed.structure if rng.random() < 0.1 else damaged(rng, packed.structure)
    header = header_of(structure)
    values, bias = packed.values, packed.bias
    geometry = [packed.cout, packed.kernel, packed.stride, packed.padding]
    if header is not None and rng.random() < 0.9:
        geometry = [header.cout, header.kernel, header.stride, header.padding]
        values = torch.randn(max(0, min(header.nnz, LARGEST)))
        bias = torch.randn(max(0, min(header.cout, LARGEST)))
    cout, kernel, stride, padding = geometry
    x = image_for(rng, header, packed)
    n, cin, h, w = x.shape
    size = [(s + 2 * padding - kernel) // max(stride, 1) + 1 for s in (h, w)]
    if max(cout, 1) * max(size[0], 1) * max(size[1], 1) > LARGEST:
        return
    shape = [n, max(0, min(cout, LARGEST)), *(max(s, 0) for s in size)]
    residual = torch.randn(shape) if rng.random() < 0.3 else None
    relu = rng.random() < 0.5
    try:
        valid = SparseWeight(structure, values, bias, cin, *geometry)
    except PlanError:
        valid = None
    out = attempt(lambda: OPS.sparse_conv2d(x, structure, values, bias, residual, *geometry, relu))
    grad = torch.randn(shape)
    grad_values = attempt(lambda: OPS.sparse_conv2d_wgrad(x, grad, structure, values))
    attempt(lambda: OPS.sparse_conv2d_dgrad(grad, structure, values, cin, h, w, stride, padding))
    if valid is None or min(size) <= 0:
        return
    assert out is not None and grad_values is not None, "a valid pack was refused"
    dense = valid.to_dense()
    if n:
        results = []
        for dtype in (torch.float64, torch.float32):
            y = F.conv2d(x.to(dtype), dense.to(dtype), bias.to(dtype), stride, padding)
            y = y if residual is None else y + residual
            results.append(y.relu() if relu else y)
        assert_within(out, *results, what=("conv", geometry), ulp=64)


def one_block(rng: random.Random) -> None:
    cin, width, pool = rng.randint(1, 20), rng.randint(1, 20), rng.choice((1, 1, 2, 3))
    down = pool > 1 or rng.random() < 0.5
    cout = rng.randint(1, 20) if down else cin
    packs = [random_pack(rng, k, i, o) for k, i, o in (
        (1, cin, width), (3, width, width), (1, width, cout), (1, cin, cout))]  # fmt: skip
    tensors = [t for p in packs[: 3 + down] for t in (p.structure, p.values, p.bias)]
    broken = rng.randrange(3 + down)
    tensors[3 * broken] = structure = damaged(rng, tensors[3 * broken])
    header = header_of(structure)
    if header is not None and rng.random() < 0.8:
        tensors[3 * broken + 1] = torch.randn(max(0, min(header.nnz, LARGEST)))
    x = torch.randn(rng.randint(1, 2), cin, rng.randint(1, 20), rng.randint(1, 20))
    x = rng.choice(list(layouts(x)))[1]
    missing = [] if down else [None] * 3
    threads = rng.choice((1, 1, 3))
    torch.set_num_threads(threads)
    attempt(lambda: OPS.sparse_bottleneck(
        x, *tensors, *missing, cout, pool, pool if down else 1))  # fmt: skip
    attempt(lambda: OPS.sparse_stage(x, tensors, [cout], [pool], [int(down)]))
    torch.set_num_threads(1)


def one_trained_layer(rng: random.Random) -> None:
    packed = random_pack(rng)
    structure = damaged(rng, packed.structure)
    weight = masked_weight(packed.cout, packed.cin, packed.kernel, 1.0).requires_grad_()
    x = torch.randn(1, packed.cin, rng.randint(1, 12), rng.randint(1, 12), requires_grad=True)
    size = [(s + 2 * packed.padding - packed.kernel) // packed.stride + 1 for s in x.shape[2:]]
    forward = OPS.sparse_folded_conv2d
    norm = (None, None, None, None, None, 1e-5)
    rest = (packed.stride, packed.padding, rng.random() < 0.5, packed.nnz, True, True)
    made = attempt(lambda: forward(x, weight, structure, *norm, None, *rest))
    if made is not None:
        attempt(lambda: made[0].sum().backward())
    grad = torch.randn(1, packed.cout, *(max(s, 0) for s in size))
    bits = torch.randint(0, 256, (packed.cout, rng.randint(0, 30)), dtype=torch.uint8)
    attempt(lambda: OPS.sparse_folded_conv2d_backward(
        grad, x.detach(), weight, structure, *norm, None, bits, list(x.shape), *rest[:4],
        [True, True, False, False, False, True]))  # fmt: skip


def one_linear_layer(rng: random.Random) -> None:
    """Alone and as the first or second layer of an MLP; a third of the packs are windows."""
    cin, cout = rng.randint(1, 40), rng.randint(1, 40)
    packed = random_pack(rng, rng.choice((1, 1, 3)), cin, cout)
    other = random_pack(rng, 1, cout, rng.randint(1, 40))
    structure = packed.structure if rng.random() < 0.1 else damaged(rng, packed.structure)
    header = header_of(structure)
    values, bias = packed.values, packed.bias
    if header is not None and rng.random() < 0.9:
        cout = header.cout
        values = torch.randn(max(0, min(header.nnz, LARGEST)))
        bias = torch.randn(max(0, min(cout, LARGEST)))
        cin = header.cin if 0 < header.cin <= 256 else cin
    sizes = (*rng.choice(((), (0,), (1,), (2, 7), (3, 1, 5), (33,))), cin)
    if math.prod(sizes[:-1]) * max(cout, 1) > LARGEST:
        return
    x = torch.randn(sizes)
    if len(sizes) > 2 and rng.random() < 0.5:
        x = x.transpose(0, -2).contiguous().transpose(0, -2)
    residual = torch.randn(*sizes[:-1], max(0, cout)) if rng.random() < 0.3 else None
    act = Activation(rng.choice(list(Kind)), 0.1)
    rest = (act.kind, act.slope)
    torch.set_num_threads(rng.choice((1, 1, 3)))
    try:
        valid = SparseWeight(structure, values, bias, cin, cout, 1, 1, 0)
    except PlanError:
        valid = None
    out = attempt(lambda: OPS.sparse_linear(x, structure, values, bias, residual, cout, *rest))
    one, two = (structure, values, bias), (other.structure, other.values, other.bias)
    with torch.no_grad():
        attempt(lambda: OPS.sparse_mlp(x, *one, *two, None, other.cout, *rest))
        hidden = torch.randn(*sizes[:-1], other.cin)
        attempt(lambda: OPS.sparse_mlp(hidden, *two, *one, residual, cout, *rest))
    torch.set_num_threads(1)
    if valid is None:
        return
    assert out is not None, "a valid pack was refused"
    weight = valid.to_dense()[:, :, 0, 0]
    results = [
        dense_linear(x, weight, bias, residual, act, d) for d in (torch.float64, torch.float32)
    ]
    assert_within(out, *results, what=("linear", cin, cout), ulp=64)


def one_mlp(rng: random.Random) -> None:
    """Two layers whose blocks of rows and chunks do not fit each other; one pack is damaged."""
    sizes = [rng.choice((1, 2, 7, 16, 33, 64, 65, 130)) for _ in range(3)]
    packs = []
    for cin, cout in itertools.pairwise(sizes):
        weight = masked_weight(cout, cin, 1, rng.choice((0.0, 0.05, 0.3, 1.0)), rng.randrange(99))
        bias = torch.randn(cout) if rng.random() < 0.7 else None
        chunk = rng.choice((None, 1, 2, 5, 64, cin, max(1, cin - 1)))
        row_block = rng.choice((None, 1, 2, 5, 64, cout, max(1, cout - 1)))
        packs.append(SparseWeight.from_dense(weight, bias, chunk=chunk, row_block=row_block))
    broken = rng.choice((None, 0, 1))
    structures = [packed.structure for packed in packs]
    if broken is not None:
        structures[broken] = damaged(rng, structures[broken])
    x = torch.randn(rng.choice((0, 1, 3, 8, 17, 20, 53, 119, 200)), sizes[0])
    x = x.t().contiguous().t() if rng.random() < 0.3 else x
    residual = torch.randn(len(x), sizes[2]) if rng.random() < 0.3 else None
    act = Activation(rng.choice(list(Kind)), 0.1)
    tensors = [
        t
        for s, packed in zip(structures, packs, strict=True)
        for t in (s, packed.values, packed.bias)
    ]
    try:
        valid = [
            SparseWeight(s, p.values, p.bias, p.cin, p.cout, 1, 1, 0)
            for s, p in zip(structures, packs, strict=True)
        ]
    except PlanError:
        valid = []
    torch.set_num_threads(rng.choice((1, 1, 2, 7)))
    with torch.no_grad():
        out = attempt(lambda: OPS.sparse_mlp(
            x, *tensors, residual, sizes[2], act.kind, act.slope))  # fmt: skip
    torch.set_num_threads(1)
    if not valid:
        return
    assert out is not None, "valid packs were refused"
    results = []
    for dtype in (torch.float64, torch.float32):
        first, last = (packed.to_dense()[:, :, 0, 0] for packed in valid)
        hidden = dense_linear(x, first, packs[0].bias, None, act, dtype)
        results.append(dense_linear(hidden, last, packs[1].bias, residual, dtype=dtype))
    if len(x):
        assert_within(out, *results, what=("mlp", sizes, len(x)), ulp=64)


PACKS = (
    one_convolution, one_convolution, one_convolution, one_block, one_trained_layer,
    one_linear_layer, one_mlp,
)  # fmt: skip


def run(seed: int, first: int, cases: int, seconds: float, trace: bool) -> int:
    """The number of cases done."""
    end = time.monotonic() + seconds
    number = first
    while number < first + cases and time.monotonic() < end:
        if number % 200 == 0 or trace:
            print(f"seed {seed} case {number}", flush=True)
        rng = random.Random(f"{seed} {number}")
        torch.manual_seed(rng.getrandbits(32))
        kind = rng.choice(PACKS if rng.random() < 0.7 else ARGUMENTS)
        try:
            kind(rng)
        except Exception:
            print(f"{kind.__name__} failed: --seed {seed} --first {number} --cases 1", flush=True)
            raise
        number += 1
    return number - first


def main() -> int:
    parser = argparse.ArgumentParser(description="Fuzz the CPU ops.")
    parser.add_argument("--seconds", type=float, default=60.0, help="in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--cases", type=int, default=sys.maxsize // 2, help="per instruction set")
    parser.add_argument("--isa", help="this one, in this process")
    parser.add_argument("--trace", action="store_true", help="print the number of every case")
    args = parser.parse_args()
    if args.isa:
        os.environ["OPENTRANS_CPU_CAPABILITY"] = args.isa
        faulthandler.enable()
        torch.set_num_threads(1)
        native.require("fuzzing the ops")
        done = run(args.seed, args.first, args.cases, args.seconds, args.trace)
        print(f"{native.cpu_capability()}: {done} cases")
        return 0
    names, failed = [name for name, there in supported().items() if there], []
    for name in names:
        command = [sys.executable, str(Path(__file__)), "--isa", name, "--seed", str(args.seed)]
        command += ["--first", str(args.first), "--cases", str(args.cases)]
        command += ["--seconds", str(args.seconds / len(names)), *["--trace"] * args.trace]
        if code := subprocess.run(command).returncode:
            failed.append(f"{name} (exit code {code})")
    print(f"failed: {', '.join(failed)}" if failed else f"passed: {', '.join(names)}")
    return 1 if failed or not names else 0


if __name__ == "__main__":
    sys.exit(main())
