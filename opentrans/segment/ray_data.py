"""The same over several machines with Ray Data: one actor per machine builds its model once.

Pictures, weights and the output folder are files that every machine sees under the same paths.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from opentrans_kernels.errors import OpenTransError
from opentrans_kernels.lazy import optional_module

from .folder import OutputFolder
from .pictures import Picture
from .pool import OnDone, OnReady
from .recipe import Recipe

__all__ = ["work_with_ray"]

COMES_FROM = "--ray spreads pictures over machines with Ray Data"
ONCE = 1  # a picture whose process dies is tried again this often, and then reported


class _Actor:
    """What Ray Data makes once per place, and calls with batches of pictures."""

    def __init__(self, recipe: Recipe, path: str, font: str | None) -> None:
        from .systems import build, describe

        self.folder, self.font = OutputFolder(Path(path)), font
        self.refused, self.about = "", {}
        try:
            self.segmenter = build(recipe)
            self.about = describe(self.segmenter)
        except OpenTransError as error:  # raised here, Ray would build again and again
            self.refused = str(error)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        from .job import tried

        names = zip(batch["file"], batch["name"], strict=True)
        found = {"number": list(batch["number"]), "reason": [], "refused": [], "name": []}
        found |= {"notes": [], "report": []}
        for file, name in names:
            picture = Picture(str(file), str(name))
            reason = self.refused or tried(self.segmenter, picture, self.folder, self.font)
            found["reason"].append(reason)
            found["refused"].append(bool(self.refused))
            found["name"].append(self.about.get("name", ""))
            found["notes"].append("\n".join(self.about.get("notes", [])))
            found["report"].append(self.about.get("report", ""))
        return found


def work_with_ray(
    recipe: Recipe,
    pictures: Sequence[Picture],
    folder: OutputFolder,
    *,
    address: str | None = None,
    actors: int | None = None,
    font: str | None = None,
    on_done: OnDone,
    on_ready: OnReady,
) -> None:
    """Segment ``pictures`` on a Ray cluster.

    Args:
        address: of the cluster ("auto", "ray://HOST:PORT"); None: ``RAY_ADDRESS``, else one here.
        actors: models at work at once; None: one per machine of the cluster.

    Raises OpenTransError if Ray is missing, no cluster can be reached or no model can be built.
    """
    ray = optional_module("ray", COMES_FROM)
    data = optional_module("ray.data", COMES_FROM)
    started = not ray.is_initialized()
    if started:
        try:
            ray.init(address=address or None, log_to_driver=False, include_dashboard=False)
        except Exception as error:  # of many kinds, by the way it is reached
            raise OpenTransError(
                f"no Ray cluster at {address or 'this machine'} ({error}). Start one with: ray "
                "start --head, or leave the address out for a local one."
            ) from error
    try:
        _run(ray, data, recipe, pictures, folder, actors, font, on_done, on_ready)
    finally:
        if started:
            ray.shutdown()


def _run(
    ray: Any, data: Any, recipe: Recipe, pictures: Sequence[Picture], folder: OutputFolder,
    actors: int | None, font: str | None, on_done: OnDone, on_ready: OnReady,
) -> None:  # fmt: skip
    places = actors or sum(bool(node["Alive"]) for node in ray.nodes())
    places = max(1, min(places, len(pictures)))
    context = data.DataContext.get_current()
    context.max_errored_blocks = -1  # a picture that is lost is reported, the others are done
    context.enable_progress_bars = False
    items = [{"number": n, "file": p.file, "name": p.name} for n, p in enumerate(pictures)]
    rows = data.from_items(items, override_num_blocks=len(items)).map_batches(
        _Actor,
        fn_constructor_args=(recipe, str(folder.path), font),
        batch_size=1,
        compute=data.ActorPoolStrategy(size=places),
        num_cpus=recipe.threads,
        scheduling_strategy="SPREAD",
        max_restarts=ONCE,
        max_task_retries=ONCE,
    )
    left = dict(enumerate(pictures))
    said = False
    for row in rows.iter_rows():
        if row["refused"]:
            raise OpenTransError(row["reason"])
        if not said:
            said = True
            notes = row["notes"].split("\n") if row["notes"] else []
            on_ready({"name": row["name"], "notes": notes, "report": row["report"]})
        on_done(left.pop(int(row["number"])), row["reason"])
    for picture in left.values():
        on_done(
            picture,
            "Ray lost the process that segmented it. If memory is short, use fewer --processes or "
            "a smaller --size",
        )
