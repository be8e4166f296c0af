"""Positions on three axes: tables worked by hand, and the models' own where these are right."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import tiny_vlms
import torch
from torch import Tensor

from pipelines.vlm.families import FAMILIES
from pipelines.vlm.load import load_vlm
from pipelines.vlm.model import VisionLanguageModel
from pipelines.vlm.positions import Grid, grid_positions

GRIDS = ("image_grid_thw", "video_grid_thw", "second_per_grid_ts")
QWEN = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")


@pytest.fixture(scope="module", params=QWEN)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> VisionLanguageModel:
    folder = tiny_vlms.BUILDERS[request.param](tmp_path_factory.mktemp("vlm") / request.param)
    return load_vlm(folder, device="cpu")


def video(frames: int, height: int = 16, width: int = 16) -> Tensor:
    return torch.rand(frames, 3, height, width, generator=torch.Generator().manual_seed(frames))


def positions(types: list[int], **grids: list[Grid]) -> list[list[int]]:
    return grid_positions(torch.tensor(types, dtype=torch.long), **grids).tolist()


def test_text_counts_on_all_axes() -> None:
    assert positions([0, 0, 0]) == [[0, 1, 2]] * 3
    assert positions([]) == [[], [], []]


def test_a_wide_image_ends_at_its_last_column() -> None:
    # One row of three columns after one word: the next word comes after the largest position, 1 + 2.
    assert positions([0, 1, 1, 1, 0], images=[Grid((0,), 1, 3)]) == [
        [0, 1, 1, 1, 4],
        [0, 1, 1, 1, 4],
        [0, 1, 2, 3, 4],
    ]


def test_a_long_video_ends_at_its_last_frame() -> None:
    # Four frames of 1 x 2: time goes to 2 + 3, so the text goes on at 6; start + max(height, width) would be 4.
    assert positions([0, 0, *[2] * 8, 0, 0], videos=[Grid((0, 1, 2, 3), 1, 2)]) == [
        [0, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 7],
        [0, 1, 2, 2, 2, 2, 2, 2, 2, 2, 6, 7],
        [0, 1, 2, 3, 2, 3, 2, 3, 2, 3, 6, 7],
    ]


def test_media_side_by_side_and_of_both_kinds_keep_their_order() -> None:
    # Two videos without text between them, then an image: 0..1, 2..3, and 4..5.
    types, videos = [2, 2, 2, 0, 1, 1], [Grid((0, 1), 1, 1), Grid((0,), 1, 1)]
    assert positions(types, videos=videos, images=[Grid((0,), 2, 1)]) == [
        [0, 1, 2, 3, 4, 4],
        [0, 0, 2, 3, 4, 5],
        [0, 0, 2, 3, 4, 4],
    ]


def vision_config(**changes: Any) -> Any:
    return SimpleNamespace(vision_config=SimpleNamespace(spatial_merge_size=2, **changes))


@pytest.mark.parametrize(
    ("seconds", "times"),
    [
        (1.0, (0, 2, 4, 6)),
        (0.5, (0, 1, 2, 3)),  # transformers up to 5.16.1 cuts seconds to whole ones first: all at 0
        (0.75, (0, 1, 3, 4)),  # 0, 1.5, 3, 4.5: rounded down after the product, not before
        (5 / 3, (0, 3, 6, 10)),  # exactly 10 in single precision, in which the times are computed
    ],
)
def test_frames_of_qwen2_5_stand_at_their_times(seconds: float, times: tuple[int, ...]) -> None:
    grids, config = FAMILIES["qwen2_5_vl"].grids, vision_config(tokens_per_second=2)
    assert grids is not None
    vision = {"video_grid_thw": torch.tensor([[4, 4, 6]]), "second_per_grid_ts": torch.tensor([seconds])}
    assert grids(vision, config) == ([], [Grid(times, 2, 3)])
    image = {"image_grid_thw": torch.tensor([[1, 4, 6]])}
    assert grids(image, config) == ([Grid((0,), 2, 3)], [])


def test_frames_of_qwen3_are_grids_of_their_own() -> None:
    grids = FAMILIES["qwen3_vl"].grids
    assert grids is not None
    vision = {"video_grid_thw": torch.tensor([[2, 4, 6], [1, 2, 2]])}
    assert grids(vision, vision_config()) == ([], [Grid((0,), 2, 3)] * 2 + [Grid((0,), 1, 1)])


def test_short_media_stand_where_the_model_itself_puts_them(model: VisionLanguageModel) -> None:
    image = video(1, 24, 40)[0]
    # Two frames a grid and half a second a frame: the time of a grid's end is within its width.
    media = [[video(4, 32, 48)], [image], [image, video(4, 32, 24)], []]
    batch = model.encode(["what?"] * 4, media, ["a", "b", "cd", "e"], fps=4.0, padding_side="left")
    placed = model._positions(batch)
    for row, read in enumerate(batch.attention_mask.bool()):
        one = model._inputs(batch.select([row]))
        given = {name: one.get(name) for name in GRIDS}
        own, _ = model.network.model.get_rope_index(
            one["input_ids"], mm_token_type_ids=one["mm_token_type_ids"], attention_mask=one["attention_mask"], **given
        )
        assert torch.equal(placed[:, row, read], own[:, 0, read])


@torch.no_grad()
def test_positions_of_long_videos_reach_the_network_and_generation(model: VisionLanguageModel) -> None:
    media = [[video(12)], [video(4)]]
    batch = model.encode(["what?"] * 2, media, ["a", "b"], fps=2.0)
    seen: list[Tensor] = []
    language = model.network.get_submodule(model.family.language)
    hook = language.register_forward_pre_hook(
        lambda _, args, given: seen.append(given["position_ids"]), with_kwargs=True
    )
    model.log_probs(batch)
    model.generate(["what?"] * 2, media, max_new_tokens=2, fps=2.0)
    hook.remove()
    scored, first, second = seen
    assert torch.equal(scored, model._positions(batch))
    # The long one is not padded: its prompt is placed as before, and its answer follows.
    prompt = int((~batch.completion_mask & batch.attention_mask.bool())[0].sum())
    assert torch.equal(first[-3:, 0], scored[:, 0, :prompt])
    assert torch.equal(second[-3:, 0, 0], scored[:, 0, prompt])
    if model.network.config.model_type != "qwen3_vl":  # six grids of 2 x 2 after three words or so: time is largest
        assert int(scored[0, 0, prompt - 1]) > int(scored[1, 0][model.token_types(batch.input_ids)[0] == 2].max()) + 3
