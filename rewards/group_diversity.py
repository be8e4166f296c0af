"""How far an image is from the other images of its prompt: against the collapse of online training.

Methods that compare the images of a prompt with each other move towards whatever scores a little better in what the
prompt leaves open, until all images share it. This reward, beside the others with a small weight, pays for being
unlike the others of the group:

    1/(n - 1) sum over the others of 1 - exp(-d^2 / (2 scale^2)),

with d the root mean square difference of the images, averaged over a `grid` x `grid` of areas. So for images in
clusters far apart it is the share of the group in OTHER clusters, whose mean is the Gini-Simpson index 1 - sum p^2 (up
to n / (n - 1)), and it does not pay for being farther apart than a few times `scale`, as a plain distance does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from rewards.base import Reward
from rewards.errors import RewardError


class GroupDiversity(Reward):
    """How unlike an image is to the other images of its prompt in the batch, 0 (alike) to 1; see above.

    grid: 1 (default) compares the mean colours, the palette; 16 the layout too. scale: the difference, in pixel values
    of 0 to 1, at which images begin to count as unlike, 0.1 by default.
    """

    name: ClassVar[str] = "group-diversity"
    range = (0.0, 1.0)
    differentiable = True
    batch_invariant = False
    grouped = True
    needs = frozenset({"prompts"})
    licence = "Apache-2.0"
    citation = "none: ours"

    def __init__(self, *, grid: int = 1, scale: float = 0.1, **common: Any) -> None:
        """Check the options."""
        super().__init__(**common)
        if not 1 <= grid <= 64:
            raise RewardError(f"{self.name}: grid is {grid}; 1 to 64 are allowed")
        if not 0 < scale <= 1:
            raise RewardError(f"{self.name}: scale is {scale:g}; a number above 0 up to 1 is allowed")
        self.grid, self.scale = grid, scale
        self.version = f"grid {grid}, scale {scale:g}"

    def score(
        self, media: Tensor, prompts: Sequence[str] | None, references: Sequence[Tensor] | None
    ) -> Float[Tensor, " batch"]:
        """Compare each image with the others of its prompt."""
        assert prompts is not None
        alone = [prompt for prompt in prompts if list(prompts).count(prompt) == 1]
        if alone:
            raise RewardError(
                f"{self.name} compares the images of a prompt, and there is one of {alone[0]!r} in this batch; "
                "it is for training, with method.images_per_prompt of 2 or more"
            )
        features = adaptive_avg_pool2d(media, self.grid).flatten(1)
        squares = (features[:, None] - features[None]).square().mean(-1)
        unlike = 1 - torch.exp(-squares / (2 * self.scale**2))
        position = {prompt: index for index, prompt in enumerate(dict.fromkeys(prompts))}
        group = torch.tensor([position[prompt] for prompt in prompts], device=media.device)
        same = (group[:, None] == group[None]).to(unlike)
        return (unlike * same).sum(1) / (same.sum(1) - 1)
