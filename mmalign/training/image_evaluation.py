"""Evaluate a generator while it trains: media of fixed prompts and seeds, and the means of some rewards."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mmalign.core.files import write_atomically
from mmalign.core.io.grid import frame_strips, image_grid
from mmalign.core.io.images import encode_png
from mmalign.core.seeds import derive_seed
from mmalign.data.building.generation import condition
from mmalign.data.prompts import Prompt, load_prompts
from mmalign.scoring.checks import check_reward
from mmalign.training.evaluation import Evaluated
from rewards import load_reward
from rewards.combining.on_frames import on_frames
from rewards.registry import reward_class

if TYPE_CHECKING:
    from PIL.Image import Image

    from mmalign.config.sections import EvaluateConfig
    from mmalign.methods.run import Run

COLUMNS = 4


def check_evaluation(config: EvaluateConfig, modality: str = "image") -> None:
    """Check prompts and rewards of the evaluation, without loading any.

    Raises:
        UserError, RewardError: the prompts cannot be read, or a reward cannot score media of them.
    """
    prompts = [prompt.text for prompt in load_prompts(str(config.prompts), limit=config.limit)]
    for name in config.rewards:
        on_frames = modality == "video" and reward_class(name).modality == "image" and config.frames is not None
        check_reward(name, {}, prompts, "image" if on_frames else modality)


class ImageEvaluation:
    """Samples the same prompts with the same seeds every time, so that two evaluations differ by the weights alone."""

    def __init__(self, config: EvaluateConfig, generator: Any, seed: int, *, first_frames: bool = False) -> None:
        """Load the rewards and encode the prompts, which must happen before the encoders are freed.

        With `first_frames` videos start from those of the prompts, where these have such.
        """
        self.config = config
        prompts = load_prompts(str(config.prompts), limit=config.limit)
        self.prompts = [prompt.text for prompt in prompts]
        self.rewards = {name: self._load(name, generator) for name in config.rewards}
        self.seeds = [derive_seed(seed, "evaluate", index) for index in range(len(self.prompts))]
        self.cond = condition(generator, prompts if first_frames else [Prompt(text) for text in self.prompts])
        self.negative = generator.unconditional()

    def _load(self, name: str, generator: Any) -> Any:
        reward = load_reward(name, device=generator.device)
        return on_frames(reward, None if reward.modality == generator.modality else self.config.frames)

    def higher_is_better(self, name: str) -> bool:
        """Tell whether more of a reward is better."""
        return bool(self.rewards[name].higher_is_better)

    def lower_is_better(self) -> set[str]:
        """Return the names of the rewards of which less is better."""
        return {name for name in self.rewards if not self.higher_is_better(name)}

    @torch.no_grad()
    def evaluate(self, run: Run) -> Evaluated:
        """Return mean and standard deviation over the prompts of each reward, as "evaluation/NAME", and one image.

        The encoders are read for decoding and freed again, unless the method decodes too.
        """
        from pipelines import sample

        run.generator.network.eval()
        with run.autocast():
            trajectory = sample(
                run.generator,
                self.cond,
                steps=self.config.steps,
                guidance=self.config.guidance,
                seeds=self.seeds,
                negative=self.negative,
                batch_size=1 if run.generator.modality == "video" else 8,
            )
        run.generator.network.train()
        media = torch.cat([run.generator.decode(part).float() for part in trajectory.latents.split(8)])
        run.generator.free_encoders(keep=run.kept)
        means, spreads = {}, {}
        for name, reward in self.rewards.items():
            prompts = self.prompts if "prompts" in reward.needs else None
            scores = reward(media, prompts=prompts)
            means[f"evaluation/{name}"] = float(scores.mean())
            spreads[f"evaluation/{name}"] = float(scores.std(correction=0))
        return Evaluated(means, spreads, self._picture(list(media.cpu())))

    def _picture(self, made: list[Tensor]) -> Image:
        """Draw the images in a grid, or a strip of frames of each video."""
        if made[0].ndim == 4:
            return frame_strips(made, self.prompts)
        return image_grid([made[start : start + COLUMNS] for start in range(0, len(made), COLUMNS)])


def save_grid(picture: Image, output: Path, step: int) -> Path:
    """Write the image as <output>/evaluation/step_N.png and return the path."""
    path = output / "evaluation" / f"step_{step}.png"
    write_atomically(path, encode_png(picture))
    return path
