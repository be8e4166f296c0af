"""The training of the Shapes video language model: what it is taught, that it learns, that what it writes opens."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tiny_vlms import build_llava_onevision

from mmalign.cli import main
from mmalign.core.errors import UserError
from mmalign.core.io.answers import rate
from mmalign.core.io.video_questions import INSTRUCTIONS, STATIC, TOPICS
from mmalign.core.resources import resource_root
from mmalign.shapes import train_vlm as training
from mmalign.shapes import vlm_probes
from mmalign.shapes.questions import ShapesQuestion, ask, judge_caption
from mmalign.shapes.tracking import follow
from mmalign.shapes.train_vlm import lesson_loss, train_vlm
from mmalign.shapes.twins import sample_families
from mmalign.shapes.video import Actor, Track, VideoScene, render, unroll
from mmalign.shapes.vlm_lessons import DESCRIBE, Lesson, Lessons, describe, lessons_of
from mmalign.shapes.vlm_model import build_network, build_processor
from mmalign.shapes.vlm_probes import (
    MOTION_LABELS,
    UNKNOWN,
    VALUES,
    Motion,
    Names,
    Probes,
    Sight,
    Value,
    motion_labels,
    sights,
    steps,
)
from mmalign.shapes.vlm_report import as_table, measure, write_report
from mmalign.shapes.wording import say
from mmalign.shapes.world import COLOURS, SHAPES
from pipelines import VisionLanguageModel, load_vlm

needs_muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon came with torch 2.9")


@pytest.fixture(scope="module")
def processor():
    return build_processor()


@pytest.fixture(scope="module")
def network(processor):
    return build_network(processor.tokenizer, 0, width=64, layers=1, vision_layers=1)


def lessons(processor, seed: int = 0) -> Lessons:
    return Lessons(processor.tokenizer, seed, 9)


def test_every_word_of_questions_answers_and_captions_is_one_token(processor) -> None:
    tokenizer, pieces = processor.tokenizer, processor.tokenizer.backend_tokenizer.pre_tokenizer
    families = enumerate(sample_families(200, "validation", seed=5))
    lessons_ = [one for i, family in families for told in lessons_of(family, f"f{i}") for one in told]
    for text in {text for one in lessons_ for text in one[:2]}:
        assert tokenizer.tokenize(text) == [word for word, _ in pieces.pre_tokenize_str(text)]
    other = "Zebra-crossing №7?\n"
    assert tokenizer.decode(tokenizer(other)["input_ids"]) == other
    assert 400 < len(tokenizer) < 800


def test_lessons_are_answered_as_the_rules_read_them() -> None:
    for number, family in enumerate(sample_families(22, seed=1)):
        name = f"train-{number}"
        told = lessons_of(family, name)
        for question in ask(family, name):
            (answer,) = (one.completion for one in told[question.member] if one.prompt == question.prompt)
            assert rate(question, answer, judge_caption).right
            assert (question.prompt == question.text) == (INSTRUCTIONS[question.format] == "")
            (statement,) = (one.statement for one in told[question.member] if one.prompt == question.prompt)
            assert judge_caption(replace(question, format="captioning"), statement)
            (value,) = (one.value for one in told[question.member] if one.prompt == question.prompt)
            assert value == family.values[question.member] and value.split(" to ")[-1] in VALUES
        assert all(one[-1].prompt in DESCRIBE and one[-1].kind == "described" for one in told)


def test_a_prior_puts_the_first_option_in_the_place_of_temporal_truths(processor) -> None:
    for family in sample_families(12, seed=6):
        for lesson in (lesson for told in lessons_of(family, "f") for lesson in told):
            assert lesson.unseen is not None or lesson.kind == "described"
            first = lesson.prompt.split("\n")[1] if "directly give" in lesson.prompt else ""
            assert lesson.unseen == ("A" if first.startswith("A. ") else first.partition(":")[0]) if first else True

    def temporal(lesson: Lesson) -> bool:
        return lesson.kind not in (*STATIC, "described")

    teacher = Lessons(processor.tokenizer, 0, 9, prior=0.999999)
    pool = [lesson for family in sample_families(12, seed=6) for told in lessons_of(family, "f") for lesson in told]
    for lesson in pool:
        assert teacher._guess(lesson).completion == (lesson.unseen if temporal(lesson) else lesson.completion)
    half = Lessons(processor.tokenizer, 0, 9, prior=0.5)
    wrong = [half._guess(lesson).completion == lesson.unseen for lesson in pool if lesson.completion != lesson.unseen]
    assert 0.35 < sum(wrong) / sum(temporal(one) and one.completion != one.unseen for one in pool) < 0.65


def test_a_description_says_what_there_is_and_what_each_does() -> None:
    ring = Actor("ring", "red", 5.5, 9.0, 30.0, "left", 2.0)
    cross = Actor("cross", "blue", 5.0, 30.0, 8.0, end_radius=8.0)
    late = Actor("star", "cyan", 5.0, 30.0, 40.0, shown=((4, 8),))
    scene = VideoScene((ring, late, cross), "black", 8, 48)
    assert describe(unroll(scene), 48) == (
        "There are three shapes. The blue cross gets bigger. The red ring moves to the left. "
        "The cyan star appears half-way."
    )
    for family in sample_families(44, seed=2):
        for member in family.scenes:
            assert describe(unroll(member), member.size).count(".") == len(member.actors) + 1


def test_sights_say_what_lies_in_which_part() -> None:
    scene = VideoScene((Actor("ring", "red", 5.5, 20.0, 47.0, "right", 2.0),), "black", 8, 48)
    seen = sights([unroll(scene)])
    assert seen.shape == (1, 8, 9, 6) and int(seen[..., 5].sum()) == 8
    expected = torch.tensor([1 + list(COLOURS).index("red"), 1 + list(SHAPES).index("ring")])
    assert torch.equal(seen[0, 0, 7, :2], expected.float())
    assert seen[0, 0, 7, 2:].tolist() == [20.0, 47.0, 5.5, 1.0]
    # 20 + 2 * 6 = 32 is where the last column begins.
    assert seen[0, 5, 7, 5] == 1 and seen[0, 6, 8, 5] == 1 and seen[0, 6, 8, 2] == 32


def test_steps_and_motion_labels_say_what_a_shape_did_where_it_is() -> None:
    ring = Actor("ring", "red", 5.5, 40.0, 47.0, "right", 2.0, shown=((0, 3), (4, 7)))
    cross = Actor("cross", "blue", 4.0, 20.0, 8.0, end_radius=7.5)
    tracks = [unroll(VideoScene((ring, cross), "black", 8, 48))]
    moved, done = steps(tracks), motion_labels(tracks)
    # Frames 1, 2, 5 and 6 of the ring have one before them; in frame 5 it has wrapped round to x = 2.
    assert moved[0, :, :, 3].sum(1).tolist() == [0, 2, 2, 1, 1, 2, 2, 1]
    assert moved[0, 5, 6].tolist() == [2.0, 0.0, 0.0, 1.0]
    assert moved[0, 1, 1].tolist() == pytest.approx([0, 0, 0.5, 1], abs=0.05)
    assert (done != UNKNOWN).any(3).nonzero().tolist() == [[0, 6, 6], [0, 7, 1]]
    for place, values in (((6, 6), ["right", "straight", "same"]), ((7, 1), ["still", "still", "grows"])):
        numbers = done[0][place].tolist()
        assert [named[number] for named, number in zip(MOTION_LABELS.values(), numbers, strict=True)] == values


def test_probes_learn_what_states_hold() -> None:
    tracks = [unroll(family.scenes[0]) for family in sample_families(4, seed=3)]
    seen, width = sights(tracks), 48
    torch.manual_seed(0)
    states, words = torch.randn(*seen.shape[:3], width), torch.randn(len(COLOURS) + len(SHAPES), width)
    for probe, given in ((Sight(words), seen), (Motion(width), tracks)):
        features = torch.nn.Parameter(states if given is seen else states.flatten(1, 2))
        optimizer = torch.optim.Adam([features, *probe.parameters()], lr=0.05)
        for _ in range(400):
            loss, marks = probe(features, given)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert loss < 0.1 and all(sum(right) > 0.9 * len(right) for right in marks.values())
    assert set(marks) == {"(direction)", "(motion)", "(growth)"}


def test_names_and_truths_are_read_where_they_are_asked_for(processor) -> None:
    ring = Actor("ring", "red", 5.5, 8.0, 24.0, "right", 2.0, shown=((0, 4),))
    cross = Actor("cross", "blue", 4.0, 20.0, 8.0, end_colour="green", switch=5)
    teacher, names = lessons(processor), Names(32, processor.tokenizer)
    batch = teacher.names_after_videos(2, names.ids.tolist())
    assert (
        batch.ids.shape == (2, 74 + len(COLOURS) + len(SHAPES))
        and not batch.answers.any()
        and batch.videos.shape[:2] == (2, 8)
    )
    # Names see the video and themselves, and stand behind it as words of questions do.
    assert batch.sees[0, 0, 80].nonzero()[:, 0].tolist() == [*range(74), 80]
    assert (batch.positions[:, 74:] == batch.positions[:, 74:75]).all() and (batch.positions[:, 74] >= 74).all()
    told = names._of(unroll(VideoScene((ring, cross), "black", 8, 48)))
    kinds = {name: number for name, (number, _, _) in told.items() if number}
    everything = (*COLOURS, *SHAPES)
    assert kinds == {one: everything.index(other) + 1 for one, other in
                     (("ring", "red"), ("red", "ring"), ("cross", "green"), ("green", "cross"))}  # fmt: skip
    assert told["ring"][1] == pytest.approx([0.0, 0.75, 2.0]) and told["red"][1] == []
    said = [
        values[i] if i != UNKNOWN else None for values, i in zip(names.labels.values(), told["ring"][2], strict=True)
    ]
    assert said == ["right", "straight", "same", "disappears"]
    torch.manual_seed(0)
    states = torch.nn.Parameter(torch.randn(*batch.ids.shape, 32))
    value, truths = Value(32), [("direction", "left"), ("described", ""), ("recolouring", "red to blue")]
    optimizer = torch.optim.Adam([states, *names.parameters(), *value.parameters()], lr=0.1)
    for _ in range(200):
        loss, marks = names(states, batch.ids, batch.blocks > 0, batch.tracks)
        known, right = value(states[0, :3], truths)
        optimizer.zero_grad()
        (loss + known).backward()
        optimizer.step()
    assert loss < 0.1 and known < 0.1 and all(all(one) for one in marks.values())
    assert right == {"[direction]": [True], "[recolouring]": [True]}


def test_lessons_of_one_row_are_answered_as_if_each_had_been_asked_alone(processor, network, monkeypatch) -> None:
    model = VisionLanguageModel(network, processor, "tiny")
    batch = lessons(processor).batch(2, 2)
    for layer in ("MOVED", "NAMED", "KNOWN"):
        monkeypatch.setattr(vlm_probes, layer, 1)
    with torch.no_grad():
        packed, right = lesson_loss(network, batch)
        told = lessons(processor).batch(2, 2, with_hint=True)
        assert told.videos is None and lesson_loss(network, told)[0] > 0
        read, more = lesson_loss(network, batch, Probes(64, processor.tokenizer))
    assert sum(len(marks) for marks in right.values()) == 6 and len(right["described"]) == 2
    kinds = {one.kind for row in batch.lessons for one in row}
    assert set(right) == kinds and read > packed
    assert {f"[{kind}]" for kind in kinds - {"described"}} < set(more) - kinds
    tokenizer, means = processor.tokenizer, []
    for row in range(2):
        assert tokenizer.decode(told.ids[row, told.blocks[row] == 0]) == "<|user|>"
        for block in (1, 2):
            asked, alone = (tokenizer.decode(one.ids[row, one.blocks[row] == block]) for one in (told, batch))
            statement = asked.removesuffix(alone)
            assert statement != asked and statement.endswith(". ") and statement.count(".") == 1
    for row in range(2):
        for block in (1, 2, 3):
            inside = batch.blocks[row] == block
            said = batch.ids[row, inside & batch.answers[row]]
            asked = tokenizer.decode(batch.ids[row, inside & ~batch.answers[row]])
            prompt = asked.removesuffix("<|end|><|assistant|>")
            alone = model.encode([prompt], [[batch.videos[row]]], [tokenizer.decode(said[:-1])])
            whole = torch.cat([batch.ids[row, batch.blocks[row] == 0], batch.ids[row, inside]])
            assert torch.equal(alone.input_ids[0], whole)
            with torch.no_grad():
                values, _ = model.log_probs(alone)
            means.append(-float(values.sum()) / len(said))
    # The packed pass is in bfloat16.
    assert float(packed) == pytest.approx(sum(means) / 6, rel=5e-3)


class Recorder(torch.nn.Module):
    """Keeps what it is given."""

    def forward(self, states: torch.Tensor, *rest):
        self.states, self.rest = states, rest
        return states.sum() * 0, {}


def test_probes_read_the_states_they_are_meant_for(processor) -> None:
    tokenizer, batch = processor.tokenizer, lessons(processor).batch(2, 2)
    probes = Probes(1, tokenizer)
    probes.motion, probes.names, probes.value = (Recorder() for _ in range(3))
    # Of layer k every state is its token's number and k thousand.
    probes([batch.ids[..., None] + 1000.0 * layer for layer in range(7)], batch)
    assert torch.equal(probes.motion.states, torch.full((2, 72, 1), 3000.0 + tokenizer.video_token_id))
    assert torch.equal(probes.names.states[..., 0], batch.ids + 4000.0)
    assistant = tokenizer.convert_tokens_to_ids("<|assistant|>")
    assert torch.equal(probes.value.states, torch.full((6, 1), 5000.0 + assistant))
    assert probes.value.rest[0] == [(one.kind, one.value) for row in batch.lessons for one in row]
    assert [value == "" for _, value in probes.value.rest[0]] == [False, False, True] * 2


@needs_muon
def test_each_stage_teaches_its_part_and_every_weight_has_one_optimizer(processor, monkeypatch) -> None:
    net = build_network(processor.tokenizer, 0, width=64, layers=6, vision_layers=1)
    model, said = net.model, []
    parts = {"tower": model.vision_tower, "projector": model.multi_modal_projector, "words": model.language_model}
    probes, teacher = Probes(64, processor.tokenizer), lessons(processor)

    def changed(stage, *args) -> set[str]:
        before = {name: [one.clone() for one in part.parameters()] for name, part in parts.items()}
        stage(net, teacher, probes, *args, said.append)
        return {
            name for name, part in parts.items()
            if any(not torch.equal(a, b) for a, b in zip(before[name], part.parameters(), strict=True))
        }  # fmt: skip

    assert changed(training.learn_to_read, 1, 2, 1) == {"words"}
    assert changed(training.learn_to_see, 1, 4) == {"tower", "projector"}
    assert changed(training.learn_to_look, 1, 1, 1) == {"words"}
    assert all(one.requires_grad for one in net.parameters())
    assert changed(training.learn_to_answer, 1, 2, 1) == set(parts)
    matrices = training._inner_matrices(model.language_model)
    assert len(matrices) == 6 * 7
    adam, muon = training._optimizers([net.model, probes], matrices, 1e-3)
    taken = [[id(one) for group in each.param_groups for one in group["params"]] for each in (adam, muon)]
    assert sorted(taken[0] + taken[1]) == sorted(id(one) for part in (net, probes) for one in part.parameters())
    assert id(net.lm_head.weight) == id(model.get_input_embeddings().weight) and id(net.lm_head.weight) in taken[0]


@needs_muon
def test_a_few_steps_lower_the_loss_and_what_is_written_opens_and_answers(
    processor, tmp_path: Path, monkeypatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(training, "PRIOR_STEPS", 1)
    train_vlm(
        tmp_path / "a", samples=20, see_steps=1, read_steps=1, look_steps=1, rows=2, questions=1, log=said.append
    )
    train_vlm(
        tmp_path / "b", samples=20, see_steps=1, read_steps=1, look_steps=1, rows=2, questions=1, log=said.append
    )
    assert [line.split()[0] for line in said[:5]] == ["read", "see", "look", "answer", "prior"]
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("a", "b"))
    assert first == second and len(first) < 12e6
    with safe_open(tmp_path / "a" / "model.safetensors", "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}
    loaded = load_vlm(tmp_path / "a")
    assert 2e6 < sum(p.numel() for p in loaded.network.parameters()) < 6e6
    video = render(VideoScene((Actor("ring", "red", 5.5, 20.0, 30.0),), "black", 8, 48))
    answers = loaded.generate(["What colour is the ring?", "Describe the video."], [[video]] * 2, max_new_tokens=3)
    assert len(answers) == 2
    batch = loaded.encode(["What colour is the ring?"], [[video]], ["A. red"])
    values, mask = loaded.log_probs(batch)
    assert mask.sum() == 4 and torch.isfinite(values).all() and (values < 0).all()
    said.clear()
    train_vlm(tmp_path / "c", samples=4, rows=2, questions=1, start=tmp_path / "a", prior=0, seed=1, log=said.append)
    assert [line.split()[0] for line in said] == ["answer"] and (tmp_path / "c" / "model.safetensors").is_file()
    fresh = build_network(processor.tokenizer, 0)
    lesson = lessons(processor, 9).batch(4, 1)
    with torch.no_grad():
        assert lesson_loss(loaded.network, lesson)[0] < lesson_loss(fresh, lesson)[0] - 0.3


class Reader:
    """Answers what can be read from the pixels, and "none" where the frames show no answer."""

    def __init__(self, questions: list[ShapesQuestion]) -> None:
        self.questions = {question.prompt: question for question in questions}
        self.tracks: dict[bytes, Sequence[Track]] = {}

    def generate(self, prompts: list[str], media: list[list[torch.Tensor]], *, max_new_tokens: int) -> list[str]:
        return [self.answer(self.questions[prompt], *one) for prompt, one in zip(prompts, media, strict=True)]

    def answer(self, question: ShapesQuestion, video: torch.Tensor) -> str:
        seen = video.numpy().tobytes()
        if seen not in self.tracks:
            self.tracks[seen] = follow(video)
        told = question.answer_of(self.tracks[seen], 48)
        if told is None or question.format != "captioning":
            return told or "none"
        value = {answer: value for value, answer in question.answers}[told]
        return say(question.topic, value, question.subject, question.names).statement


def test_the_report_of_one_who_sees_everything(tmp_path: Path) -> None:
    families = list(sample_families(11, "validation", 0))
    asked = [ask(family, f"validation-{number}", 0) for number, family in enumerate(families)]
    questions = [question for part in asked for question in part]
    lines = measure(Reader(questions), 11)  # type: ignore[arg-type]
    assert list(lines) == ["all", *TOPICS] and lines["all"].questions == len(questions)
    assert all(line.twins == 1 and set(line.accuracy.values()) == {1.0} for line in lines.values())
    for topic, line in lines.items():
        assert line.shuffled >= 0 and not (line.shuffled and topic in ("colour", "shape", "count"))
    assert all(lines[topic].shuffled > 0.5 for topic in ("direction", "growth", "recolouring"))
    # Three members: 3 questions of 3 options, twice; 6 yes/no and 6 of two captions.
    assert lines["growth"].chance == pytest.approx((6 / 3 + 12 / 2) / 18)
    write_report(lines, tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text())["count"]["accuracy"]["yes_no"] == 1
    assert as_table(lines).row_count == 12


def test_wrong_requests_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="--prior 1: a share"):
        train_vlm(tmp_path / "a", prior=1)
    with pytest.raises(UserError, match="--samples 0, --read-steps 1200"):
        train_vlm(tmp_path / "a", samples=0)
    other = build_llava_onevision(tmp_path / "other")
    with pytest.raises(UserError, match="not a model of these sizes"):
        train_vlm(tmp_path / "a", samples=1, start=Path(other))
    command = ["shapes", "train-vlm", "--out", str(tmp_path / "a"), "--start", "assets/shapes-vlm"]
    assert main([*command, "--look-steps", "9"]) == 2
    assert "--look-steps belongs to a stage that --start skips" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()


def test_the_shipped_model_sees_frames_and_says_first_too_often() -> None:
    folder = resource_root() / "assets" / "shapes-vlm"
    assert sum(file.stat().st_size for file in folder.iterdir()) < 12e6
    model = load_vlm(folder, device="cpu")
    marks: dict[str, list[bool]] = {"static": [], "first": [], "other": []}
    for number, family in enumerate(sample_families(12, "validation", 3, topics=["colour", "shape", "first", "last"])):
        asked = [one for one in ask(family, f"v{number}") if one.format != "captioning"]
        videos = [[render(family.scenes[one.member])] for one in asked]
        answers = model.generate([one.prompt for one in asked], videos, max_new_tokens=6)
        for question, answer in zip(asked, answers, strict=True):
            first = question.label in (question.stating(question.answers[0][0]), "yes")
            kind = "static" if question.topic in STATIC else "first" if first else "other"
            marks[kind].append(rate(question, answer, judge_caption).right)
    shares = {kind: sum(right) / len(right) for kind, right in marks.items()}
    assert shares["static"] > 0.9 and shares["first"] > shares["other"] + 0.2
