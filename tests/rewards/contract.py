"""What every reward must do, whatever it measures: `check_contract(reward, ...)`, and its parts.

A reward's own test file calls it once, on a tiny real model, beside the tests of its numbers.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence

import pytest
import torch
from PIL import Image
from torch import Tensor

from rewards import Preprocess, Reward, RewardError
from rewards.backbones.weights import Weights
from rewards.media import load_image

PROMPTS = [
    *("a red circle", "two blue squares", "a green star", "a photo of a yellow ring"),
    *("", "a cat and a dog", "three cyan triangles left of a pink cross", "a photo of a dog"),
]
BATCH = len(PROMPTS)
ORDER = [3, 0, 7, 1, 6, 2, 5, 4]


def smooth_images(count: int = BATCH, height: int = 48, width: int = 40, seed: int = 0) -> Tensor:
    """Images `[count, 3, height, width]` in [0.1, 0.9], so smooth that resampling stays inside [0, 1]."""
    noise = torch.rand(count, 3, 6, 5, generator=torch.Generator().manual_seed(seed))
    return 0.1 + 0.8 * torch.nn.functional.interpolate(noise, size=(height, width), mode="bilinear")


def check_contract(
    reward: Reward,
    *,
    media: Tensor | None = None,
    prompts: Sequence[str] | None = None,
    references: Sequence[Tensor] | None = None,
    atol: float = 1e-5,
    half_atol: float | None = None,
    spread: float | None = None,
    long_prompt: str | None = None,
    slope_rtol: float = 1e-4,
) -> None:
    """Hold a reward to everything that does not depend on what it measures.

    media: 8 of them, smooth images by default; prompts and references: 8 each, as far as the reward needs them, by
    default `PROMPTS` (one of them empty) and two images for each sample. atol: of scores that must be equal;
    half_atol: of float16 and bfloat16 weights against float32 ones (None: not asked for); spread: the least standard
    deviation over the 8 samples, below which equality would say nothing (default 20 atol); long_prompt: longer than
    the reward's context, which must be warned of, once. slope_rtol: of finite differences, relative to the gradient;
    larger for models that compute parts in float32 whatever their dtype.
    """
    media = smooth_images() if media is None else media
    if "prompts" in reward.needs:
        prompts = PROMPTS if prompts is None else prompts
    if "references" in reward.needs and references is None:
        references = smooth_images(2 * BATCH, 40, 52, seed=1).split(2)
    check_facts(reward)
    check_needs(reward, media, prompts, references)
    check_batches(reward, media, prompts, references, atol=atol, spread=20 * atol if spread is None else spread)
    if reward.modality == "image":
        check_image_kinds(reward, prompts, references, atol=atol)
    if reward.needs == {"prompts"}:
        check_matrix(reward, media, prompts, atol=atol)
    if reward.differentiable:
        check_gradient(reward, media[:2], *_rows([0, 1], prompts, references), rtol=slope_rtol)
    else:
        check_black_box(reward, media, prompts, references)
    if half_atol is not None:
        check_half_precision(reward, media, prompts, references, atol=half_atol)
    if long_prompt is not None:
        check_long_prompt(reward, media, long_prompt, references)


def check_facts(reward: Reward) -> None:
    """The facts are stated, and agree between the class and the reward."""
    facts = reward.facts
    assert facts.name and facts.summary and facts.summary.endswith(".") and len(facts.summary) < 120
    assert facts.licence and facts.source and facts.citation and facts.version
    assert facts.range[0] < facts.range[1]
    assert all(isinstance(file, Weights) and file.repo and file.file for file in facts.files)
    assert type(reward).__doc__ and "\n" not in facts.summary


def check_needs(reward: Reward, media: Tensor, prompts: Sequence[str] | None, references: object) -> None:
    """Leaving out what the reward declares to need is an error that names it."""
    for need in sorted(reward.needs):
        given = {"prompts": prompts, "references": references} | {need: None}
        with pytest.raises(RewardError, match=f"needs {need}"):
            reward(media, **given)


def check_batches(
    reward: Reward,
    media: Tensor,
    prompts: Sequence[str] | None,
    references: Sequence[Tensor] | None,
    *,
    atol: float,
    spread: float,
) -> None:
    """Scores are `[B]` float32 in range; batches of 1 and 8 agree, and so do permuted ones."""
    whole = reward(media, prompts=prompts, references=references)
    assert whole.dtype == torch.float32 and whole.shape == (len(media),) and whole.device == media.device
    assert not whole.requires_grad and whole.isfinite().all()
    assert whole.std() > spread, f"{whole.tolist()} hardly differ, so that nothing below would be noticed"
    low, high = reward.range
    assert low - atol <= whole.min() and whole.max() <= high + atol, f"{whole.tolist()} outside {reward.range}"
    if reward.batch_invariant:
        alone = [reward(media[[i]], **_named(_rows([i], prompts, references))) for i in range(len(media))]
        _close(torch.cat(alone), whole, atol, "one by one and in one batch")
        _close(_micro_batched(reward, 3)(media, prompts=prompts, references=references), whole, atol, "micro-batches")
    permuted = reward(media[ORDER], **_named(_rows(ORDER, prompts, references)))
    _close(permuted, whole[ORDER], atol, "permuted")


def check_image_kinds(
    reward: Reward, prompts: Sequence[str] | None, references: Sequence[Tensor] | None, *, atol: float
) -> None:
    """Images of mixed shapes and of every 8-bit mode score as their RGB tensors do, each alone."""
    wide, high = smooth_images(1, 40, 64, seed=2), smooth_images(1, 64, 40, seed=3)
    pixels = (smooth_images(1, 48, 40, seed=4)[0] * 255).round().byte().permute(1, 2, 0).numpy()
    rgb = Image.fromarray(pixels)
    translucent = rgb.convert("RGBA")
    translucent.putalpha(100)
    turned = rgb.copy()
    turned.getexif()[0x0112] = 6  # orientation: to be turned by 90 degrees
    kinds = [wide[0], translucent, rgb.convert("L"), rgb.quantize(32), turned, high[0], rgb, high[0].flip(-1)]
    rows = [item if isinstance(item, Tensor) else load_image(item) for item in kinds]
    over_white = (100 * rows[6] + 155) / 255
    assert (rows[1] - over_white).abs().max() <= 1 / 255 and rows[4].shape == (3, 40, 48)
    together = reward(kinds, prompts=prompts, references=references)
    for position, row in enumerate(rows if reward.batch_invariant else []):
        alone = reward(row[None], **_named(_rows([position], prompts, references)))
        _close(alone, together[[position]], atol, f"media[{position}] among others")


def check_matrix(reward: Reward, media: Tensor, prompts: Sequence[str] | None, *, atol: float) -> None:
    """The diagonal of the matrix is the score, and a column is the score with one prompt for all."""
    assert prompts is not None
    scores = reward.matrix(media, prompts)
    assert scores.shape == (len(media), len(prompts)) and scores.dtype == torch.float32
    _close(scores.diagonal(), reward(media, prompts=prompts), atol, "the diagonal of the matrix")
    _close(scores[:, 1], reward(media, prompts=[prompts[1]] * len(media)), atol, "a column of the matrix")


def check_gradient(
    reward: Reward,
    media: Tensor,
    prompts: Sequence[str] | None,
    references: Sequence[Tensor] | None,
    *,
    rtol: float = 1e-4,
) -> None:
    """The gradient in the pixels equals finite differences in float64; none reaches the weights.

    The rounding of the preprocessing is switched off: it is a staircase whose straight-through gradient is the
    gradient of the map without it.
    """
    leaf = media.clone().requires_grad_()
    scores = reward(leaf, prompts=prompts, references=references)
    scores.sum().backward()
    assert leaf.grad is not None and leaf.grad.abs().amax(dim=tuple(range(1, leaf.dim()))).min() > 0
    assert all(p.grad is None and not p.requires_grad for p in reward.parameters())

    exact = copy.deepcopy(reward).double()
    without_rounding(exact)
    sets = None
    if references is not None:
        with torch.no_grad():
            sets = exact.prepare_references([reference.double() for reference in references])
    start = media.double()
    leaf = start.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(exact.score(leaf, prompts, sets).sum(), leaf)
    length = gradient.norm()
    random = torch.randn(start.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    for direction in (gradient / length, random / random.norm()):
        step = 1e-4
        with torch.no_grad():
            ahead, behind = (exact.score(start + s * direction, prompts, sets).sum() for s in (step, -step))
        slope, expected = (ahead - behind) / (2 * step), (gradient * direction).sum()
        assert abs(slope - expected) < rtol * length, f"slope {slope.item():.8g}, gradient says {expected.item():.8g}"


def check_black_box(
    reward: Reward, media: Tensor, prompts: Sequence[str] | None, references: Sequence[Tensor] | None
) -> None:
    """A reward without gradient refuses media that ask for one."""
    with pytest.raises(RewardError, match="not differentiable"):
        reward(media.clone().requires_grad_(), prompts=prompts, references=references)


def check_half_precision(
    reward: Reward,
    media: Tensor,
    prompts: Sequence[str] | None,
    references: Sequence[Tensor] | None,
    *,
    atol: float,
) -> None:
    """Weights in float16 and bfloat16 give float32 scores within the tolerance, yet not the very same."""
    whole = reward(media, prompts=prompts, references=references)
    for dtype in (torch.float16, torch.bfloat16):
        half = copy.deepcopy(reward).to(dtype)(media, prompts=prompts, references=references)
        assert half.dtype == torch.float32
        assert 0 < (half - whole).abs().max() <= atol, f"{dtype}: off by {(half - whole).abs().max().item():.3g}"


def check_long_prompt(reward: Reward, media: Tensor, prompt: str, references: Sequence[Tensor] | None) -> None:
    """A prompt beyond the context is warned of with its count, once."""
    sets = None if references is None else references[:2]
    with pytest.warns(UserWarning, match="1 of 2 prompts"):
        reward(media[:2], prompts=[prompt, "short"], references=sets)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert reward(media[:2], prompts=[prompt + " more", prompt], references=sets).isfinite().all()


def without_rounding(reward: Reward) -> None:
    """Make the map continuous: switch off the rounding in every `Preprocess` that the reward or its parts hold."""
    for module in reward.modules():
        for value in vars(module).values():
            if isinstance(value, Preprocess):
                object.__setattr__(value, "rounding", False)


def _micro_batched(reward: Reward, size: int) -> Reward:
    other = copy.copy(reward)
    object.__setattr__(other, "batch_size", size)
    return other


def _rows(indices: list[int], prompts: Sequence[str] | None, references: Sequence[Tensor] | None) -> tuple:
    return (
        None if prompts is None else [prompts[i] for i in indices],
        None if references is None else [references[i] for i in indices],
    )


def _named(rows: tuple) -> dict:
    return dict(zip(("prompts", "references"), rows, strict=True))


def _close(found: Tensor, expected: Tensor, atol: float, what: str) -> None:
    worst = (found - expected).abs().max().item()
    assert worst <= atol, f"{what}: scores differ by {worst:.3g}, {found.tolist()} and {expected.tolist()}"
