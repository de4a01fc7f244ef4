"""Datasets for detectron2: folders registered by split, and the mapper from files to tensors."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from opentrans_kernels.errors import OpenTransError

from ..ovs.folder import IGNORE, Split, read_split, splits_of
from .presence import require_detectron2

require_detectron2()

from detectron2.data import DatasetCatalog, MetadataCatalog  # noqa: E402
from detectron2.data import detection_utils as utils  # noqa: E402
from detectron2.data import transforms as T  # noqa: E402

__all__ = ["OpenVocabularyMapper", "check_datasets", "register_folder", "vocabulary_of"]

RESIZABLE = np.float64  # detectron2 resizes no integers wider than a byte; these are exact


def register_folder(root: str | os.PathLike[str]) -> tuple[str, ...]:
    """Register every split of a dataset folder as ``FOLDER_SPLIT``, such as ``shapes_train``.

    Calling it again with the same folder changes nothing. Returns the names. Raises OpenTransError
    if the folder is missing or damaged, or another dataset has one of the names.
    """
    folder = Path(root).resolve()
    names = []
    for split in splits_of(folder):
        name = f"{folder.name}_{split}"
        names.append(name)
        if name in DatasetCatalog.list():
            known = MetadataCatalog.get(name).get("opentrans_folder")
            if known != str(folder):
                raise OpenTransError(
                    f"there is a dataset {name!r} already (of {known or 'somebody else'}), so "
                    f"{folder} cannot be registered under that name. Rename the folder."
                )
            continue
        _register(name, folder, read_split(folder, split))
    return tuple(names)


def _register(name: str, folder: Path, split: Split) -> None:
    DatasetCatalog.register(name, lambda: copy.deepcopy(split.records))
    MetadataCatalog.get(name).set(
        stuff_classes=list(split.classes),
        things=list(split.things),
        ignore_label=split.ignore,
        evaluator_type="sem_seg",
        opentrans_folder=str(folder),
    )


def check_datasets(names: Sequence[str]) -> None:
    """Raise OpenTransError unless every dataset is registered, listed and has class names."""
    for name in names:
        if name not in DatasetCatalog.list():
            raise OpenTransError(
                f"there is no dataset {name!r}. For a folder of your own set MODEL.OVS.DATA_FOLDER "
                "(its splits are called FOLDER_SPLIT); detectron2's own datasets are listed by "
                "DatasetCatalog.list()."
            )
        try:
            records = DatasetCatalog.get(name)
        except (OSError, AssertionError) as error:
            raise _unreadable(name, str(error)) from error
        missing = [
            record[key]
            for record in records[:1]
            for key in ("file_name", "sem_seg_file_name")
            if key in record and not os.path.exists(record[key])
        ]
        if not records or missing:
            raise _unreadable(name, f"{missing[0]} does not exist" if missing else "it is empty")
        vocabulary_of(name)


def _unreadable(name: str, reason: str) -> OpenTransError:
    return OpenTransError(
        f"the dataset {name!r} cannot be read: {reason}. Set the environment variable "
        "DETECTRON2_DATASETS to the folder that holds detectron2's datasets, or "
        "MODEL.OVS.DATA_FOLDER to one of your own."
    )


def vocabulary_of(name: str) -> tuple[tuple[str, ...], frozenset[int]]:
    """Class names by label, and the numbers of those that are things.

    Raises OpenTransError if the dataset has no ``stuff_classes``.
    """
    metadata = MetadataCatalog.get(name)
    classes = metadata.get("stuff_classes")
    if not classes:
        raise OpenTransError(
            f"the dataset {name!r} has no class names for its labels. Set them with "
            f"MetadataCatalog.get({name!r}).stuff_classes = [...]."
        )
    named = metadata.get("things")
    things = set(named if named is not None else metadata.get("thing_classes") or ())
    return tuple(classes), frozenset(i for i, c in enumerate(classes) if c in things)


class OpenVocabularyMapper:
    """Record -> tensors, with the vocabulary that its labels refer to.

    Adds ``image`` (uint8 [3, H, W]), in training ``sem_seg`` (int64 [H, W]) and, with ``panoptic``
    and where there is a ground truth, ``mask_targets`` (bool [n, H, W] and class numbers [n]); and
    always ``vocabulary`` and ``things``.

    Args:
        names: datasets the records come from; all must have the same classes.

    Raises OpenTransError if they do not.
    """

    def __init__(
        self, cfg: Any, names: Sequence[str], *, training: bool, panoptic: bool = False
    ) -> None:
        vocabularies = {vocabulary_of(name) for name in names}
        if len(vocabularies) != 1:
            raise OpenTransError(
                f"the datasets {', '.join(names)} have different class lists, and a label must "
                "mean one class. Train on one of them, or give them one list."
            )
        (self.vocabulary, self.things) = vocabularies.pop()
        self.training, self.panoptic = training, panoptic
        self.format = cfg.INPUT.FORMAT
        self.ignore = MetadataCatalog.get(names[0]).get("ignore_label", IGNORE)
        steps = utils.build_augmentation(cfg, training)
        if cfg.INPUT.CROP.ENABLED and training:
            steps.insert(
                1, T.RandomCrop_CategoryAreaConstraint(
                    cfg.INPUT.CROP.TYPE, cfg.INPUT.CROP.SIZE,
                    cfg.INPUT.CROP.SINGLE_CATEGORY_MAX_AREA, self.ignore,
                ),
            )  # fmt: skip
        self.augmentations = T.AugmentationList(steps)

    def __call__(self, record: dict[str, Any]) -> dict[str, Any]:
        record = copy.deepcopy(record)
        image = utils.read_image(record["file_name"], format=self.format)
        utils.check_image_size(record, image)
        labels = None
        if self.training:
            labels = utils.read_image(record["sem_seg_file_name"]).astype(RESIZABLE)
        given = T.AugInput(image, sem_seg=labels)
        transforms = self.augmentations(given)
        record["image"] = torch.from_numpy(np.ascontiguousarray(given.image.transpose(2, 0, 1)))
        record["vocabulary"], record["things"] = self.vocabulary, self.things
        if not self.training:
            return record
        record["sem_seg"] = self._known(_whole_numbers(given.sem_seg))
        if self.panoptic and "pan_seg_file_name" in record:
            record["mask_targets"] = self._segments(record, transforms)
        return record

    def _known(self, labels: torch.Tensor) -> torch.Tensor:
        return (
            labels if self.ignore == IGNORE else labels.masked_fill(labels == self.ignore, IGNORE)
        )

    def _segments(self, record: dict[str, Any], transforms: Any) -> tuple[Any, Any]:
        ids = read_panoptic(record["pan_seg_file_name"])
        ids = _whole_numbers(transforms.apply_segmentation(ids.astype(RESIZABLE)))
        kinds = {segment["id"]: segment["category_id"] for segment in record["segments_info"]}
        masks: dict[tuple[str, int], torch.Tensor] = {}
        for segment in record["segments_info"]:
            kind, own = segment["category_id"], ids == segment["id"]
            if segment.get("iscrowd") or not bool(own.any()):
                continue
            # Stuff is one mask per class, however many segments it has.
            key = ("thing", segment["id"]) if kind in self.things else ("stuff", kind)
            masks[key] = masks[key] | own if key in masks else own
        classes = [kinds[n] if what == "thing" else n for what, n in masks]
        stacked = torch.stack(list(masks.values())) if masks else ids.new_zeros(0, *ids.shape) > 0
        return stacked, torch.tensor(classes, dtype=torch.int64)


def _whole_numbers(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(pixels)).long()


def read_panoptic(file: str) -> np.ndarray:
    """Segment numbers int64 [H, W] of a panoptic PNG: R + 256 G + 65536 B."""
    rgb = utils.read_image(file, format="RGB").astype(np.int64)
    return rgb[..., 0] + 256 * rgb[..., 1] + 65536 * rgb[..., 2]
