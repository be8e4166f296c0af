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

Encoding = tuple[str, str, str, dict[str, str]]
"""Container, codec, pixel format, options."""

CODECS: dict[str, Encoding] = {
    "mp4": ("mp4", "libx264", "yuv420p", {"crf": "4"}),
    "mkv": ("matroska", "ffv1", "bgr0", {}),
}
"""suffix -> encoding: H.264 that plays everywhere, and FFV1, which loses nothing."""
FALLBACK = ("mp4", "mpeg4", "yuv420p", {"qmin": "1", "qmax": "3"})
"""For an MP4 where PyAV was built without H.264: plays in players, not in browsers."""
BROWSERS: dict[str, Encoding] = {
    "video/mp4": ("mp4", "libx264", "yuv420p", {"crf": "23"}),
    "video/webm": ("webm", "libvpx-vp9", "yuv420p", {"crf": "32", "b:v": "0"}),
}
"""media type -> encoding that browsers play; the first that this PyAV can write is used."""


def write_video(path: Path, video: UInt8[Tensor, "frames 3 height width"], fps: float = 4.0) -> None:
    """Write frames as `.mp4` (nearly lossless; colours at half resolution) or `.mkv` (lossless), by PyAV.

    Raises:
        UserError: another suffix; an MP4 with an odd side, which its pixel format cannot hold; PyAV is missing.
    """
    kind = path.suffix.lower().removeprefix(".")
    if kind not in CODECS:
        raise UserError(f"{path}: videos are written as {' or '.join(CODECS)}{did_you_mean(kind, CODECS)}")
    with replacing(path) as aside:
        _write(str(aside), _encoding(kind, str(path), video), video, fps)


def encode_video(media: Float[Tensor, "frames 3 height width"], fps: float, *, lossless: bool = False) -> bytes:
    """Return a video in [0, 1] as the bytes of an MP4, or of a lossless MKV if asked for, or where a side is odd."""
    kind = "mkv" if lossless or media.shape[-2] % 2 or media.shape[-1] % 2 else "mp4"
    levels = media.detach().float().clamp(0, 1).mul(255).round().to(torch.uint8)
    buffer = io.BytesIO()
    _write(buffer, _encoding(kind, "a video", levels), levels, fps)
    return buffer.getvalue()


def encode_for_browsers(
    video: UInt8[Tensor, "frames 3 height width"], fps: float, quality: int = 0
) -> tuple[str, bytes] | None:
    """Return media type and bytes of a video of even sides that browsers play; None where PyAV can write none.

    `quality` is added to the codec's `crf`: 6 more is about half the size.
    """
    available = _pyav().codecs_available
    for media_type, (container, codec, pixels, options) in BROWSERS.items():
        if codec in available:
            crf = str(int(options["crf"]) + quality)
            buffer = io.BytesIO()
            _write(buffer, (container, codec, pixels, {**options, "crf": crf}), video, fps)
            return media_type, buffer.getvalue()
    return None


def _encoding(kind: str, name: str, video: Tensor) -> Encoding:
    height, width = video.shape[-2:]
    if kind == "mp4" and (height % 2 or width % 2):
        raise UserError(f"{name}: an MP4 needs even sides, not {width}x{height}; write an .mkv")
    return FALLBACK if kind == "mp4" and CODECS[kind][1] not in _pyav().codecs_available else CODECS[kind]


def _pyav() -> Any:
    try:
        import av
    except ImportError:
        raise UserError('writing video files needs PyAV: pip install "mmalign[video]"') from None
    return av


def _write(target: str | io.BytesIO, encoding: Encoding, video: Tensor, fps: float) -> None:
    av = _pyav()
    container_name, codec, pixels, options = encoding
    height, width = video.shape[-2:]
    # Without the flag a file holds a random identifier, and the same frames never give the same bytes.
    exact = {"fflags": "+bitexact"}
    with av.open(target, "w", format=container_name, options=exact) as container:
        stream: Any = container.add_stream(codec, rate=Fraction(fps).limit_denominator(1000), options=dict(options))
        stream.width, stream.height, stream.pix_fmt = width, height, pixels
        for frame in video.permute(0, 2, 3, 1).contiguous().cpu().numpy():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
