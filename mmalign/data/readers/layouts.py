"""Which columns of a table hold what: known by the names that published sets use, or told by `data.columns`.

Three kinds of rows. `Sides`: two images, of which one is preferred (Pick-a-Pic, Rapidata, HPDv3, `chosen` and
`rejected`). `Rated`: one image with a rank or a rating, compared with the others of its prompt (ImageRewardDB,
EvalMuse, RichHF-18K, VisionRewardDB). `Listed`: several images and a preference for each (HPDv2).

Videos are media as images are: VideoAlign's `path_A` and `path_B` are sides, VideoFeedback's videos are rated. Where
a set judges several axes, `data.axis` chooses one.

Names are found in any case, with spaces for underscores, and with the ending `_file_name` that image folders have.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mmalign.config.sections import ColumnsConfig, DataConfig
from mmalign.core.errors import UserError
from mmalign.core.io.columns import missing_columns

ID_COLUMNS = ("ranking_id", "pair_id", "uid", "id")
CATEGORY_COLUMNS = ("category", "categories", "classification", "tag", "type")
_PROMPTS = ("caption", "prompt", "text_prompt")
_IMAGE_LISTS = ("image_path", "images", "file_path")
_LABELS = (("label_0", "label_1"),)
_JUDGED = ("path_a", "path_b")
"""VideoAlign's videos; a column an axis says which is preferred."""
_SIDES: tuple[tuple[tuple[str, str], tuple[tuple[str, str], ...]], ...] = (
    (("jpg_0", "jpg_1"), _LABELS),  # Pick-a-Pic
    (("image_0", "image_1"), _LABELS),
    (
        ("image1", "image2"),  # Rapidata
        (
            ("weighted_results_image1_preference", "weighted_results_image2_preference"),
            ("weighted_results_image1", "weighted_results_image2"),
            ("votes_image1", "votes_image2"),
        ),
    ),
    (("path1", "path2"), ()),  # HPDv3, whose first image is the preferred one
    (_JUDGED, ()),
    (("chosen", "rejected"), ()),
)
"""Two images, and the labels that may say which is preferred; without labels the first is."""
VIDEO_AXES = (
    "visual quality",
    "temporal consistency",
    "dynamic degree",
    "text-to-video alignment",
    "factual consistency",
)
"""What VideoFeedback rates from 1 to 4."""
VIDEO_GAP = 1.0
"""Least difference of VideoFeedback's ratings (of their means, without an axis) that makes a preference."""
PREFERRED = {"a": (1.0, 0.0), "b": (0.0, 1.0), "same": (0.5, 0.5)}
"""VideoAlign's labels."""
_RATED: tuple[tuple[tuple[str, ...], str, float], ...] = (
    (("image", "image_path", "file_name"), "rank", -1.0),  # ImageRewardDB
    (("img_path",), "total_score", 1.0),  # EvalMuse: one rating for each annotator
    (("image", "image_path", "file_name", "filename"), "overall_score", 1.0),  # RichHF-18K, joined with its images
    (("image",), "annotation", 1.0),  # VisionRewardDB-Image: a rating for each dimension
)
"""The image, its rating, and the sign that makes more of it better."""
_FIX = "; set data.columns to say which hold the pair, such as {prompt: text, chosen: good_image, rejected: bad_image}"


@dataclass(frozen=True)
class Sides:
    """A row with two images; without `labels` the first is preferred."""

    prompt: str
    images: tuple[str, str]
    labels: tuple[str, str] | None
    scores: tuple[str, str] | None
    has_label: str | None
    id: str | None
    category: str | None
    axis: str | None = None
    """the column that says A, B or same"""
    fps: tuple[str, str] | None = None
    weight: str | None = None
    segments: str | None = None
    first_frame: str | None = None
    """the image that both videos start from, which is read with them"""

    @property
    def small(self) -> list[str]:
        """The columns besides the images."""
        named = *(self.labels or ()), *(self.scores or ()), self.has_label, self.id, self.category
        return _present(self.prompt, *named, self.axis, *(self.fps or ()), self.weight, self.segments)


@dataclass(frozen=True)
class Rated:
    """A row with one image; times `sign`, more of the mean of `ratings` is better, if they differ by `gap` or more."""

    prompt: str
    image: str
    ratings: tuple[str, ...]
    sign: float
    group: str | None
    category: str | None
    gap: float = 0.0
    first_frame: str | None = None

    @property
    def images(self) -> tuple[str]:
        """The column of the image."""
        return (self.image,)

    @property
    def small(self) -> list[str]:
        """The columns besides the image."""
        return _present(self.prompt, *self.ratings, self.group, self.category)


@dataclass(frozen=True)
class Listed:
    """A row with a list of images; times `sign`, more of the number in `ratings` is better."""

    prompt: str
    image_list: str
    ratings: str
    sign: float
    id: str | None
    category: str | None
    first_frame: str | None = None

    @property
    def images(self) -> tuple[str]:
        """The column of the images."""
        return (self.image_list,)

    @property
    def small(self) -> list[str]:
        """The columns besides the images, of which the number is needed too."""
        return _present(self.prompt, self.image_list, self.ratings, self.id, self.category)


Layout = Sides | Rated | Listed


def _present(*names: str | None) -> list[str]:
    return list(dict.fromkeys(name for name in names if name is not None))


class Names:
    """Columns as they are written, by the name in lower case, without spaces and `_file_name`."""

    def __init__(self, found: Sequence[str]) -> None:
        """Index the columns; one that is written exactly so comes first."""
        self.found = list(found)
        self._written: dict[str, str] = {name: name for name in found}
        for name in found:
            plain = name.strip().lower().replace(" ", "_")
            for known in (plain, plain.removesuffix("_file_name")):
                self._written.setdefault(known, name)

    def first(self, *names: str) -> str | None:
        """Return the first of these columns that is there, as it is written."""
        return next((self._written[name] for name in names if name in self._written), None)

    def both(self, pair: tuple[str, str]) -> tuple[str, str] | None:
        """Return two columns as they are written, None unless both are there."""
        first, second = (self._written.get(name) for name in pair)
        return None if first is None or second is None else (first, second)


def choose_layout(
    found: Sequence[str], config: DataConfig, source: str, sample: Mapping[str, Any] | None = None
) -> Layout:
    """Return the layout of a row; `sample` is one, where a list must be told from text.

    Raises:
        UserError: the columns are in no known layout (they are listed), or one that `data.columns` names is missing.
    """
    repeated = next((name for name in found if found.count(name) > 1), None)
    if repeated is not None:
        raise UserError(f"{source}: two columns are called '{repeated}'; rename one")
    names, told = Names(found), config.columns or ColumnsConfig()
    lacking = [name for name in told.model_dump().values() if name not in found]
    if lacking:
        raise missing_columns(f"{source}: data.columns", lacking, found)
    prompt = _prompt(names, told, config.caption_column, source)
    category, identifier = told.category or names.first(*CATEGORY_COLUMNS), told.id or names.first(*ID_COLUMNS)
    rated, first = _rated(names, told), names.first("first_frame")
    if rated is not None and (told.image or not _is_list((sample or {}).get(rated[0]))):
        image, rating, sign = rated
        group = told.group or names.first("prompt_id")
        return Rated(prompt, image, (rating,), sign, group, category, first_frame=first)
    video = None if told.image or told.chosen or told.image_0 else names.first("video_link")
    if video is not None and (axes := _video_axes(names, config.axis, source)):
        return Rated(prompt, video, axes, 1.0, told.group, category, VIDEO_GAP, first)
    images, preferences = names.first(*_IMAGE_LISTS), names.first("human_preference", "rank")
    sides = _sides(names, told, source)
    if sides is None and images is not None:
        if preferences is None:
            raise missing_columns(source, ["human_preference"], found, f" (or 'rank'){_FIX}")
        sign = -1.0 if preferences == names.first("rank") else 1.0
        return Listed(prompt, images, preferences, sign, identifier, category, first)
    if sides is None:
        raise missing_columns(source, _nearest(names), found, _FIX)
    scores = (told.score_0, told.score_1) if told.score_0 and told.score_1 else names.both(("score_0", "score_1"))
    judged = names.both(_JUDGED)
    rates = names.both(("fps_a", "fps_b")) if sides[0] == judged else names.both(("fps", "fps"))
    return Sides(
        prompt,
        *sides,
        scores,
        names.first("has_label"),
        identifier,
        category,
        axis=_axis(names, config.axis, source) if sides[0] == judged else None,
        fps=rates or names.both(("fps_chosen", "fps_rejected")),
        weight=names.first("weight"),
        segments=names.first("segments"),
        first_frame=_first_frame(names, sides[0]),
    )


def _first_frame(names: Names, sides: tuple[str, str]) -> str | None:
    found = names.first("first_frame", "image")
    return None if found in sides else found


def holds_pairs(found: Sequence[str], config: DataConfig) -> bool:
    """Tell whether a table with these columns is in a known layout of pairs."""
    try:
        choose_layout(found, config, "")
    except UserError:
        return False
    return True


def _prompt(names: Names, told: ColumnsConfig, asked: str, source: str) -> str:
    known = told.prompt or names.first(*(_PROMPTS if asked == "caption" else [asked]))
    if known is None:
        fix = "; data.caption_column or data.columns.prompt names the one that holds the prompt"
        raise missing_columns(source, [asked], names.found, fix)
    return known


def _rated(names: Names, told: ColumnsConfig) -> tuple[str, str, float] | None:
    """Return the image, its rating and the sign of rows with one image; None where there are two."""
    if told.image is not None:
        return told.image, str(told.rank or told.score), -1.0 if told.rank else 1.0
    if told.chosen or told.image_0 or any(names.both(images) for images, _ in _SIDES):
        return None
    for images, rating, sign in _RATED:
        image, written = names.first(*images), names.first(rating)
        if image is not None and written is not None and names.first("human_preference") is None:
            return image, written, sign
    return None


def _sides(names: Names, told: ColumnsConfig, source: str) -> tuple[tuple[str, str], tuple[str, str] | None] | None:
    """Return the two images of a row and their labels; None where it has not two."""
    labels = (told.label_0, told.label_1) if told.label_0 and told.label_1 else None
    if told.chosen and told.rejected:
        return (told.chosen, told.rejected), labels
    if told.image_0 and told.image_1:
        labels = labels or names.both(_LABELS[0])
        if labels is None:
            raise missing_columns(source, _LABELS[0], names.found, "; set data.columns.label_0 and label_1")
        return (told.image_0, told.image_1), labels
    for images, known in _SIDES:
        both = names.both(images)
        if both is None:
            continue
        chosen = labels or next((found for one in known if (found := names.both(one))), None)
        chosen = chosen or (_only_votes(names) if images == ("image1", "image2") else None)
        if chosen is None and known:
            continue
        return both, chosen
    return None


def _axis(names: Names, asked: str | None, source: str) -> str:
    """Return the column of VideoAlign's labels."""
    known = [name for name in names.found if name in ("VQ", "MQ", "TA", "Overall")]
    if asked is None:
        raise UserError(f"{source}: judges {', '.join(known)}; choose one by data.axis")
    if asked not in names.found:
        raise missing_columns(f"{source}: data.axis", [asked], known)
    return asked


def _video_axes(names: Names, asked: str | None, source: str) -> tuple[str, ...]:
    """Return the columns of VideoFeedback's ratings; none where it is another table."""
    known = [name for name in names.found if name.lower() in VIDEO_AXES]
    if known and asked is not None and asked not in known:
        raise missing_columns(f"{source}: data.axis", [asked], known)
    return tuple(known) if asked is None else tuple(name for name in known if name == asked)


def _only_votes(names: Names) -> tuple[str, str] | None:
    """Return Rapidata's votes on the only question that was asked, whatever it was."""
    start = "weighted_results_image1_"
    asked = [name.removeprefix(start) for name in names.found if name.startswith(start)]
    return names.both((start + asked[0], f"weighted_results_image2_{asked[0]}")) if len(asked) == 1 else None


def _nearest(names: Names) -> list[str]:
    """Return the columns that lack for the two images that are nearest to those found."""
    for images, labels in _SIDES:
        needed = [*images, *(labels[0] if labels else ())]
        if names.first(*needed):
            return [name for name in needed if names.first(name) is None]
    return ["chosen", "rejected"]


def _is_list(value: object) -> bool:
    return isinstance(value, list | tuple)
