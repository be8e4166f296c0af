"""Pairs of answers from perturbed videos: events, fates of answers, filters, and what is written and read back."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from tiny_vlms import build_llava_onevision, build_qwen3_vl

from mmalign.cli import main
from mmalign.compare.vlm.results import families
from mmalign.config.sections import DataConfig
from mmalign.core.errors import UserError
from mmalign.core.io.decode import ALL_FRAMES, Frames, decode
from mmalign.core.io.video_files import write_video
from mmalign.core.seeds import derive_seed
from mmalign.data.video.answering import Answerer, Decoding, Request
from mmalign.data.video.events import clip_lengths, clips, shot_states
from mmalign.data.video.items import QuestionItem, VideoItem, is_video_source, load_video_questions, read_video_items
from mmalign.data.video.operators import Effect
from mmalign.data.video.pairs import REASONS, VideoPairSettings, mirrored, refuse, write_video_pairs
from mmalign.data.video.perturbations import Perturbation, parse_perturbations
from mmalign.data.video.reading import VideoReader
from mmalign.data.vlm_pairs import read_vlm_pairs
from mmalign.shapes.question_set import SceneTruth, scene_states
from mmalign.shapes.questions import ShapesQuestion
from mmalign.shapes.tracking import follow
from mmalign.shapes.video import Actor, VideoScene, unroll
from mmalign.shapes.video_set import read_questions, write_video_set
from pipelines import load_vlm

REVERSE = Perturbation(("reverse",))


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    write_video_set(folder, 26, seed=3, size=32)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return build_llava_onevision(tmp_path_factory.mktemp("model"))


class Oracle:
    """A model that always answers what the pixels show: no trained one of test size does."""

    def __init__(self, folder: Path) -> None:
        self.questions = {question.prompt: question for question in read_questions(folder)}

    def generate(self, prompts: Sequence[str], media: Sequence[Sequence[torch.Tensor]], **options: Any) -> list[str]:
        shown = zip(prompts, media, strict=True)
        return [self.questions[prompt].answer_of(follow(video), 32) or "unclear" for prompt, (video,) in shown]


def settings(*names: str, difficulties: Sequence[int] = (8, 2), **options: Any) -> VideoPairSettings:
    return VideoPairSettings(tuple(parse_perturbations(names, difficulties)), **options)


def rows(path: Path) -> list[dict[str, Any]]:
    return pq.read_table(path).to_pylist()


def test_shots_are_told_apart_and_known_again() -> None:
    levels = torch.tensor([0, 10, 0, 255, 250, 5], dtype=torch.uint8)
    video = levels[:, None, None, None].expand(6, 3, 20, 24).contiguous()
    states = shot_states(video)
    assert states == [0, 0, 0, 1, 1, 0]
    assert clip_lengths(states) == [3, 2, 1]
    assert [int(clip[0, 0, 0, 0]) for clip in clips(video, states)] == [0, 255, 5]
    assert shot_states(video[:1]) == [0]


def test_states_of_a_scene_graph() -> None:
    bouncing = Actor("circle", "red", 5.0, 16.0, 16.0, "right", 2.0, "bounces")
    late = Actor("square", "blue", 5.0, 4.0, 4.0, shown=((6, 8),), end_radius=7.0)
    scene = VideoScene((bouncing, late), "white", 8, 32)
    states = scene_states(unroll(scene), 32)
    right, still, left = (("red", sign, 0, 0) for sign in (1, 0, -1))  # 0 1 2 3 3 2 1 0 steps to the right
    grows = ("blue", 0, 0, 1)
    assert states == [*[(right, None)] * 3, (still, None), *[(left, None)] * 2, *[(left, grows)] * 2]
    assert clip_lengths(states) == [3, 1, 2, 2]


def items_of(folder: Path, aspect: str, format_: str) -> list[QuestionItem]:
    return [one for one in load_video_questions(str(folder), [format_]) if one.aspect == aspect]


def test_the_scene_graph_decides_what_a_perturbation_leaves_true(videos: Path) -> None:
    for item in items_of(videos, "direction", "multi-choice"):
        still = "not move" in item.question.answer
        assert REVERSE.fate(item, 8, 0) is (Effect.KEEPS if still else Effect.CHANGES)
        # Without all frames the label map speaks, which says the same of the true direction.
        assert REVERSE.fate(item, 4, 0) is (Effect.KEEPS if still else Effect.CHANGES)
        sideways = any(word in item.question.answer for word in ("left", "right"))
        assert Perturbation(("flip",)).fate(item, 8, 0) is (Effect.CHANGES if sideways else Effect.KEEPS)
        assert Perturbation(("flip", "reverse")).fate(item, 8, 0) is not (Effect.CHANGES if sideways else Effect.KEEPS)
    for item in items_of(videos, "colour", "yes_no"):
        assert REVERSE.fate(item, 8, 0) is Effect.KEEPS
        # Another colour may be denied as rightly as the one asked for.
        assert Perturbation(("hue",)).fate(item, 8, 0) is (Effect.CHANGES if item.answer == "yes" else Effect.DEPENDS)
    shuffled = Perturbation(("block_shuffle",), 8)
    for item in items_of(videos, "direction", "yes_no"):
        if item.answer == "yes" and "not move" not in item.prompt and "stand" not in item.prompt:
            assert shuffled.fate(item, 8, 1) is Effect.CHANGES  # a shuffled path has no direction


def test_label_maps_of_whole_aspects_where_there_is_no_scene_graph() -> None:
    item = VideoItem("a", Path("a.mp4"), "?", aspect="order")
    assert REVERSE.fate(item, None, 0) is Effect.CHANGES
    assert REVERSE.fate(replace(item, aspect="colour"), None, 0) is Effect.KEEPS
    assert REVERSE.fate(replace(item, aspect="action"), None, 0) is Effect.DEPENDS
    assert REVERSE.fate(replace(item, aspect=None), None, 0) is Effect.DEPENDS


@pytest.mark.parametrize(
    ("names", "chosen", "rejected", "reason"),
    [
        (("drop",), "abcdef", "xyz", None),
        (("drop",), "abc", "xyz", "length"),  # what lost clips must be shorter
        (("drop",), "abcdefghi", "x", None),  # by however much
        (("block_reverse",), "abc", "xyzw", None),
        (("block_reverse",), "abcd", "uvwxyz", None),  # 1.5 times, not more
        (("block_reverse",), "abcd", "tuvwxyz", "length"),
        (("block_reverse",), "abcdefg", "wxyz", "length"),
        (("block_reverse",), "abc", "xabc", "substring"),
        (("block_reverse",), " abc", "abc ", "equal"),
        (("drop",), "abc", " ", "empty"),
    ],
)
def test_filters_of_descriptions(names: tuple[str, ...], chosen: str, rejected: str, reason: str | None) -> None:
    item = VideoItem("a", Path("a.mp4"), "Describe.")
    assert refuse(item, Perturbation(names, 4), chosen, rejected, settings("drop")) == reason
    anyhow = None if reason == "length" else reason
    assert refuse(item, Perturbation(names, 4), chosen, rejected, settings("drop", length_ratio=None)) == anyhow


def test_answers_of_a_table_are_checked_without_case_and_stop() -> None:
    item = VideoItem("a", Path("a.mp4"), "?", answer="B. To the left")
    said = {"b. to the left.": True, "B": True, "b)": True, "A": False, "to the right": False, "": False}
    assert {text: item.right(text) for text in said} == said
    assert replace(item, answer="two").right("Two.") is True
    assert replace(item, answer=None).right("two") is None


def test_an_oracle_gives_a_pair_wherever_the_answer_changes(videos: Path, model: str, tmp_path: Path) -> None:
    items = load_video_questions(str(videos), ["multi-choice"])
    answerer = Answerer(model, Decoding(8), None, open_model=lambda: Oracle(videos))
    counts = write_video_pairs(items, tmp_path / "pairs.parquet", settings("reverse", questions=True), answerer)
    expected = {}
    for item in items:
        question = item.question
        assert isinstance(question, ShapesQuestion) and isinstance(item.truth, SceneTruth)
        backwards = [track[::-1] for track in unroll(item.truth.scene)]
        answer = question.answer_of(backwards, 32)
        if answer != question.answer and (answer is not None or question.answer != "no"):
            expected[f"{item.id}/reverse"] = (question.answer, answer or "unclear")
    found = {row["id"]: (row["chosen"], row["rejected"]) for row in rows(tmp_path / "pairs.parquet")}
    assert found == expected and counts.pairs["reverse"] == len(expected)
    assert counts.pairs.total() + counts.left_out.total() == len(items)
    aspects = {row["aspect"] for row in rows(tmp_path / "pairs.parquet")}
    assert aspects & {"direction", "order"} and not aspects & {"colour", "shape", "count"}


def test_wrong_answers_to_the_video_give_no_pair_and_right_ones_to_its_perturbation_neither(
    videos: Path, model: str, tmp_path: Path
) -> None:
    items = [one for one in read_video_items(str(videos), questions=True) if "/yes_no/" in one.id]
    yes = Answerer(model, Decoding(8), None, open_model=lambda: Always("yes"))
    with pytest.raises(UserError, match="no pair is left") as caught:
        write_video_pairs(items, tmp_path / "a.parquet", settings("reverse", questions=True), yes)
    wrong = sum(item.answer == "no" for item in items)
    assert f"{wrong} questions that the model gets wrong" in str(caught.value) and "equal answers" in str(caught.value)
    truth = settings("reverse", questions=True, chosen="truth")
    counts = write_video_pairs(items, tmp_path / "b.parquet", truth, yes)
    # "yes" is only ever wrong, and never equal, where "no" is true and the reverse changes that.
    assert {(row["chosen"], row["rejected"]) for row in rows(tmp_path / "b.parquet")} == {("no", "yes")}
    assert (
        counts.left_out["equal"] + counts.left_out["keeps"] + counts.pairs.total()
        == len(items) - (counts.left_out["depends"])
    )


class Always:
    """A model that says one thing."""

    def __init__(self, text: str) -> None:
        self.text = text

    def generate(self, prompts: Sequence[str], media: Sequence[Any], **options: Any) -> list[str]:
        return [self.text for _ in prompts]


def test_rejected_videos_are_the_perturbed_frames_and_need_no_model(videos: Path, tmp_path: Path) -> None:
    items = items_of(videos, "order", "multi-choice")
    chosen = settings("reverse", questions=True, chosen="truth", rejected="videos")
    out = tmp_path / "deep" / "pairs.parquet"
    assert write_video_pairs(items, out, chosen).pairs.total() == len(rows(out)) > 0
    for pair in read_vlm_pairs(str(out), DataConfig(pairs=str(out))):
        assert pair.chosen == pair.rejected and pair.rejected_media is not None
        before, after = (decode(files[0], "video") for files in (pair.media, pair.rejected_media))  # type: ignore[arg-type]
        assert torch.equal(after, before.flip(0))


def test_captions_of_clips_are_joined_in_both_orders(model: str, videos: Path, tmp_path: Path) -> None:
    class Counting(Always):
        """Numbers the clips in the order in which it is asked about them."""

        def generate(self, prompts: Sequence[str], media: Sequence[Any], **options: Any) -> list[str]:
            self.text = str(int(self.text) + len(prompts))
            return [f"clip {int(self.text) - len(prompts) + index}" for index in range(len(prompts))]

    items = [one for one in read_video_items(str(videos), questions=False) if "-first-" in one.id][:1]
    answerer = Answerer(model, Decoding(8), None, open_model=lambda: Counting("0"))
    how = settings("block_reverse", "drop", captions="join", min_events=2, length_ratio=None, difficulties=(8,))
    write_video_pairs(items, tmp_path / "pairs.parquet", how, answerer)
    first, second = rows(tmp_path / "pairs.parquet")
    count = len(first["chosen"].split(".")) - 1
    told = [f"clip {number}." for number in range(count)]
    assert count >= 2 and first["chosen"] == second["chosen"] == " ".join(told)
    assert first["rejected"] == " ".join(reversed(told)) and second["rejected"] in told


def test_the_command_goes_on_and_writes_what_training_reads(
    videos: Path, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "pairs.parquet"
    command = ["pairs", "perturb", str(videos), "--out", str(out), "--model", model, "--mode", "answers"]
    command += ["--length-ratio", "0", "--limit", "8", "--max-new-tokens", "6", "--difficulty", "8,2"]
    command += ["--temperature", "1", "--operators", "drop,block-reverse"]
    assert main(command) == 0
    assert "pairs (" in capsys.readouterr().out
    table = read_vlm_pairs(str(out), DataConfig(pairs=str(out)), [8])
    assert set(table.difficulties()) == {8} and table.left_out > 0
    assert table[0].media[0].samefile(videos / "videos" / table[0].media[0].name)  # type: ignore[union-attr]
    content = out.read_bytes()
    (kept,) = (tmp_path / "pairs.answers").iterdir()
    kept.write_text(kept.read_text() + '\n{"key": "half a li')
    monkeypatch.setattr("pipelines.vlm.model.VisionLanguageModel.generate", None)  # everything is answered already
    assert main(command) == 0 and out.read_bytes() == content
    assert main([*command, "--seed", "1"]) != 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--contrast", "rules"], "--contrast applies to captions of images"),
        ([], "--model is missing"),
        (["--operators", "drop,revers"], "did you mean 'reverse'"),
        (["--operators", "neighbour"], "needs bank"),
        (["--difficulty", "4,1"], "difficulty 1"),
        (["--mode", "answers", "--perturb", "captions", "--operators", "flip"], "'flip' changes frames"),
        (["--perturb", "captions"], "use --mode answers"),
        (["--mode", "answers", "--chosen", "truth"], "--mode questions"),
        (["--length-ratio", "2"], "needs --mode answers"),
        (["--instruction", "Describe it."], "--instruction: must not be empty, and needs --mode answers"),
        (["--seed", "-1"], "'-1' is not a whole number of at least 0"),
    ],
)
def test_mistakes_are_one_line(
    videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], said: str
) -> None:
    assert main(["pairs", "perturb", str(videos), "--out", str(tmp_path / "out.parquet"), *options]) == 2
    assert said in capsys.readouterr().err


def test_a_mistyped_source_is_told_so(videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = videos.with_name(f"{videos.name}s")
    assert main(["pairs", "perturb", str(wrong), "--model", "m", "--out", str(tmp_path / "out.parquet")]) == 2
    assert f"did you mean '{videos}'" in capsys.readouterr().err
    assert main(["pairs", "perturb", str(tmp_path), "--model", "m", "--out", str(tmp_path / "out.parquet")]) == 2
    assert f"--model applies to videos only, and {tmp_path} holds none" in capsys.readouterr().err


def test_tables_of_videos(videos: Path, tmp_path: Path) -> None:
    table = tmp_path / "asked.csv"
    file = next((videos / "videos").iterdir())
    table.write_text(f"id,video,prompt,answer,aspect\na,{file},What colour?,red,colour\nb,{file},How many?,,\n")
    assert is_video_source(str(table)) and not is_video_source("org/name:train")
    first, second = read_video_items(str(table), questions=True)
    assert (first.answer, first.aspect, second.answer, second.aspect) == ("red", "colour", None, None)
    told = {one.prompt for one in read_video_items(str(videos), questions=False, instructions=["Tell.", "Say."])}
    assert told == {"Tell.", "Say."}
    table.write_text("video\nmissing.mp4\n")
    with pytest.raises(UserError, match="missing.mp4, which does not exist"):
        read_video_items(str(table), questions=False)
    with pytest.raises(UserError, match="prompt"):
        read_video_items(str(table), questions=True)


def test_an_interrupted_job_goes_on_after_its_last_batch(videos: Path, model: str, tmp_path: Path) -> None:
    class Failing(Always):
        """Answers two batches."""

        left = 2

        def generate(self, prompts: Sequence[str], media: Sequence[Any], **options: Any) -> list[str]:
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt
            return super().generate(prompts, media, **options)

    items = items_of(videos, "order", "multi-choice")[:5]
    reader = VideoReader(ALL_FRAMES)
    requests = [Request(one.prompt, reader.media_id(one), lambda one=one: reader.show(one)) for one in items]
    first, second = Failing("a"), Failing("b")
    with pytest.raises(KeyboardInterrupt):
        Answerer(model, Decoding(8), tmp_path, batch_size=2, open_model=lambda: first).answer(requests, "ask")
    answers = Answerer(model, Decoding(8), tmp_path, batch_size=2, open_model=lambda: second).answer(requests, "ask")
    assert sorted(answers) == ["a", "a", "a", "a", "b"] and second.left == 1
    other = Answerer(model, Decoding(9), tmp_path, open_model=lambda: Always("c"))
    assert other.answer(requests, "ask") == ["c"] * 5  # another way to answer knows nothing of these


def test_questions_of_tempcompass_go_by_the_label_map(videos: Path, tmp_path: Path) -> None:
    (tmp_path / "questions").mkdir()
    asked = {"direction": [{"question": "Left?", "answer": "yes"}], "speed": [{"question": "Fast?", "answer": "no"}]}
    (tmp_path / "questions" / "yes_no.json").write_text(json.dumps({"7": asked, "7_reverse": asked}))
    (tmp_path / "videos").mkdir()
    for name in ("7", "7_reverse"):
        shutil.copy(next((videos / "videos").iterdir()), tmp_path / "videos" / f"{name}.mkv")
    items = read_video_items(str(tmp_path), questions=True)
    fates = {item.id: Perturbation(("flip",)).fate(item, None, 0) for item in items}
    assert fates == {
        f"yes_no/{name}/{aspect}/0": Effect.DEPENDS if aspect == "direction" else Effect.KEEPS
        for name in ("7", "7_reverse")
        for aspect in asked
    }
    assert [item.id for item in read_video_items(str(tmp_path), questions=False)] == ["7", "7_reverse"]
    # One video and what was made from it, whatever is asked about them.
    assert len(set(families([item.question for item in items if isinstance(item, QuestionItem)]))) == 1


def test_mirrored_pairs_teach_nothing_about_words() -> None:
    given = [("p", "a", "b")] * 3 + [("p", "b", "a")] * 2 + [("q", "a", "b"), ("p", "a", "c")]
    kept = mirrored(given)
    assert sorted(given[index] for index in kept) == [("p", "a", "b")] * 2 + [("p", "b", "a")] * 2
    assert kept == sorted(kept) == mirrored(given) and len({tuple(mirrored(given, seed)) for seed in range(9)}) > 1
    assert mirrored(given[:3]) == []
    with pytest.raises(UserError, match="only answers to questions can be mirrored"):
        settings("reverse", mirrored=True)


def test_wrong_answers_are_rejected_whatever_became_of_the_truth(videos: Path, tmp_path: Path, model: str) -> None:
    class Guess(Oracle):
        def generate(self, prompts: Sequence[str], media: Sequence[Any], **options: Any) -> list[str]:
            answers = [[answer for _, answer in self.questions[prompt].answers] for prompt in prompts]
            sums = [int(video.long().sum()) for (video,) in media]
            return [offered[number % len(offered)] for offered, number in zip(answers, sums, strict=True)]

    answerer = Answerer(model, Decoding(32), None, open_model=lambda: Guess(videos))
    items = {item.id: item for item in read_video_items(str(videos), questions=True)}
    given = settings("mask", "reverse", questions=True, chosen="truth")
    counts = write_video_pairs([*items.values()], tmp_path / "pairs.parquet", given, answerer)
    written = rows(tmp_path / "pairs.parquet")
    kept = [row for row in written if row["operator"] == "reverse" and row["aspect"] == "speed"]  # stays true
    assert kept and not counts.left_out["keeps"]
    assert not any(items[row["id"].rpartition("/")[0]].right(row["rejected"]) for row in written)

    counts = write_video_pairs(
        [*items.values()], tmp_path / "mirrored.parquet", replace(given, mirrored=True), answerer
    )
    fewer = [(row["prompt"], row["chosen"], row["rejected"]) for row in rows(tmp_path / "mirrored.parquet")]
    assert 0 < len(fewer) == len(written) - counts.left_out["mirror"] < len(written)
    assert sorted(fewer) == sorted((prompt, rejected, chosen) for prompt, chosen, rejected in fewer)


def test_perturbations_without_effect_are_left_out(videos: Path, tmp_path: Path, model: str) -> None:
    class Contrary(Oracle):
        """Answers anything but the truth, as far as it knows it from the words."""

        def __init__(self, folder: Path) -> None:
            super().__init__(folder)
            self.real = load_vlm(model, device="cpu")
            self.encode_prompt, self.complete = self.real.encode_prompt, self.real.complete
            self.collate, self.log_probs = self.real.collate, self.real.log_probs

        def generate(self, prompts: Sequence[str], media: Sequence[Any], **options: Any) -> list[str]:
            return ["no" if self.questions[prompt].answer == "yes" else "yes" for prompt in prompts]

    def make(name: str, least: float | None) -> list[dict[str, Any]]:
        given = settings("reverse", "mask", questions=True, chosen="truth", min_effect=least)
        answerer = Answerer(model, Decoding(32), tmp_path / "kept", open_model=lambda: Contrary(videos))
        write_video_pairs(items, tmp_path / name, given, answerer)
        return rows(tmp_path / name)

    items = [one for one in read_video_items(str(videos), questions=True) if one.answer in ("yes", "no")][:20]
    every = make("all.parquet", None)
    network, reader, by_id = load_vlm(model, device="cpu"), VideoReader(ALL_FRAMES), {one.id: one for one in items}

    def margin(row: dict[str, Any], perturbation: Perturbation | None = None, seed: int = 0) -> float:
        shown = reader.show(by_id[row["id"].rpartition("/")[0]], perturbation, seed).media
        batch = network.encode([row["prompt"]] * 2, [shown] * 2, [row["chosen"], row["rejected"]])
        with torch.no_grad():
            chosen, rejected = network.log_probs(batch)[0].sum(1).tolist()
        return float(chosen - rejected)

    effects = []
    for row in every:
        name, _, operator = row["id"].rpartition("/")
        seed = derive_seed(0, "perturb", name, operator)
        effects.append(margin(row) - margin(row, Perturbation((operator,)), seed))
    ordered = sorted(effects)
    _, least = max((above - below, (above + below) / 2) for below, above in pairwise(ordered))  # far from any effect
    strong = [row["id"] for row, effect in zip(every, effects, strict=True) if effect >= least]
    assert [row["id"] for row in make("strong.parquet", least)] == strong and 0 < len(strong) < len(every)
    answerer = Answerer(model, Decoding(32), tmp_path / "kept", open_model=lambda: pytest.fail("already weighed"))
    request = Request(every[0]["prompt"], reader.media_id(by_id[every[0]["id"].rpartition("/")[0]]), lambda: None)
    found = answerer.margins([(request, every[0]["chosen"], every[0]["rejected"])], "again")
    assert found == [pytest.approx(margin(every[0]), abs=1e-4)]


class Saying(Always):
    """A model that answers an original video as told, and its perturbations, which are shorter, otherwise."""

    def __init__(self, original: str, perturbed: str) -> None:
        self.original, self.perturbed = original, perturbed

    def generate(self, prompts: Sequence[str], media: Sequence[Any], **options: Any) -> list[str]:
        return [self.original if len(video) == 8 else self.perturbed for (video,) in media]


@pytest.mark.parametrize(
    ("known", "original", "perturbed", "reason"),
    [
        ("yes", "Yes, it moves.", "No, it stands.", None),
        ("Yes, it moves.", "yes", "no", None),
        ("yes", "yes", "Yes, it moves.", "equal"),
        (None, "Yes, it moves.", "yes", "equal"),  # the same in fewer words, whatever the truth
        ("yes", "yes", "It moves.", "right"),  # may well be right
        ("yes", "It moves.", "no", "unanswered"),  # may be right, but no rule says so
        ("3", "There are three.", "4", None),
        ("3", "three", "3 balls", "equal"),
        ("B. to the left", "(B)", "A", None),
        ("B. to the left", "B", "It moves to the left.", "right"),
    ],
)
def test_right_answers_in_other_words_are_chosen_and_never_rejected(
    videos: Path, model: str, tmp_path: Path, known: str | None, original: str, perturbed: str, reason: str | None
) -> None:
    item = VideoItem("a", next((videos / "videos").iterdir()), "?", answer=known)
    answerer = Answerer(model, Decoding(8), None, open_model=lambda: Saying(original, perturbed))
    how, out = settings("drop", difficulties=(2,), questions=True), tmp_path / "pairs.parquet"
    if reason is None:
        write_video_pairs([item], out, how, answerer)
        assert [(row["chosen"], row["rejected"]) for row in rows(out)] == [(original, perturbed)]
        return
    with pytest.raises(UserError, match=f"left out: 1 {REASONS[reason]}"):
        write_video_pairs([item], out, how, answerer)


def test_the_defaults_work_on_a_model_that_joins_two_frames(videos: Path, tmp_path: Path) -> None:
    out = tmp_path / "pairs.parquet"
    qwen = build_qwen3_vl(tmp_path / "qwen")
    command = ["pairs", "perturb", str(videos), "--out", str(out), "--model", qwen, "--mode", "answers"]
    command += ["--limit", "2", "--min-events", "1", "--length-ratio", "0", "--max-new-tokens", "6"]
    # The default operators and difficulties: drop at 16 and 8 leaves one of eight frames.
    assert main([*command, "--temperature", "1"]) == 0
    assert {("drop", 16), ("drop", 8), ("block_shuffle", 16)} <= {
        (row["operator"], row["difficulty"]) for row in rows(out)
    }


def test_a_video_that_fails_costs_no_other_one(
    videos: Path, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = sorted((videos / "videos").iterdir())
    (tmp_path / "broken.mkv").write_bytes(b"no video")
    write_video(tmp_path / "single.mkv", torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    shown = {"whole": files[0], "broken": tmp_path / "broken.mkv", "single": tmp_path / "single.mkv", "last": files[1]}
    items = [VideoItem(name, file, "Describe.") for name, file in shown.items()]
    how = settings("block_shuffle", difficulties=(4,), length_ratio=None)
    answerer = Answerer(model, Decoding(6, temperature=1.0), tmp_path / "kept", batch_size=3)
    counts = write_video_pairs(items, tmp_path / "pairs.parquet", how, answerer)
    assert [row["id"] for row in rows(tmp_path / "pairs.parquet")] == ["whole/block_shuffle/4", "last/block_shuffle/4"]
    assert counts.left_out["failed"] == 2
    said = capsys.readouterr().err
    assert (
        "left out: broken: unreadable video" in said and "left out: single: 1 frame at ratio=4 are one block" in said
    )


def test_rejected_videos_come_with_their_own_rate(videos: Path, tmp_path: Path) -> None:
    item = VideoItem("a", next((videos / "videos").iterdir()), "?", answer="yes", aspect="order")
    how = settings("reverse", questions=True, chosen="truth", rejected="videos", frames=Frames(4))
    write_video_pairs([item], tmp_path / "pairs.parquet", how)
    (row,) = rows(tmp_path / "pairs.parquet")
    assert row["fps"] is None and row["rejected_fps"] == pytest.approx(4 * 3 / 7)
