"""Write videos to files; reading them, by number of frames or rate, is :func:`mmalign.core.io.decode.decode`."""

from __future__ import annotations

import io
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from mmalign.core.errors import UserError, did_you_mean
from mmalign.core.files import replacing

CODECS: dict[str, tuple[str, str, str, dict[str, str]]] = {
    "mp4": ("mp4", "libx264", "yuv420p", {"crf": "4"}),
    "mkv": ("matroska", "ffv1", "bgr0", {}),
}
"""suffix -> container, codec, pixel format, options: H.264 that plays everywhere, and FFV1, which loses nothing."""
FALLBACK = ("mp4", "mpeg4", "yuv420p", {"qmin": "1", "qmax": "3"})
"""For an MP4 where PyAV was built without H.264: plays in players, not in browsers."""


def write_video(path: Path, video: UInt8[Tensor, "frames 3 height width"], fps: float = 4.0) -> None:
    """Write frames as `.mp4` (nearly lossless; colours at half resolution) or `.mkv` (lossless), by PyAV.

    Raises:
        UserError: another suffix; an MP4 with an odd side, which its pixel format cannot hold; PyAV is missing.
    """
    kind = path.suffix.lower().removeprefix(".")
    if kind not in CODECS:
        raise UserError(f"{path}: videos are written as {' or '.join(CODECS)}{did_you_mean(kind, CODECS)}")
    with replacing(path) as aside:
        _write(str(aside), kind, str(path), video, fps)


def encode_video(media: Float[Tensor, "frames 3 height width"], fps: float) -> bytes:
    """Return a video in [0, 1] as the bytes of an MP4, or of a lossless MKV where a side is odd."""
    kind = "mkv" if media.shape[-2] % 2 or media.shape[-1] % 2 else "mp4"
    buffer = io.BytesIO()
    _write(buffer, kind, "a video", media.detach().float().clamp(0, 1).mul(255).round().to(torch.uint8), fps)
    return buffer.getvalue()


def _write(target: str | io.BytesIO, kind: str, name: str, video: Tensor, fps: float) -> None:
    try:
        import av
    except ImportError:
        raise UserError('writing video files needs PyAV: pip install "mmalign[video]"') from None
    height, width = video.shape[-2:]
    if kind == "mp4" and (height % 2 or width % 2):
        raise UserError(f"{name}: an MP4 needs even sides, not {width}x{height}; write an .mkv")
    container_name, codec, pixels, options = CODECS[kind]
    if kind == "mp4" and codec not in av.codecs_available:
        container_name, codec, pixels, options = FALLBACK
    # Without the flag a file holds a random identifier, and the same frames never give the same bytes.
    exact = {"fflags": "+bitexact"}
    with av.open(target, "w", format=container_name, options=exact) as container:
        stream: Any = container.add_stream(codec, rate=Fraction(fps).limit_denominator(1000), options=dict(options))
        stream.width, stream.height, stream.pix_fmt = width, height, pixels
        for frame in video.permute(0, 2, 3, 1).contiguous().cpu().numpy():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
