"""Z-Image: a single-stream flow transformer over image and text tokens, conditioned by a language model (Qwen3).

Z-Image: arXiv 2511.22699. The conventions are those of diffusers' ``ZImagePipeline``: the network takes lists of
samples, each prompt with its own length, and the time 1 - sigma, and gives ``x0 - noise``. A guidance of w here is its
``guidance_scale`` of w - 1, since it adds that many times the difference to the conditional prediction.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from pipelines import adapters
from pipelines.components import read_json
from pipelines.conditioning import Conditioning
from pipelines.errors import PipelineError
from pipelines.families.latent import single
from pipelines.families.transformer_image import TransformerImage

DEFAULT_SIDE = 1024
"""Side in pixels of the images that diffusers' pipeline makes by default, if the network has positions for it."""
TEXT_BLOCK = 32
"""The network fills up each text to a multiple of this."""


class ZImage(TransformerImage):
    """Z-Image, base and Turbo (which is distilled to few steps, and loses that in training)."""

    family = "z_image"
    text_names = ("text_encoder", "tokenizer")
    lora_targets = adapters.DEFAULT_TARGETS
    even_sigmas = True
    patch_size = 2

    @property
    def default_text_length(self) -> int:
        """The length that diffusers' pipeline pads prompts to, or the tokenizer's own if that is shorter."""
        file = self.root / "tokenizer" / "tokenizer_config.json"
        known = read_json(file).get("model_max_length")
        if known is None:
            return self.longest_text
        if not isinstance(known, int | float) or not known >= 1:
            raise PipelineError(f"{file}: model_max_length is {str(known)[:60]!r}; allowed: a number of at least 1.")
        return int(min(known, self.longest_text))

    @property
    def longest_text(self) -> int:
        """As the pipeline, but no more than the network has positions for: text in whole blocks, then the image."""
        return min(super().longest_text, (int(self.config["axes_lens"][0]) - 2) // TEXT_BLOCK * TEXT_BLOCK)

    @property
    def largest_side(self) -> int:
        """The largest side in pixels: the network has positions for no more tokens."""
        return int(min(self.config["axes_lens"][1:])) * self.side_multiple

    @property
    def _default_side(self) -> int:
        return min(DEFAULT_SIDE, self.largest_side)

    def predict(
        self, x_t: Float[Tensor, "batch channels height width"], t: Shaped[Tensor, " batch"], cond: Conditioning
    ) -> Float[Tensor, "batch channels height width"]:
        """Run the transformer once, without guidance; the output, ``noise - x0``, is float32 (or float64)."""
        if cond.mask is None:
            raise PipelineError("'z_image' needs the mask of each prompt; encode the prompts with this generator.")
        levels = self.process.num_train_timesteps
        texts = zip(cond.prompt_embeds.to(self.dtype), cond.mask, strict=True)
        output = self.network(
            list(x_t.to(self.dtype).unsqueeze(2)),
            (levels - t) / levels,
            [text[kept] for text, kept in texts],
            return_dict=False,
        )[0]
        return -single(torch.stack(output)).squeeze(2)

    def _encode_batch(self, prompts: list[str]) -> Conditioning:
        tokens = self._chat(prompts, thinking=True)
        mask = tokens["attention_mask"].bool()
        encoder = self.encoder("text_encoder")
        hidden = encoder(tokens["input_ids"], attention_mask=mask, output_hidden_states=True).hidden_states[-2]
        return Conditioning(hidden * mask.unsqueeze(-1), mask=mask)
