"""Run a vision-language model: encode prompts with media, score completions, generate, adapt, save.

One class serves every family of `pipelines.vlm.families`. Prompts and media go through the model's own processor and
chat format, one sample at a time; the batch is padded here, so that no sample depends on its neighbours. Nothing is
ever cut: a sample that is too long is an error.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pipelines import adapters
from pipelines.components import quiet_loading
from pipelines.errors import PipelineError
from pipelines.vlm import adapters as vlm_adapters
from pipelines.vlm.batch import PaddingSide, VlmBatch, VlmSample, collate
from pipelines.vlm.decoding import NextToken
from pipelines.vlm.families import FAMILIES, join, signature
from pipelines.vlm.media import split_media, to_uint8, video_arguments
from pipelines.vlm.packing import pack, saves, sees_everything
from pipelines.vlm.positions import grid_positions
from pipelines.vlm.prompts import separator_of, turns_of, vision_ids

Media = Sequence[Tensor]
"""One sample's media, in order: images `[3, H, W]` and videos `[F, 3, H, W]`, floats in [0, 1] or uint8."""


class VisionLanguageModel:
    """A vision-language model from transformers with its processor.

    Attributes: `name_or_path` as given (the base model, when an adapter was named); `network` and `processor`;
    `family`, their special features; `vision_ids`, the tokens that stand for vision, which no completion holds;
    `scored`, a module that changes nothing and through which all scores go, a row a sample, to be counted.
    """

    def __init__(self, network: Any, processor: Any, name_or_path: str) -> None:
        """Take a loaded model and processor; `load_vlm` makes them from a name."""
        self.network = network.eval()
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.name_or_path = name_or_path
        self.family = FAMILIES[network.config.model_type]
        self.scored: Any = torch.nn.Identity()
        if self.tokenizer.eos_token_id is None:
            raise PipelineError(f"{name_or_path}: the tokenizer has no end token; set eos_token in its configuration.")
        if not getattr(processor, "chat_template", None):
            raise PipelineError(f"{name_or_path}: the processor has no chat template; add chat_template.jinja to it.")
        self.vision_ids = vision_ids(network.config, processor)
        ends = network.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        self._end_ids = sorted({self.tokenizer.eos_token_id, *ends} - {None})
        first = self.tokenizer("x", add_special_tokens=False)["input_ids"][0]
        self._writes_space = self.tokenizer.convert_ids_to_tokens(first).startswith("▁")
        # Other kernels take no custom attention mask, and layers with a window make a mask of their own.
        self._packs = network.config._attn_implementation == "sdpa" and sees_everything(network.config)
        self._takes_types = "mm_token_type_ids" in inspect.signature(network.model.forward).parameters

    @property
    def device(self) -> torch.device:
        """The device of the network."""
        return next(self.network.parameters()).device

    def encode_prompt(self, prompt: str, media: Media = (), *, fps: float = 1.0) -> VlmSample:
        """Encode one prompt with its media, as the processor and the chat format of the model do.

        Media stand where the text says `<image>` or `<video>`, else before the text. A video of fewer frames than the
        vision tower joins is shown with its last frame repeated. fps: frames per second of the videos, which families
        that write times or count positions by them need.

        Raises:
            PipelineError: media of a wrong shape, range or mix, or a prompt that holds words standing for vision or
                tags of other media than there are.
        """
        pixels = [to_uint8(one) for one in media]
        images, videos = split_media(pixels, self.family)
        turns = turns_of(prompt, ["video" if one.ndim == 4 else "image" for one in pixels], self.processor)
        text = self.processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        least = getattr(getattr(self.processor, "video_processor", None), "temporal_patch_size", None) or 1
        try:
            encoded = self.processor(
                text=[text],
                images=[images] if images else None,
                return_tensors="pt",
                **video_arguments(videos, fps, least),
            )
        except (ValueError, StopIteration, IndexError, TypeError, RuntimeError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            given = f"{len(images)} images and {len(videos)} videos"
            raise PipelineError(f"the processor refuses a prompt with {given}: {reason}") from error
        text_names = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
        vision = {name: torch.as_tensor(value) for name, value in encoded.items() if name not in text_names}
        if self.family.axis:  # the videos of one sample are joined like those of several samples
            vision = {name: value.flatten(0, self.family.axis)[None] for name, value in vision.items()}
        sample = VlmSample(encoded["input_ids"][0], vision, separator_of(turns, text, self.processor))
        self._check_placeholders(sample.prompt_ids, sample.vision)
        return sample

    def complete(self, sample: VlmSample, completion: str) -> VlmSample:
        """Return the sample with a completion and the end token.

        Raises:
            PipelineError: the completion holds a token that stands for vision.
        """
        text = sample.separator + completion
        if self._writes_space:
            text = text.removeprefix(" ")
        ids = [*self.tokenizer(text, add_special_tokens=False)["input_ids"], self.tokenizer.eos_token_id]
        held = self.vision_ids.intersection(ids)
        if held:
            words = ", ".join(self.tokenizer.convert_ids_to_tokens(sorted(held)))
            raise PipelineError(f"the completion {completion[:60]!r} holds {words}, which stands for vision; drop it.")
        return sample.with_completion(ids)

    def encode(
        self,
        prompts: Sequence[str],
        media: Sequence[Media],
        completions: Sequence[str],
        *,
        fps: float | Sequence[float] = 1.0,
        padding_side: PaddingSide = "right",
        max_length: int | None = None,
    ) -> VlmBatch:
        """Encode prompts, each with its media and completion, as one batch on the model's device.

        The rejected side of a pair may have media of its own: pass both sides as samples, chosen first. `fps` is one
        number or one a sample. `max_length` bounds prompt, vision and completion together (default: the model's own).

        Raises:
            PipelineError: lists of different lengths, or the errors of `encode_prompt`, `complete` and `collate`.
        """
        if len(prompts) != len(completions):
            raise PipelineError(f"{len(prompts)} prompts but {len(completions)} completions; give one for each.")
        encoded = self._encode_prompts(prompts, media, fps)
        samples = [self.complete(sample, text) for sample, text in zip(encoded, completions, strict=True)]
        return self.collate(samples, padding_side=padding_side, max_length=max_length)

    def _encode_prompts(
        self, prompts: Sequence[str], media: Sequence[Media], fps: float | Sequence[float]
    ) -> list[VlmSample]:
        rates = [fps] * len(prompts) if isinstance(fps, int | float) else fps
        if not len(prompts) == len(media) == len(rates) > 0:
            raise PipelineError(
                f"{len(prompts)} prompts, {len(media)} lists of media and {len(rates)} rates; there must be as many of"
                " each, and at least one."
            )
        each = zip(prompts, media, rates, strict=True)
        return [self.encode_prompt(prompt, one, fps=float(rate)) for prompt, one, rate in each]

    def collate(
        self,
        samples: Sequence[VlmSample],
        *,
        padding_side: PaddingSide = "right",
        length: int | None = None,
        max_length: int | None = None,
    ) -> VlmBatch:
        """Pad samples (to `length`, if that is longer than the longest) into one batch on the model's device.

        Raises:
            PipelineError: a sample is longer than `max_length`, by default the model's own limit.
        """
        for sample in samples:
            self.check_length(sample, max_length)
        return collate(samples, self.tokenizer.eos_token_id, padding_side=padding_side, length=length).to(self.device)

    def check_length(self, sample: VlmSample, max_length: int | None = None) -> None:
        """Raise unless a sample has at most `max_length` tokens, by default the model's own limit.

        Raises:
            PipelineError: it is longer.
        """
        most = max_length or getattr(self.network.config.get_text_config(), "max_position_embeddings", None)
        if most is not None and len(sample) > most:
            vision, said = sum(int(i) in self.vision_ids for i in sample.prompt_ids), len(sample.completion_ids)
            raise PipelineError(
                f"a sample has {len(sample)} tokens ({vision} of vision, {said} of completion) but at most"
                f" {most} are allowed; nothing is cut: give fewer frames, smaller images or less text."
            )

    def log_probs(self, batch: VlmBatch) -> tuple[Float[Tensor, "batch tokens"], Bool[Tensor, "batch tokens"]]:
        """Return the log-probability of every completion token, the end token included, and which columns are tokens.

        Column t is the t-th token of each completion, whatever the padding; 0 beyond its end. Differentiable.
        """
        logits = self._flat_logits(batch)
        tokens = batch.input_ids[batch.completion_mask]
        values = logits.gather(1, tokens[:, None]).squeeze(1) - logits.logsumexp(1)
        return self.scored(batch.by_column(values)), batch.token_mask

    def completion_logits(self, batch: VlmBatch) -> Float[Tensor, "batch tokens vocabulary"]:
        """Return the logits that predict each completion token, laid out as `log_probs` is; for divergences."""
        return self.scored(batch.by_column(self._flat_logits(batch)))

    def _flat_logits(self, batch: VlmBatch) -> Float[Tensor, "all vocabulary"]:
        """Logits at completion positions alone, sample after sample; the head is not applied elsewhere."""
        parts: list[Tensor] = [torch.empty(0)] * len(batch)
        head = self.network.get_output_embeddings()
        for indices in self._groups(batch):
            group = batch.select(indices)
            if self._packs and saves(group):
                inputs, before = self._packed_inputs(group)
            else:
                inputs = self._inputs(group)
                places = group.completion_mask.roll(-1, 1).nonzero()
                before = places[:, 0], places[:, 1]
            hidden = self.network.model(**inputs, use_cache=False).last_hidden_state
            # The state before a token predicts it.
            logits = head(hidden[before])
            logits = logits if logits.dtype == torch.float64 else logits.float()
            for index, part in zip(indices, logits.split(group.completion_mask.sum(1).tolist()), strict=True):
                parts[index] = part
        return torch.cat(parts)

    def _groups(self, batch: VlmBatch) -> Iterator[list[int]]:
        """Yield samples whose pixels can be joined: for families with a frames axis, those of equally many frames."""
        groups: dict[Any, list[int]] = {}
        for index, vision in enumerate(batch.vision):
            groups.setdefault(signature(vision, self.family.axis), []).append(index)
        yield from groups.values()

    def _inputs(self, batch: VlmBatch) -> dict[str, Tensor]:
        """Return the arguments of the network, placeholders counted once more."""
        for ids, mask, vision in zip(batch.input_ids, batch.attention_mask, batch.vision, strict=True):
            self._check_placeholders(ids[mask.bool()], vision)
        vision = join(batch.vision, self.family.axis)
        for name in vision:
            if name.startswith("pixel_values"):
                vision[name] = vision[name].to(self.network.dtype)
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, **vision}
        if self._takes_types:
            inputs["mm_token_type_ids"] = self.token_types(batch.input_ids)
        inputs["position_ids"] = self._positions(batch)
        return inputs

    def _positions(self, batch: VlmBatch) -> Int[Tensor, "*axes batch length"]:
        """Return the position of every token, on three axes for families with grids; 0 for padding."""
        positions = (batch.attention_mask.cumsum(1) - 1).clamp(min=0)
        if self.family.grids is None:
            return positions
        positions = positions.expand(3, -1, -1).clone()
        types, read = self.token_types(batch.input_ids).cpu(), batch.attention_mask.cpu().bool()
        for row, vision in enumerate(batch.vision):
            own = grid_positions(types[row][read[row]], *self.family.grids(vision, self.network.config))
            positions[:, row, read[row].to(positions.device)] = own.to(positions.device)
        return positions

    def _packed_inputs(self, batch: VlmBatch) -> tuple[dict[str, Tensor], tuple[Tensor, Tensor]]:
        """Return the arguments of the network for a row a prompt, and the places of the states that predict tokens."""
        rows = pack(batch)
        inputs = self._inputs(rows.batch)
        positions = inputs["position_ids"] - rows.back
        return {**inputs, "position_ids": positions, "attention_mask": rows.reads}, rows.before

    def token_types(self, input_ids: Int[Tensor, "batch length"]) -> Int[Tensor, "batch length"]:
        """Return 1 for a placeholder of an image, 2 for one of a video and 0 for text: prompt, completion, padding."""
        config = self.network.config
        types = (input_ids == config.image_token_id).long()
        return types.masked_fill(input_ids == getattr(config, "video_token_id", -1), 2)

    def _check_placeholders(self, ids: Tensor, vision: Any) -> None:
        """Raise unless one sample's tokens hold exactly as many placeholders as its media make features."""
        config = self.network.config
        videos = int((ids == getattr(config, "video_token_id", -1)).sum())
        held = (int((ids == config.image_token_id).sum()), videos)
        made = self.family.count(vision, config)
        if held != made:
            raise PipelineError(
                f"a sample holds {held[0]} image and {held[1]} video placeholders, but its media make {made[0]} and"
                f" {made[1]} features; was it cut, or does its text name a placeholder?"
            )

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[str],
        media: Sequence[Media],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seeds: Sequence[int] | None = None,
        fps: float | Sequence[float] = 1.0,
    ) -> list[str]:
        """Answer prompts, greedily or (temperature > 0) by sampling; never with a token that stands for vision.

        seeds: one a sample, needed for sampling; an answer depends on its own seed alone, not on the batch. Settings
        of
        the checkpoint's ``generation_config.json`` other than its end tokens are not used. Answers are stripped.

        Raises:
            PipelineError: seeds and temperature do not go together, or the errors of `encode_prompt`.
        """
        from transformers import GenerationConfig, LogitsProcessorList

        if (temperature > 0) != (seeds is not None) or (seeds is not None and len(seeds) != len(prompts)):
            raise PipelineError(
                f"temperature={temperature} with {'no' if seeds is None else len(seeds)} seeds for {len(prompts)}"
                " prompts: greedy answers take temperature=0 and no seeds, sampled ones a seed a prompt."
            )
        samples = self._encode_prompts(prompts, media, fps)
        batch = self.collate(samples, padding_side="left")
        settings = GenerationConfig(
            max_new_tokens=max_new_tokens, eos_token_id=self._end_ids, pad_token_id=self.tokenizer.eos_token_id
        )
        answers = [""] * len(samples)
        for indices in self._groups(batch):
            inputs = self._inputs(batch.select(indices))
            if self.family.grids is None:
                del inputs["position_ids"]  # generation derives the same from the mask
            choice = NextToken(
                self.vision_ids, temperature, top_p, None if seeds is None else [seeds[i] for i in indices]
            )
            tokens = self._generate(inputs, settings, LogitsProcessorList([choice]))
            for index, row in zip(indices, tokens, strict=True):
                answers[index] = self.tokenizer.decode(row, skip_special_tokens=True).strip()
        return answers

    def _generate(self, inputs: dict[str, Tensor], settings: Any, choice: Any) -> Tensor:
        """Return the new tokens, chosen by `choice` alone: the checkpoint's own settings are not used."""
        kept, self.network.generation_config = self.network.generation_config, settings
        # A block that keeps no activations keeps no cache either, and generation would lose its past.
        training = [module for module in self._checkpointed() if module.training]
        try:
            for module in training:
                module.training = False
            whole = self.network.generate(**inputs, logits_processor=choice)
        finally:
            self.network.generation_config = kept
            for module in training:
                module.training = True
        return whole[:, inputs["input_ids"].shape[1] :]

    @property
    def has_adapter(self) -> bool:
        """Whether the network carries a LoRA."""
        return adapters.has_adapter(self.network)

    def add_adapter(
        self,
        rank: int,
        alpha: float | None = None,
        target_modules: Sequence[str] | None = None,
        seed: int = 0,
        init: adapters.Init = "kaiming",
    ) -> None:
        """Add a trainable LoRA (A seeded, B zero) to the language model and freeze everything else, vision too."""
        layers = vlm_adapters.layers_to_adapt(self.network, self.family.language, target_modules)
        adapters.add_adapter(self.network, rank, alpha, layers, seed, init)

    def load_adapter(self, path: str | Path) -> None:
        """Load an adapter directory and freeze everything else."""
        vlm_adapters.load_adapter(self.network, path)

    def adapter_disabled(self) -> AbstractContextManager[None]:
        """Context in which the model is, to the bit, its base: the reference."""
        if not self.has_adapter:
            raise PipelineError("the model carries no adapter to switch off; use a frozen copy as the reference.")
        return adapters.adapter_disabled(adapters.lora_layers(self.network))

    def merge_adapter(self) -> None:
        """Fold the adapter into the weights, which become the start and the reference of the next adapter."""
        if not self.has_adapter:
            raise PipelineError("the model carries no adapter to merge.")
        vlm_adapters.merge_adapter(self.network)

    def trainable_parameters(self) -> list[torch.nn.Parameter]:
        """Return the trainable parameters: the adapter's weights if there is one, else the whole network's."""
        return [parameter for parameter in self.network.parameters() if parameter.requires_grad]

    def enable_gradient_checkpointing(self) -> None:
        """Trade compute for memory in the language model's backward pass."""
        self.network.gradient_checkpointing_enable({"use_reentrant": False})
        for module in self._checkpointed():
            # Blocks recompute activations in training mode only; their inner modules stay without dropout.
            module.training = True

    def _checkpointed(self) -> list[torch.nn.Module]:
        blocks = self.network.get_submodule(self.family.language).modules()
        return [module for module in blocks if getattr(module, "gradient_checkpointing", False)]

    def save(self, path: str | Path) -> None:
        """Write model and processor in transformers' layout; an adapter is merged into a copy first."""
        network = self.network
        if self.has_adapter:
            network = copy.deepcopy(network)
            vlm_adapters.merge_adapter(network)
        with quiet_loading():
            network.save_pretrained(path)
        self.processor.save_pretrained(path)

    def save_lora(self, path: str | Path, *, base_model: str | None = None) -> None:
        """Write the adapter in peft's layout, and ``mmalign.json`` naming the base model."""
        record = {"base_model": base_model or self.name_or_path, "family": self.network.config.model_type}
        vlm_adapters.save_adapter(self.network, path, record)

    def check_lora_export(self, folder: Path) -> None:
        """Write the adapter with made-up weights into a folder inside `folder`, read it again and compare."""
        adapters.check_round_trip(self.network, self.save_lora, folder)
