"""Damaged files of every kind the project reads, by the thousand.

A small valid file of each kind is damaged in many ways with a fixed seed. Reading it must end in
an OpenTransError or in what the file held; a kind, or a change, that carries no checksum may also
give something else. Anything else is a failure: another exception, a hang, memory. A case is named
by seed, target and number, from which it is made again; no file is kept.

    python tests/fuzz_files.py --seconds 600 --seed 1
"""

from __future__ import annotations

import argparse
import io
import json
import pickle
import random
import resource
import signal
import struct
import sys
import tempfile
import time
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from masked_nets import masks_of, net
from torch import nn

from opentrans.state import TrainingState, read_training_state
from opentrans_kernels import accelerate, checkpoint
from opentrans_kernels.errors import OpenTransError
from opentrans_kernels.masks import load_masks, open_checkpoint, packed, read_state_dict

MOST_SECONDS, MOST_BYTES = 10, 500 << 20  # of one case; of the whole run, beyond its start
ODD_NUMBERS = (0, 1, 2, 7, 8, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1)
ODD_TEXT = ("0", "-1", "2", "1e999", "NaN", str(2**63), "1" + "0" * 60, "null", '"x"', "[]", "{}")


class Hang(BaseException):
    """A case took longer than MOST_SECONDS."""


@dataclass(frozen=True)
class Target:
    """A kind of file.

    make: writes a valid one. read: what it holds, comparable by ``equal``. strict: a checksum
    covers all of that, so damage is noticed. edits: changes that keep file and checksums
    consistent, after which other content is right.
    """

    make: Callable[[Path], Any]
    read: Callable[[Path], Any]
    strict: bool
    edits: tuple[Callable[[bytes, random.Random], bytes], ...] = ()


@dataclass
class Summary:
    """What happened to how many files; ``failures``: seed, target, number, and what was raised."""

    cases: int = 0
    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    bytes_used: int = 0

    def __str__(self) -> str:
        lines = [f"{self.cases} files, {self.bytes_used >> 20} MiB more than at the start"]
        for name in sorted({target for target, _ in self.outcomes}):
            counts = ", ".join(f"{n} {o}" for (t, o), n in self.outcomes.items() if t == name)
            lines.append(f"  {name}: {counts}")
        return "\n".join([*lines, *self.failures])


def equal(one: Any, two: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(two, torch.Tensor):
        same = one.dtype == two.dtype and one.shape == two.shape
        return same and torch.equal(one.nan_to_num(7), two.nan_to_num(7))
    if isinstance(one, Mapping) and isinstance(two, Mapping):
        return set(one) == set(two) and all(equal(one[key], two[key]) for key in one)
    if isinstance(one, list | tuple) and isinstance(two, list | tuple):
        return len(one) == len(two) and all(map(equal, one, two))
    return bool(one == two)


# Damage that no checksum knows of: bits, bytes, lengths, blocks.


def flip_bits(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8, 64))):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def truncate(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(1, len(data))]


def splice(data: bytes, rng: random.Random) -> bytes:
    a, b = rng.randrange(len(data)), rng.randrange(len(data))
    block = data[a : a + rng.choice((1, 4, 64, 512))]
    kept = rng.choice((0, len(block)))  # inserted, or written over
    return data[:b] + block + data[b + kept :]


def cut_out(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data))
    return data[:at] + data[at + rng.choice((1, 4, 64, 512)) :]


def edit_field(data: bytes, rng: random.Random) -> bytes:
    """An odd number into a zip header, or the length at the file's beginning."""
    places = [0]
    for magic in (b"PK\x01\x02", b"PK\x03\x04", b"PK\x05\x06"):
        at = data.find(magic)
        while at >= 0:
            places.append(at)
            at = data.find(magic, at + 1)
    at = rng.choice(places) + rng.randrange(46)
    width = rng.choice("BHIQ")
    number = struct.pack("<" + width, rng.choice(ODD_NUMBERS) % 256 ** struct.calcsize(width))
    return data[:at] + number + data[at + len(number) :]


def edit_text(data: bytes, rng: random.Random) -> bytes:
    """A number or a bracket of a JSON header becomes something else; the length still fits."""
    length = int.from_bytes(data[:8], "little")
    header, rest = data[8 : 8 + length], data[8 + length :]
    places = [i for i, byte in enumerate(header) if byte in b'0123456789[]{}":,']
    if not places:
        return flip_bits(data, rng)
    at = rng.choice(places)
    new = rng.choice((*ODD_TEXT, "[" * 500, '"', "}")).encode()
    changed = header[:at] + new + header[at + 1 :]
    return len(changed).to_bytes(8, "little") + changed + rest


DAMAGE = (flip_bits, flip_bits, truncate, splice, cut_out, edit_field)


# Changes after which every checksum holds again.


def rewrite_record(data: bytes, rng: random.Random) -> bytes:
    """A record of a zip archive damaged, its CRC made to fit; stored or compressed."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    pickled = [name for name in records if name.endswith("/data.pkl")]
    chosen = rng.choice([*pickled * 4, *(n for n in records if len(records[n]) > 8)])
    records[chosen] = rng.choice((flip_bits, truncate, splice, cut_out))(records[chosen], rng)
    changed = io.BytesIO()
    with zipfile.ZipFile(changed, "w", rng.choice((0, 8))) as archive:
        for name, record in records.items():
            archive.writestr(name, record)
    return changed.getvalue()


def _odd_leaf(content: Any, rng: random.Random) -> Any:
    """The same JSON value with one value somewhere inside exchanged or taken out."""
    if isinstance(content, dict | list) and content and rng.random() < 0.9:
        keys = list(content) if isinstance(content, dict) else list(range(len(content)))
        key = rng.choice(keys)
        if rng.random() < 0.1:
            del content[key]
        else:
            content[key] = _odd_leaf(content[key], rng)
        return content
    odd = (None, True, -1, 0, 500, 2**70, 1e300, float("nan"), "", "x", [], {}, [content])
    return rng.choice(odd)


def _parts(data: bytes, key: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    from safetensors.torch import load

    length = int.from_bytes(data[:8], "little")
    return json.loads(json.loads(data[8 : 8 + length])["__metadata__"][key]), load(data)


def edit_sparse(data: bytes, rng: random.Random) -> bytes:
    """The header of a sparse checkpoint changed, under a hash that fits."""
    from safetensors.torch import save

    header, tensors = _parts(data, checkpoint.METADATA_KEY)
    header = _odd_leaf(header, rng)
    if isinstance(header, dict):
        header["sha256"] = checkpoint.digest(tensors, header)
    return save(tensors, {checkpoint.METADATA_KEY: json.dumps(header)})


def edit_packed(data: bytes, rng: random.Random) -> bytes:
    from safetensors.torch import save

    header, tensors = _parts(data, packed.METADATA_KEY)
    return save(tensors, {packed.METADATA_KEY: json.dumps(_odd_leaf(header, rng))})


# The kinds.


def _state() -> dict[str, Any]:
    model = net()
    masks = masks_of(model).masks
    state = {k: v * masks[k[:-7]] if k[:-7] in masks else v for k, v in model.state_dict().items()}
    return {"epoch": 3, "state_dict": state}


def _arrays(path: Path) -> None:
    weights = {k: v.numpy() for k, v in _state()["state_dict"].items()}
    content = {"model": weights, "scale": np.float64(2), "matching_heuristics": True}
    path.write_bytes(pickle.dumps(content, protocol=2))


def _script(path: Path) -> None:
    torch.jit.save(torch.jit.trace(net().eval(), torch.ones(1, 3, 8, 8)), str(path))


def _masks(path: Path) -> Any:
    return dict(load_masks(path).masks)


def _content(path: Path) -> Any:
    content = open_checkpoint(path).content
    read_state_dict(path)
    return content


def _sparse(path: Path) -> None:
    model = net().eval()
    accelerate(model, masks_of(model), input_size=(8, 8), measure=False)
    checkpoint.save_accelerated(path, model)


def _read_sparse(path: Path) -> Any:
    model = net(3).eval()
    report = checkpoint.load_accelerated(path, model)
    str(report.plan)
    return {key: value.clone() for key, value in model.state_dict().items()}


def _training(seed: int) -> tuple[nn.Module, TrainingState]:
    model = net(seed)
    masks = masks_of(model)
    masks.apply_(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return model, TrainingState(model, optimizer, masks=masks, config={"lr": 0.1})


def _read_training(path: Path) -> Any:
    saved = read_training_state(path)
    model, state = _training(3)
    position = state.load(path)
    masks = None if saved.masks is None else dict(saved.masks.masks)
    return model.state_dict(), masks, position.step, dict(saved.config)


ZIP, JSON = (rewrite_record,), (edit_text,)
TARGETS: dict[str, Target] = {
    "zip": Target(lambda p: torch.save(_state(), p), _content, True, ZIP),
    "zip of masks": Target(lambda p: torch.save(dict(masks_of(net()).masks), p), _masks, True, ZIP),
    "legacy": Target(
        lambda p: torch.save(_state(), p, _use_new_zipfile_serialization=False), _content, False
    ),
    "torchscript": Target(_script, _content, True, ZIP),
    "numpy pickle": Target(_arrays, _content, False),
    "packed masks": Target(lambda p: masks_of(net()).save(p), _masks, True, (*JSON, edit_packed)),
    "sparse checkpoint": Target(_sparse, _read_sparse, True, (*JSON, edit_sparse, edit_sparse)),
    "training state": Target(lambda p: _training(0)[1].save(p, step=5), _read_training, True, ZIP),
}


@contextmanager
def _alarm() -> Iterator[None]:
    def ring(*_: Any) -> None:
        raise Hang(f"longer than {MOST_SECONDS} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, MOST_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def damaged(target: Target, data: bytes, rng: random.Random) -> tuple[bytes, bool]:
    """The file damaged, and whether a checksum still tells."""
    if target.edits and rng.random() < 0.4:
        return rng.choice(target.edits)(data, rng), False
    change = rng.choice(DAMAGE)
    return change(data, rng), target.strict


def outcome(target: Target, path: Path, expected: Any, strict: bool) -> str:
    """ "refused", "equal" or "different"; raises AssertionError, or what the reader should not."""
    try:
        with _alarm():
            found = target.read(path)
    except OpenTransError as error:
        if len(str(error)) < 20 or len(str(error)) > 20_000:
            raise AssertionError(f"an error that helps nobody: {error!r:.200}") from error
        return "refused"
    if equal(found, expected):
        return "equal"
    if strict:
        raise AssertionError("changed content was taken, although a checksum covers it")
    return "different"


def run(seconds: float, seed: int, targets: Mapping[str, Target] = TARGETS) -> Summary:
    """Damage and read files, the kinds in turn, for about ``seconds``."""
    summary, start = Summary(), time.monotonic()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, about odd pickles
        path = Path(folder) / "file"
        valid: dict[str, tuple[bytes, Any]] = {}
        for name, target in targets.items():
            random.seed(0), np.random.seed(0), torch.manual_seed(0)  # the same file every time
            target.make(path)
            valid[name] = path.read_bytes(), target.read(path)
        number = 0
        while time.monotonic() - start < seconds:
            for name, target in targets.items():
                data, expected = valid[name]
                changed, strict = damaged(target, data, random.Random(f"{seed} {name} {number}"))
                path.write_bytes(changed)
                summary.cases += 1
                try:
                    found = outcome(target, path, expected, strict)
                except (Exception, Hang) as error:
                    found = "FAILED"
                    summary.failures.append(
                        f"seed {seed}, {name}, number {number}: {type(error).__name__}: "
                        f"{str(error)[:200]}"
                    )
                summary.outcomes[name, found] += 1
            number += 1
    used = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) << 10
    summary.bytes_used = used
    if used > MOST_BYTES:
        summary.failures.append(f"seed {seed}: {used >> 20} MiB of memory were used")
    return summary


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    summary = run(options.seconds, options.seed)
    sys.stdout.write(f"{summary}\n")
    return 1 if summary.failures else 0


if __name__ == "__main__":
    sys.exit(main())
