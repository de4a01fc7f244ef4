"""Show versions, the build, the CPU, the kernels that can run here, and every setting."""

from __future__ import annotations

import argparse

from .options import add_json
from .render import Output

SUMMARY = "versions, build, CPU, available kernels, settings"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``opentrans info``."""
    add_json(parser)


def run(options: argparse.Namespace, out: Output) -> int:
    """Collect and show; always 0, since a missing extension is a state and not a failure."""
    from opentrans_kernels import native, settings
    from opentrans_kernels.bench.environment import machine, versions
    from opentrans_kernels.dispatch import backends

    loaded = native.load()
    payload = {
        "versions": versions(),
        "machine": machine(),
        "extension": {"loaded": loaded, "reason": native.reason()},
        "cpu_capability": native.cpu_capability(),
        "build": native.build_info(),
        "backends": backends(),
        "settings": [
            {
                "name": row.name,
                "value": row.value,
                "default": row.default,
                "origin": row.origin,
                "when": row.when,
                "choices": row.choices,
                "doc": row.doc,
            }
            for row in settings.table()
        ],
    }
    out.heading("Versions")
    out.pairs({name: version or "not installed" for name, version in payload["versions"].items()})
    out.heading("Compiled kernels")
    out.pairs({"loaded": "yes" if loaded else "no", "CPU capability": payload["cpu_capability"]})
    if not loaded:
        out.text(str(payload["extension"]["reason"]))
    if payload["build"]:
        out.pairs({f"built: {key}": str(value) for key, value in payload["build"].items()})
    out.heading("Machine")
    out.pairs(
        {
            name: ", ".join(map(str, value)) if isinstance(value, list) else str(value)
            for name, value in payload["machine"].items()
        }
    )
    out.heading("Kernels")
    keys = ("op", "backend", "device", "dtypes", "layouts", "available")
    out.table(None, keys, [[row[key] for key in keys] for row in payload["backends"]], right=())
    out.heading("Settings (environment variables)")
    names = ("name", "value", "default", "when", "choices", "doc")
    rows = [[row[name] for name in names] for row in payload["settings"]]
    out.table(None, ("variable", "value", "default", "when", "choices", "meaning"), rows, right=())
    out.finish(payload)
    return 0
