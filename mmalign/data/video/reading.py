"""The videos of items, decoded once for consecutive requests, and perturbed on demand."""

from __future__ import annotations

from collections.abc import Hashable

from mmalign.core.errors import UserError
from mmalign.core.io.decode import Frames
from mmalign.data.batches import TimedMedia
from mmalign.data.encoded.vlm_samples import read_media
from mmalign.data.video.events import clips, shot_states
from mmalign.data.video.items import VideoItem
from mmalign.data.video.perturbations import Perturbation
from mmalign.data.vlm_pairs import media_digest


class VideoReader:
    """Reads the frames of videos that `frames` selects."""

    def __init__(self, frames: Frames) -> None:
        """Start with nothing decoded."""
        self.frames = frames
        self._last: tuple[tuple[object, ...], TimedMedia] | None = None
        self._digests: dict[object, str] = {}
        self._states: dict[object, list[Hashable]] = {}

    def show(self, item: VideoItem, perturbation: Perturbation | None = None, seed: int = 0) -> TimedMedia:
        """Return the video of an item as media, perturbed or unchanged.

        Raises:
            UserError: it cannot be read or perturbed.
        """
        key = (item.file, item.fps)
        if self._last is None or self._last[0] != key:
            self._last = key, read_media([item.file], "video", self.frames, item.fps, item.id)
        media, fps = self._last[1]
        if perturbation is None:
            return TimedMedia(media, fps)
        try:
            return TimedMedia((perturbation.apply(media[0], seed),), fps)
        except UserError as error:
            raise UserError(f"{item.id}: {error}") from None

    def media_id(self, item: VideoItem) -> str:
        """Return an identifier of the frames of an item's video: the file's content and the selection of frames."""
        if item.file not in self._digests:
            self._digests[item.file] = media_digest(item.file)
        return f"{self._digests[item.file]}+{self.frames!r}+{item.fps}"

    def count(self, item: VideoItem) -> int | None:
        """Return how many frames of a video are taken; None where that is not known without decoding."""
        if item.truth is None or self.frames.fps is not None:
            return None
        return len(self.frames.choose(item.truth.frames, None))

    def states(self, item: VideoItem) -> list[Hashable]:
        """Return the state of each frame: from the truth, if it is known and all frames are taken, else from cuts."""
        key = (item.file, item.fps)  # which frames are taken may depend on the rate
        if key not in self._states:
            if item.truth is not None and self.count(item) == item.truth.frames:
                self._states[key] = item.truth.states()
            else:
                self._states[key] = shot_states(self.show(item).media[0])
        return self._states[key]

    def show_clip(self, item: VideoItem, number: int) -> TimedMedia:
        """Return one clip of an item's video, counted from 0."""
        media, fps = self.show(item)
        return TimedMedia((clips(media[0], self.states(item))[number],), fps)
