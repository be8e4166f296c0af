"""Score images and videos: one reward per file, usable on its own.

```python
from rewards import load_reward

clip = load_reward("clip", weights="hf-hub:laion/CLIP-ViT-B-32-laion2B-s34B-b79K")
scores = clip(media, prompts=["a red circle", "two green stars"])  # media [2, 3, H, W] in [0, 1] -> [2] float32
```

`list_rewards()` returns the facts of every reward, without reading weights. README.md beside this file shows how to
write one. Importing the package is fast: torch and the model libraries are imported when first needed.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from rewards.errors import RewardError
from rewards.moved import MOVED, MovedModules
from rewards.registry import check_options, list_rewards, load_reward, register, reward_class

if TYPE_CHECKING:
    from rewards.backbones.preprocess import Preprocess
    from rewards.base import Facts, Reward
    from rewards.bases.two_tower import TwoTowerReward

__all__ = [
    "Facts",
    "Preprocess",
    "Reward",
    "RewardError",
    "TwoTowerReward",
    "check_options",
    "list_rewards",
    "load_reward",
    "register",
    "reward_class",
]

_LAZY = {
    "Facts": "rewards.base",
    "Preprocess": "rewards.backbones.preprocess",
    "Reward": "rewards.base",
    "TwoTowerReward": "rewards.bases.two_tower",
}


def __getattr__(name: str) -> Any:
    """Import the classes that need torch on first use."""
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


MovedModules(MOVED).install()
