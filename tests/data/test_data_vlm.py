"""Pairs of answers on disk, what they become, and questions with their videos."""

from __future__ import annotations

import argparse
import inspect
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from tiny_runs import write_answer_pairs
from tiny_vlms import build_llava_onevision, build_qwen3_vl

from mmalign.cli import pairs as pairs_command
from mmalign.config.sections import DataConfig
from mmalign.core.errors import UserError
from mmalign.core.io.decode import Frames, decode_video
from mmalign.core.io.images import encode_png
from mmalign.core.io.tables import TABLE_SUFFIXES
from mmalign.core.io.video_files import write_video
from mmalign.data.encoded import vlm_samples
from mmalign.data.encoded.vlm_samples import VlmPairs, read_media
from mmalign.data.video.items import load_video_questions, read_video_items
from mmalign.data.vlm_pairs import read_vlm_pairs
from pipelines import VisionLanguageModel, load_vlm


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> VisionLanguageModel:
    return load_vlm(build_llava_onevision(tmp_path_factory.mktemp("models") / "vlm"), device="cpu")


def pairs_of(path: Path, model: VisionLanguageModel, limit: int = 2**30, **changes: Any) -> VlmPairs:
    data = DataConfig(pairs=str(path), cache=str(path.parent / "cache"), **changes)
    table = read_vlm_pairs(str(path), data)
    return VlmPairs(table, model, data, model_id="m", precision="fp32", memory_limit=limit)


def test_pairs_are_encoded_as_the_model_encodes_them(model: VisionLanguageModel, tmp_path: Path) -> None:
    path = write_answer_pairs(tmp_path, 3, own_media=True, margin=[1.0, None, 2.5], aspect=["speed", "order", None])
    pairs = pairs_of(path, model)
    batch = pairs.batch([2, 0], 4, 0)
    assert batch.ids == ["pair-2", "pair-0"] and batch.epoch == 4 and batch.prompts[1] == "what moves in 0?"
    assert batch.aspects == [None, "speed"]
    assert batch.margins is not None and batch.margins.tolist() == [2.5, 1.0]
    shown, rate = decode_video(tmp_path / "2-other.mkv")
    assert rate == 4.0
    expected = model.complete(model.encode_prompt("what moves in 2?", [shown], fps=4.0), "a green one")
    assert torch.equal(batch.rejected[0].completion_ids, expected.completion_ids)
    assert torch.equal(batch.rejected[0].vision["pixel_values_videos"], expected.vision["pixel_values_videos"])
    assert torch.equal(batch.media[0]().media[0], decode_video(tmp_path / "2.mkv")[0])
    assert batch.media[0]().fps == 4.0


def test_nothing_is_decoded_twice_while_there_is_room(model: VisionLanguageModel, tmp_path: Path) -> None:
    path = write_answer_pairs(tmp_path, 2)
    roomy, tight = pairs_of(path, model), pairs_of(path, model, limit=0)
    first = [pairs.batch([0], 0, 0).chosen[0] for pairs in (roomy, tight)]
    roomy.media(0)
    (tmp_path / "0.mkv").write_bytes(b"no video")
    assert roomy.batch([0], 1, 0).chosen[0] is first[0]
    assert roomy.media(0).media[0].shape == (4, 3, 16, 16)
    with pytest.raises(UserError, match=r"answers.jsonl: row 0, pair 'pair-0': unreadable video in .*0.mkv \("):
        tight.batch([0], 1, 0)


def test_pairs_about_one_video_decode_it_once(
    model: VisionLanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_answer_pairs(tmp_path, 3)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    shared = [{**row, "video": "0.mkv"} for row in rows[:2]] + [{**rows[2], "rejected_video": "0.mkv"}]
    path.write_text("\n".join(map(json.dumps, shared)))
    decoded: list[str] = []

    def counted(file: Any, *options: Any) -> Any:
        decoded.append(file.name)
        return decode_video(file, *options)

    monkeypatch.setattr(vlm_samples, "decode_video", counted)
    batch = pairs_of(path, model).batch([0, 1, 2], 0, 0)
    assert [one().media[0].shape for one in batch.media] == [(4, 3, 16, 16)] * 3
    assert decoded == ["0.mkv", "2.mkv"]


def test_a_rate_does_not_tell_the_rejected_side(tmp_path: Path) -> None:
    # What `pairs perturb --frames 4` writes about a video of 24 frames a second: its file, and 4 frames in another.
    qwen = load_vlm(build_qwen3_vl(tmp_path / "qwen"), device="cpu")
    write_video(tmp_path / "long.mkv", torch.zeros(24, 3, 16, 16, dtype=torch.uint8), 24.0)
    taken, rate = decode_video(tmp_path / "long.mkv", Frames(count=4))
    assert rate == pytest.approx(24 * 3 / 23)
    write_video(tmp_path / "short.mkv", taken, rate or 1.0)
    row = {"prompt": "what?", "chosen": "red", "rejected": "red", "video": "long.mkv", "rejected_video": "short.mkv",
           "fps": 24.0}  # fmt: skip
    for more in ({}, {"rejected_fps": rate}):
        (tmp_path / "pairs.jsonl").write_text(json.dumps({**row, **more}))
        batch = pairs_of(tmp_path / "pairs.jsonl", qwen, frames=4).batch([0], 0, 0)
        assert torch.equal(batch.chosen[0].prompt_ids, batch.rejected[0].prompt_ids)  # the times are in the text
    # Where the rate decides which frames are taken, each side has its own.
    seen = pairs_of(tmp_path / "pairs.jsonl", qwen, fps=2.0).batch([0], 0, 0)
    assert [int(one.vision["video_grid_thw"][0, 0]) for one in (seen.chosen[0], seen.rejected[0])] == [1, 1]


def test_bad_rows_are_named_or_left_out(
    model: VisionLanguageModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_answer_pairs(tmp_path, 7)
    (tmp_path / "1.mkv").write_bytes(b"no video")
    (tmp_path / "2.mkv").unlink()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[4] |= {"chosen": ""}
    rows[5] |= {"prompt": "<image> and <video>?"}
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(UserError, match=r"row 4 has no text in column 'chosen' .*; data.on_bad=skip leaves such rows"):
        pairs_of(path, model)
    pairs = pairs_of(path, model, on_bad="skip")
    assert pairs.table.counts == "5 pairs of answers, 2 bad" and pairs.ids == [f"pair-{n}" for n in (0, 1, 3, 5, 6)]
    batch = pairs.batch([0, 1, 3], 0, 0)
    assert batch.ids == ["pair-0", "pair-3", "pair-6"] and batch.prompts[1] == "what moves in 3?"
    assert [len(one().media) for one in batch.media] == [1, 1, 1]
    assert pairs.batch([1], 1, 0).ids == ["pair-3"] and pairs.table.counts == "5 pairs of answers, 4 bad"
    said = capsys.readouterr().err
    for message in (
        "row 2, video: .*2.mkv does not exist",
        "row 1, pair 'pair-1': unreadable video in .*1.mkv",
        "row 5, pair 'pair-5': the text has 1 <image> and 1 <video>, but the sample has 0 images and 1 v",
    ):
        assert len(re.findall(f"left out: .*answers.jsonl: {message}", said)) == 1
    sums = pairs.reference_sums(lambda batch: torch.ones(len(batch), 2), 2, [""] * 5)
    assert sums[:, 0].isnan().tolist() == [False, True, False, True, False]
    for name in ("0.mkv", "3.mkv", "6.mkv"):
        (tmp_path / name).write_bytes(b"no video")
    with pytest.raises(UserError, match="none of the 5 pairs can be used"):
        pairs_of(path, model, on_bad="skip").batch([0], 0, 0)


def test_too_long_a_sample_is_named_before_it_is_trained_on(model: VisionLanguageModel, tmp_path: Path) -> None:
    path = write_answer_pairs(tmp_path, 1, chosen=["word " * 10_000])
    with pytest.raises(UserError, match=r"row 0, pair 'pair-0': a sample has .* nothing is cut"):
        pairs_of(path, model).batch([0], 0, 0)


def test_csv_tables_hold_pairs_too(model: VisionLanguageModel, tmp_path: Path) -> None:
    write_answer_pairs(tmp_path, 2)
    lines = ["prompt,chosen,rejected,video,rejected_video,fps,aspect", "what?,red,blue,0.mkv,,,",
             "what?,red,red,0.mkv,1.mkv,8,speed"]  # fmt: skip
    (tmp_path / "pairs.csv").write_text("\n".join(lines))
    pairs = pairs_of(tmp_path / "pairs.csv", model)
    assert pairs.table.own_media == [False, True] and pairs.table.aspects == [None, "speed"]
    assert [pairs.table[index].fps for index in (0, 1)] == [None, 8.0] and len(pairs.batch([0, 1], 0, 0)) == 2


def test_references_are_kept_for_one_release_of_transformers(
    model: VisionLanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, calls = write_answer_pairs(tmp_path, 2), []

    def sums() -> None:
        pairs = pairs_of(path, model)
        pairs.reference_sums(lambda batch: (calls.append(batch.ids), torch.ones(len(batch), 2))[1], 2, [""] * 2)

    sums()
    sums()
    assert len(calls) == 1
    monkeypatch.setattr(vlm_samples, "version", lambda name: "5.99.0")
    sums()
    assert len(calls) == 2


def test_the_data_are_known_by_content(model: VisionLanguageModel, tmp_path: Path) -> None:
    path = write_answer_pairs(tmp_path / "one", 3)
    found = pairs_of(path, model).data_id
    moved = shutil.copytree(tmp_path / "one", tmp_path / "two")
    shutil.rmtree(tmp_path / "one")
    assert pairs_of(moved / "answers.jsonl", model).data_id == found
    shutil.copy(moved / "1.mkv", moved / "2.mkv")
    assert pairs_of(moved / "answers.jsonl", model).data_id != found


def test_parquet_holds_media_inside_or_beside(model: VisionLanguageModel, tmp_path: Path) -> None:
    image = encode_png(torch.rand(3, 16, 16))
    rows = [
        {"prompt": "what?", "chosen": "red", "rejected": "blue", "images": [{"bytes": image, "path": None}] * 2,
         "rejected_image": None},
        {"prompt": "what?", "chosen": "red", "rejected": "red", "images": [{"bytes": image, "path": None}],
         "rejected_image": {"bytes": encode_png(torch.zeros(3, 16, 16)), "path": None}},
    ]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "inside.parquet")
    batch = pairs_of(tmp_path / "inside.parquet", model).batch([0, 1], 0, 0)
    assert [len(one().media) for one in batch.media] == [2, 1] and batch.ids == ["0", "1"]
    assert float(batch.rejected[1].vision["pixel_values"].max()) < float(batch.chosen[1].vision["pixel_values"].max())

    (tmp_path / "frames").mkdir()
    for index in range(6):
        Image.new("RGB", (16, 16), (40 * index,) * 3).save(tmp_path / "frames" / f"{index}.png")
    row = {"caption": "what?", "chosen": "red", "rejected": "blue", "video": "frames", "fps": 3.0, "id": "x"}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "beside.parquet")
    found = pairs_of(tmp_path / "beside.parquet", model, frames=3).media(0)
    # Three of six frames at 3 a second, the first and the last among them: 2.5 frames apart, 1.2 a second.
    assert found.media[0][:, 0, 0, 0].tolist() == [0, 80, 200] and found.fps == pytest.approx(3 * 2 / 5)


def test_rates_are_those_of_the_frames_taken(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mkv", torch.zeros(9, 3, 16, 16, dtype=torch.uint8), 4.0)
    assert decode_video(tmp_path / "a.mkv")[1] == 4.0
    assert decode_video(tmp_path / "a.mkv", Frames(fps=2.0))[1] == pytest.approx(2.0)
    assert decode_video(tmp_path / "a.mkv", Frames(count=3), rate=8.0)[1] == pytest.approx(2.0)
    assert read_media([tmp_path / "a.mkv"], "video", Frames(count=1), None, "x").fps == 4.0


class Counted:
    """A container whose decoded frames are counted; `hidden` packets more are found in it."""

    def __init__(self, container: Any, hidden: int) -> None:
        self.container, self.hidden, self.decoded = container, hidden, 0

    def __enter__(self) -> Counted:
        return self

    def __exit__(self, *error: object) -> None:
        self.container.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.container, name)

    def demux(self, stream: Any) -> Iterator[Any]:
        packets = list(self.container.demux(stream))
        return iter([*packets, *packets[: self.hidden]])

    def decode(self, stream: Any) -> Iterator[Any]:
        for frame in self.container.decode(stream):
            self.decoded += 1
            yield frame


@pytest.mark.parametrize(("hidden", "decoded"), [(0, 9), (2, 18)])
@pytest.mark.parametrize("suffix", ["mkv", "mp4"])
def test_frames_are_thinned_out_in_one_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, hidden: int, decoded: int
) -> None:
    path, levels = tmp_path / f"a.{suffix}", torch.arange(9, dtype=torch.uint8) * 25
    write_video(path, levels[:, None, None, None].expand(9, 3, 16, 16).contiguous(), 4.0)
    opened: list[Counted] = []
    real = av.open
    monkeypatch.setattr(
        av, "open", lambda *args, **how: opened.append(Counted(real(*args, **how), hidden)) or opened[-1]
    )
    for frames, wanted, rate in ((Frames(count=3), [0, 4, 8], 1.0), (Frames(fps=2.0), [0, 2, 4, 6, 8], 2.0)):
        video, found = decode_video(path, frames)
        assert [round(int(level) / 25) for level in video[:, 0, 0, 0]] == wanted and found == pytest.approx(rate)
        assert opened[-1].decoded == decoded


FINE = {"prompt": "what?", "chosen": "red", "rejected": "blue", "video": "0.mkv"}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{**FINE, "chosen": " "}], "row 0 has no text in column 'chosen' (' ')"),
        ([{"prompt": "what?", "chosen": "red", "video": "0.mkv"}], "no column 'rejected'; found 'prompt'"),
        ([{"prompt": "what?", "chosen": "red", "rejected": "blue"}], "no column 'video'"),
        ([{**FINE, "rejected": "red "}], "row 0: chosen and rejected are the same answer about the same media"),
        ([{**FINE, "video": "gone.mkv"}], "gone.mkv does not exist"),
        ([FINE, {**FINE, "video": None}], "row 1 has no media"),
        ([{**FINE, "image": "0.png"}], "row 0 has video and image; give one of"),
        ([{**FINE, "rejected_image": "0.mkv"}], "row 0 has video and rejected_image"),
        ([{**FINE, "id": "a"}, {**FINE, "id": "a"}], "id 'a' occurs more than once"),
        ([{**FINE, "fps": 0}], "fps 0; the rate must be above 0"),
        ([{**FINE, "difficulty": 1.5}], "difficulty 1.5; give a whole number"),
        ([{**FINE, "margin": "much"}], "margin is 'much'; give a number"),
    ],
)
def test_rows_that_are_no_pairs(tmp_path: Path, rows: list[dict[str, Any]], message: str) -> None:
    write_video(tmp_path / "0.mkv", torch.zeros(2, 3, 16, 16, dtype=torch.uint8))
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(UserError) as error:
        read_vlm_pairs(str(tmp_path / "pairs.jsonl"), DataConfig(pairs="x"))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_margins_and_difficulties_choose_pairs(tmp_path: Path) -> None:
    path = write_answer_pairs(tmp_path, 4, margin=[0.1, 2.0, 0.3, 4.0], difficulty=[16, 8, 8, 2])
    assert read_vlm_pairs(str(path), DataConfig(min_margin=0.2), difficulties=[8, 16]).ids == ["pair-1", "pair-2"]
    assert str(read_vlm_pairs(str(path), DataConfig(limit=3)).counts) == "3 pairs of answers, 1 left out"
    with pytest.raises(UserError, match="no pair is left of 4"):
        read_vlm_pairs(str(path), DataConfig(), difficulties=[32])
    with pytest.raises(UserError, match="give a .csv or .jsonl or .parquet or .tsv file"):
        read_vlm_pairs(str(tmp_path), DataConfig())


def test_tempcompass_with_its_videos(tmp_path: Path) -> None:
    (tmp_path / "questions").mkdir()
    (tmp_path / "videos").mkdir()
    questions = {"clip1": {"speed": [{"question": "Fast or slow?\nA. fast\nB. slow", "answer": "A. fast"}]}}
    (tmp_path / "questions" / "multi-choice.json").write_text(json.dumps(questions))
    with pytest.raises(UserError, match="1 questions are about videos that are not there, clip1 first"):
        load_video_questions(str(tmp_path))
    write_video(tmp_path / "videos" / "clip1.mp4", torch.zeros(2, 3, 16, 16, dtype=torch.uint8))
    (item,) = load_video_questions(str(tmp_path))
    assert item.question.aspect == "speed" and item.file == tmp_path / "videos" / "clip1.mp4"
    with pytest.raises(UserError, match="no question in the formats yes_no"):
        load_video_questions(str(tmp_path), ["yes_no"])
    with pytest.raises(UserError, match="no questions about videos; give a folder that `mmalign shapes videos"):
        load_video_questions(str(tmp_path / "videos"))


def test_help_promises_the_formats_that_are_read(model: VisionLanguageModel, tmp_path: Path) -> None:
    parser = argparse.ArgumentParser(prog="mmalign pairs")
    pairs_command.add_arguments(parser)
    (perturb,) = [action.choices["perturb"] for action in parser._actions if isinstance(action.choices, dict)]
    fields = inspect.getsource(DataConfig).partition("pairs: str")[2].partition("prompts: str")[0]
    for text in (" ".join(perturb.format_help().split()), " ".join(fields.split())):
        (promised,) = re.findall(r"an? (CSV, [\w, ]+ or \w+) file", text)
        assert {f".{name.lower()}" for name in re.split(r", | or ", promised)} == TABLE_SUFFIXES

    write_answer_pairs(tmp_path, 1)
    row = {"prompt": "what?", "chosen": "red", "rejected": "blue", "video": "0.mkv"}
    for suffix in TABLE_SUFFIXES:
        path, mark = tmp_path / f"pairs{suffix}", "\t" if suffix == ".tsv" else ","
        if suffix == ".parquet":
            pq.write_table(pa.Table.from_pylist([row]), path)
        elif suffix == ".jsonl":
            path.write_text(json.dumps(row))
        else:
            path.write_text("\n".join(mark.join(one) for one in (row, row.values())))
        assert len(pairs_of(path, model).batch([0], 0, 0)) == 1
        assert read_video_items(str(path), questions=True)[0].prompt == "what?"
