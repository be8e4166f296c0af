"""Every family of vision-language models, as a tiny random model of its real class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_vlms
import torch
from torch import Tensor

from pipelines.errors import PipelineError
from pipelines.vlm.features import media_features
from pipelines.vlm.load import load_vlm
from pipelines.vlm.model import VisionLanguageModel

FAMILIES = tuple(tiny_vlms.BUILDERS)
QUESTION, ANSWER = "what moves?", "a red one"


def video(frames: int, seed: int = 0, height: int = 16, width: int = 16) -> Tensor:
    return torch.rand(frames, 3, height, width, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> VisionLanguageModel:
    folder = tiny_vlms.BUILDERS[request.param](tmp_path_factory.mktemp("vlm") / request.param)
    return load_vlm(folder, device="cpu")


def by_the_real_forward(model: VisionLanguageModel, media: list[Tensor], completion: str, fps: float) -> Tensor:
    """Log-probs of one completion from the whole model's logits at all positions, on what its processor returns."""
    from transformers.video_utils import VideoMetadata

    levels = [(one * 255).round().to(torch.uint8) for one in media]
    images, videos = ([one for one in levels if one.ndim == axes] for axes in (3, 4))
    content = [{"type": "video" if one.ndim == 4 else "image"} for one in media] + [{"type": "text", "text": QUESTION}]
    template = model.processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    metadata = [VideoMetadata(total_num_frames=len(v), fps=fps, frames_indices=[*range(len(v))]) for v in videos]
    inputs = model.processor(
        text=[template],
        images=[images] if images else None,
        return_tensors="pt",
        **({"videos": videos, "video_metadata": metadata, "do_sample_frames": False} if videos else {}),
    )
    space = " " if template.endswith("Assistant:") else ""
    ids = [*model.tokenizer(space + completion)["input_ids"], model.tokenizer.eos_token_id]
    prompt = inputs["input_ids"].shape[1]
    inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([ids])], 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if "mm_token_type_ids" in inputs:
        zeros = torch.zeros(1, len(ids), dtype=inputs["mm_token_type_ids"].dtype)
        inputs["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], zeros], 1)
    with torch.no_grad():
        logits = model.network(**inputs).logits[0]
    return logits.log_softmax(-1)[prompt - 1 : -1].gather(1, torch.tensor(ids)[:, None])[:, 0]


@torch.no_grad()
def test_log_probs_are_those_of_the_whole_model_on_its_processors_inputs(model: VisionLanguageModel) -> None:
    image = video(1, seed=5, height=24, width=20)[0]
    # Videos are wide, so that releases of transformers agree on the position of the text after it.
    cases = [[video(4, width=24)], [image], [image, image.flip(-1)], [video(6, seed=3, width=40)]] + [
        [image, video(2)]
    ] * model.family.mixes_media
    for media in cases:
        batch = model.encode([QUESTION], [media], [ANSWER], fps=4.0)
        values, mask = model.log_probs(batch)
        expected = by_the_real_forward(model, media, ANSWER, fps=4.0)
        assert mask.all() and mask.shape[1] == len(expected) >= len(ANSWER) + 1
        torch.testing.assert_close(values[0], expected, rtol=1e-5, atol=1e-5)
        # What the model sees counts, and when it sees it.
        others, _ = model.log_probs(model.encode([QUESTION], [[one.flip(0) for one in media]], [ANSWER], fps=4.0))
        assert (others - values).abs().max() > 1e-3


@torch.no_grad()
def test_log_probs_depend_on_neither_padding_nor_batch(model: VisionLanguageModel) -> None:
    prompts = [QUESTION, "and now, in many more words?", "?", QUESTION]
    media: list[list[Tensor]] = [[video(4)], [video(6, seed=1)], [video(4, seed=2)], []]
    completions = [ANSWER, "no", "it turns and turns, and stops", ANSWER]
    alone = [
        model.log_probs(model.encode([prompt], [one], [completion]))[0][0]
        for prompt, one, completion in zip(prompts, media, completions, strict=True)
    ]
    samples = [
        model.complete(model.encode_prompt(prompt, one), completion)
        for prompt, one, completion in zip(prompts, media, completions, strict=True)
    ]
    longest = max(map(len, samples))
    for order in ([0, 1, 2, 3], [3, 2, 0, 1]):
        for side, length in (("right", None), ("left", None), ("left", longest + 7), ("right", longest + 7)):
            batch = model.collate([samples[i] for i in order], padding_side=side, length=length)
            values, mask = model.log_probs(batch)
            for row, index in enumerate(order):
                torch.testing.assert_close(values[row][mask[row]], alone[index], rtol=1e-5, atol=2e-5)
                assert (values[row][~mask[row]] == 0).all()
                assert batch.completion_ids[row][mask[row]].tolist() == samples[index].completion_ids.tolist()


@torch.no_grad()
def test_several_videos_of_a_sample_stay_in_order(model: VisionLanguageModel) -> None:
    first, second = [video(4, seed=1), video(4, seed=2)], [video(4, seed=3), video(4, seed=4)]
    together, _ = model.log_probs(model.encode([QUESTION] * 2, [first, second], [ANSWER] * 2))
    for row, media in enumerate((first, second)):
        alone, _ = model.log_probs(model.encode([QUESTION], [media], [ANSWER]))
        torch.testing.assert_close(together[row], alone[0], rtol=1e-5, atol=2e-5)


@torch.no_grad()
def test_chosen_and_rejected_may_see_different_media(model: VisionLanguageModel) -> None:
    clean, broken = video(4), video(4).flip(0)
    both = model.encode([QUESTION] * 2, [[clean], [broken]], [ANSWER] * 2)
    values, _ = model.log_probs(both)
    for row, media in enumerate((clean, broken)):
        alone, _ = model.log_probs(model.encode([QUESTION], [[media]], [ANSWER]))
        torch.testing.assert_close(values[row], alone[0], rtol=1e-5, atol=2e-5)
    assert (values[0] - values[1]).abs().max() > 1e-3


@torch.no_grad()
def test_logits_give_the_log_probs_and_the_head_sees_completions_alone(model: VisionLanguageModel) -> None:
    batch = model.encode([QUESTION] * 2, [[video(4)], [video(6)]], [ANSWER, "no"])
    seen: list[int] = []
    hook = model.network.get_output_embeddings().register_forward_hook(
        lambda module, inputs, output: seen.append(output.shape[:-1].numel())
    )
    logits = model.completion_logits(batch)
    hook.remove()
    values, mask = model.log_probs(batch)
    assert sum(seen) == int(mask.sum()) == int(batch.completion_mask.sum())
    picked = logits.log_softmax(-1).gather(2, batch.completion_ids[..., None])[..., 0]
    torch.testing.assert_close(picked[mask], values[mask], rtol=1e-6, atol=1e-5)


def test_a_lora_learns_in_the_language_model_and_switches_off(model: VisionLanguageModel, tmp_path: Path) -> None:
    batch = model.encode([QUESTION] * 2, [[video(4)], [video(6)]], [ANSWER, "no"], padding_side="left")
    tuned = load_vlm(model.name_or_path, device="cpu")
    # Frozen weights take another kernel, so the bits are compared among frozen ones.
    tuned.network.requires_grad_(False)
    base, _ = tuned.log_probs(batch)
    tuned.add_adapter(rank=2, seed=3)
    torch.testing.assert_close(tuned.log_probs(batch)[0], base, rtol=0, atol=1e-6)
    optimiser = torch.optim.SGD(tuned.trainable_parameters(), lr=0.05)
    for _ in range(2):
        optimiser.zero_grad()
        (-tuned.log_probs(batch)[0].sum()).backward()
        optimiser.step()
    named = {name: p for name, p in tuned.network.named_parameters() if p.requires_grad}
    assert all(f"{tuned.family.language}." in name and "lora_" in name for name in named)
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in named.values())
    assert len(named) == 2 * 2 * 7
    with torch.no_grad():
        learned, _ = tuned.log_probs(batch)
        assert learned.sum() > base.sum() + 0.1
        with tuned.adapter_disabled():
            torch.testing.assert_close(tuned.log_probs(batch)[0], base, rtol=0, atol=0)
        tuned.save_lora(tmp_path / "lora")
        again = load_vlm(tmp_path / "lora", device="cpu")
        torch.testing.assert_close(again.log_probs(batch)[0], learned, rtol=0, atol=1e-5)
        tuned.save(tmp_path / "whole")
        torch.testing.assert_close(load_vlm(tmp_path / "whole").log_probs(batch)[0], learned, rtol=1e-5, atol=5e-5)
        tuned.merge_adapter()
        assert not tuned.has_adapter
        torch.testing.assert_close(tuned.log_probs(batch)[0], learned, rtol=1e-5, atol=5e-5)
        tuned.add_adapter(rank=1)  # the next stage starts where this one ended
        torch.testing.assert_close(tuned.log_probs(batch)[0], learned, rtol=1e-5, atol=5e-5)


def test_checkpointing_runs_blocks_twice_with_the_same_gradient_and_answers(model: VisionLanguageModel) -> None:
    tuned = load_vlm(model.name_or_path, device="cpu")
    tuned.add_adapter(rank=1)
    batch = tuned.encode([QUESTION] * 2, [[video(4)]] * 2, [ANSWER, "no"])
    answer = tuned.generate([QUESTION], [[video(4)]], max_new_tokens=4)
    calls: list[int] = []
    block = tuned.network.get_submodule(tuned.family.language).layers[0]
    block.self_attn.q_proj.register_forward_hook(lambda *_: calls.append(1))
    gradients = []
    for runs in (1, 2):
        calls.clear()
        tuned.network.zero_grad()
        tuned.log_probs(batch)[0].sum().backward()
        gradients.append([parameter.grad.clone() for parameter in tuned.trainable_parameters()])
        assert len(calls) == runs
        tuned.enable_gradient_checkpointing()
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(checkpointed, plain, rtol=1e-6, atol=1e-6)
    assert tuned.generate([QUESTION], [[video(4)]], max_new_tokens=4) == answer
    assert block.training and not block.self_attn.training and tuned.network.training is False


@torch.no_grad()
def test_features_are_the_mean_of_what_the_language_model_is_given(model: VisionLanguageModel) -> None:
    seen: list[Tensor] = []
    language = model.network.get_submodule(model.family.language)
    image = video(1, seed=5, height=24, width=20)[0]
    cases = [[video(4)], [image]] + [[image, video(2)]] * model.family.mixes_media
    given = []
    for media in cases:
        batch = model.collate([model.encode_prompt(QUESTION, media).with_completion([0])])
        hook = language.register_forward_pre_hook(
            lambda _, args, kw: seen.append(kw["inputs_embeds"]), with_kwargs=True
        )
        model.log_probs(batch)
        hook.remove()
        given.append(seen.pop()[model.token_types(batch.input_ids) > 0].mean(0))
    torch.testing.assert_close(media_features(model, cases), torch.stack(given), rtol=1e-5, atol=1e-5)
    with pytest.raises(PipelineError, match="without media"):
        media_features(model, [[]])


@torch.no_grad()
def test_half_precision_scores_in_single(model: VisionLanguageModel) -> None:
    half = load_vlm(model.name_or_path, device="cpu", dtype="bf16")
    values, _ = half.log_probs(half.encode([QUESTION], [[video(4)]], [ANSWER]))
    exact, _ = model.log_probs(model.encode([QUESTION], [[video(4)]], [ANSWER]))
    assert values.dtype == torch.float32 and half.network.dtype == torch.bfloat16
    torch.testing.assert_close(values, exact, rtol=0.01, atol=0.05)


@torch.no_grad()
def test_answers_are_greedy_word_by_word_whatever_the_batch(model: VisionLanguageModel) -> None:
    prompts, media = [QUESTION, "longer words in here?"], [[video(4)], [video(6, seed=1)]]
    answers = model.generate(prompts, media, max_new_tokens=5, fps=[1.0, 2.0])
    for prompt, one, fps, answer in zip(prompts, media, (1.0, 2.0), answers, strict=True):
        sample, ids = model.encode_prompt(prompt, one, fps=fps), []
        while len(ids) < 5 and model.tokenizer.eos_token_id not in ids:
            # The logits that predict any next token after what has been said.
            logits = model.completion_logits(model.collate([sample.with_completion([*ids, 0])]))[0, -1]
            logits[list(model.vision_ids)] = -torch.inf
            ids.append(int(logits.argmax()))
        assert model.tokenizer.decode(ids, skip_special_tokens=True).strip() == answer


@torch.no_grad()
def test_no_answer_holds_a_vision_token_even_if_the_model_wants_one(model: VisionLanguageModel) -> None:
    def push(module: Any, inputs: Any, output: Tensor) -> Tensor:
        return output.index_add(-1, wanted, torch.full((*output.shape[:-1], len(wanted)), 1e4))

    plain = model.generate([QUESTION], [[video(4)]], max_new_tokens=4)
    sampled = model.generate([QUESTION], [[video(4)]], max_new_tokens=4, temperature=1.0, seeds=[7])
    wanted = torch.tensor(sorted(model.vision_ids))
    assert len(wanted) >= 2
    hook = model.network.get_output_embeddings().register_forward_hook(push)
    try:
        assert model.generate([QUESTION], [[video(4)]], max_new_tokens=4) == plain
        assert model.generate([QUESTION], [[video(4)]], max_new_tokens=4, temperature=1.0, seeds=[7]) == sampled
    finally:
        hook.remove()


@torch.no_grad()
def test_a_seed_fixes_an_answer_alone_and_in_company(model: VisionLanguageModel) -> None:
    options: dict[str, Any] = {"max_new_tokens": 4, "temperature": 0.8, "top_p": 0.95}
    alone = [model.generate([QUESTION], [[video(4)]], seeds=[seed], **options)[0] for seed in range(3)]
    together = model.generate([QUESTION] * 3, [[video(4)]] * 3, seeds=[2, 0, 1], **options)
    assert together == [alone[2], alone[0], alone[1]] and len(set(alone)) > 1
