"""One short name per kind of machine: the folder its results live in, and what may be compared.

The name is made from the ``machine`` block of a result, never from the machine that reads it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

#: (vendor word in the CPU's name, flag, generation): the first line that fits names it. Virtual
#: machines often hide the model ("AMD EPYC"), but not the vector extensions.
_GENERATIONS = (
    ("amd", "avx512_vp2intersect", "zen5"),
    ("amd", "avx512f", "zen4"),
    ("intel", "amx_tile", "sapphirerapids"),
    ("intel", "avx512_vbmi2", "icelake"),
    ("intel", "avx512_vnni", "cascadelake"),
    ("intel", "avx512f", "skylake"),
    ("", "avx512f", "avx512"),
    ("", "avx2", "avx2"),
    ("", "sve", "sve"),
    ("", "asimd", "neon"),
)
_NOISE = re.compile(
    r"\((?:r|tm|c)\)|@.*$|\b(?:cpu|processor|\d+-core|with|gen|\d+th)\b", re.IGNORECASE
)
_COMPARED = ("cpu", "architecture", "flags", "cpus", "caches")


def machine_slug(machine: Mapping[str, Any]) -> str:
    """Name of a machine, for instance ``amd-epyc-zen4-2cpu``.

    Args:
        machine: the ``machine`` block of a result (:func:`.environment.machine`).
    """
    name = str(machine.get("cpu") or machine.get("architecture") or "unknown")
    flags = set(machine.get("flags") or ())
    generation = next(
        (found for vendor, flag, found in _GENERATIONS if vendor in name.lower() and flag in flags),
        "",
    )
    words = re.sub(r"[^a-z0-9]+", "-", _NOISE.sub(" ", name).lower()).strip("-")
    return "-".join(part for part in (words, generation, f"{machine.get('cpus')}cpu") if part)


def machine_differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """What makes two machines different ones, as sentences; empty if times may be compared."""
    found = []
    for key in _COMPARED:
        a, b = one.get(key), other.get(key)
        if key == "flags":
            a, b = sorted(set(a or ()) - set(b or ())), sorted(set(b or ()) - set(a or ()))
        if a != b:
            found.append(f"{key}: {a!r} against {b!r}")
    return found
