"""Completions of one prompt share a row: the numbers and gradients of rows of their own, one look at a video."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import tiny_vlms
import torch
from torch import Tensor

from pipelines.vlm.batch import VlmBatch, VlmSample, collate
from pipelines.vlm.load import load_vlm
from pipelines.vlm.model import VisionLanguageModel
from pipelines.vlm.packing import pack, saves


@pytest.fixture(scope="module", params=tuple(tiny_vlms.BUILDERS))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> VisionLanguageModel:
    folder = tiny_vlms.BUILDERS[request.param](tmp_path_factory.mktemp("vlm") / request.param)
    model = load_vlm(folder, device="cpu", dtype=torch.float64)
    model.add_adapter(rank=2, seed=1)
    model.network.double()
    with torch.no_grad():
        for parameter in model.trainable_parameters():
            parameter.add_(0.1)
    return model


def video(frames: int, seed: int) -> Tensor:
    return torch.rand(frames, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def shared(model: VisionLanguageModel) -> VlmBatch:
    """Four prompts, two of them with two completions and one with three, of several lengths, in mixed order."""
    first, second, third, fourth = (
        model.encode_prompt(prompt, media, fps=2.0)
        for prompt, media in (
            ("what moves?", [video(4, 1)]),
            ("and now, in more words?", [video(6, 2)]),
            ("what moves?", [video(4, 3)]),
            ("no picture", []),
        )
    )
    said = [
        (first, "a red one"), (second, "no"), (third, "up"), (fourth, "well"), (first, "b"),
        (second, "nothing at all"), (first, "a red star"), (fourth, "very well"),
    ]  # fmt: skip
    return model.collate([model.complete(prompt, completion) for prompt, completion in said])


def test_shared_rows_give_what_rows_of_their_own_give(model: VisionLanguageModel) -> None:
    batch = shared(model)
    assert batch.prompts == (0, 1, 2, 3, 0, 1, 0, 3)
    apart = replace(batch, prompts=())
    weights = torch.randn(batch.token_mask.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    gradients, values = [], []
    for one in (batch, apart):
        found, _ = model.log_probs(one)
        values.append(found.detach())
        gradients.append(torch.autograd.grad((weights * found).sum(), model.trainable_parameters()))
    # transformers computes rotations and norms in float32.
    torch.testing.assert_close(values[0], values[1], rtol=1e-5, atol=2e-5)
    assert max(float(one.abs().max()) for one in gradients[1]) > 1e-2
    for packed, alone in zip(*gradients, strict=True):
        torch.testing.assert_close(packed, alone, rtol=1e-3, atol=1e-4)


def test_a_video_and_its_prompt_are_seen_once(model: VisionLanguageModel) -> None:
    batch = shared(model)
    tokens: list[int] = []
    language = model.network.get_submodule(model.family.language)
    hook = language.layers[0].register_forward_hook(lambda _, inputs, output: tokens.append(inputs[0].numel()))
    with torch.no_grad():
        model.log_probs(batch)
        packed = sum(tokens)
        tokens.clear()
        model.log_probs(replace(batch, prompts=()))
    hook.remove()
    assert packed < 0.75 * sum(tokens)
    assert len(pack(batch.select([0, 4, 6])).batch.vision) == 1


def test_checkpointed_blocks_take_shared_rows(model: VisionLanguageModel) -> None:
    batch = shared(model)
    plain = torch.autograd.grad(model.log_probs(batch)[0].sum(), model.trainable_parameters())
    model.enable_gradient_checkpointing()
    again = torch.autograd.grad(model.log_probs(batch)[0].sum(), model.trainable_parameters())
    model.network.gradient_checkpointing_disable()
    for one, other in zip(plain, again, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8)


@torch.no_grad()
def test_kernels_that_take_no_mask_get_rows_of_their_own(model: VisionLanguageModel) -> None:
    folder = model.name_or_path
    other = load_vlm(folder, device="cpu", dtype=torch.float64, attention="eager")
    values, _ = other.log_probs(shared(other))
    expected, _ = load_vlm(folder, device="cpu", dtype=torch.float64).log_probs(shared(other))
    torch.testing.assert_close(values, expected, rtol=1e-5, atol=2e-5)


@torch.no_grad()
def test_layers_with_a_window_get_rows_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = tiny_vlms._text
    monkeypatch.setattr(tiny_vlms, "_text", lambda tokenizer, _: text(tokenizer, "mistral", sliding_window=16))
    model = load_vlm(tiny_vlms.build_llava_next_video(tmp_path / "windowed"), device="cpu")
    asked = model.encode_prompt("what moves here?", [video(4, 1)])
    together = model.collate([model.complete(asked, "a red one"), model.complete(asked, "no")])
    assert len(asked.prompt_ids) > 16 and together.prompts == (0, 0)
    apart, _ = model.log_probs(replace(together, prompts=()))
    torch.testing.assert_close(model.log_probs(together)[0], apart, rtol=1e-5, atol=2e-5)


def test_rows_are_shared_only_where_that_saves_tokens() -> None:
    def batch(prompt: int, *answers: tuple[int, int]) -> VlmBatch:
        prompts = [VlmSample(torch.ones(prompt, dtype=torch.long), {}) for _ in range(8)]
        return collate([prompts[which].with_completion([1] * count) for which, count in answers], 0)

    assert saves(batch(100, (0, 10), (0, 12)))
    assert not saves(batch(50, (0, 400), (0, 400)))
    assert not saves(batch(100, (0, 10), (1, 10)))
    # One long row would lengthen the others.
    assert not saves(batch(60, (0, 300), (0, 300), *((k, 300) for k in range(1, 8))))


def test_a_row_by_hand() -> None:
    prompt, other = VlmSample(torch.tensor([7, 8, 9]), {}), VlmSample(torch.tensor([5]), {})
    samples = [prompt.with_completion([1, 2]), other.with_completion([4]), prompt.with_completion([3])]
    for side in ("right", "left"):
        rows = pack(collate(samples, 0, padding_side=side))
        assert rows.batch.input_ids.tolist() == [[7, 8, 9, 1, 2, 3], [5, 4, 0, 0, 0, 0]]
        assert rows.batch.attention_mask.tolist() == [[1] * 6, [1, 1, 0, 0, 0, 0]]
        positions = rows.batch.attention_mask.cumsum(1) - 1 - rows.back
        assert positions[0].tolist() == [0, 1, 2, 3, 4, 3]
        assert rows.reads[0, 0].int().tolist() == [
            [1, 0, 0, 0, 0, 0],
            [1, 1, 0, 0, 0, 0],
            [1, 1, 1, 0, 0, 0],
            [1, 1, 1, 1, 0, 0],
            [1, 1, 1, 1, 1, 0],
            [1, 1, 1, 0, 0, 1],
        ]
        assert [one.tolist() for one in rows.before] == [[0, 0, 1, 0], [2, 3, 0, 2]]
        assert not rows.reads[1, 0, :, 2:][:2].any()
