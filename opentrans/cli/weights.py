"""OpenAI's published RN50 weights for the demo, if they are at hand or quickly reachable."""

from __future__ import annotations

import os
import subprocess
import sys
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

HOST = "https://huggingface.co"
_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
# A process of its own can be ended when the download is too slow for a demo.
_DOWNLOAD = """
import sys
from open_clip.pretrained import download_pretrained, get_pretrained_cfg
sys.stdout.write(download_pretrained(get_pretrained_cfg(sys.argv[1], "openai")))
"""


@dataclass(frozen=True)
class Found:
    """A file with weights, or the reason why there is none."""

    path: Path | None
    reason: str


def openai_weights(
    arch: str, *, host: str = HOST, probe_s: float = 3.0, download_s: float = 60.0
) -> Found:
    """Weights of open_clip's ``arch``, pretrained "openai": from the local cache, else downloaded.

    Args:
        arch: for instance "RN50".
        host: the server asked first whether it answers at all.
        probe_s: seconds it has for that.
        download_s: seconds a download may take.
    """
    try:
        import huggingface_hub
        from open_clip.pretrained import get_pretrained_cfg
    except ImportError as error:
        return Found(None, f"open_clip cannot be imported ({error})")
    repository = (get_pretrained_cfg(arch, "openai") or {}).get("hf_hub", "").strip("/")
    if not repository:
        return Found(None, f"open_clip has no 'openai' weights for {arch}")
    for name in _FILES:
        cached = huggingface_hub.try_to_load_from_cache(repository, name)
        if isinstance(cached, str):
            return Found(Path(cached), "found in the local cache")
    unreachable = why_unreachable(host, probe_s)
    if unreachable:
        return Found(None, f"{host} does not answer ({unreachable})")
    try:
        done = subprocess.run(
            [sys.executable, "-c", _DOWNLOAD, arch],
            capture_output=True,
            text=True,
            timeout=download_s,
            env={**os.environ, "HF_HUB_DISABLE_PROGRESS_BARS": "1"},
        )
    except subprocess.TimeoutExpired:
        return Found(None, f"the download took longer than {download_s:.0f} s")
    if done.returncode != 0 or not Path(done.stdout.strip()).is_file():
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return Found(None, f"the download failed ({last[:200]})")
    return Found(Path(done.stdout.strip()), "downloaded")


def why_unreachable(host: str, seconds: float) -> str | None:
    """None if ``host`` answers a HEAD request in time, else the reason."""
    request = urllib.request.Request(host, method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=seconds).close()
    except urllib.error.HTTPError:
        return None  # an answer, if not a friendly one
    except (OSError, ValueError) as error:
        return str(getattr(error, "reason", error))
    return None
