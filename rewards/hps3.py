"""HPSv3: human preference with its uncertainty, by Qwen2-VL-7B.

Source: Ma et al. 2025, "HPSv3" (arXiv:2508.03789), section 4: the model reads the image, a long instruction and the
prompt; a perceptron 3584-1024-16-2 with ReLU on the hidden state at the token <|Reward|> gives mean and uncertainty
of a normal distribution, and the mean is the score. It is the logarithm of the standard deviation that the head gives
(training takes its exponential), which `mean_and_deviation` undoes and the authors' `reward()` does not.

Scores of different prompts are comparable; they have no bound and no unit (Bradley-Terry). Images are resized to about
200 704 = 256 x 28 x 28 pixels, whatever their size.
"""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rewards.backbones.heads import Float32Head
from rewards.backbones.instruction import Instruction, read_instruction
from rewards.backbones.preprocess import MODES
from rewards.backbones.weights import GITHUB, Weights, load_state, locate, read_state
from rewards.bases.cross_encoder import CrossEncoderReward
from rewards.bases.qwen2_vl import Qwen2VLReader, VisualTokens
from rewards.errors import RewardError, choices
from rewards.media import Media, read_media

PIXELS = 256 * 28 * 28
HEAD = "rm_head."
BASE = "Qwen/Qwen2-VL-7B-Instruct"
PUBLISHED = Weights("MizzenAI/HPSv3", "HPSv3.safetensors")
INSTRUCTION = Instruction(
    Weights(
        "MizzenAI/HPSv3",
        "hpsv3/dataset/data_collator_qwen.py",
        revision="d232ff8669a0b00759766067c6c3a26e2e717fac",
        host=GITHUB,
    ),
    ("INSTRUCTION", "prompt_with_special_token"),
    "f6ee57479d4e9eee76b49c00dc962e1e696a5a2b3cc32cebd9b1fa76fe27502c",
)


class HpsV3(CrossEncoderReward):
    """Human preference for an image given its prompt, by HPSv3 (7 B parameters); unbounded.

    weights: the file HPSv3.safetensors or a directory that holds it, by default `MizzenAI/HPSv3` on the hub. base:
    directory or hub id of Qwen2-VL-7B-Instruct, for configuration and processor. instruction: what the model was
    trained with, as the authors' data_collator_qwen.py, a text file, or the text with {text_prompt} where the prompt
    goes; by default fetched from the authors' repository, and part of `version` if it is another. preprocessing: as in
    `rewards.backbones.preprocess`. dtype: bfloat16 by default, as published; the head computes in float32. Raises
    `RewardError` for weights of another model and for prompts with special tokens of the tokenizer.
    """

    name: ClassVar[str] = "hps-v3"
    version = "v3"
    differentiable = True
    licence = "MIT (HPSv3), Apache-2.0 (Qwen2-VL)"
    source = "MizzenAI/HPSv3, HPSv3.safetensors; processor of Qwen/Qwen2-VL-7B-Instruct"
    citation = "Ma et al. 2025, arXiv:2508.03789"
    files = (PUBLISHED,)

    def __init__(
        self,
        *,
        weights: str | PathLike[str] | None = None,
        base: str | PathLike[str] = BASE,
        instruction: str | PathLike[str] | None = None,
        preprocessing: str = "differentiable",
        dtype: str | torch.dtype | None = None,
        **options: Any,
    ) -> None:
        """Load model, head and instruction."""
        super().__init__(dtype=dtype or "bfloat16", **options)
        if preprocessing not in MODES:
            raise RewardError(f"preprocessing {preprocessing!r} is unknown; {choices(preprocessing, MODES)}")
        self.preprocessing = preprocessing
        template = read_instruction(INSTRUCTION, instruction)
        self.version = ", ".join(filter(None, ("v3", template.version)))
        path = locate(PUBLISHED, weights)
        state = read_state(path)
        layers = {name.removeprefix(HEAD): state.pop(name) for name in list(state) if name.startswith(HEAD)}
        self.reader = Qwen2VLReader(
            base, state, path, reward_tokens=("<|Reward|>",), instruction=template, dtype=self.dtype
        ).to(self.device)
        head = Float32Head(
            *(nn.Linear(self.reader.width, 1024), nn.ReLU(), nn.Dropout(0.05)),
            *(nn.Linear(1024, 16), nn.ReLU(), nn.Linear(16, 2)),
        )
        load_state(head, layers, f"{path}, {HEAD}*")
        self.head = head.to(self.device, self.dtype)

    def encode_media(self, media: Float[Tensor, "batch 3 height width"]) -> VisualTokens:
        """Encode images into tokens of the language model."""
        return self.reader.encode(media[:, None], "image", (PIXELS, PIXELS), self.preprocessing)

    def compare(self, encoded: VisualTokens, prompts: list[str]) -> Float[Tensor, " batch"]:
        """Return the mean of the preference for each image and its prompt."""
        return self._outputs(encoded, prompts)[:, 0]

    def mean_and_deviation(self, media: Media, *, prompts: Sequence[str]) -> Float[Tensor, "batch 2"]:
        """Return mean and standard deviation of the preference, `[B, 2]` float32; the mean is the score."""
        groups = read_media(media, self.modality)
        checked = self._check_prompts(prompts, sum(len(positions) for positions, _ in groups)) or []

        def row(chunk: Tensor, positions: list[int]) -> Tensor:
            outputs = self._outputs(self.encode_media(chunk), [checked[i] for i in positions])
            return torch.stack([outputs[:, 0], outputs[:, 1].exp()], dim=1)

        return self._run(groups, row)

    def _outputs(self, encoded: VisualTokens, prompts: list[str]) -> Tensor:
        return self.head(self.reader(encoded, prompts)[:, 0])
