"""Folders of video pairs in published layouts: VideoDPO's two JSON files, and RealDPO's aligned text files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmalign.core.errors import UserError, shorten
from mmalign.core.files import is_file, visible
from mmalign.core.io.decode import CONTAINER_SUFFIXES
from mmalign.core.io.tables import read_text
from mmalign.data.readers.listed import ListedPairs
from mmalign.data.readers.rows import locate
from mmalign.data.readers.source import number_of, weight_of

VIDEODPO = ("metadata.json", "pair.json")
REALDPO = ("prompt.txt", "video.txt")
REJECTED = "rejected.txt"
NO_SAMPLE = "without a rejected video"
NO_LINE = "without a prompt or a video"


def read_clip_folder(folder: Path) -> ListedPairs | None:
    """Return the pairs of a folder in one of the layouts, None where it is in neither."""
    if all(is_file(folder / name) for name in VIDEODPO):
        return read_videodpo(folder)
    if all(is_file(folder / name) for name in REALDPO):
        return read_realdpo(folder)
    return None


def read_videodpo(folder: Path) -> ListedPairs:
    """Return VideoDPO's pairs: `video1` (preferred) and `video2` of pair.json are places in metadata.json.

    A video is `basic.clip_path` there, with `basic.score` if it was scored; the prompt is the pair's `frame_caption`,
    else the first `misc.frame_caption` of the preferred video. A `weight` of a pair is its weight in the loss.

    Raises:
        UserError: a file is no such list, or a pair names a video that is not there.
    """
    videos, pairs = (_json_list(folder / name) for name in VIDEODPO)
    found = ListedPairs(str(folder))
    for number, pair in enumerate(pairs):
        where = f"{folder / VIDEODPO[1]}: pair {number}"
        try:
            sides = [videos[_place(pair[side], len(videos))] for side in ("video1", "video2")]
            paths = [locate(folder / VIDEODPO[0], str(side["basic"]["clip_path"])) for side in sides]
            captions = pair.get("frame_caption") or sides[0]["misc"]["frame_caption"]
            prompt = captions if isinstance(captions, str) else captions[0]
        except (KeyError, TypeError, IndexError, AttributeError):
            raise UserError(
                f"{where} is {shorten(repr(pair))}; give video1 and video2, numbers of entries of {VIDEODPO[0]} "
                f"(of {len(videos)}) that have basic.clip_path and misc.frame_caption"
            ) from None
        scores = [number_of(side["basic"].get("score"), f"{where}: score") for side in sides]
        weight = weight_of(pair.get("weight"), f"{where}: weight")
        found.add(str(prompt), str(number), (paths[0], paths[1]), (scores[0], scores[1]), weight)
    return found


def read_realdpo(folder: Path) -> ListedPairs:
    """Return RealDPO's pairs: line n of prompt.txt belongs to line n of video.txt, a real clip, which is preferred.

    The rejected videos are line n of rejected.txt, or the files 0.mp4, 1.mp4, ... in FOLDER/NAME, NAME being that of
    the real clip without its suffix; each of them makes a pair. A clip without any, and a line that is empty in one
    file, is counted.

    Raises:
        UserError: the files differ in length.
    """
    prompts, videos = (_lines(folder / name) for name in REALDPO)
    rejected = _lines(folder / REJECTED) if is_file(folder / REJECTED) else None
    lengths = {REALDPO[0]: len(prompts), REALDPO[1]: len(videos)}
    lengths |= {} if rejected is None else {REJECTED: len(rejected)}
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"{name} has {count} lines" for name, count in lengths.items())
        raise UserError(f"{folder}: {listed}; each line of one belongs to the same line of the others")
    found = ListedPairs(str(folder))
    for number, (prompt, video) in enumerate(zip(prompts, videos, strict=True)):
        if not prompt or not video:
            found.leave_out(NO_LINE)
            continue
        real = folder / video
        told = None if rejected is None else [folder / rejected[number]] * bool(rejected[number])
        samples = _samples(folder, real.stem) if told is None else told
        for place, sample in enumerate(samples):
            found.add(prompt, f"{number}" if len(samples) == 1 else f"{number}-{place}", (real, sample))
        if not samples:
            found.leave_out(NO_SAMPLE)
    return found


def _samples(folder: Path, stem: str) -> list[Path]:
    """Return the model's own videos for a real clip."""
    places = [place / stem for place in visible(folder) if (place / stem).is_dir()]
    return [path for place in places for path in visible(place) if path.suffix.lower() in CONTAINER_SUFFIXES]


def _place(value: Any, count: int) -> int:
    place = int(value)
    if not 0 <= place < count:
        raise IndexError
    return place


def _lines(path: Path) -> list[str]:
    """Return the lines without those at the end that are empty; one between others keeps its place."""
    return [line.strip() for line in read_text(path).rstrip().split("\n")]


def _json_list(path: Path) -> Sequence[Mapping[str, Any]]:
    try:
        loaded = json.loads(read_text(path))
    except ValueError as error:
        raise UserError(f"{path}: is not JSON ({error})") from None
    if not isinstance(loaded, list) or not all(isinstance(one, Mapping) for one in loaded):
        raise UserError(f"{path}: is a {type(loaded).__name__}; expected a list of objects")
    return loaded
