"""CLIP-FlanT5: an encoder-decoder that reads an image as 576 tokens among the words of a question.

Source: Lin et al. 2024, "Evaluating Text-to-Visual Generation with Image-to-Text Generation" (arXiv:2404.01291),
section 3; architecture of LLaVA-1.5 (arXiv:2310.03744) with a FlanT5 in the place of the language model. Image tokens
are the features of CLIP's image tower before its last layer, without the class token, through a two-layer perceptron.

Published names: T5's own; `mm_projector.0`, `mm_projector.2`; and, where the image tower is in the same files,
`vision_tower.vision_tower.vision_model.*`. Which layer and which tokens of the tower are taken stands in config.json
(`mm_vision_select_layer`, `mm_vision_select_feature`), the second last layer and the patches where it does not.
"""

from __future__ import annotations

import json
from os import PathLike
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from rewards.backbones.checkpoints import build, locate_directory, read_checkpoint
from rewards.backbones.hf import load_pretrained
from rewards.backbones.weights import load_state
from rewards.errors import RewardError

TOWER = "vision_tower.vision_tower."
PROJECTOR = "mm_projector."


class ClipT5(nn.Module):
    """Image features and a question -> the likelihood of an answer. Weights are those of `source`."""

    def __init__(
        self, source: str | PathLike[str], vision_tower: str | PathLike[str] | None, dtype: torch.dtype
    ) -> None:
        """Load a checkpoint (directory or hub id).

        vision_tower: directory or hub id of the CLIP image tower's configuration, and of its weights where the
        checkpoint has none; by default what config.json names. Raises `RewardError` for another model.
        """
        super().__init__()
        import transformers

        config, settings = _configuration(source)
        projector = settings.get("mm_projector_type", "mlp2x_gelu")
        if projector != "mlp2x_gelu":
            raise RewardError(f"{source}: mm_projector_type {projector!r} is not supported; allowed: mlp2x_gelu")
        self.layer = settings.get("mm_vision_select_layer", -2)
        self.with_class_token = settings.get("mm_vision_select_feature", "patch") == "cls_patch"
        state = read_checkpoint(source)
        tower = {name.removeprefix(TOWER): state.pop(name) for name in list(state) if name.startswith(TOWER)}
        layers = {name.removeprefix(PROJECTOR): state.pop(name) for name in list(state) if name.startswith(PROJECTOR)}
        state.pop("embed_tokens.weight", None)  # a second name of the encoder's
        self.vision = _vision(vision_tower or settings.get("mm_vision_tower"), tower, source, dtype)
        width, features = config.d_model, self.vision.config.hidden_size
        self.projector = nn.Sequential(nn.Linear(features, width), nn.GELU(), nn.Linear(width, width))
        load_state(self.projector, layers, f"{source}, {PROJECTOR}*")
        self.projector.to(dtype)
        if "shared.weight" in state:
            config.vocab_size = len(state["shared.weight"])
        self.t5 = build(transformers.T5ForConditionalGeneration, config, state, source, dtype)

    @property
    def image_size(self) -> int:
        """Height and width of its input images."""
        return self.vision.config.image_size

    def image_features(self, pixels: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch patches features"]:
        """Encode normalised images into tokens of the language model."""
        hidden = self.vision(pixels.to(self.vision.dtype), output_hidden_states=True).hidden_states[self.layer]
        return self.projector(hidden if self.with_class_token else hidden[:, 1:])

    def answer_log_likelihood(
        self,
        image: Float[Tensor, "batch patches features"],
        before: Int[Tensor, " before"],
        after: list[Int[Tensor, " _"]],
        answer: Int[Tensor, " answer"],
        words: int,
    ) -> Float[Tensor, " batch"]:
        """Mean log-probability of the answer's tokens after each question: `[B]` float32, at most 0.

        before: token ids that precede the image, the same for all; after: those that follow it; answer: with its end
        of sequence. Probabilities are over the first `words` tokens: rows beyond the tokenizer's are unused padding.
        """
        embed = self.t5.get_input_embeddings()
        questions = [
            torch.cat([embed(before), features, embed(ids)]) for features, ids in zip(image, after, strict=True)
        ]
        mask = pad_sequence([torch.ones(len(question), device=image.device) for question in questions], True)
        start = answer.new_tensor([self.t5.config.decoder_start_token_id])
        output = self.t5(
            inputs_embeds=pad_sequence(questions, batch_first=True),
            attention_mask=mask.long(),
            decoder_input_ids=torch.cat([start, answer[:-1]]).expand(len(questions), -1),
            use_cache=False,
        )
        logits = output.logits[..., :words]
        log = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
        return log.gather(-1, answer.expand(len(questions), -1)[..., None])[..., 0].mean(1)


def _configuration(source: str | PathLike[str]) -> tuple[Any, dict[str, Any]]:
    """Return T5's configuration and the other settings; the published `model_type` is unknown to transformers."""
    import transformers

    path = locate_directory(source) / "config.json"
    if not path.is_file():
        raise RewardError(f"{source} has no config.json; the directory or hub id of a CLIP-FlanT5 is expected")
    settings = json.loads(path.read_text(encoding="utf-8"))
    known = {name: value for name, value in settings.items() if name not in ("model_type", "architectures")}
    return transformers.T5Config(**{name: value for name, value in known.items() if name[:3] != "mm_"}), settings


def _vision(tower: Any, state: dict[str, Tensor], source: object, dtype: torch.dtype) -> Any:
    import transformers

    if tower is None:
        raise RewardError(f"{source}: config.json names no mm_vision_tower; give vision_tower=DIRECTORY or hub id")
    if not state:
        return load_pretrained("CLIPVisionModel", tower, dtype=dtype)
    model: Any = transformers.CLIPVisionModel(load_pretrained("CLIPVisionConfig", tower))
    wanted = model.state_dict()

    def rename(name: str) -> str | None:
        # transformers 4 has everything under vision_model, transformers 5 nothing.
        bare = name.removeprefix("vision_model.")
        return None if bare == "embeddings.position_ids" else name if name in wanted else bare

    load_state(model, state, f"{source}, {TOWER}*", rename=rename)
    return model.to(dtype).eval()
