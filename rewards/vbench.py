"""VBench's dimensions of video quality whose models are published and can be loaded here.

Source: Huang et al. 2024, "VBench" (arXiv:2311.17982), section 3, and its evaluation code. For frames f_1 .. f_F

    consistency = mean over t > 1 of (max(0, cos(f_t-1, f_t)) + max(0, cos(f_1, f_t))) / 2

of DINO ViT-B/16 features (subject) or CLIP ViT-B/32 embeddings (background). Each is scored here per video; VBench
reports subject and background consistency averaged over the frames of all videos, where long ones weigh more. Its
leaderboard rescales every dimension by fixed bounds, here `normalise=True`, and sums all sixteen
(`rewards.vbench_total`).

Frames are resized as there: on tensors without antialiasing, neither clamped nor rounded, so that one path serves for
scoring and for gradients; other resizing gives other scores. Dynamic degree is in `rewards.video_motion`, and so is a
motion smoothness that is not VBench's unless it is given VBench's interpolator. Not offered, because each rests on
a network that is not ported: imaging quality (MUSIQ), temporal style and overall consistency (ViCLIP), human action
(UMT), scene (Tag2Text), and object class, multiple objects, colour and spatial relationship (GRiT).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from os import PathLike
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from rewards.aesthetic import VERSIONS, Aesthetic
from rewards.backbones.hf import load_pretrained
from rewards.backbones.load import load_preset
from rewards.backbones.preprocess import IMAGENET, OPENAI
from rewards.base import Reward
from rewards.bases.encoder import EncoderReward
from rewards.bases.two_tower import unit
from rewards.errors import RewardError
from rewards.vbench_total import BOUNDS

SIZE = 224
DINO = "facebook/dino-vitb16"
CLIP_B32 = "ViT-B-32-quickgelu"
CITATION = "Huang et al. 2024, VBench, arXiv:2311.17982"


class VBenchReward(Reward):
    """A dimension of VBench; a subclass names it and implements `measure`."""

    modality = "video"
    differentiable = True
    licence = "Apache-2.0 (VBench)"
    citation = CITATION
    dimension: ClassVar[str] = ""

    def __init__(self, *, normalise: bool = False, batch_size: int = 4, **options: Any) -> None:
        """normalise: rescale as VBench's leaderboard does, by the bounds of the dimension."""
        super().__init__(batch_size=batch_size, **options)
        self.normalise = normalise
        self.version = f"{self.version}, normalised" if normalise else self.version
        low, high = self._rescaled(torch.tensor(self.range, dtype=torch.float64)).tolist()
        self.range = (low, high)

    @abstractmethod
    def measure(
        self, media: Float[Tensor, "batch frames 3 height width"], prompts: Sequence[str] | None
    ) -> Float[Tensor, " batch"]:
        """Measure videos of at least `least_frames` frames, before the normalisation."""

    def score(
        self,
        media: Float[Tensor, "batch frames 3 height width"],
        prompts: Sequence[str] | None,
        references: Sequence[Tensor] | None,
    ) -> Float[Tensor, " batch"]:
        """Measure, and normalise if requested."""
        if media.shape[1] < self.least_frames:
            raise RewardError(
                f"{self.name}: a video of {media.shape[1]} frame{'s' * (media.shape[1] > 1)}; at least "
                f"{self.least_frames} are needed"
            )
        return self._rescaled(self.measure(media, prompts))

    def _rescaled(self, scores: Tensor) -> Tensor:
        if not self.normalise:
            return scores
        low, high = BOUNDS[self.dimension]
        return (scores - low) / (high - low)


class SubjectConsistency(VBenchReward):
    """Similarity of the frames in DINO features, which depend on the subject; in [0, 1].

    weights: directory or hub id of DINO ViT-B/16 in transformers' layout. A video without motion scores 1. Deviation:
    the position embeddings of frames that are not square are interpolated to their size as transformers does, where
    DINO's own code adds 0.1 to it, against rounding.
    """

    name: ClassVar[str] = "vbench-subject-consistency"
    dimension = "subject consistency"
    version = "DINO ViT-B/16"
    range = (0.0, 1.0)
    licence = "Apache-2.0 (VBench, DINO)"
    source = DINO
    least_frames = 2

    def __init__(self, *, weights: str | PathLike[str] | None = None, **options: Any) -> None:
        """Load DINO."""
        super().__init__(**options)
        self.source = str(weights or DINO)
        model = load_pretrained("ViTModel", weights or DINO, dtype=torch.float32, add_pooling_layer=False)
        self.model = model.to(self.device, self.dtype)

    def measure(self, media: Tensor, prompts: Sequence[str] | None) -> Float[Tensor, " batch"]:
        """Compare the class tokens of the frames."""
        pixels = prepare(media.flatten(0, 1), "bilinear", IMAGENET, size=SIZE).to(self.dtype)
        hidden = self.model(pixel_values=pixels, interpolate_pos_encoding=True).last_hidden_state
        return consistency(hidden[:, 0].unflatten(0, media.shape[:2]))


class BackgroundConsistency(VBenchReward):
    """Similarity of the frames in CLIP embeddings, which depend on the whole scene; in [0, 1].

    weights: of CLIP ViT-B/32, as `weights` of the reward `clip`, by default open_clip's with the tag `openai`.
    """

    name: ClassVar[str] = "vbench-background-consistency"
    dimension = "background consistency"
    version = "CLIP ViT-B/32"
    range = (0.0, 1.0)
    licence = "Apache-2.0 (VBench), MIT (CLIP)"
    source = f"open_clip {CLIP_B32}, openai"
    least_frames = 2

    def __init__(self, *, weights: str | PathLike[str] | None = None, **options: Any) -> None:
        """Load the image tower of CLIP."""
        super().__init__(**options)
        encoder = load_preset(weights, model=CLIP_B32, pretrained="openai").without_texts()
        self.source = encoder.source
        self.encoder = encoder.to(self.device, self.dtype)

    def measure(self, media: Tensor, prompts: Sequence[str] | None) -> Float[Tensor, " batch"]:
        """Compare the embeddings of the frames."""
        size = self.encoder.preprocess.target[0]
        pixels = prepare(media.flatten(0, 1), "bicubic", OPENAI, size=size, crop=True).to(self.dtype)
        return consistency(self.encoder.embed_pixels(pixels).unflatten(0, media.shape[:2]))


class TemporalFlickering(VBenchReward):
    """One minus the mean change of a pixel from frame to frame; in [0, 1].

    Meant for prompts of still scenes: motion lowers it as flicker does, and VBench leaves moving videos out.
    """

    name: ClassVar[str] = "vbench-temporal-flickering"
    dimension = "temporal flickering"
    range = (0.0, 1.0)
    least_frames = 2

    def measure(self, media: Tensor, prompts: Sequence[str] | None) -> Float[Tensor, " batch"]:
        """Compare neighbouring frames."""
        return 1 - (media[:, 1:] - media[:, :-1]).abs().flatten(1).mean(1)


class AestheticQuality(VBenchReward):
    """Mean over the frames of LAION's aesthetic rating of version v1, divided by 10; about 0.1 to 1.

    weights: of the head, encoder: of CLIP ViT-L/14, as in the reward `aesthetic`.
    """

    name: ClassVar[str] = "vbench-aesthetic-quality"
    dimension = "aesthetic quality"
    version = "LAION v1 / 10"
    licence = "Apache-2.0 (VBench), MIT (LAION v1, CLIP)"
    source = "LAION-AI/aesthetic-predictor on GitHub; open_clip ViT-L-14-quickgelu, tag openai"
    derived_from = frozenset({"aesthetic"})
    files = (VERSIONS["v1"].file,)

    def __init__(
        self,
        *,
        weights: str | PathLike[str] | None = None,
        encoder: str | PathLike[str] | None = None,
        **options: Any,
    ) -> None:
        """Load head and CLIP."""
        super().__init__(**options)
        self.aesthetic = Aesthetic(
            version="v1", weights=weights, encoder=encoder, device=self.device, dtype=self.dtype
        )
        self.source = self.aesthetic.source

    def measure(self, media: Tensor, prompts: Sequence[str] | None) -> Float[Tensor, " batch"]:
        """Rate each frame."""
        encoder = self.aesthetic.encoder
        size = encoder.preprocess.target[0]
        pixels = prepare(media.flatten(0, 1), "bicubic", OPENAI, size=size, crop=True).to(self.dtype)
        return self.aesthetic.rate(encoder.embed_pixels(pixels)).unflatten(0, media.shape[:2]).mean(1) / 10


class AppearanceStyle(EncoderReward):
    """Mean over the frames of the cosine of CLIP ViT-B/32 with the name of a style; in [-1, 1].

    The prompt is the style alone, as VBench lists it beside its prompts, such as "Van Gogh style". weights: as in
    `vbench-background-consistency`. normalise: as in the other dimensions. Frames are resized with antialiasing here,
    as VBench does through PIL; preprocessing: as in `rewards.backbones.preprocess`.
    """

    name: ClassVar[str] = "vbench-appearance-style"
    modality = "video"
    version = "CLIP ViT-B/32"
    licence = "Apache-2.0 (VBench), MIT (CLIP)"
    source = f"open_clip {CLIP_B32}, openai"
    citation = CITATION

    def __init__(
        self,
        *,
        weights: str | PathLike[str] | None = None,
        normalise: bool = False,
        batch_size: int = 4,
        **options: Any,
    ) -> None:
        """Load CLIP."""
        super().__init__(batch_size=batch_size, **options)
        self.use(load_preset(weights, model=CLIP_B32, pretrained="openai"))
        self.bounds = BOUNDS["appearance style"] if normalise else (0.0, 1.0)
        self.version = f"{self.version}, normalised" if normalise else self.version
        low, high = (self.compare(torch.tensor(bound)).item() for bound in self.range)
        self.range = (low, high)

    def media_embeddings(self, media: Float[Tensor, "batch frames 3 height width"]) -> Float[Tensor, "batch features"]:
        """Average the unit embeddings of the frames, which makes a product with it the mean of the cosines."""
        return super().media_embeddings(media.flatten(0, 1)).unflatten(0, media.shape[:2]).mean(1)

    def compare(self, cosine: Float[Tensor, " *shape"]) -> Float[Tensor, " *shape"]:
        """Return the mean cosine, normalised if requested."""
        low, high = self.bounds
        return (cosine - low) / (high - low)


def consistency(features: Float[Tensor, "batch frames features"]) -> Float[Tensor, " batch"]:
    """Average the cosines of every frame with its predecessor and with the first, negative ones counted as 0."""
    frames = unit(features)
    later = frames[:, 1:]
    neighbours, first = ((later * others).sum(-1).clamp(min=0) for others in (frames[:, :-1], frames[:, :1]))
    return ((neighbours + first) / 2).mean(1)


def prepare(
    frames: Float[Tensor, "frames 3 height width"],
    interpolation: str,
    statistics: tuple[tuple[float, ...], tuple[float, ...]],
    *,
    size: int,
    crop: bool = False,
) -> Float[Tensor, "frames 3 out_height out_width"]:
    """Resize the shorter edge to `size` without antialiasing, crop the centre if requested, and normalise."""
    height, width = frames.shape[-2:]
    short = min(height, width)
    target = (int(size * height / short), int(size * width / short))
    frames = F.interpolate(frames, size=target, mode=interpolation, antialias=False, align_corners=False)
    if crop:
        top, left = round((target[0] - size) / 2), round((target[1] - size) / 2)
        frames = frames[..., top : top + size, left : left + size]
    mean, deviation = (frames.new_tensor(values).view(-1, 1, 1) for values in statistics)
    return (frames - mean) / deviation
