"""Find objects in images: the detector interface, detectors of transformers, and FastestDet through onnxruntime.

Names of objects are those of GenEval: the 80 classes of COCO in COCO's order, three of them spelt out ("tv remote").
Sources: Mask2Former, Cheng et al. 2022 (arXiv:2112.01527), whose instances score as in detectron2 and mmdet: class
probability times the mean probability inside the mask; FastestDet (github.com/dog-qiuqiu/FastestDet, BSD-3-Clause).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from PIL import Image
from torch import Tensor, nn

from rewards.backbones.hf import load_pretrained
from rewards.errors import RewardError

OBJECTS = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow", "elephant",
    "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard",
    "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle",
    "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange", "broccoli",
    "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant", "bed", "dining table", "toilet",
    "tv", "laptop", "computer mouse", "tv remote", "computer keyboard", "cell phone", "microwave", "oven", "toaster",
    "sink", "refrigerator", "book", "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush",
)  # fmt: skip

_OTHER_NAMES = {
    "mouse": "computer mouse", "remote": "tv remote", "keyboard": "computer keyboard", "motorbike": "motorcycle",
    "aeroplane": "airplane", "sofa": "couch", "pottedplant": "potted plant", "diningtable": "dining table",
    "tvmonitor": "tv",
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Detection:
    """One object: its name, score in [0, 1], box (left, top, right, bottom) in pixels, and mask `[H, W]` if known."""

    name: str
    score: float
    box: tuple[float, float, float, float]
    mask: Bool[Tensor, "height width"] | None = None


@runtime_checkable
class Detector(Protocol):
    """Finds objects: `names` are all its object names; a call returns the detections of each image, in any order.

    Weak detections are included; the caller applies a threshold.
    """

    names: Collection[str]

    def __call__(self, images: Sequence[Image.Image]) -> list[list[Detection]]:
        """Find objects in RGB images of one size."""


class TransformersDetector(nn.Module):
    """A detector of transformers: any `...ForObjectDetection` (DETR and its kin), or Mask2Former with masks."""

    def __init__(self, source: str | PathLike[str], dtype: torch.dtype = torch.float32, least: float = 0.05) -> None:
        """Load a directory or a model of the hub; detections below the score `least` are dropped."""
        super().__init__()
        config = load_pretrained("AutoConfig", source)
        kind = (config.architectures or ["no architecture"])[0]
        self.masks = kind == "Mask2FormerForUniversalSegmentation"
        if not self.masks and not kind.endswith("ForObjectDetection"):
            raise RewardError(
                f"{source} is a {kind}; a detector is needed: ...ForObjectDetection, or "
                "Mask2FormerForUniversalSegmentation of instances"
            )
        self.least = least
        self.model = load_pretrained(kind, source, dtype=dtype)
        self.processor: Any = load_pretrained("AutoImageProcessor", source)
        self.labels = {index: object_name(label) for index, label in config.id2label.items()}
        self.names: Collection[str] = frozenset(self.labels.values())

    def forward(self, images: Sequence[Image.Image]) -> list[list[Detection]]:
        """Find objects in RGB images of one size."""
        weight = next(self.model.parameters())
        inputs = self.processor(images=list(images), return_tensors="pt").to(weight.device)
        inputs["pixel_values"] = inputs["pixel_values"].to(weight.dtype)
        outputs = self.model(**inputs)
        size = images[0].height, images[0].width
        if not self.masks:
            found = self.processor.post_process_object_detection(
                outputs, threshold=self.least, target_sizes=[size] * len(images)
            )
            return [self._boxes(one, size) for one in found]
        pairs = zip(outputs.class_queries_logits.float(), outputs.masks_queries_logits.float(), strict=True)
        return [self._instances(classes, masks, size) for classes, masks in pairs]

    def _boxes(self, found: Mapping[str, Tensor], size: tuple[int, int]) -> list[Detection]:
        rows = zip(found["labels"].tolist(), found["scores"].tolist(), found["boxes"].tolist(), strict=True)
        known = [row for row in rows if row[0] in self.labels]
        return [Detection(self.labels[label], score, clipped(box, size)) for label, score, box in known]

    def _instances(
        self,
        classes: Float[Tensor, "queries classes_and_none"],
        masks: Float[Tensor, "queries height width"],
        size: tuple[int, int],
    ) -> list[Detection]:
        """Take the best 100 pairs of query and class, as published; every mask stays whole."""
        chances = classes.softmax(-1)[:, :-1]
        best = chances.flatten().topk(min(100, chances.numel()))
        found = []
        for score, index in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            if score < self.least:
                break
            query, label = divmod(index, chances.shape[1])
            # Images of one size are resized without padding, so that the mask covers the whole of them.
            logits = F.interpolate(masks[query][None, None], size=size, mode="bilinear", align_corners=False)[0, 0]
            mask = logits > 0
            sure = (logits.sigmoid() * mask).sum().item() / (mask.sum().item() + 1e-6)
            if mask.any() and score * sure >= self.least:
                rows, columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
                ends = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
                left, top, right, bottom = (float(end) for end in ends)
                found.append(Detection(self.labels[label], score * sure, (left, top, right, bottom), mask.cpu()))
        return found


class OnnxDetector:
    """FastestDet, or a detector with its outputs, through onnxruntime: `[1, 3, s, s]` -> `[1, 5 + names, h, w]`.

    The input is BGR in [0, 1], squashed to a square. Each cell of the output holds the chance of an object, tanh
    offsets of the centre from the cell in cells, logits of width and height relative to the image, and the chances of
    all names; the score is `object ** 0.6 * name ** 0.4`, overlaps above 0.45 within one name are suppressed.
    """

    def __init__(self, path: str | PathLike[str], names: Sequence[str] = OBJECTS, least: float = 0.05) -> None:
        """Load a file; detections below the score `least` are dropped.

        Raises:
            RewardError: onnxruntime is not installed, or the file is not such a model.
        """
        try:
            import onnxruntime
        except ImportError as error:
            raise RewardError('ONNX detectors need onnxruntime: pip install "mmalign[onnx]"') from error
        if not Path(path).is_file():
            raise RewardError(f"no such file: {path}")
        self.names: Collection[str] = names
        self.order, self.least = tuple(names), least
        try:
            self.session: Any = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's own
            reason = " ".join(str(error).split())[:200]
            raise RewardError(f"{path}: not a readable ONNX model ({reason})") from error
        inputs, outputs = self.session.get_inputs()[0], self.session.get_outputs()[0]
        if len(inputs.shape) != 4 or len(outputs.shape) != 4 or outputs.shape[1] != 5 + len(names):
            raise RewardError(
                f"{path} maps {inputs.shape} to {outputs.shape}; [1, 3, s, s] to [1, {5 + len(names)}, h, w] is "
                "expected"
            )
        self.input, (self.height, self.width) = inputs.name, inputs.shape[2:]

    def __call__(self, images: Sequence[Image.Image]) -> list[list[Detection]]:
        """Find objects in RGB images, one by one."""
        return [self._find(image) for image in images]

    def _find(self, image: Image.Image) -> list[Detection]:
        small = image.resize((self.width, self.height), Image.Resampling.BILINEAR)
        pixels = np.asarray(small, dtype=np.float32)[..., ::-1].transpose(2, 0, 1)[None] / 255
        output = torch.from_numpy(self.session.run(None, {self.input: np.ascontiguousarray(pixels)})[0][0])
        return decode_cells(output, self.order, (image.height, image.width), self.least)


def decode_cells(
    output: Float[Tensor, "values rows columns"], names: Sequence[str], size: tuple[int, int], least: float
) -> list[Detection]:
    """Read the output of `OnnxDetector`'s model for an image of a size (height, width)."""
    rows, columns = output.shape[1:]
    chance, name = output[5:].max(0)
    scores = output[0].clamp(min=0) ** 0.6 * chance.clamp(min=0) ** 0.4
    found = []
    for row, column in (scores >= least).nonzero().tolist():
        dx, dy = output[1:3, row, column].tanh().tolist()
        width, height = output[3:5, row, column].sigmoid().tolist()
        x, y = (column + dx) / columns, (row + dy) / rows
        ends = ((x - width / 2) * size[1], (y - height / 2) * size[0], (x + width / 2) * size[1])
        box = clipped((*ends, (y + height / 2) * size[0]), size)
        found.append(Detection(names[int(name[row, column])], scores[row, column].item(), box))
    return suppressed(found, 0.45)


def suppressed(found: Sequence[Detection], overlap: float) -> list[Detection]:
    """Sort by score, best first, and drop what overlaps a better detection of its name by at least `overlap`."""
    kept: list[Detection] = []
    for one in sorted(found, key=lambda one: -one.score):
        if overlap >= 1 or all(one.name != better.name or iou(one.box, better.box) < overlap for better in kept):
            kept.append(one)
    return kept


def iou(first: Sequence[float], second: Sequence[float]) -> float:
    """Return the intersection of two boxes over their union."""
    across = min(first[2], second[2]) - max(first[0], second[0])
    down = min(first[3], second[3]) - max(first[1], second[1])
    inside = max(across, 0.0) * max(down, 0.0)
    areas = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (first, second))
    return inside / (areas - inside) if areas > inside else 0.0


def clipped(box: Sequence[float], size: tuple[int, int]) -> tuple[float, float, float, float]:
    """Clip a box to the edges of an image of a size (height, width)."""
    left, right = (min(max(float(x), 0.0), float(size[1])) for x in (box[0], box[2]))
    top, bottom = (min(max(float(y), 0.0), float(size[0])) for y in (box[1], box[3]))
    return left, top, right, bottom


def object_name(label: str) -> str:
    """Return GenEval's name for a detector's label in COCO's or Pascal VOC's spelling."""
    label = label.strip().lower().replace("_", " ")
    return _OTHER_NAMES.get(label, label)
