"""What differs between images and videos in a comparison: how they are stored, and how rewards are given them.

Both are stored without loss, as 8-bit levels: images as PNG, videos as FFV1 in Matroska. What is scored is what is
stored. An MP4 would change what rewards of flicker or motion see.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from mmalign.compare.config import CompareConfig, RewardEntry
from mmalign.compare.systems.training import plan_trainings
from mmalign.core.errors import UserError
from mmalign.core.io.decode import Frames, decode
from mmalign.core.io.images import encode_png
from mmalign.core.io.video_files import encode_video
from mmalign.core.resources import resolve_model
from mmalign.scoring.checks import check_reward


class ImageMedia:
    """Images, as PNG files; rewards read the files themselves."""

    modality, suffix, at_once, noted_after = "image", "png", 8, 32
    """`at_once`: how many are generated together where the config does not say. `noted_after`: after how many new
    files the manifest is written; those of a killed run that it does not list are made again."""

    def encode(self, drawn: Float[Tensor, "*media"], rate: float | None) -> bytes:
        """Return the bytes of a file that holds `drawn`, in [0, 1]; `rate`: frames a second of a video."""
        return encode_png(drawn)

    def read(self, path: Path, frames: int | None = None) -> Path | Tensor:
        """Return a file as a reward takes it; `frames`: of a video only so many, spread evenly."""
        return path


class VideoMedia(ImageMedia):
    """Videos `[F, 3, H, W]`, as lossless MKV files."""

    modality, suffix, at_once, noted_after = "video", "mkv", 1, 1

    def encode(self, drawn: Float[Tensor, "*media"], rate: float | None) -> bytes:
        """See `ImageMedia`."""
        assert rate is not None
        return encode_video(drawn, rate, lossless=True)

    def read(self, path: Path, frames: int | None = None) -> Path | Tensor:
        """See `ImageMedia`; all frames by default.

        Raises:
            UserError: the file cannot be read.
        """
        try:
            return decode(path, "video", Frames(frames)).float().div_(255)
        except Exception as error:  # PyAV and PIL raise errors of their own
            raise UserError(f"{path}: cannot be read as a video ({' '.join(str(error).split())})") from None


IMAGES, VIDEOS = ImageMedia(), VideoMedia()


def find_media(config: CompareConfig) -> ImageMedia:
    """Return what the systems of a comparison make, by the indices of their models; nothing is loaded or trained.

    Raises:
        UserError: a system is not what its config takes it for (see `plan_trainings`), some make images and others
            videos, or `video` is given for images.
    """
    made = _modalities(config)
    first = config.baseline_name
    for name, modality in made.items():
        if modality != made[first]:
            raise UserError(
                f"systems: '{name}' makes {modality}s, and '{first}' makes {made[first]}s; compare them apart"
            )
    if made[first] == "image" and config.video is not None:
        raise UserError("video: is for video models, and these systems make images; remove it")
    return VIDEOS if made[first] == "video" else IMAGES


def check_entry(entry: RewardEntry, prompts: list[str], media: ImageMedia) -> None:
    """Check that a reward can score media of this kind; an image reward scores videos by `frames` of each.

    Raises:
        UserError, RewardError: it cannot; see `check_reward` too.
    """
    from rewards.registry import reward_class

    scores = reward_class(entry.name).modality
    if entry.frames is not None and (media.modality, scores) != ("video", "image"):
        raise UserError(
            f"reward '{entry.title}': frames is for image rewards on videos; this one scores {scores}s, and the"
            f" systems make {media.modality}s; remove it"
        )
    if (media.modality, scores) == ("video", "image") and entry.frames is None:
        raise UserError(
            f"reward '{entry.title}' scores images, and the systems make videos; give it frames, such as"
            f" {{name: {entry.name}, frames: 4}}, the number of frames of each video that it scores, or choose a video"
            " reward"
        )
    check_reward(entry.name, entry.options, prompts, scores if entry.frames else media.modality)


def _modalities(config: CompareConfig) -> dict[str, str]:
    """Return what each replica makes; a model that is trained here makes what its config trains."""
    from pipelines.load import drawer_of, makes_videos

    trainings = plan_trainings(config)
    trained = {name: training.config for training in trainings for name in training.systems}
    made_here = {training.folder: training.config for training in trainings}

    def is_video(name: str, videos: str | None, model: str | None) -> bool:
        run = trained.get(name) or made_here.get(Path(model or "").resolve())
        if run is not None:
            if run.video is not None and Path(resolve_model(run.model)).is_dir():
                refuse_first_frames(name, run.model)
            return run.video is not None
        if model is not None:
            refuse_first_frames(name, model)
        return videos is not None or (model is not None and makes_videos(resolve_model(model), resolve_model))

    def refuse_first_frames(name: str, model: str) -> None:
        if getattr(drawer_of(resolve_model(model), resolve_model), "needs_first_frame", False):
            raise UserError(
                f"system {name}: {model} makes videos of a first frame, which a comparison does not give it; draw them"
                " with `mmalign generate --image` and compare the folders (videos:)"
            )

    found: Mapping[str, bool] = {
        one.name: is_video(one.name, one.system.videos, one.system.model) for one in config.replicas
    }
    return {name: "video" if video else "image" for name, video in found.items()}
