"""LAION's aesthetic predictors: a small head on the unit CLIP embedding of an image, trained on ratings from 1 to 10.

Source: Schuhmann et al. 2022, "LAION-5B" (arXiv:2210.08402), and the repositories of the heads. With e the embedding
and e' = e / |e|:

    v1: w e' + b                              v2: MLP(e'), 768-1024-128-64-16-1 without activations, so affine too

| version | head | CLIP | trained on |
|---|---|---|---|
| `v1`, `v1-b-32`, `v1-b-16` | linear | OpenAI ViT-L/14, B/32, B/16 | Simulacra Aesthetic Captions (SAC) |
| `v2` | MLP, affine | OpenAI ViT-L/14 | SAC, LAION-Logos, AVA |
| `v2-ava-logos` | MLP, affine | OpenAI ViT-L/14 | LAION-Logos, AVA |
| `v2-ava-logos-relu` | MLP with ReLU | OpenAI ViT-L/14 | LAION-Logos, AVA |

The embedding is normalised and the head applied in at least float32, whatever the CLIP runs in: an embedding that is
not normalised gives scores that look right, and a head in half precision changes the second decimal. A generator
trained on this score alone saturates texture and forgets the prompt; combine it with a reward that reads the prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from jaxtyping import Float
from torch import Tensor, nn

from rewards.backbones.heads import Float32Head
from rewards.backbones.load import check_mode, load_preset
from rewards.backbones.weights import GITHUB, Weights, load_state, locate, read_state
from rewards.base import Reward
from rewards.bases.two_tower import unit
from rewards.errors import RewardError, choices


class Version(NamedTuple):
    """A published head: its file, open_clip's name of its CLIP, and its licence."""

    file: Weights
    clip: str
    licence: str


def _v1(clip: str, sha256: str) -> Weights:
    revision = "6d122adad522ab246644d9dc1c6d7a3810ee255f"
    return Weights("LAION-AI/aesthetic-predictor", f"sa_0_4_{clip}_linear.pth", revision, sha256, GITHUB)


def _v2(head: str, sha256: str) -> Weights:
    revision = "6934dd81792f086e613a121dbce43082cb8be85e"
    return Weights("christophschuhmann/improved-aesthetic-predictor", f"{head}.pth", revision, sha256, GITHUB)


L14 = "ViT-L-14-quickgelu"
VERSIONS = {
    "v1": Version(_v1("vit_l_14", "2cd4e60f4f24ae3bcd57b847b13c1f3ba27edc28cc1a7f9ce74ee9f421243cba"), L14, "MIT"),
    "v1-b-32": Version(
        _v1("vit_b_32", "c7b14cead230694acc7b9447974d3cad78003c72da032e402a303b6c2429e85f"),
        "ViT-B-32-quickgelu",
        "MIT",
    ),
    "v1-b-16": Version(
        _v1("vit_b_16", "8ad3923d7ecf019df20ecd2ab5542a3075fbba0278d239c0371345f3d7fcbde0"),
        "ViT-B-16-quickgelu",
        "MIT",
    ),
    "v2": Version(
        _v2("sac+logos+ava1-l14-linearMSE", "21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0"),
        L14,
        "Apache-2.0",
    ),
    "v2-ava-logos": Version(
        _v2("ava+logos-l14-linearMSE", "390a3aafaf3b37d57148f9b22f30556de38343064b7d915acfa80d3812b4c9ff"),
        L14,
        "Apache-2.0",
    ),
    "v2-ava-logos-relu": Version(
        _v2("ava+logos-l14-reluMSE", "0af3254c651d55b7ea851429c20f26ec880bb0169805a4df85b814bd7966f3e4"),
        L14,
        "Apache-2.0",
    ),
}

# Where the linear layers of the published networks stand, without and with activations.
AFFINE, RECTIFIED = (0, 2, 4, 6, 7), (0, 3, 6, 9, 11)


class Aesthetic(Reward):
    """Human rating of the beauty of an image, about 1 to 10, predicted by LAION's heads on CLIP.

    version: of the head, see above. weights: the head's file, or a directory that holds it; a layer `weight [1, D]`,
    `bias [1]` or a published MLP, whatever the version. encoder: the CLIP, as `weights` of the reward `clip`, or a
    file of OpenAI's weights; by default open_clip's with the tag `openai`. preprocessing: as in
    `rewards.backbones.preprocess`.
    Raises `RewardError` for an unknown version, a head of another layout, and a CLIP of another width.
    """

    name: ClassVar[str] = "aesthetic"
    version = "v2"
    differentiable = True
    licence = "v1 MIT, v2 Apache-2.0; CLIP MIT"
    source = "christophschuhmann/improved-aesthetic-predictor on GitHub; open_clip ViT-L-14-quickgelu, tag openai"
    citation = "Schuhmann et al. 2022, arXiv:2210.08402"
    files = (VERSIONS["v2"].file,)

    def __init__(
        self,
        *,
        version: str = "v2",
        weights: str | PathLike[str] | None = None,
        encoder: str | PathLike[str] | None = None,
        preprocessing: str = "differentiable",
        **options: Any,
    ) -> None:
        """Load head and CLIP."""
        super().__init__(**options)
        if version not in VERSIONS:
            raise RewardError(f"aesthetic: version {version!r} is unknown; {choices(version, VERSIONS)}")
        published = VERSIONS[version]
        self.preprocessing = check_mode(preprocessing)
        path = locate(published.file, weights)
        self.head = load_head(path).to(self.device, self.dtype)
        clip = load_preset(encoder, model=published.clip, pretrained="openai").without_texts()
        self.encoder = clip.to(self.device, self.dtype)
        self.version, self.files = version, (published.file,)
        self.licence = f"{published.licence}; CLIP MIT"
        self.source = f"{published.file if weights is None else path}; {clip.source}"

    def score(
        self,
        media: Float[Tensor, "batch 3 height width"],
        prompts: Sequence[str] | None,
        references: Sequence[Tensor] | None,
    ) -> Float[Tensor, " batch"]:
        """Apply the head to unit embeddings."""
        return self.rate(self.encoder.embed_media(media, self.preprocessing))

    def rate(self, embeddings: Float[Tensor, "batch features"]) -> Float[Tensor, " batch"]:
        """Rate CLIP embeddings of any length, in at least float32."""
        width = self.head[0].in_features
        if embeddings.shape[-1] != width:
            raise RewardError(
                f"aesthetic: the head {self.version!r} needs embeddings of {width} numbers, and the CLIP has "
                f"{embeddings.shape[-1]}; give a version and an encoder that belong together"
            )
        return self.head(unit(embeddings))[:, 0]


def load_head(path: Path) -> Float32Head:
    """Read a published head: one linear layer, or an MLP of five layers with or without activations.

    Raises:
        RewardError: the layout is another one, or a layer is missing, unexpected or of another shape.
    """
    state = read_state(path)
    if "weight" in state:
        state = {f"layers.0.{name}": value for name, value in state.items()}
        places: Sequence[int] = (0,)
    else:
        places = RECTIFIED if "layers.11.weight" in state else AFFINE
    layers: list[nn.Module] = []
    renamed = {}
    for place in places:
        if layers and places is RECTIFIED:
            layers.append(nn.ReLU())
        renamed[f"layers.{place}."] = f"{len(layers)}."
        layers.append(_linear(state, f"layers.{place}.weight", path))
    head = Float32Head(*layers)

    def rename(name: str) -> str:
        prefix = name[: name.rfind(".") + 1]
        return renamed.get(prefix, prefix) + name[len(prefix) :]

    load_state(head, state, path, rename=rename)
    if head[-1].out_features != 1:
        raise RewardError(f"{path}: the last layer has {head[-1].out_features} outputs; an aesthetic head has one")
    return head


def _linear(state: Mapping[str, Tensor], name: str, path: Path) -> nn.Linear:
    if name not in state or state[name].dim() != 2:
        raise RewardError(f"{path}: lacks {name} as a matrix, which the layers {AFFINE} of an aesthetic head have")
    return nn.Linear(state[name].shape[1], state[name].shape[0])
