"""The oracle as rewards, and the Shapes CLIP; registered by entry points, like any third party's rewards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from mmalign.core.resources import find
from mmalign.shapes import oracle
from mmalign.shapes.language import PromptError, parse
from mmalign.shapes.world import SIZE
from rewards import Reward
from rewards.clip import ClipReward
from rewards.errors import RewardError


def check_grammar(reward: type[Reward], prompts: Sequence[str], parse: Callable[[str], object]) -> None:
    """Raise `RewardError` for prompts outside the grammar that `parse` reads, with their number and the first."""
    faults = []
    for prompt in prompts:
        try:
            parse(prompt)
        except PromptError as error:
            faults.append(error)
    if faults:
        raise RewardError(f"{reward.name} cannot score {len(faults)} of {len(prompts)} prompts: {faults[0]}")


class OracleReward(Reward):
    """Base of the rewards that read images of the Shapes world."""

    range = (0.0, 1.0)
    licence = "Apache-2.0"
    source = "none: computed by mmalign.shapes.oracle"
    fixed_size = SIZE

    def readings(self, media: Float[Tensor, "batch 3 height width"]) -> list[oracle.Reading]:
        """Read each image once."""
        if media.shape[-2:] != (SIZE, SIZE):
            raise RewardError(
                f"{self.name} reads {SIZE}x{SIZE} images of the Shapes world, got {tuple(media.shape[-2:])}"
            )
        pixels = (media.permute(0, 2, 3, 1) * 255).round().to(torch.uint8).cpu().numpy()
        return [oracle.read_cached(picture) for picture in pixels]


class ShapesCorrectness(OracleReward):
    """How well the image fits the prompt, graded by the oracle: objects, attributes, count, relation."""

    name: ClassVar[str] = "shapes-correctness"
    needs = frozenset({"prompts"})

    @classmethod
    def check_prompts(cls, prompts: Sequence[str]) -> None:
        """Refuse prompts outside the grammar."""
        check_grammar(cls, prompts, parse)

    def score(self, media: Tensor, prompts: Sequence[str] | None, references: Sequence[Tensor] | None) -> Tensor:
        """Grade each image against its prompt, in [0, 1]."""
        readings = self.readings(media)
        return torch.tensor([oracle.judge(parse(p), r) for p, r in zip(prompts or (), readings, strict=True)])


class ShapesStrict(ShapesCorrectness):
    """1 if the image shows exactly the content of the prompt and nothing else, otherwise 0."""

    name: ClassVar[str] = "shapes-strict"
    derived_from = frozenset({"shapes-correctness"})

    def score(self, media: Tensor, prompts: Sequence[str] | None, references: Sequence[Tensor] | None) -> Tensor:
        """Pass or fail each image."""
        return (super().score(media, prompts, references) > 1.0 - 1e-6).float()


class ShapesQuality(OracleReward):
    """Render quality whatever the content: sharp edges, clean areas, full contrast; 0 to 1."""

    name: ClassVar[str] = "shapes-quality"

    def score(self, media: Tensor, prompts: Sequence[str] | None, references: Sequence[Tensor] | None) -> Tensor:
        """Rate each image; the prompt is not used."""
        return torch.tensor([reading.quality for reading in self.readings(media)])


class ShapesClip(ClipReward):
    """Cosine of the small CLIP trained on Shapes (`assets/shapes-clip`): differentiable, learned, imperfect."""

    name: ClassVar[str] = "shapes-clip"
    licence = "Apache-2.0"
    source = "assets/shapes-clip, shipped with mmalign"
    citation = "trained by `mmalign shapes train-clip`"

    @classmethod
    def default_weights(cls) -> str | None:
        """Find the shipped directory, in a checkout or in an installed wheel."""
        return str(find("assets/shapes-clip"))
