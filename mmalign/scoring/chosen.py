"""The choice of rewards with options and weights: read from a list of names or a YAML file, checked, loaded."""

from __future__ import annotations

import hashlib
import inspect
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import CodeType
from typing import Any

import torch

from mmalign.core.errors import UserError, did_you_mean, plain, shorten
from mmalign.scoring.choice import TEXT_COLUMNS, TOTAL, Choice, WeightedReward

MAX_LABEL = 200
"""Characters of a label, which heads a column and names files."""
SAMPLED_VALUES = 4096
"""Number of values of each tensor in a fingerprint; retraining a reward changes practically all of them."""


def parse_rewards(text: str) -> dict[str, float]:
    """Read "clip,shapes-quality:0.5" as reward name -> weight (1 where none is given); "package.module:Class" works.

    Raises:
        UserError: an empty or repeated name, or a weight that is no finite number or is 0.
    """
    return {choice.name: 1.0 if choice.weight is None else choice.weight for choice in parse_choices(text)}


def parse_choices(text: str) -> list[Choice]:
    """Read "clip,shapes-quality:0.5" as `parse_rewards` does, and distinguish a weight of 1 from none."""
    chosen: dict[str, Choice] = {}
    for part in text.split(","):
        name, weight = part.strip(), None
        head, colon, tail = name.rpartition(":")
        if colon and not tail.strip().isidentifier():
            try:
                name, weight = head.strip(), float(tail)
            except ValueError:
                raise UserError(f"reward '{part.strip()}': '{tail}' is no weight; write NAME or NAME:0.5") from None
        if not name or name in chosen:
            raise UserError(f"rewards '{text}': {'repeats ' + repr(name) if name else 'has an empty name'}")
        check_weight(part.strip(), weight)
        chosen[name] = Choice(name, name, weight)
    return list(chosen.values())


def read_choices(text: str, options: Sequence[str] = ()) -> list[Choice]:
    """Read `--rewards`: names as for `parse_choices`, or a YAML file; and `options` such as "clip.weights=DIR".

    The file holds `rewards:`, a list of names or of {name, label, weight, options}.

    Raises:
        UserError: it cannot be read, a label occurs twice, or an option belongs to no reward.
    """
    if Path(text).suffix in (".yaml", ".yml"):
        from mmalign.scoring.schema import read_yaml

        chosen = read_yaml(text)
        for choice in chosen:
            check_weight(choice.label, choice.weight)
    else:
        chosen = parse_choices(text)
    check_labels(chosen)
    return _with_options(chosen, options)


def check_labels(chosen: Sequence[Choice]) -> None:
    """Refuse labels that are given twice, that are names of other columns, or that no table shows.

    Raises:
        UserError: see above.
    """
    repeated = [label for label, count in Counter(choice.label for choice in chosen).items() if count > 1]
    if repeated:
        raise UserError(f"rewards: '{repeated[0]}' occurs more than once; give each its own label")
    for label in (choice.label for choice in chosen):
        if label == TOTAL:
            raise UserError(f"rewards: '{TOTAL}' is the name of the weighted sum; choose another label")
        if label in TEXT_COLUMNS:
            raise UserError(f"rewards: '{label}' is a column beside the scores; choose another label")
        if len(label) > MAX_LABEL or not label.isprintable():
            raise UserError(
                f"rewards: '{shorten(plain(label))}' is no label; give at most {MAX_LABEL} printable characters"
            )


def _with_options(chosen: Sequence[Choice], options: Sequence[str]) -> list[Choice]:
    from mmalign.config.yaml import parse_value

    labels = [choice.label for choice in chosen]
    given: dict[str, dict[str, Any]] = {label: {} for label in labels}
    for option in options:
        key, equals, value = option.partition("=")
        label = max((name for name in labels if key.startswith(f"{name}.")), key=len, default="")
        if not equals or not label:
            hint = did_you_mean(key.partition(".")[0], labels)
            raise UserError(f"--option '{option}': write REWARD.OPTION=VALUE for one of {', '.join(labels)}{hint}")
        given[label][key.removeprefix(f"{label}.")] = parse_value(value)
    return [
        Choice(choice.name, choice.label, choice.weight, {**choice.options, **given[choice.label]})
        for choice in chosen
    ]


def check_weight(name: str, weight: float | None) -> None:
    """Refuse a weight that is 0 or not finite.

    Raises:
        UserError: see above.
    """
    if weight is not None and (not math.isfinite(weight) or weight == 0):
        raise UserError(f"reward '{name}': the weight must be a finite number other than 0")


def load_weighted_rewards(
    weights: Mapping[str, float], prompts: Sequence[str], device: str | None = None
) -> list[WeightedReward]:
    """Load the rewards that decide, after checking that all of them can score media of these prompts.

    The first one decides whether these are images or videos.

    Raises:
        UserError, RewardError: see `mmalign.scoring.checks.check_reward`.
    """
    from rewards import reward_class

    choices = [Choice(name, name, weight) for name, weight in weights.items()]
    modality = reward_class(choices[0].name).modality
    return load_choices(choices, prompts, modality=modality, device=device)


def load_choices(
    chosen: Sequence[Choice],
    prompts: Sequence[str],
    *,
    modality: str = "image",
    device: str | None = None,
    dtype: str | None = None,
) -> list[WeightedReward]:
    """Load rewards after checking that all of them can score media of this kind with these prompts.

    Raises:
        UserError, RewardError: see `mmalign.scoring.checks.check_reward`.
    """
    from mmalign.scoring.checks import check_reward
    from rewards import load_reward

    for choice in chosen:
        check_reward(choice.name, choice.options, prompts, modality)
    common = {"device": device, "dtype": dtype}
    return [
        WeightedReward(
            choice.label,
            1.0 if choice.weight is None else choice.weight,
            load_reward(choice.name, **{**common, **choice.options}),
        )
        for choice in chosen
    ]


def fingerprint_reward(reward: Any, neighbours: bool = False) -> list[str]:
    """Fingerprint weights and code, so that scores from before a retraining do not count as the new reward's.

    A plug-in may consist of code alone; the source of its class and of its bases counts as well, and with `neighbours`
    that of the modules beside it.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(reward.state_dict().items()):
        flat = tensor.detach().flatten()
        picked = flat[torch.linspace(0, len(flat) - 1, min(len(flat), SAMPLED_VALUES)).long().to(flat.device)]
        digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}".encode())
        digest.update(picked.double().cpu().numpy().tobytes())
    classes = [cls for cls in type(reward).__mro__ if issubclass(cls, torch.nn.Module) and cls is not torch.nn.Module]
    files = {cls: _source_file(cls) for cls in classes}
    paths = {path for path in files.values() if path is not None}
    if neighbours:
        paths |= {beside for path in paths for beside in path.parent.glob("*.py")}
    code = hashlib.blake2b(digest_size=16)
    for path in sorted(paths):
        code.update(path.read_bytes())
    for cls in (cls for cls, path in files.items() if path is None):
        for name, function in sorted((name, part) for name, part in vars(cls).items() if inspect.isfunction(part)):
            code.update(repr((name, _instructions(function.__code__))).encode())
    return [digest.hexdigest(), code.hexdigest()]


def _instructions(code: CodeType) -> tuple[Any, ...]:
    """Return the code of a function without its place in the file."""
    inner = (_instructions(one) if isinstance(one, CodeType) else one for one in code.co_consts)
    constants = (sorted(map(repr, one)) if isinstance(one, frozenset) else one for one in inner)  # in a stable order
    return code.co_code, code.co_names, code.co_varnames, *constants


def _source_file(cls: type) -> Path | None:
    """Return the file that defines a class; None for one of a notebook's cell or of an interactive session."""
    try:
        file = inspect.getsourcefile(cls)
    except (TypeError, OSError):  # its module has no file
        return None
    return Path(file) if file is not None and Path(file).is_file() else None
