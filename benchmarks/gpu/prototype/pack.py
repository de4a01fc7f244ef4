"""Weights of ``two_four_conv``: a 3x3 convolution as slices of 2:4 matrices.

A slice is 64 output channels x 32 input channels of one tap. It is written as A1 + A2, each with at
most two nonzeros in four neighbours along the input channels; a part without nonzeros is left out.
The order of output and of input channels is free inside a bottleneck, so both are chosen such that
many parts are empty.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

__all__ = ["BLOCK", "CHUNK", "GROUP_BYTES", "TwoFour", "decode", "orders", "pack"]

BLOCK, CHUNK, SLICE = 64, 64, 32  # output channels of a warpgroup, input channels of a chunk, slice
TAPS, HALO_ACROSS = 9, 10
SLICES, HEADER, INDICES, VALUES = 6, 128, 256, 2048
GROUP_BYTES = HEADER + SLICES * (INDICES + VALUES)
GATHER = (
    0.05  # what a nonzero that stays alone costs beside a part: makes the search leave plateaus
)


@dataclass(frozen=True)
class TwoFour:
    """A packed weight ``[cout, cin, 3, 3]``.

    ``groups`` ``[G, GROUP_BYTES]`` uint8; ``begin`` int32 ``[cout / 64 * cin / 64 + 1]``, the first
    group of a block's chunk; ``used`` int32 ``[G]``, bytes; ``rows`` and ``channels``: the original
    channel at each position. ``slices``: parts multiplied for a tile of pixels; ``second``: those
    that are a second part; ``dense``: parts of a weight without zeros, whose time is that of
    multiplying without the 2:4 format.
    """

    groups: torch.Tensor
    begin: torch.Tensor
    used: torch.Tensor
    rows: torch.Tensor
    channels: torch.Tensor
    slices: int
    second: int

    @property
    def dense(self) -> int:
        return 2 * len(self.rows) * len(self.channels) * TAPS // (BLOCK * SLICE)

    def to(self, device: torch.device | str) -> TwoFour:
        """The same pack on ``device``."""
        moved = (t.to(device) for t in (self.groups, self.begin, self.used))
        return TwoFour(*moved, self.rows, self.channels, self.slices, self.second)


def orders(weight: torch.Tensor, swaps: int = 20000, seed: int = 0) -> tuple[np.ndarray, ...]:
    """(rows, channels): orders under which few parts have nonzeros.

    Both are sorted by nonzeros, so that crowded rows and channels share slices and others run
    empty. Within a slice, channels are dealt into groups of four. Then pairs of input channels are
    swapped at random; a swap stays if the parts become fewer, or as many with their nonzeros
    gathered.
    """
    live = (weight != 0).cpu().numpy().reshape(*weight.shape[:2], TAPS)
    rows = np.argsort(-live.sum((1, 2)), kind="stable")
    search = _Search(live[rows])
    random = np.random.default_rng(seed)
    quads = len(search.quads)
    for a, b, i, j in zip(
        random.integers(0, quads, swaps), random.integers(0, quads, swaps),
        random.integers(0, 4, swaps), random.integers(0, 4, swaps), strict=True,
    ):  # fmt: skip
        if a != b:
            search.swap(int(a), int(i), int(b), int(j))
    return rows, search.quads.reshape(-1)


class _Search:
    """Input channels in groups of four, and what each slice holds: all nonzeros, and those that a
    first part has no room for."""

    def __init__(self, live: np.ndarray) -> None:
        ranked = np.argsort(-live.sum((0, 2)), kind="stable")
        deal = ranked.reshape(-1, 4, SLICE // 4).copy()
        deal[:, 1::2] = deal[:, 1::2, ::-1]  # in a snake: each group gets crowded and empty ones
        self.live = live
        self.quads = deal.transpose(0, 2, 1).reshape(-1, 4).copy()
        shape = (live.shape[0], -1, 4, TAPS)
        self.count = live[:, self.quads.reshape(-1)].reshape(shape).sum(2, dtype=np.int8)
        self.parts = np.stack([self._held(self.count[:, q]) for q in range(len(self.quads))])
        self.slices = self.parts.reshape(-1, SLICE // 4, *self.parts.shape[1:]).sum(1)

    @staticmethod
    def _held(count: np.ndarray) -> np.ndarray:
        """``[2, blocks, taps]`` of a group's counts ``[rows, taps]``."""
        both = np.stack([count, np.maximum(count - 2, 0)])
        return both.reshape(2, -1, BLOCK, TAPS).sum(2, dtype=np.int32)

    @staticmethod
    def _cost(slices: np.ndarray) -> float:
        return float((slices > 0).sum() + GATHER * np.sqrt(slices).sum())

    def swap(self, a: int, i: int, b: int, j: int) -> None:
        """Channel ``i`` of group ``a`` against ``j`` of ``b``, if that costs less."""
        quads = self.quads
        change = self.live[:, quads[b, j]].astype(np.int8) - self.live[:, quads[a, i]]
        counts = {a: self.count[:, a] + change, b: self.count[:, b] - change}
        held = {q: self._held(count) for q, count in counts.items()}
        size = SLICE // 4
        new = {q // size: self.slices[q // size].copy() for q in counts}
        for q in counts:
            new[q // size] += held[q] - self.parts[q]
        if sum(map(self._cost, new.values())) >= sum(self._cost(self.slices[s]) for s in new):
            return
        quads[a, i], quads[b, j] = quads[b, j], quads[a, i]
        for q in counts:
            self.count[:, q], self.parts[q] = counts[q], held[q]
        for s, value in new.items():
            self.slices[s] = value


def _parts(matrix: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(values ``[64, 16]``, places ``[64, 8, 2]``) of each part that has nonzeros."""
    groups = matrix.reshape(BLOCK, SLICE // 4, 4)
    nonzeros_first = np.argsort(groups == 0, axis=2, kind="stable")
    for half in (nonzeros_first[..., :2], nonzeros_first[..., 2:]):
        places = np.sort(half, axis=2)
        values = np.take_along_axis(groups, places, 2)
        if values.any():
            yield values.reshape(BLOCK, 16), places


def _index_words(places: np.ndarray) -> np.ndarray:
    """The 64 words of ``places``, as lanes hold them: see ``multiply`` in sm90.h."""
    nibbles = (places[..., 0] | places[..., 1] << 2).astype(np.uint32)
    by_lane = nibbles.reshape(4, 2, 8, 2, 4)  # warp, second row, row, lane of two, group
    shifts = 16 * np.arange(2)[None, :, None, None, None] + 4 * np.arange(4)
    return (by_lane << shifts.astype(np.uint32)).sum((1, 4), dtype=np.uint32).reshape(-1)


def _bits(values: np.ndarray) -> np.ndarray:
    """bfloat16 bits of float32 values that bfloat16 can hold."""
    bits = torch.from_numpy(np.ascontiguousarray(values)).to(torch.bfloat16).view(torch.int16)
    return bits.numpy()


def pack(weight: torch.Tensor, swaps: int | None = 20000) -> TwoFour:
    """Pack ``weight`` ``[cout, cin, 3, 3]``, rounded to bfloat16 first; swaps None: channels stay.

    ValueError: cout is no multiple of 128, cin none of 64, or the kernel is not 3x3.
    """
    cout, cin = weight.shape[:2]
    if weight.shape[2:] != (3, 3) or cout % (2 * BLOCK) or cin % CHUNK:
        raise ValueError(
            f"two_four_conv: the weight has shape {tuple(weight.shape)}. It takes 3x3 kernels with "
            f"a multiple of {2 * BLOCK} output and of {CHUNK} input channels."
        )
    rounded = weight.detach().to(torch.bfloat16).float()
    rows, channels = np.arange(cout), np.arange(cin)
    if swaps is not None:
        rows, channels = orders(rounded, swaps)
    ordered = rounded.cpu().numpy()[rows][:, channels].reshape(cout, cin, TAPS)
    groups: list[np.ndarray] = []
    begin, used, slices, second = [0], [], 0, 0
    for block in range(cout // BLOCK):
        for chunk in range(cin // CHUNK):
            found = []
            for tap in range(TAPS):
                for half in range(CHUNK // SLICE):
                    first = chunk * CHUNK + half * SLICE
                    matrix = ordered[block * BLOCK :, first : first + SLICE, tap][:BLOCK]
                    place = half << 8 | (tap // 3 * HALO_ACROSS + tap % 3)
                    parts = [(place, *part) for part in _parts(matrix)]
                    second += len(parts) == 2
                    found += parts
            if len(found) % 2:  # the kernel multiplies two at a time
                found.append((found[-1][0], np.zeros_like(found[-1][1]), found[-1][2]))
            slices += len(found)
            for at in range(0, len(found), SLICES):
                group, size = _group(found[at : at + SLICES])
                groups.append(group)
                used.append(size)
            begin.append(len(groups))
    data = np.stack(groups) if groups else np.zeros((1, GROUP_BYTES), np.uint8)
    return TwoFour(
        torch.from_numpy(data), torch.tensor(begin, dtype=torch.int32),
        torch.tensor(used or [HEADER], dtype=torch.int32), torch.from_numpy(rows),
        torch.from_numpy(channels), slices, second,
    )  # fmt: skip


def _group(parts: list[tuple[int, np.ndarray, np.ndarray]]) -> tuple[np.ndarray, int]:
    """One group of slices, and how many of its bytes are used."""
    data = np.zeros(GROUP_BYTES, np.uint8)
    words = data[:HEADER].view(np.int32)
    words[0] = len(parts) // 2
    for i, (place, values, places) in enumerate(parts):
        words[1 + i] = place
        at = HEADER + i * INDICES
        data[at : at + INDICES].view(np.uint32)[:] = _index_words(places)
        # Blocks of 8 rows x 8 columns: rows outermost, 16 bytes a row.
        blocks = _bits(values).reshape(8, 8, 2, 8).transpose(0, 2, 1, 3)
        at = HEADER + SLICES * INDICES + i * VALUES
        data[at : at + VALUES].view(np.int16)[:] = blocks.reshape(-1)
    return data, HEADER + SLICES * INDICES + len(parts) * VALUES


def decode(packed: TwoFour) -> torch.Tensor:
    """The weight that was packed, in its original order, rounded to bfloat16: float32."""
    cout, cin = len(packed.rows), len(packed.channels)
    ordered = np.zeros((cout, cin, TAPS), np.float32)
    begin, groups = packed.begin.tolist(), packed.groups.cpu().numpy()
    chunks = cin // CHUNK
    for cell in range(len(begin) - 1):
        block, chunk = divmod(cell, chunks)
        for group in groups[begin[cell] : begin[cell + 1]]:
            words = group[:HEADER].view(np.int32)
            for i in range(2 * int(words[0])):
                place = int(words[1 + i])
                tap = (place & 255) // HALO_ACROSS * 3 + (place & 255) % HALO_ACROSS
                first = chunk * CHUNK + (place >> 8) * SLICE
                at = HEADER + i * INDICES
                lanes = group[at : at + INDICES].view(np.uint32).reshape(4, 8, 2)
                at = HEADER + SLICES * INDICES + i * VALUES
                bits = group[at : at + VALUES].view(np.int16).reshape(8, 2, 8, 8)
                values = torch.from_numpy(bits.transpose(0, 2, 1, 3).reshape(BLOCK, 16).copy())
                kept = values.view(torch.bfloat16).float().numpy()
                for row in range(BLOCK):
                    warp, second, lane = row // 16, row // 8 % 2, row % 8
                    for column in range(16):
                        word = int(lanes[warp, lane, column // 8])
                        pair = word >> (16 * second + 4 * (column // 2 % 4)) & 15
                        k = column // 2 * 4 + (pair & 3 if column % 2 == 0 else pair >> 2)
                        ordered[block * BLOCK + row, first + k, tap] += kept[row, column]
    weight = np.zeros_like(ordered)
    weight[np.ix_(packed.rows.numpy(), packed.channels.numpy())] = ordered
    return torch.from_numpy(weight).reshape(cout, cin, 3, 3)
