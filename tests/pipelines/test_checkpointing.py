"""Checkpointing changes the memory and not one bit of a gradient; autocast never loses one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from pipelines import (
    Conditioning,
    Generator,
    PipelineError,
    Segment,
    Truncation,
    load_generator,
    sample,
    sample_with_gradient,
)
from pipelines.truncation import MODES

bfloat16 = partial(torch.autocast, "cpu", torch.bfloat16)


@pytest.fixture
def cond(sd15: Generator) -> Conditioning:
    return sd15.encode_prompts(["a red circle", "two blue stars"])


def gradients(generator: Generator, value: Tensor) -> list[Tensor]:
    weights = generator.trainable_parameters()
    return [torch.zeros(()) if g is None else g for g in torch.autograd.grad(value, weights, allow_unused=True)]


@contextmanager
def stored() -> Iterator[dict[int, int]]:
    """Count the bytes that graphs keep, by storage; the inputs of checkpointed calls are not among them."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept


@pytest.mark.parametrize("adapter", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("autocast", [nullcontext, bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("mode", MODES)
def test_checkpointed_gradients_are_equal_to_the_bit(
    sd15: Generator, cond: Conditioning, mode: str, autocast: Any, adapter: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if adapter:
        sd15.add_adapter(2)
        for parameter in sd15.trainable_parameters():
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(0))
    calls: list[bool] = []
    predict = sd15.predict
    monkeypatch.setattr(sd15, "predict", lambda *given: calls.append(torch.is_grad_enabled()) or predict(*given))
    found = []
    for checkpoint in (False, True):
        result = sample_with_gradient(
            sd15, cond, truncation=Truncation(mode), rng=torch.Generator().manual_seed(5), seeds=[3, 4], steps=4,
            guidance=3.0, eta=1.0, checkpoint=checkpoint, autocast=autocast,
        )  # fmt: skip
        before = len(calls)
        found.append(gradients(sd15, result.latents.square().sum()))
        recomputed = len(result.grad_steps[0]) + (mode == "low-variance")
        assert calls[before:] == [True] * (recomputed if checkpoint else 0)
    assert max(gradient.abs().max() for gradient in found[0]) > 0
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_a_checkpointed_step_keeps_little_and_a_step_without_gradient_nothing(
    sd15: Generator, cond: Conditioning
) -> None:
    kept: dict[tuple[str, bool, int], int] = {}
    for mode, checkpoint, steps in [
        ("full", False, 4), ("full", False, 8), ("full", True, 4), ("full", True, 8),
        ("last-k", False, 4), ("last-k", False, 8),
    ]:  # fmt: skip
        with stored() as storages:
            sample_with_gradient(
                sd15, cond, truncation=Truncation(mode), rng=torch.Generator(), seeds=[3, 4], steps=steps,
                guidance=3.0, checkpoint=checkpoint,
            )  # fmt: skip
        kept[mode, checkpoint, steps] = sum(storages.values())
    latents = 2 * 4 * 8 * 8 * 4
    plain = (kept["full", False, 8] - kept["full", False, 4]) / 4
    checkpointed = (kept["full", True, 8] - kept["full", True, 4]) / 4
    assert plain > 100 * latents and checkpointed <= 2 * latents
    assert kept["last-k", False, 8] <= kept["last-k", False, 4] < 2 * plain


@pytest.mark.parametrize("surrounded", [True, False])
def test_weights_trained_in_full_get_gradients_after_steps_without(
    sd15: Generator, cond: Conditioning, surrounded: bool
) -> None:
    """Autocast may keep the cast weights of a call without a graph, within one region of the caller's or of ours."""

    def last_of_three(within: AbstractContextManager[Any], autocast: Any) -> list[Tensor]:
        with within:
            latents = sample(
                sd15, cond, steps=3, guidance=3.0, seeds=[3, 4], segment=Segment(grad_steps=[2]), autocast=autocast
            ).latents
        return gradients(sd15, latents.square().sum())

    exact = last_of_three(nullcontext(), nullcontext)
    low = last_of_three(bfloat16(), nullcontext) if surrounded else last_of_three(nullcontext(), bfloat16)
    for one, other in zip(exact, low, strict=True):
        if one.norm() > 1e-3:
            assert torch.nn.functional.cosine_similarity(one.flatten(), other.flatten(), dim=0) > 0.9
    assert sum(one.norm() > 1e-3 for one in exact) > 50


def test_each_network_call_has_its_own_autocast(sd15: Generator, cond: Conditioning) -> None:
    entered = []

    @contextmanager
    def counted() -> Iterator[None]:
        entered.append(torch.is_autocast_enabled("cpu"))
        with bfloat16():
            yield

    low = sample(sd15, cond, steps=3, seeds=[3, 4], autocast=counted).latents
    exact = sample(sd15, cond, steps=3, seeds=[3, 4]).latents
    assert entered == [False] * 3 and low.dtype == torch.float32 and 0 < (low - exact).norm() < 0.1 * exact.norm()


@pytest.mark.parametrize("kind", ["sd15", "sd2"])
def test_the_decoder_is_recomputed_in_slices(tiny_paths: dict[str, str], kind: str) -> None:
    generator = load_generator(tiny_paths[kind])
    latents = torch.randn(5, 4, 8, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
    weight = torch.linspace(-1, 1, 16 * 16).reshape(16, 16)
    results, kept = [], []
    for decode in (
        generator.decode,
        generator.decode_checkpointed,
        partial(generator.decode_checkpointed, batch_size=2),
    ):
        with stored() as storages:
            images = decode(latents)
        kept.append(sum(storages.values()))
        results.append((images, torch.autograd.grad((weight * images).sum(), latents)[0]))
    assert results[0][1].abs().max() > 0
    assert torch.equal(results[1][0], results[0][0]) and torch.equal(results[1][1], results[0][1])
    for one, other in zip(results[2], results[0], strict=True):
        assert torch.allclose(one, other, atol=1e-5)
    assert kept[0] > 50 * (kept[1] + 1) and kept[2] == kept[1]
    with pytest.raises(PipelineError, match="batch_size must be at least 1, got 0"):
        generator.decode_checkpointed(latents, 0)
