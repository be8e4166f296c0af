"""What can be chosen for a video model: the size, the number and the rate of its frames."""

from __future__ import annotations

from dataclasses import dataclass, fields

from pipelines.errors import PipelineError


@dataclass(frozen=True)
class VideoOptions:
    """The geometry of a model's videos; None is the family's own. Raises `PipelineError` for what is not above 0.

    height, width
        Of a frame, in pixels.
    frames
        Of a video.
    fps
        Frames a second: how fast videos are played and, in families that are told the rate (LTX-Video), what the
        network makes of time.

    >>> VideoOptions(480, 832).filled(VideoOptions(512, 704, 161, 25.0))
    VideoOptions(height=480, width=832, frames=161, fps=25.0)
    """

    height: int | None = None
    width: int | None = None
    frames: int | None = None
    fps: int | float | None = None

    def __post_init__(self) -> None:
        """Check that what is given is above 0."""
        for name, value in self.given().items():
            if not 0 < value < float("inf"):
                raise PipelineError(f"{name} of videos must be above 0, got {value}.")

    def given(self) -> dict[str, int | float]:
        """Return what was chosen, by name."""
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in named.items() if value is not None}

    def filled(self, own: VideoOptions) -> VideoOptions:
        """Return the options with `own` in the place of what was not chosen."""
        return VideoOptions(**{**own.given(), **self.given()})  # type: ignore[arg-type]

    @property
    def sampling(self) -> str:
        """What was chosen, as text; "default" where nothing was."""
        return ", ".join(f"{name} {value:g}" for name, value in self.given().items()) or "default"
