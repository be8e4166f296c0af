"""Find a reward by name: built in, registered by `register`, an entry point of a third party, or a dotted path.

Third parties declare theirs in their pyproject.toml; the key equals the `name` of the class:

    [project.entry-points."mmalign.rewards"]
    sharpness = "their_package.rewards:Sharpness"
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from os import PathLike
from typing import TYPE_CHECKING, Any

from rewards.errors import RewardError, choices
from rewards.lookup import Lookup

if TYPE_CHECKING:
    import rewards.base

ENTRY_POINT_GROUP = "mmalign.rewards"

BUILTIN = {
    "aesthetic": "rewards.aesthetic:Aesthetic",
    "block-motion": "rewards.block_motion:BlockMotion",
    "clip": "rewards.clip:ClipReward",
    "clip-i": "rewards.clip_i:ClipI",
    "combine": "rewards.combine:Combine",
    "dino-i": "rewards.dino_i:DinoI",
    "frame-consistency": "rewards.frame_consistency:FrameConsistency",
    "geneval": "rewards.geneval:GenEval",
    "group-diversity": "rewards.group_diversity:GroupDiversity",
    "hps": "rewards.hps:Hps",
    "hps-v3": "rewards.hps3:HpsV3",
    "image-reward": "rewards.image_reward:ImageReward",
    "jpeg-compressibility": "rewards.jpeg:JpegCompressibility",
    "jpeg-incompressibility": "rewards.jpeg:JpegIncompressibility",
    "lambda-harmonic": "rewards.lambda_harmonic:LambdaHarmonic",
    "latent": "rewards.latent:LatentReward",
    "motion-smoothness": "rewards.video_motion:MotionSmoothness",
    "mps": "rewards.mps:Mps",
    "ocr": "rewards.ocr:OcrReward",
    "pickscore": "rewards.pickscore:PickScore",
    "ref-clipscore": "rewards.ref_clipscore:RefClipScore",
    "social-reward": "rewards.social_reward:SocialReward",
    "text-norm": "rewards.text_norm:TextNorm",
    "vbench-aesthetic-quality": "rewards.vbench:AestheticQuality",
    "vbench-appearance-style": "rewards.vbench:AppearanceStyle",
    "vbench-background-consistency": "rewards.vbench:BackgroundConsistency",
    "vbench-dynamic-degree": "rewards.video_motion:DynamicDegree",
    "vbench-subject-consistency": "rewards.vbench:SubjectConsistency",
    "vbench-temporal-flickering": "rewards.vbench:TemporalFlickering",
    "video-align": "rewards.video_align:VideoAlign",
    "video-score": "rewards.video_score:VideoScore",
    "vlm-judge": "rewards.vlm_judge:VlmJudge",
    "vlm-rm": "rewards.vlm_rm:VlmRm",
    "vqa-score": "rewards.vqa_score:VqaScore",
}

_LOOKUP = Lookup("reward", BUILTIN, ENTRY_POINT_GROUP)


def register(reward: type[rewards.base.Reward]) -> type[rewards.base.Reward]:
    """Make a reward class known under its `name` in this process; usable as a decorator."""
    _LOOKUP.register(_checked(reward, reward.__qualname__))
    return reward


def load_reward(
    name: str,
    *,
    device: Any = None,
    dtype: Any = None,
    weights: str | PathLike[str] | None = None,
    **options: Any,
) -> rewards.base.Reward:
    """Make a reward by registered name or `"module.path:Class"`.

    device: None is CUDA where there is one; dtype: of the weights, float32 by default; weights: where they come from,
    in the words of the reward; options: keyword arguments of the reward's class. Raises `RewardError` for an unknown
    name or option, with the nearest match.
    """
    given = {"device": device, "dtype": dtype, "weights": weights}
    options |= {option: value for option, value in given.items() if value is not None}
    found = check_options(name, options)
    try:
        return found(**options)
    except (TypeError, ValueError) as error:
        if not options or type(error) not in (TypeError, ValueError):
            raise
        shown = ", ".join(f"{option}={str(value)[:60]}" for option, value in options.items())
        raise RewardError(f"reward {name!r} cannot be made with {shown}: {error}") from error


def check_options(name: str, options: Mapping[str, Any]) -> type[rewards.base.Reward]:
    """Return the class behind a name, checked to take these options, and no fewer; no reward is made.

    Raises `RewardError` for an unknown name or option, with the nearest match, and for a missing option.
    """
    found = reward_class(name)
    allowed = options_of(found)
    for option in options:
        if allowed is None or option in allowed:
            continue
        if option == "weights":
            raise RewardError(f"reward {name!r} has no weights to choose; leave out weights={str(options[option])!r}")
        raise RewardError(f"reward {name!r} has no option {option!r}; {choices(option, allowed)}")
    lacking = [option for option, default in (allowed or {}).items() if default is inspect.Parameter.empty]
    if missing := [option for option in lacking if option not in options]:
        raise RewardError(
            f"reward {name!r} needs the option {missing[0]!r}; give it, see `mmalign list rewards {name}`"
        )
    return found


def list_rewards() -> list[rewards.base.Facts]:
    """Return the facts of every reward that can be loaded by name, sorted by name, without reading weights.

    A third party's reward that cannot be imported is left out with a warning.
    """
    from rewards.base import Facts

    facts = []
    for name in _LOOKUP.names():
        try:
            facts.append(Facts.of(reward_class(name)))
        except RewardError as error:
            warnings.warn(str(error), stacklevel=2)
    return facts


def reward_class(name: str) -> type[rewards.base.Reward]:
    """Return the class behind a name or a dotted path, without making a reward.

    Raises `RewardError` for an unknown name, one that two rewards claim, and what is no reward of that name.
    """
    found = _checked(_LOOKUP.get(name), name)
    if ":" not in name and found.name != name:
        raise RewardError(f"{found} is declared as reward {name!r} but its name is {found.name!r}; make them equal")
    return found


def _checked(found: Any, label: str) -> type[rewards.base.Reward]:
    from rewards.base import Reward

    if not (isinstance(found, type) and issubclass(found, Reward)):
        raise RewardError(f"{label!r} is not a subclass of rewards.Reward")
    if inspect.isabstract(found):
        raise RewardError(f"{label!r} lacks {', '.join(sorted(found.__abstractmethods__))}")
    if not found.name or ":" in found.name:
        raise RewardError(f"{label!r} has the name {found.name!r}; set a class attribute `name`, without ':'")
    return found


def options_of(found: type[rewards.base.Reward]) -> dict[str, Any] | None:
    """Collect the options of a class, with defaults (`inspect.Parameter.empty`: to be given); None: anything goes.

    They are its keyword arguments and, where it passes `**rest` on, those of its bases.
    """
    from rewards.base import Reward

    options: dict[str, Any] = {}
    for cls in found.__mro__:
        if "__init__" not in vars(cls):
            continue
        parameters = inspect.signature(vars(cls)["__init__"]).parameters.values()
        named = {p.name: p.default for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)}
        options |= {name: default for name, default in named.items() if name not in {"self", *options}}
        if cls is Reward or not any(p.kind is p.VAR_KEYWORD for p in parameters):
            return options
    return None
