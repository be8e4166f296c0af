"""GenEval: whether an image shows the objects, numbers, colours and positions that its prompt names.

Source: Ghosh et al. 2023 (arXiv:2310.11513). A detector's boxes are compared with the prompt by the rules of
`rewards.language.geneval_tasks`; colours are read by CLIP, zero-shot, from the box, with what the mask leaves out
painted grey. Forms, whose scores are not comparable:

* `correct`  1 where all is right, else 0; at least as many objects as asked for (more is wrong only for numbers);
* `strict`   the same with exact numbers, as Flow-GRPO (Liu et al. 2025, arXiv:2505.05470) rewards;
* `dense`    the mean of credits, as Flow-GRPO: 1 - |found - asked| / asked for each number and colour, 0 or 1 for a
  relation. Deviations from its code: credits are at least 0, not negative for many objects too many; a relation that
  does not hold gets 0, where the code appends a 1 after the 0 and so gives one half; every colour and relation has its
  credit also where the number is wrong.

The paper's detector is Mask2Former Swin-S of mmdetection; that of transformers has the same architecture but other
weights, so that published totals (SD 1.5 0.43, SDXL 0.55) are met approximately. A total is the mean over the six tags
of the mean over a tag's prompts. `verdicts` says what is wrong with each image.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor

from rewards.backbones.detectors import Detection, Detector, OnnxDetector, TransformersDetector, suppressed
from rewards.backbones.encoder import Encoder
from rewards.backbones.load import load_preset
from rewards.backbones.weights import Weights
from rewards.bases.observed import ObservedReward
from rewards.bases.two_tower import unit
from rewards.errors import RewardError, choices
from rewards.language.geneval_tasks import COLOURS, Task, Verdict, check_names, judge, parse_task, read_tasks
from rewards.media import Media, load_image

FORMS = ("correct", "dense", "strict")
TEMPLATES = ("a photo of a {colour} {name}", "a photo of a {colour}-colored {name}", "a photo of a {colour} object")
GREY = (0x99, 0x99, 0x99)
MASK2FORMER = "facebook/mask2former-swin-small-coco-instance"


class GenEval(ObservedReward):
    """Objects, numbers, colours and positions that the prompt asks for, found by a detector: GenEval.

    form: `correct` (default), `strict` or `dense`, see above. weights: of the detector, a directory or hub id of
    transformers, or an .onnx file; detector: one of your own instead (`rewards.backbones.detectors.Detector`). clip:
    weights of the CLIP that names colours, read when first needed; by default OpenAI's ViT-L/14. metadata: GenEval's
    JSONL or its rows, for prompts that `parse_task` cannot read. threshold, counting_threshold: boxes must score more,
    the second where numbers are asked for (lower it for small detectors). max_objects: of each name, the best;
    max_overlap: of boxes of one name, as intersection over union; 1 keeps all.
    """

    name: ClassVar[str] = "geneval"
    version = "correct, boxes above 0.3 (counting 0.9)"
    range = (0.0, 1.0)
    licence = "Apache-2.0; weights: Mask2Former MIT, CLIP MIT"
    source = f"{MASK2FORMER}; colours: open_clip ViT-L-14-quickgelu, openai"
    citation = "Ghosh et al. 2023, arXiv:2310.11513; dense: Liu et al. 2025, arXiv:2505.05470"
    files: tuple[Weights, ...] = (Weights(MASK2FORMER, "model.safetensors"),)

    def __init__(
        self,
        *,
        form: str = "correct",
        weights: str | PathLike[str] | None = None,
        detector: Detector | None = None,
        clip: str | PathLike[str] | None = None,
        metadata: str | PathLike[str] | Iterable[Mapping[str, Any]] = (),
        threshold: float = 0.3,
        counting_threshold: float = 0.9,
        max_objects: int = 16,
        max_overlap: float = 1.0,
        **common: Any,
    ) -> None:
        """Load the detector; CLIP is loaded at the first prompt with a colour."""
        super().__init__(**common)
        if form not in FORMS:
            raise RewardError(f"geneval: form {form!r} is unknown; {choices(form, FORMS)}")
        if weights is not None and detector is not None:
            raise RewardError("geneval: give weights or detector, not both")
        if max_objects < 1:
            raise RewardError(f"geneval: max_objects is {max_objects}; at least 1 is allowed")
        self.form, self.clip = form, clip
        self.threshold, self.counting_threshold = threshold, counting_threshold
        self.max_objects, self.max_overlap = max_objects, max_overlap
        self.tasks = read_tasks(metadata)
        self.detector: Any = self._load(weights) if detector is None else detector
        self._encoder: Encoder | None = None
        self._names_of_colours: dict[str, Tensor] = {}
        self.version = f"{form}, boxes above {threshold:g} (counting {counting_threshold:g})"
        if detector is not None or weights is not None:
            what = type(detector).__name__ if detector is not None else str(weights)
            self.source, self.files = f"detector {what}; colours: {clip or 'open_clip ViT-L-14-quickgelu, openai'}", ()

    def task(self, prompt: str) -> Task:
        """Return the task of a prompt, from the metadata or else from its words; `RewardError` if both fail."""
        task = self.tasks.get(prompt) or parse_task(prompt)
        check_names(task, self.detector.names, prompt)
        return task

    def observe(self, images: list[Image.Image]) -> list[tuple[Image.Image, list[Detection]]]:
        """Detect objects; the images are kept, for their colours."""
        return list(zip(images, self.detector(images), strict=True))

    def rate(self, observed: tuple[Image.Image, list[Detection]], prompt: str) -> float:
        """Check the objects, and score as the form says."""
        verdict = self._verdict(*observed, self.task(prompt))
        return sum(verdict.credits) / len(verdict.credits) if self.form == "dense" else float(verdict.correct)

    def verdicts(self, media: Media, *, prompts: Sequence[str]) -> list[Verdict]:
        """Return for each image whether it is correct, its credits, and what is wrong with it."""
        tasks = [self.task(prompt) for prompt in self._check_prompts(prompts, len(media)) or ()]
        with torch.inference_mode():
            seen = self.observations(media)
            return [self._verdict(image, found, task) for (image, found), task in zip(seen, tasks, strict=True)]

    def _verdict(self, image: Image.Image, found: Sequence[Detection], task: Task) -> Verdict:
        least = self.counting_threshold if task.counting else self.threshold
        objects: dict[str, list[Detection]] = {}
        for name in task.names:
            best = sorted((one for one in found if one.name == name and one.score > least), key=lambda one: -one.score)
            objects[name] = suppressed(best[: self.max_objects], self.max_overlap)
        return judge(objects, task, lambda some, name: self._colours(image, some, name), self.form != "correct")

    def _colours(self, image: Image.Image, found: Sequence[Detection], name: str) -> list[str]:
        """Name the colour of each object."""
        encoder = self._colour_encoder()
        crops = [load_image(cut_out(image, one)).to(self.device) for one in found]
        embedded = torch.cat([unit(encoder.embed_media(crop[None], "reference")) for crop in crops])
        if name not in self._names_of_colours:
            texts = [text.format(colour=colour, name=name) for colour in COLOURS for text in TEMPLATES]
            each = unit(encoder.embed_texts(texts)).unflatten(0, (len(COLOURS), len(TEMPLATES)))
            self._names_of_colours[name] = unit(each.mean(1))
        return [COLOURS[index] for index in (embedded @ self._names_of_colours[name].T).argmax(1).tolist()]

    def _colour_encoder(self) -> Encoder:
        if self._encoder is None:
            with torch.inference_mode(False):
                loaded = load_preset(self.clip, model="ViT-L-14-quickgelu", pretrained="openai")
                self._encoder = loaded.to(self.device, self.dtype)
        return self._encoder

    def _load(self, weights: str | PathLike[str] | None) -> Detector:
        if str(weights).endswith(".onnx"):
            return OnnxDetector(str(weights))
        return TransformersDetector(MASK2FORMER if weights is None else weights, self.dtype).to(self.device)

    def _check_prompts(self, prompts: Sequence[str] | None, count: int) -> list[str] | None:
        """Check the prompts before a detector runs."""
        checked = super()._check_prompts(prompts, count)
        for prompt in checked or ():
            self.task(prompt)
        return checked

    def _apply(self, fn: Any, recurse: bool = True) -> GenEval:
        """Clear the embeddings when the weights move or change their dtype."""
        self._names_of_colours.clear()
        return super()._apply(fn, recurse)


def cut_out(image: Image.Image, found: Detection) -> Image.Image:
    """Return an object's box, at least one pixel of it, with what its mask leaves out painted grey."""
    if found.mask is not None:
        mask = Image.fromarray((found.mask.byte() * 255).numpy())
        image = Image.composite(image, Image.new("RGB", image.size, GREY), mask)
    left, top, right, bottom = (round(value) for value in found.box)
    left, top = min(left, image.width - 1), min(top, image.height - 1)
    return image.crop((left, top, max(right, left + 1), max(bottom, top + 1)))
