"""A comparison of video models: what is stored and scored, folders of videos, rewards on frames, and the report."""

from __future__ import annotations

import base64
import csv
import io
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import build_tiny_sd
from tiny_videos import GEOMETRY, build_tiny_wan

from mmalign.cli import main
from mmalign.compare.config import CompareConfig, make_compare_config
from mmalign.compare.images.made import as_system
from mmalign.compare.images.media import IMAGES, VIDEOS, ImageMedia
from mmalign.compare.images.store import ImageStore, Sampling
from mmalign.compare.report import clips as page_clips
from mmalign.compare.report.clips import QUALITIES, Clip, embed_clip, fit_clips
from mmalign.compare.report.gallery import _geometry
from mmalign.compare.report.thumbnails import Thumbnail
from mmalign.compare.run import compare
from mmalign.core.errors import UserError
from mmalign.core.io.decode import decode, decode_video
from mmalign.core.io.video_files import encode_video, write_video
from pipelines import PipelineError, VideoOptions, load_generator, sample

REWARDS = '''
from rewards import Reward, TwoTowerReward

class Brightness(TwoTowerReward):
    """Mean of all pixels of an image, which also embeds it."""
    name = "brightness"
    needs = frozenset()

    def score(self, media, prompts, references):
        return media.mean(dim=(1, 2, 3))

    def encode_media(self, media):
        return media.flatten(1)

    def encode_prompts(self, prompts):
        raise NotImplementedError

    def compare(self, cosine):
        return cosine

class Change(Reward):
    """Mean difference of the last and the first frame."""
    name = "change"
    modality = "video"

    def score(self, media, prompts, references):
        return (media[:, -1] - media[:, 0]).mean(dim=(1, 2, 3))
'''
MODULE = "tiny_video_rewards"
PROMPTS = ["a cat runs", "</script> a red ball"]


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with two tiny video models, prompts and a module of rewards."""
    folder = tmp_path_factory.mktemp("videos")
    build_tiny_wan(folder / "base")
    build_tiny_wan(folder / "tuned", seed=1)
    (folder / f"{MODULE}.py").write_text(REWARDS)
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    (folder / "validation.txt").write_text("a dog\n")
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))
    sys.modules.pop(MODULE, None)


def config_of(room: Path, output: Path, **changes: Any) -> CompareConfig:
    values: dict[str, Any] = {
        "systems": [{"name": "base", "model": str(room / "base")}, {"name": "tuned", "model": str(room / "tuned")}],
        "prompts": str(room / "prompts.txt"),
        "rewards": [f"{MODULE}:Change", {"name": f"{MODULE}:Brightness", "label": "light", "frames": 2}],
        "output": str(output),
        "seeds": [0, 5],
        "steps": 2,
        "guidance": 2.0,
        "video": GEOMETRY,
        "resamples": 200,
    }
    return make_compare_config(**{**values, **changes})


@pytest.fixture(scope="module")
def finished(room: Path) -> Path:
    control = {"guidances": [1.0, 2.0], "prompts": str(room / "validation.txt"), "rewards": ["light"]}
    diversity = {"name": f"{MODULE}:Brightness", "frames": 3}
    compare(config_of(room, room / "out", guidance_control=control, diversity=diversity))
    return room / "out"


def test_videos_are_stored_without_loss(room: Path, finished: Path) -> None:
    from mmalign.compare.images.store import noise_seed

    generator = load_generator(str(room / "tuned"), video=VideoOptions(**GEOMETRY))
    cond = generator.encode_prompts([PROMPTS[0]])
    with torch.no_grad():
        latents = sample(generator, cond, steps=2, guidance=2.0, seeds=[noise_seed(5, PROMPTS[0])]).latents
        expected = (generator.decode(latents)[0].clamp(0, 1) * 255).round()
    stored, rate = decode_video(finished / "videos" / "tuned" / "0000-5.mkv")
    assert stored.shape == (5, 3, 16, 16) and rate == 8
    assert torch.equal(stored.float(), expected)


def test_scores_are_those_of_the_stored_videos(finished: Path) -> None:
    rows = list(csv.DictReader((finished / "scores.csv").open(newline="")))
    systems = {row["system"] for row in rows}
    assert len(systems) == 3 and len(rows) == 3 * 3 * 2 * 2  # rewards and diversity x systems x prompts x seeds
    for row in rows:
        path = finished / "videos" / row["system"] / f"{int(row['index']):04d}-{row['seed']}.mkv"
        video = decode(path, "video").double().numpy() / 255
        if row["reward"] == f"{MODULE}:Change":
            assert float(row["score"]) == pytest.approx((video[-1] - video[0]).mean(), abs=1e-6)
        elif row["reward"] == "light":  # of five frames, the first and the last
            assert float(row["score"]) == pytest.approx(video[[0, 4]].mean(), abs=1e-6)


def test_diversity_compares_the_frames_of_the_seeds(finished: Path) -> None:
    rows = list(csv.DictReader((finished / "scores.csv").open(newline="")))
    found = next(float(row["score"]) for row in rows if (row["reward"], row["system"]) == ("diversity", "base"))
    embedded = []
    for seed in (0, 5):
        frames = decode(finished / "videos" / "base" / f"0000-{seed}.mkv", "video")[[0, 2, 4]].double().numpy()
        flat = frames.reshape(3, -1)
        embedded.append((flat / np.linalg.norm(flat, axis=1, keepdims=True)).mean(axis=0))
    cosine = embedded[0] @ embedded[1] / np.linalg.norm(embedded[0]) / np.linalg.norm(embedded[1])
    assert found == pytest.approx(1 - cosine, abs=1e-5)


def test_results_name_the_geometry_and_the_sweep(finished: Path) -> None:
    results = json.loads((finished / "results.json").read_text())
    assert results["settings"]["video"] == GEOMETRY
    assert results["guidance_control"]["points"][0]["guidance"] == 1.0
    assert (finished / "control" / "base@guidance=1" / "0000-0.mkv").is_file()
    assert results["rewards"]["light"]["summary"].endswith("Mean over 2 frames of each video.")


def test_a_second_run_draws_and_scores_nothing(room: Path, finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mmalign.compare.images import draw, scoring

    monkeypatch.setattr(draw.ModelHolder, "open", lambda *_: pytest.fail("loads a model"))
    monkeypatch.setattr(scoring.RewardScorer, "_score_new", lambda *_: pytest.fail("scores again"))
    before = (finished / "scores.csv").read_bytes()
    compare(config_of(room, finished))
    assert len((finished / "scores.csv").read_bytes()) < len(before)  # without control and diversity


def test_a_killed_run_keeps_every_video(tmp_path: Path) -> None:
    def store(media: ImageMedia) -> ImageStore:
        return ImageStore(tmp_path / media.modality, "model", Sampling(2, 1.0), ["a", "b"], [0, 1], media)

    for media in (VIDEOS, IMAGES):
        store(media).put(0, 1, b"made in minutes")  # nothing is saved at the end
    assert store(VIDEOS).missing() == {0: [0], 1: [0, 1]}
    assert store(IMAGES).missing() == {0: [0, 1], 1: [0, 1]}  # images are made in seconds


def test_the_note_on_geometry_stays_short() -> None:
    still = Thumbnail("", 1, 1, shrunk=False, pixelated=True)
    clips = [Clip("", still, frames, 8.0, 16, 16, shrunk=False) for frames in range(1, 101)]
    (note,) = _geometry(clips)
    assert "4 frames of 16 × 16 px at 8 a second; 96 other kinds." in note and len(note) < 400


def test_the_report_holds_a_playable_copy_and_a_strip_of_every_video(room: Path, tmp_path: Path) -> None:
    made = room / "out" / "videos"
    systems = [{"name": name, "videos": str(made / name)} for name in ("base", "tuned")]
    compare(config_of(room, tmp_path, systems=systems, video=None))
    page = (tmp_path / "report.html").read_text()
    sources = re.findall(r'<video [^>]*data-src="data:video/(\w+);base64,([^"]+)"', page)
    assert len(sources) == 2 * 2 * 2 and page.count('class="frames pixelated"') == len(sources)
    assert {kind for kind, _ in sources} <= {"mp4", "webm"}
    levels, rate = decode_video(base64.b64decode(sources[0][1]))
    assert levels.shape == (5, 3, 256, 256) and rate == 8  # enlarged, so that colours stay
    first = decode(made / "base" / "0000-0.mkv", "video").float()
    shrunk = torch.nn.functional.avg_pool2d(levels.float(), 16)
    assert (shrunk - first).abs().mean() < 4
    assert "Videos: 5 frames of 16 × 16 px at 8 a second. Shown are compressed copies" in page
    assert "4 videos per system" in page and "the better video of the same" in page and "media-src data:" in page
    assert "IntersectionObserver" in page and "images per system" not in page
    assert "http://" not in page.replace("http://www.w3.org", "") and "https://" not in page


def test_a_folder_that_generate_wrote_is_a_system(room: Path, tmp_path: Path) -> None:
    folder, geometry = tmp_path / "drawn", ["--frames", "5", "--height", "16", "--width", "16"]
    sampling = ["--prompts", str(room / "prompts.txt"), "--steps", "2", "--guidance", "2", *geometry]
    assert main(["generate", str(room / "tuned"), "--out", str(folder), "--seeds", "0,5", *sampling]) == 0
    assert as_system("drawn", str(folder)) == {"name": "drawn", "videos": str(folder)}
    command = ["compare", str(room / "base"), str(folder), "--seeds", "0,5", "--out", str(tmp_path / "out")]
    rewards = ["--rewards", f"{MODULE}:Change,{MODULE}:Brightness", "--reward-frames", "2"]
    assert main([*command, *rewards, *sampling]) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert set(results["systems"]) == {"base", "drawn"}
    assert results["rewards"][f"{MODULE}:Brightness"]["summary"].endswith("Mean over 2 frames of each video.")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rewards": [f"{MODULE}:Brightness"]}, "scores images, and the systems make videos; give it frames, such as"),
        ({"rewards": [{"name": f"{MODULE}:Change", "frames": 2}]}, "frames is for image rewards on videos"),
        ({"rewards": [f"{MODULE}:Change"], "diversity": f"{MODULE}:Change"}, "diversity: reward .* embeds no videos"),
        ({"video": {**GEOMETRY, "frames": 6}}, r"frames.*6"),
    ],
)
def test_what_does_not_fit_videos_is_refused(
    room: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises((UserError, PipelineError), match=message):
        compare(config_of(room, tmp_path, **changes))


def test_images_and_videos_are_compared_apart(room: Path, tmp_path: Path) -> None:
    build_tiny_sd(tmp_path / "sd", vae="tiny")
    systems = [{"name": "base", "model": str(room / "base")}, {"name": "still", "model": str(tmp_path / "sd")}]
    with pytest.raises(UserError, match="'still' makes images, and 'base' makes videos; compare them apart"):
        compare(config_of(room, tmp_path / "out", systems=systems))
    with pytest.raises(UserError, match="video: is for video models, and these systems make images"):
        two = [systems[1], {"name": "again", "model": str(tmp_path / "sd")}]
        compare(config_of(room, tmp_path / "out", systems=two, rewards=["jpeg-compressibility"]))


def test_a_damaged_video_is_named(room: Path, tmp_path: Path) -> None:
    for index in range(2):
        for seed in (0, 5):
            write_video(tmp_path / "made" / f"{index:04d}-{seed}.mp4", torch.zeros(5, 3, 16, 16, dtype=torch.uint8))
    (tmp_path / "made" / "0001-5.mp4").write_bytes(b"no video")
    systems = [{"name": "base", "model": str(room / "base")}, {"name": "made", "videos": str(tmp_path / "made")}]
    with pytest.raises(UserError, match=r"0001-5.mp4: cannot be read as a video"):
        compare(config_of(room, tmp_path / "out", systems=systems))


def _clip(size: int) -> Clip:
    return Clip("x" * size, Thumbnail("", 1, 1, False, False), 5, 8.0, 16, 16, False)


def test_the_page_stays_small_by_shrinking_and_then_by_leaving_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_clips, "MOST_BYTES", 1000)
    large, small, smallest = QUALITIES
    sizes = {large: 200, small: 50, smallest: 10}
    kept = fit_clips(20, 2, lambda index, quality: [_clip(sizes[quality])] * 2)
    assert len(kept) == 20 and all(clip.size == 10 for row in kept.values() for clip in row)
    kept = fit_clips(20, 1, lambda index, quality: [_clip(sizes[quality])])
    assert len(kept) == 20 and kept[0][0].size == 50
    kept = fit_clips(20, 1, lambda index, quality: [_clip(300)])
    assert list(kept) == [0, 10, 19]
    assert fit_clips(2, 1, lambda index, quality: [_clip(2000)]) == {}


def test_large_and_odd_videos_get_even_sides(tmp_path: Path) -> None:
    video = torch.rand(3, 3, 151, 301)
    (tmp_path / "a.mkv").write_bytes(encode_video(video, 12, lossless=True))
    clip = embed_clip(tmp_path / "a.mkv")
    assert (clip.frames, clip.rate, clip.width, clip.height, clip.shrunk) == (3, 12, 301, 151, True)
    levels, _ = decode_video(base64.b64decode(clip.uri.partition(",")[2]))
    assert levels.shape == (3, 3, 128, 256)
    assert io.BytesIO(base64.b64decode(clip.strip.uri.partition(",")[2])).read(2) == b"\xff\xd8"
