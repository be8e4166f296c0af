"""Scores that the authors of the rewards published, or that follow from their published files, with their sources.

`mmalign rewards verify` and the tests run them. A golden whose weights or files are not here is skipped with the
reason; nothing is downloaded unless the caller allows it. Files are looked for in the folder given, by
default the one that MMALIGN_GOLDEN names.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from rewards.errors import RewardError
from rewards.registry import load_reward

VARIABLE = "MMALIGN_GOLDEN"
HEADS = "aesthetic_heads_cpu.npz"
# Raised, under one of our own errors, by what would have to fetch a file and may or can not.
_UNREACHABLE = {"LocalEntryNotFoundError", "OfflineModeIsEnabled", "ConnectionError", "ConnectError", "URLError"}


Numbers = Sequence[float | int] | Tensor


@dataclass(frozen=True)
class Call:
    """The arguments of a golden's computation: the folder of files, and the weights (None: the default ones)."""

    folder: Path
    weights: str | None = None
    device: str | None = None

    def load(self, name: str, weights: str | None = None, **options: Any) -> Any:
        """Load a reward with the user's weights, or else with the weights of the golden."""
        return load_reward(name, weights=self.weights or weights, device=self.device, **options)


@dataclass(frozen=True)
class Golden:
    """One published result: `name` is unique and starts with the reward's.

    tolerance: absolute, or where `relative` a share of each expected number. files: what must lie in the golden
    folder. compute: returns as many numbers as are expected.
    """

    name: str
    given: str
    expected: tuple[float | int, ...]
    tolerance: float
    source: str
    compute: Callable[[Call], Numbers]
    files: tuple[str, ...] = ()
    relative: bool = False

    @property
    def reward(self) -> str:
        """The reward that is checked."""
        return self.name.partition("/")[0]


@dataclass(frozen=True)
class Verdict:
    """The result of a golden; if it could not be run, `got` is empty and `reason` says why."""

    golden: Golden
    status: Literal["ok", "differs", "skipped", "error"]
    got: tuple[float, ...] = ()
    reason: str = ""

    @property
    def difference(self) -> float:
        """The largest difference, in units of the tolerance; NaN if there is none."""
        if not self.got:
            return math.nan
        pairs = list(zip(self.got, self.golden.expected, strict=True))
        apart = [abs(a - b) / (abs(b) if self.golden.relative else 1.0) for a, b in pairs]
        return math.nan if any(map(math.isnan, apart)) else max(apart)


def golden_folder(given: str | os.PathLike[str] | None = None) -> Path | None:
    """Return the folder of golden files: the given one, or that of the environment; None if both are missing."""
    named = given or os.environ.get(VARIABLE)
    if named is None:
        return None
    folder = Path(named).expanduser()
    if not folder.is_dir():
        raise RewardError(f"golden files: {folder} is not a folder; give a folder, or set {VARIABLE}")
    return folder


def verify(
    golden: Golden, folder: Path | None = None, *, weights: str | None = None, device: str | None = None
) -> Verdict:
    """Run one golden. Missing default weights skip it; given weights must load."""
    absent = [file for file in golden.files if folder is None or not (folder / file).is_file()]
    if absent:
        where = f"in {folder}" if folder else f"({VARIABLE} is not set)"
        return Verdict(golden, "skipped", reason=f"no {', '.join(absent)} {where}")
    try:
        with torch.no_grad():
            got = tuple(float(value) for value in golden.compute(Call(folder or Path(), weights, device)))
    except Exception as error:  # any error of a checkpoint or an optional package is reported in the table
        reason = " ".join(str(error).split()) or type(error).__name__
        return Verdict(golden, "skipped" if weights is None and _is_absence(error) else "error", reason=reason)
    if len(got) != len(golden.expected):
        return Verdict(golden, "error", reason=f"{len(got)} numbers instead of {len(golden.expected)}")
    verdict = Verdict(golden, "ok", got)
    return verdict if verdict.difference <= golden.tolerance else Verdict(golden, "differs", got)  # NaN differs


def _is_absence(error: BaseException | None) -> bool:
    """Tell whether an error comes from missing weights or a missing optional package."""
    while error is not None:
        if type(error).__name__ in _UNREACHABLE or 'pip install "mmalign[' in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _noise_image(seed: int) -> Tensor:
    """The random image of torchmetrics' docstrings, `[1, 3, 224, 224]` in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(255, (3, 224, 224), generator=generator)[None].float() / 255


def _tokens(call: Call) -> list[int]:
    import open_clip

    return open_clip.get_tokenizer("ViT-B-32")(["a photo of a cat"])[0, :7].tolist()


B16 = "openai/clip-vit-base-patch16"
_CHEF = (
    "28-year-old chef found dead in San Francisco mall",
    "A 28-year-old chef who recently moved to San Francisco was found dead.",
)


def _clip_text(call: Call) -> Tensor:
    return call.load("clip", B16, kind="clipscore")(_noise_image(42), prompts=["a photo of a cat"])


def _clip_texts(call: Call) -> list[float]:
    first, second = call.load("clip", B16).prompt_embeddings(_CHEF)
    return [100 * float(first @ second)]


def _clip_images(call: Call) -> Tensor:
    return 100 * call.load("clip-i", B16)(_noise_image(42), references=[_noise_image(43)])


def _clip_softmax(call: Call) -> Tensor:
    reward = call.load("clip", preprocessing="reference")
    cosines = reward.matrix([call.folder / "CLIP.png"], ["a diagram", "a dog", "a cat"])
    return (100 * cosines[0]).softmax(0)


def _head(version: str, embeddings: str, copy: str | None) -> Callable[[Call], Tensor]:
    """Score the published CLIP embeddings by a head: the user's file, the published one, or its copy beside them."""

    def compute(call: Call) -> Tensor:
        import numpy as np

        from rewards.aesthetic import VERSIONS, load_head
        from rewards.backbones.weights import locate
        from rewards.bases.two_tower import unit

        arrays = np.load(call.folder / HEADS)
        media = torch.from_numpy(arrays[embeddings]).float()
        try:
            head = load_head(locate(VERSIONS[version].file, call.weights))
        except RewardError as error:
            if copy is None or call.weights is not None or not _is_absence(error):
                raise
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "head.pth"
                state = {"weight": f"{copy}_w", "bias": f"{copy}_b"}
                torch.save({name: torch.from_numpy(arrays[key]).float() for name, key in state.items()}, path)
                head = load_head(path)
        return head(unit(media))[:, 0]

    return compute


def _hps(call: Call) -> Tensor:
    reward = call.load("hps", version="v2", preprocessing="reference")
    return reward([call.folder / "hpsv2_demo_image.jpg"], prompts=["A cat with two horns on its head"])


IMAGE_REWARD_FILES = tuple(f"image-reward/{number}.webp" for number in range(1, 5))


def _image_reward(call: Call) -> Tensor:
    prompt = "a painting of an ocean with clouds and birds, day time, low depth field effect"
    reward = call.load("image-reward", preprocessing="reference")
    return reward([call.folder / file for file in IMAGE_REWARD_FILES], prompts=[prompt] * 4)


def _jpeg(call: Call) -> Tensor:
    import numpy as np

    noise = np.random.RandomState(0).randint(0, 256, (512, 512, 3), dtype=np.uint8)
    black = np.zeros((512, 512, 3), np.uint8)
    rows = (np.arange(512) * 255 // 511).astype(np.uint8)
    gradient = np.broadcast_to(rows[:, None, None], (512, 512, 3))
    images = torch.from_numpy(np.stack([noise, black, gradient])).permute(0, 3, 1, 2).float() / 255
    return 1000 * load_reward("jpeg-incompressibility", device=call.device)(images)


def _harmonic(call: Call) -> Tensor:
    from rewards.lambda_harmonic import harmonic

    image, text = torch.tensor([[0.9], [0.6]], dtype=torch.float64)
    return harmonic(image, text, 0.3)


_SCORES = torch.tensor([1.0, 0.0, -2.0], dtype=torch.float64)
_REFERENCES = torch.tensor([0.5, -0.5, 1.5, 0.0], dtype=torch.float64)


def _log_sigmoid(call: Call) -> Tensor:
    from rewards.combining.shaping import log_sigmoid_centred, reference_level

    return log_sigmoid_centred(_SCORES, reference_level(_REFERENCES))


def _par(call: Call) -> Tensor:
    from rewards.combining.shaping import par

    return par(_SCORES, _REFERENCES)


_TORCHMETRICS = "docstring of torchmetrics.multimodal.CLIPScore"
_EMBEDDINGS = "ten published CLIP embeddings, rated 0 to 9"
_LAION = "LAION's published heads on their published embeddings"

GOLDENS: tuple[Golden, ...] = (
    Golden(
        "clip/tokenizer",
        "token ids of 'a photo of a cat'",
        (49406, 320, 1125, 539, 320, 2368, 49407),
        0.0,
        "OpenAI's byte-pair vocabulary",
        _tokens,
    ),
    Golden(
        "clip/vit-b-16", "random image, 'a photo of a cat'; 100 x cosine", (24.4260,), 0.01, _TORCHMETRICS, _clip_text
    ),
    Golden("clip/vit-b-16-texts", "two headlines; 100 x cosine", (91.3950,), 0.01, _TORCHMETRICS, _clip_texts),
    Golden(
        "clip/vit-b-32",
        "CLIP.png; softmax over 'a diagram', 'a dog', 'a cat'",
        (0.9927937, 0.00421068, 0.00299572),
        2e-3,
        "README of openai/CLIP, in half precision",
        _clip_softmax,
        ("CLIP.png",),
    ),
    Golden("clip-i/vit-b-16", "two random images; 100 x cosine", (99.4860,), 0.01, _TORCHMETRICS, _clip_images),
    Golden(
        "aesthetic/v1",
        f"{_EMBEDDINGS}, L/14",
        (-2.4579, -0.1379, 1.8951, 3.5849, 5.0997, 6.4701, 7.7870, 9.0480, 10.2264, 11.3044),
        1e-3,
        _LAION,
        _head("v1", "emb_l14", "v1_l_14"),
        (HEADS,),
    ),
    Golden(
        "aesthetic/v1-b-32",
        f"{_EMBEDDINGS}, B/32",
        (-1.4700, 0.2728, 1.9900, 3.6114, 5.0874, 6.3926, 7.6682, 8.9155, 9.9166, 11.0056),
        1e-3,
        _LAION,
        _head("v1-b-32", "emb_b32", "v1_b_32"),
        (HEADS,),
    ),
    Golden(
        "aesthetic/v2",
        f"{_EMBEDDINGS}, L/14",
        (1.6555, 2.3593, 3.0698, 3.6725, 4.2380, 4.7010, 5.0731, 5.3654, 5.5767, 5.7468),
        1e-3,
        _LAION,
        _head("v2", "emb_l14", "v2_l14"),
        (HEADS,),
    ),
    Golden(
        "aesthetic/v2-ava-logos",
        f"{_EMBEDDINGS}, L/14",
        (4.5126, 4.4763, 4.4919, 4.5959, 4.7054, 4.8433, 5.0039, 5.1479, 5.2309, 5.2664),
        1e-3,
        _LAION,
        _head("v2-ava-logos", "emb_l14", None),
        (HEADS,),
    ),
    Golden(
        "aesthetic/v2-ava-logos-relu",
        f"{_EMBEDDINGS}, L/14",
        (4.3717, 4.1921, 4.0485, 4.0125, 3.9895, 4.0178, 4.1026, 4.2082, 4.2704, 4.3083),
        1e-3,
        _LAION,
        _head("v2-ava-logos-relu", "emb_l14", None),
        (HEADS,),
    ),
    Golden(
        "hps/v2",
        "hpsv2_demo_image.jpg, 'A cat with two horns on its head'",
        (0.2876,),
        1e-3,
        "tgxs002/HPSv2 issue 27, in half precision",
        _hps,
        ("hpsv2_demo_image.jpg",),
    ),
    Golden(
        "image-reward/v1",
        "1.webp to 4.webp of the repository's assets/images, 'a painting of an ocean ...'",
        (0.5811622738838196, 0.2745276093482971, -1.4131819009780884, -2.029569625854492),
        1e-2,
        "README of THUDM/ImageReward",
        _image_reward,
        IMAGE_REWARD_FILES,
    ),
    Golden(
        "jpeg-incompressibility/bytes",
        "noise, black, gradient of 512 pixels; bytes",
        (308188, 4723, 17010),
        0.01,
        "measured with Pillow 13; versions of libjpeg differ",
        _jpeg,
        relative=True,
    ),
    Golden(
        "lambda-harmonic/mean",
        "similarities 0.9 and 0.6, lambda 0.3",
        (0.6666666769547326,),
        1e-12,
        "the formula of RPO's code, in float64",
        _harmonic,
    ),
    Golden(
        "combine/log-sigmoid",
        "scores 1, 0, -2; references 0.5, -0.5, 1.5, 0",
        (-0.76637262, -1.41859555, -3.18376493),
        1e-6,
        "the formula of PAR's code for Wang et al. 2024, in float32",
        _log_sigmoid,
    ),
    Golden(
        "combine/par",
        "scores 1, 0, -2; references 0.5, -0.5, 1.5, 0",
        (0.63715827, 0.42060637, 0.10169971),
        1e-6,
        "the formula of PAR, in float32",
        _par,
    ),
)


def goldens_of(name: str | None = None) -> list[Golden]:
    """Return the goldens of a reward, or the one of that name, or all.

    Raises:
        RewardError: there is none, of a name that is neither a reward's nor a golden's.
    """
    if name is None:
        return list(GOLDENS)
    found = [golden for golden in GOLDENS if name in (golden.reward, golden.name)]
    if not found:
        from rewards.errors import choices
        from rewards.held_to import held_to

        if (line := held_to(name)) is not None:
            raise RewardError(line)
        known = {golden.reward for golden in GOLDENS} | {golden.name for golden in GOLDENS}
        raise RewardError(f"{name!r} is not a reward or a published score; {choices(name, known)}")
    return found
