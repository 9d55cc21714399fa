# SPDX-License-Identifier: Apache-2.0
"""Object detectors of transformers, behind one call: pictures and class names in, boxes out.

Three kinds are read, told apart by the checkpoint's own config: Mask2Former, which GenEval uses and which also gives
masks; open-vocabulary detectors (Grounding DINO, OWL-ViT, OWLv2), which take any name; and closed-vocabulary detectors
of the DETR family.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from PIL import Image

from ..extras import check_extra
from .checkpoints import load_model, load_part
from .geneval import Detection


# How COCO's classes are called in GenEval's prompts.
_SPELLINGS = {
    "aeroplane": "airplane",
    "diningtable": "dining table",
    "keyboard": "computer keyboard",
    "motorbike": "motorcycle",
    "mouse": "computer mouse",
    "pottedplant": "potted plant",
    "remote": "tv remote",
    "sofa": "couch",
    "tvmonitor": "tv",
}
_OPEN_VOCABULARY = ("grounding-dino", "mm-grounding-dino", "owlvit", "owlv2")


@dataclass(frozen=True)
class Found:
    """A detection and, where the detector draws outlines, its mask.

    Args:
        detection ([`Detection`]): name, score and box; no color yet.
        mask (`torch.Tensor`, *optional*): bool `[height, width]`.
    """

    detection: Detection
    mask: torch.Tensor | None = None


class Detector(Protocol):
    """Finds objects of given names in pictures."""

    def check_names(self, names: Sequence[str]) -> None:
        """Raises `ValueError` if one of the names can never be found; called before any picture is drawn."""

    def __call__(self, image: Image.Image, names: Sequence[str], threshold: float) -> list[Found]:
        """All objects of those names with a score of `threshold` or more, the surest first."""


def load_detector(checkpoint: str | os.PathLike[str], *, device: str | torch.device = "cpu") -> Detector:
    """Loads a detector of transformers.

    Args:
        checkpoint (`str` or `os.PathLike`): local folder or Hub id of a Mask2Former (instance segmentation),
            Grounding DINO, OWL-ViT, OWLv2 or DETR-family checkpoint.
        device (`str` or `torch.device`, *optional*, defaults to `"cpu"`): where it runs.

    Raises:
        MissingExtraError: without scipy, which transformers' detectors need.
        ValueError: if the checkpoint cannot be loaded or is of another task.
    """
    from transformers import (
        AutoConfig,
        AutoImageProcessor,
        AutoModelForObjectDetection,
        AutoModelForZeroShotObjectDetection,
        AutoProcessor,
        Mask2FormerForUniversalSegmentation,
    )

    check_extra("scipy", "The detector")
    config = load_part(AutoConfig, checkpoint, "detector")
    if config.model_type == "mask2former":
        model = load_model(Mask2FormerForUniversalSegmentation, checkpoint, "detector")
        return Mask2FormerDetector(model.to(device), load_part(AutoImageProcessor, checkpoint, "detector"))
    if config.model_type in _OPEN_VOCABULARY:
        model = load_model(AutoModelForZeroShotObjectDetection, checkpoint, "detector")
        return OpenVocabularyDetector(model.to(device), load_part(AutoProcessor, checkpoint, "detector"))
    if type(config) in AutoModelForObjectDetection._model_mapping:
        model = load_model(AutoModelForObjectDetection, checkpoint, "detector")
        return ClosedVocabularyDetector(model.to(device), load_part(AutoImageProcessor, checkpoint, "detector"))
    raise ValueError(
        f"{os.fspath(checkpoint)} holds a {config.model_type} model, which detects no objects. Give a checkpoint of "
        f"Mask2Former, {', '.join(_OPEN_VOCABULARY)}, or of a detector of the DETR family."
    )


class _Labeled:
    """What detectors with fixed classes share: the names behind their label numbers."""

    def __init__(self, model: Any, processor: Any) -> None:
        self.model, self.processor = model, processor
        labels: Mapping[int, str] = model.config.id2label
        self.names = {int(index): _SPELLINGS.get(label, label) for index, label in labels.items()}

    def check_names(self, names: Sequence[str]) -> None:
        """Raises `ValueError` if the model has no such class."""
        known = set(self.names.values())
        unknown = sorted(set(names) - known)
        if unknown:
            raise ValueError(
                f"The detector knows {len(known)} classes ({', '.join(sorted(known)[:5])}, ...), but not "
                f"{', '.join(unknown[:5])}. Give one that was trained on COCO, or an open-vocabulary one."
            )


class Mask2FormerDetector(_Labeled):
    """Mask2Former for instance segmentation. Boxes are those around the masks.

    Args:
        model (`Mask2FormerForUniversalSegmentation`): trained for instance segmentation.
        processor (`Mask2FormerImageProcessor`): its image processor.
    """

    @torch.no_grad()
    def __call__(self, image: Image.Image, names: Sequence[str], threshold: float) -> list[Found]:
        """See [`Detector`]."""
        inputs = self.processor(images=[image], return_tensors="pt").to(self.model.device)
        output = self.model(**inputs)
        result = self.processor.post_process_instance_segmentation(
            output, threshold=threshold, target_sizes=[image.size[::-1]], return_binary_maps=True
        )[0]
        found = []
        for segment, mask in zip(result["segments_info"], result["segmentation"], strict=False):
            name = self.names.get(segment["label_id"])
            if name is not None and name in names:
                outline = mask.bool().cpu()
                found.append(Found(Detection(name, float(segment["score"]), _box(outline)), outline))
        return _sorted(found)


class ClosedVocabularyDetector(_Labeled):
    """Detectors of the DETR family.

    Args:
        model (`PreTrainedModel`): an object detection model with `id2label`.
        processor (`BaseImageProcessor`): its image processor.
    """

    @torch.no_grad()
    def __call__(self, image: Image.Image, names: Sequence[str], threshold: float) -> list[Found]:
        """See [`Detector`]."""
        inputs = self.processor(images=[image], return_tensors="pt").to(self.model.device)
        result = self.processor.post_process_object_detection(
            self.model(**inputs), threshold=threshold, target_sizes=[image.size[::-1]]
        )[0]
        labels = [self.names.get(int(label)) for label in result["labels"]]
        return _found(labels, result["scores"], result["boxes"], names)


class OpenVocabularyDetector:
    """Grounding DINO, OWL-ViT and OWLv2, asked for each name on its own, so that no name is confused with another.

    Args:
        model (`PreTrainedModel`): a zero-shot object detection model.
        processor (`ProcessorMixin`): its processor.
    """

    def __init__(self, model: Any, processor: Any) -> None:
        self.model, self.processor = model, processor

    def check_names(self, names: Sequence[str]) -> None:
        """Takes every name."""

    @torch.no_grad()
    def __call__(self, image: Image.Image, names: Sequence[str], threshold: float) -> list[Found]:
        """See [`Detector`]."""
        found: list[Found] = []
        for name in names:
            inputs = self.processor(images=image, text=[[f"a {name}"]], return_tensors="pt").to(self.model.device)
            output = self.model(**inputs)
            options = {"input_ids": inputs["input_ids"]} if "dino" in self.model.config.model_type else {}
            result = self.processor.post_process_grounded_object_detection(
                output, threshold=threshold, target_sizes=[image.size[::-1]], **options
            )[0]
            found += _found([name] * len(result["scores"]), result["scores"], result["boxes"], names)
        return _sorted(found)


def _found(
    labels: Sequence[str | None], scores: torch.Tensor, boxes: torch.Tensor, names: Sequence[str]
) -> list[Found]:
    return _sorted(
        [
            Found(Detection(label, score, tuple(box)))
            for label, score, box in zip(labels, scores.tolist(), boxes.tolist(), strict=True)
            if label is not None and label in names
        ]
    )


def _sorted(found: list[Found]) -> list[Found]:
    return sorted(found, key=lambda item: -item.detection.score)


def _box(mask: torch.Tensor) -> tuple[float, float, float, float]:
    """Left, top, right and bottom edge of a mask that is not empty."""
    rows, columns = mask.any(dim=1).nonzero(), mask.any(dim=0).nonzero()
    return (float(columns[0]), float(rows[0]), float(columns[-1]) + 1, float(rows[-1]) + 1)
