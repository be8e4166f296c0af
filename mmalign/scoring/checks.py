"""Refuse unsuitable rewards before an image is generated or a weight is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmalign.core.errors import UserError
from mmalign.core.io.items import Item
from mmalign.scoring.choice import Choice

if TYPE_CHECKING:
    from rewards import Facts


def check_reward(
    name: str, options: Mapping[str, Any], prompts: Sequence[str], modality: str = "image", *, grouped: bool = False
) -> None:
    """Check that a reward exists, takes these options and can score single images (or videos) of these prompts.

    `grouped`: each is scored beside others of its prompt.

    Raises:
        UserError: it needs more than images and prompts, judges another kind of media, or depends on the batch.
        RewardError: it does not exist, cannot be imported, has no such option, or cannot read one of the prompts.
    """
    from rewards import Facts, check_options

    reward = check_options(name, options)
    check_usable(Facts.of(reward), name, modality, grouped=grouped)
    reward.check_prompts(prompts)


def check_sizes(chosen: Sequence[Choice], items: Sequence[Item], skip_bad: bool) -> None:
    """Refuse images whose size a reward cannot read, by the headers of their files, before a reward is loaded.

    Raises:
        UserError: there is one, or with `skip_bad`: there is no other.
    """
    from rewards import reward_class

    for choice in chosen:
        side = reward_class(choice.name).fixed_size
        if side is None:
            continue
        sizes = {item.name: _size(item.media) for item in items if isinstance(item.media, Path) and not item.fault}
        wrong = {name: size for name, size in sizes.items() if size not in (None, (side, side))}
        if wrong and (not skip_bad or len(wrong) == len(items)):
            name, size = next(iter(wrong.items()))
            raise UserError(
                f"{len(wrong)} of {len(items)} images do not have {side} x {side} pixels, and reward '{choice.label}' "
                f"reads no others (first: {name}, {' x '.join(map(str, size or ()))}); choose another reward"
                + ("" if len(wrong) == len(items) else ", or add --skip-bad to leave them out")
            )


def _size(path: Path) -> tuple[int, int] | None:
    """Return width and height of an image by its header; None where that cannot be read, which is told later."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.size
    except Exception:  # a damaged header raises anything
        return None


def check_device(given: str | None, key: str = "device") -> str | None:
    """Return a device that exists, None for the default; `key` is the option that the user set.

    Raises:
        UserError: torch knows no such device, or this machine lacks it.
    """
    if given is not None:
        import torch

        try:
            torch.zeros(1, device=given).item()
        except (RuntimeError, AssertionError) as error:
            raise UserError(f"{key} {given}: {str(error).splitlines()[0]}") from None
    return given


def check_usable(facts: Facts, name: str, modality: str = "image", *, grouped: bool = False) -> None:
    """Check that a reward scores single images (or videos) by themselves, or, if they are `grouped`, in a group.

    Raises:
        UserError: see `check_reward`.
    """
    if facts.modality != modality:
        raise UserError(f"reward '{name}' judges {facts.modality}s, and there are only {modality}s; choose another")
    if "references" in facts.needs:
        raise UserError(f"reward '{name}' needs references, and there are only {modality}s and prompts; take another")
    if facts.grouped and not grouped:
        raise UserError(
            f"reward '{name}' compares the {modality}s of a prompt with each other; it is for training by a method "
            "with images_per_prompt of 2 or more"
        )
    if not facts.batch_invariant and not facts.grouped:
        raise UserError(f"reward '{name}' depends on the rest of its batch; choose one that scores {modality}s alone")
