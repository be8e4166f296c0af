"""GenEval: its rules on synthetic boxes, prompts against the published metadata, detectors, colours by a real CLIP."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from contract import check_contract, smooth_images
from golden_data import golden_file
from PIL import Image

from rewards import RewardError, load_reward
from rewards.backbones.detectors import (
    OBJECTS,
    Detection,
    OnnxDetector,
    TransformersDetector,
    decode_cells,
    iou,
    object_name,
    suppressed,
)
from rewards.geneval import cut_out
from rewards.language.geneval_tasks import Task, Wanted, judge, parse_task, read_tasks, relations


def box(name, left, top, right, bottom, score=0.95, mask=None):
    return Detection(name, score, (float(left), float(top), float(right), float(bottom)), mask)


def held(task, *found, exact=False, colours=None):
    objects = {}
    for one in found:
        objects.setdefault(one.name, []).append(one)
    return judge(objects, task, colours or (lambda some, name: []), exact)


DOG, SECOND, THIRD, CAT = (
    box("dog", 0, 0, 10, 10),
    box("dog", 20, 0, 30, 10),
    box("dog", 40, 0, 50, 10),
    box("cat", 60, 0, 70, 10),
)


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        # centre distances 30: less a tenth of 20 leaves 28 / 30
        ((30, 0, 40, 10), {"left of"}),
        ((0, 30, 10, 40), {"above"}),
        ((-30, 0, -20, 10), {"right of"}),
        ((0, -30, 10, -20), {"below"}),
        # 28 / (30 sqrt 2) = 0.66 on both axes
        ((30, 30, 40, 40), {"left of", "above"}),
        # inside the dead zone of 0.1 (10 + 10) = 2
        ((2, 2, 12, 12), set()),
        # 2 of an offset of 4 is one half, which is not more than one half; 2.02 of 4.02 is
        ((4, 0, 14, 10), set()),
        ((4.02, 0, 14.02, 10), {"left of"}),
        # a wide object widens its own zone: centre off by 20, 0.1 (10 + 90) = 10 of it dead
        ((-20, 0, 70, 10), set()),
        ((0, 0, 10, 10), set()),
    ],
)
def test_relations(other, expected):
    assert relations((0.0, 0.0, 10.0, 10.0), [float(value) for value in other]) == expected


def test_numbers():
    two = parse_task("a photo of two dogs")
    assert two == Task((Wanted("dog", 2),), (("dog", 3),), counting=True)
    assert held(two, DOG, SECOND).correct
    assert held(two, DOG) == (False, (0.5,), ("dog: 2 expected, 1 found",))
    too_many = held(two, DOG, SECOND, THIRD)
    assert not too_many.correct and too_many.reasons == ("dog: fewer than 3 expected, 3 found",)
    both = parse_task("a photo of a dog and a cat")
    assert held(both, DOG, SECOND, CAT).correct, "more than one is no mistake unless a number is asked for"
    assert not held(both, DOG, SECOND, CAT, exact=True).correct and not held(both, DOG, SECOND).correct
    # 1 - 2 / 1 for three dogs would be negative
    assert held(both, DOG, SECOND, THIRD, CAT, exact=True).credits == (0.0, 1.0)
    assert held(parse_task("four dogs"), DOG, SECOND, THIRD, exact=True).credits == (0.75,)


def test_only_the_best_are_looked_at_for_colour():
    asked = []

    def colours(some, name):
        asked.append((name, len(some)))
        return [{0: "red", 20: "blue", 40: "red"}[one.box[0]] for one in some]

    red = parse_task("a photo of a red dog")
    assert held(red, DOG, SECOND, colours=colours).correct and not held(red, SECOND, DOG, colours=colours).correct
    two = held(parse_task("two red dogs"), DOG, SECOND, colours=colours, exact=True)
    assert two == (False, (1.0, 0.5), ("dog: red expected, red, blue found",))
    assert asked == [("dog", 1), ("dog", 1), ("dog", 2)]
    assert held(red, CAT, colours=colours).credits == (0.0, 0.0) and len(asked) == 3


def test_positions():
    task = parse_task("a photo of a dog left of a cat")
    assert task == Task((Wanted("cat"), Wanted("dog", relation="left of", target=0)))
    assert held(task, DOG, CAT).correct
    wrong = held(parse_task("a photo of a dog above a cat"), DOG, CAT)
    assert wrong == (False, (1.0, 1.0, 0.0), ("dog: not above cat",))
    assert held(task, DOG).reasons == ("cat: 1 expected, 0 found", "dog: not left of cat")
    # every pair must be in the relation
    pair = Task((Wanted("cat"), Wanted("dog", 2, relation="left of")))
    assert held(pair, DOG, SECOND, CAT).correct
    assert not held(pair, DOG, box("dog", 90, 0, 99, 10), CAT).correct
    # what has the wrong colour is no target
    tinted = Task((Wanted("cat", colour="red"), Wanted("dog", relation="left of")))
    assert held(tinted, DOG, CAT, colours=lambda some, name: ["blue"]).credits == (1.0, 0.0, 1.0, 0.0)


@pytest.mark.parametrize(
    ("prompt", "task"),
    [
        ("A photo of an orange.", Task((Wanted("orange"),))),
        ("a photo of an orange orange and a TV", Task((Wanted("orange", colour="orange"), Wanted("tv")))),
        ("a dog to the right of a hot dog", Task((Wanted("hot dog"), Wanted("dog", relation="right of")))),
        (
            "three green colored wine glasses, a bus and 2 knives",
            Task(
                (Wanted("wine glass", 3, "green"), Wanted("bus"), Wanted("knife", 2)),
                (("wine glass", 4), ("knife", 3)),
                counting=True,
            ),
        ),
    ],
)
def test_prompts(prompt, task):
    assert parse_task(prompt) == task


def test_all_published_prompts_are_read_as_their_metadata_say():
    path = golden_file("../prompts/geneval.jsonl")
    tasks = read_tasks(path)
    assert len(tasks) == 553 and {prompt: parse_task(prompt) for prompt in tasks} == tasks
    names = {item["class"] for line in path.read_text().splitlines() for item in json.loads(line)["include"]}
    assert names == set(OBJECTS)


@pytest.mark.parametrize("prompt", ["", "a photo of a unicorn", "zero dogs", "a happy dog", "dog near cat"])
def test_other_prompts_are_refused(prompt):
    with pytest.raises(RewardError, match="geneval cannot read .* or metadata=FILE in GenEval's form"):
        parse_task(prompt)
    with pytest.raises(RewardError, match="names an object twice"):
        parse_task("a red dog and a green dog")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "p"}, "row 1: not GenEval's form: it lacks 'include'"),
        ({"prompt": "p", "include": [{"class": "dog"}]}, "it lacks 'count'"),
        ({"prompt": "p", "include": [{"class": "dog", "count": 1, "color": "grey"}]}, "color 'grey'; .*did you mean"),
        ({"prompt": "p", "include": [{"class": "dog", "count": 1, "position": ["near", 0]}]}, "position"),
        ({"prompt": "p", "include": [{"class": "dog", "count": 1, "position": ["above", 0]}]}, "an earlier object"),
    ],
)
def test_wrong_metadata(row, message, tmp_path):
    path = tmp_path / "tasks.jsonl"
    path.write_text(json.dumps(row))
    with pytest.raises(RewardError, match=message):
        read_tasks(path)


class Bright:
    """A detector for tests: dogs where the quarters of an image are bright, the brighter the surer; one cat."""

    names = ("dog", "cat", "orange")

    def __init__(self):
        self.calls = 0

    def __call__(self, images):
        self.calls += 1
        return [self.find(image) for image in images]

    def find(self, image):
        across, down = image.width // 2, image.height // 2
        levels = np.asarray(image).mean(-1) / 255
        corners = [(x, y, x + across, y + down) for x in (0, across) for y in (0, down)]
        means = [float(levels[c[1] : c[3], c[0] : c[2]].mean()) for c in corners]
        dogs = [box("dog", *corner, mean) for mean, corner in zip(means, corners, strict=True)]
        return [*dogs[::-1], box("cat", 0, 0, across, image.height)]


def quarters(*levels):
    """An image [1, 3, 8, 8] of four grey levels: left top, left bottom, right top, right bottom."""
    grid = torch.tensor(levels).view(2, 2).T
    return grid.repeat_interleave(4, 0).repeat_interleave(4, 1).expand(1, 3, 8, 8).contiguous()


def test_thresholds_and_limits():
    image = quarters(0.95, 0.5, 0.92, 0.2)

    def score(prompt, **options):
        return load_reward("geneval", detector=Bright(), device="cpu", **options)(image, prompts=[prompt]).item()

    assert score("a photo of two dogs") == 1, "above 0.9, for numbers"
    assert score("a photo of three dogs") == 0
    assert score("a photo of three dogs", counting_threshold=0.3) == 1
    assert score("a photo of three dogs", counting_threshold=0.3, max_objects=2) == 0
    assert score("a photo of a dog", threshold=0.96) == 0
    assert score("a photo of a dog", form="strict") == 0, "there are three above 0.3"
    assert score("a photo of a dog", form="strict", threshold=0.93) == 1
    assert score("a photo of four dogs", form="dense") == 0.5
    assert score("a dog left of a cat and a cat", metadata=[row("a dog left of a cat and a cat")]) == 0


def row(prompt):
    return {
        "prompt": prompt,
        "tag": "x",
        "include": [{"class": "dog", "count": 1}],
        "exclude": [{"class": "cat", "count": 1}],
    }


def test_verdicts_and_matrix():
    reward = load_reward("geneval", detector=Bright(), device="cpu", form="dense")
    media = [quarters(0.95, 0.5, 0.92, 0.2)[0], quarters(0.1, 0.1, 0.95, 0.1)[0]]
    prompts = ["a photo of a dog right of a cat", "two dogs"]
    verdicts = reward.verdicts(media, prompts=prompts[:1] * 2)
    assert [verdict.correct for verdict in verdicts] == [False, True]
    assert verdicts[0].reasons == ("dog: 1 expected, 3 found",)
    reward.detector.calls = 0
    # cat, dogs, relation: 1, 0 (two too many), 0; and all right. Two dogs: two, and one
    assert reward.matrix(media, prompts).tolist() == [[pytest.approx(1 / 3), 1.0], [1.0, 0.5]]
    assert reward.detector.calls == 1


def test_prompts_are_read_before_anything_is_detected():
    reward = load_reward("geneval", detector=Bright(), device="cpu")
    with pytest.raises(RewardError, match="the detector knows no 'zebra'; allowed: cat, dog, orange"):
        reward(smooth_images(2), prompts=["a dog", "a zebra"])
    assert reward.detector.calls == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "soft"}, "form 'soft' is unknown; allowed: correct, dense, strict"),
        ({"weights": "x"}, "give weights or detector, not both"),
        ({"max_objects": 0}, "max_objects is 0"),
        ({"metadata": "nowhere.jsonl"}, "metadata 'nowhere.jsonl': not readable"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(RewardError, match=message):
        load_reward("geneval", detector=Bright(), **options)


def test_contract():
    reward = load_reward("geneval", detector=Bright(), form="dense", threshold=0.45, counting_threshold=0.5)
    prompts = [
        "a dog",
        "two dogs",
        "three dogs",
        "four dogs",
        "a cat left of a dog",
        "a dog above a cat",
        "a cat",
        "dogs",
    ]
    check_contract(reward, prompts=prompts)


def test_colours_are_those_of_clip_on_the_cut_out(clip_directory):
    import open_clip

    reward = load_reward("geneval", detector=Bright(), clip=clip_directory, device="cpu")
    media = smooth_images(1, 40, 64)
    image = Image.fromarray((media[0] * 255).round().byte().permute(1, 2, 0).numpy())
    mask = torch.zeros(40, 64, dtype=torch.bool)
    mask[5:25, 10:40] = True
    found = [Detection("dog", 0.9, (8.4, 4.6, 44.0, 30.2), mask), box("dog", 0, 0, 64, 40)]

    model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{clip_directory}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{clip_directory}")
    painted = np.full((40, 64, 3), 0x99, dtype=np.uint8)
    painted[5:25, 10:40] = np.asarray(image)[5:25, 10:40]
    crops = [Image.fromarray(painted[5:30, 8:44]), image]
    assert np.array_equal(np.asarray(cut_out(image, found[0])), painted[5:30, 8:44])
    colours = ["red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white"]
    with torch.no_grad():
        seen = F.normalize(model.encode_image(torch.stack([preprocess(crop) for crop in crops])), dim=-1)
        columns = []
        for c in colours:
            texts = [f"a photo of a {c} dog", f"a photo of a {c}-colored dog", f"a photo of a {c} object"]
            columns.append(F.normalize(model.encode_text(tokenizer(texts)), dim=-1).mean(0))
        expected = (seen @ F.normalize(torch.stack(columns), dim=-1).T).argmax(1)
        assert reward._colours(image, found, "dog") == [colours[i] for i in expected]
        right = colours[expected[1]]

    class Whole:
        names = ("dog",)

        def __call__(self, images):
            return [[found[1]] for _ in images]

    whole = load_reward("geneval", detector=Whole(), clip=clip_directory, device="cpu")
    prompts = [f"a photo of a {c} dog" for c in colours]
    assert whole.matrix(media, prompts)[0].tolist() == [float(c == right) for c in colours]


def test_cut_out_of_nothing_is_one_pixel():
    image = Image.new("RGB", (6, 4))
    assert cut_out(image, box("dog", 6, 4, 6, 4)).size == (1, 1)
    assert cut_out(image, box("dog", 1, 1, 1.2, 3)).size == (1, 2)


def test_overlaps():
    first, second = box("dog", 0, 0, 10, 10, 0.5), box("dog", 5, 0, 15, 10, 0.9)
    assert iou(first.box, second.box) == pytest.approx(50 / 150)
    assert suppressed([first, second], 0.3) == [second] and suppressed([first, second], 0.34) == [second, first]
    assert suppressed([first, second, box("cat", 5, 0, 15, 10)], 0.3)[0].name == "cat", "names do not compete"
    same = box("dog", 0, 0, 10, 10, 0.4)
    assert suppressed([first, same], 1.0) == [first, same], "1 keeps all"


def test_names_of_other_spellings():
    names = ["Mouse", "pottedplant", "cell_phone", "remote", "sofa", "dog"]
    assert [object_name(name) for name in names] == [
        *("computer mouse", "potted plant", "cell phone", "tv remote", "couch", "dog")
    ]


def test_cells_of_fastest_det():
    output = torch.zeros(5 + 3, 4, 8)
    # row 1, column 2: chance 0.64 of an object, 0.81 of the second name, the centre a half cell to the right
    output[:, 1, 2] = torch.tensor([0.64, math.atanh(0.5), 0.0, math.log(1 / 3), 0.0, 0.1, 0.81, 0.2])
    # a neighbour that sees the same thing worse
    output[:, 1, 3] = torch.tensor([0.6, -math.atanh(0.5), 0.0, math.log(1 / 3), 0.0, 0.1, 0.7, 0.2])
    (found,) = decode_cells(output, ["a", "b", "c"], (40, 160), 0.05)
    assert found.name == "b" and found.score == pytest.approx(0.64**0.6 * 0.81**0.4)
    # centre (2.5 / 8, 1 / 4), width 1/4, height 1/2 of 160 x 40; the top is cut off at the edge
    assert found.box == pytest.approx((30.0, 0.0, 70.0, 20.0), abs=1e-4)


def test_fastest_det_on_a_photograph_of_a_cat():
    pytest.importorskip("onnxruntime")
    weights = golden_file("FastestDet.onnx")
    photo = Image.open(golden_file("hpsv2_demo_image.jpg")).convert("RGB")
    best = max(OnnxDetector(weights)([photo])[0], key=lambda one: one.score)
    assert best.name == "cat" and best.score > 0.7
    two = Image.new("RGB", (1024, 512))
    two.paste(photo, (0, 0))
    two.paste(photo, (512, 0))
    reward = load_reward("geneval", weights=weights, counting_threshold=0.6, threshold=0.5)
    prompts = [
        "a photo of a cat",
        "a photo of a dog",
        "a photo of two cats",
        "a photo of two cats",
        "a photo of one cat",
    ]
    scores = reward([photo, photo, photo, two, two], prompts=prompts)
    assert scores.tolist() == [1.0, 0.0, 0.0, 1.0, 0.0]


def test_onnx_files_are_checked(tmp_path):
    pytest.importorskip("onnxruntime")
    with pytest.raises(RewardError, match="no such file"):
        load_reward("geneval", weights=str(tmp_path / "none.onnx"))
    (tmp_path / "bad.onnx").write_bytes(b"not a model")
    with pytest.raises(RewardError, match="not a readable ONNX model"):
        OnnxDetector(tmp_path / "bad.onnx")
    with pytest.raises(RewardError, match=r"\[1, 7, h, w\] is expected"):
        OnnxDetector(golden_file("FastestDet.onnx"), names=["a", "b"])


IMAGES = {
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}
LABELS = {0: "dog", 1: "sofa", 2: "mouse"}


def write_detector(path, model, images):
    model.config.id2label = LABELS
    model.config.label2id = {name: index for index, name in LABELS.items()}
    model.save_pretrained(path)
    (path / "preprocessor_config.json").write_text(json.dumps({**IMAGES, **images}))
    return path


@pytest.fixture(scope="module")
def detr(tmp_path_factory):
    from transformers import DetrConfig, DetrForObjectDetection, ResNetConfig

    torch.manual_seed(0)
    backbone = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", out_features=["stage2"]
    )
    config = DetrConfig(
        backbone_config=backbone, use_timm_backbone=False, use_pretrained_backbone=False, backbone=None, num_queries=5,
        d_model=16, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=16, decoder_ffn_dim=16,
        encoder_attention_heads=2, decoder_attention_heads=2, num_labels=3,
    )  # fmt: skip
    model = DetrForObjectDetection(config)
    size = {"shortest_edge": 48, "longest_edge": 64}
    return write_detector(
        tmp_path_factory.mktemp("detr"), model, {"image_processor_type": "DetrImageProcessor", "size": size}
    )


@pytest.fixture(scope="module")
def mask2former(tmp_path_factory):
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

    torch.manual_seed(0)
    backbone = SwinConfig(
        image_size=64, embed_dim=16, depths=[1, 1, 1, 1], num_heads=[2, 2, 2, 2], window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = Mask2FormerConfig(
        backbone_config=backbone, use_timm_backbone=False, use_pretrained_backbone=False, backbone=None, hidden_dim=32,
        feature_size=32, mask_feature_size=32, num_queries=6, encoder_layers=1, decoder_layers=2, dim_feedforward=16,
        encoder_feedforward_dim=16, num_attention_heads=2, num_labels=3,
    )  # fmt: skip
    model = Mask2FormerForUniversalSegmentation(config)
    images = {"image_processor_type": "Mask2FormerImageProcessor", "size": {"shortest_edge": 48, "longest_edge": 96}}
    return write_detector(
        tmp_path_factory.mktemp("mask2former"), model, {**images, "size_divisor": 32, "num_labels": 3}
    )


def pictures(count, height, width):
    media = smooth_images(count, height, width)
    return [Image.fromarray((one * 255).round().byte().permute(1, 2, 0).numpy()) for one in media]


def test_detr(detr):
    from transformers import AutoImageProcessor, DetrForObjectDetection

    detector = TransformersDetector(detr)
    assert set(detector.names) == {"dog", "couch", "computer mouse"}
    images = pictures(2, 40, 60)
    with torch.no_grad():
        found = detector(images)
        pixels = AutoImageProcessor.from_pretrained(detr)(images=images[1], return_tensors="pt")
        outputs = DetrForObjectDetection.from_pretrained(detr).eval()(**pixels)
    chances = outputs.logits[0].softmax(-1)[:, :-1]
    assert len(found[1]) == 5
    for one, chance, (x, y, w, h) in zip(found[1], chances, outputs.pred_boxes[0].tolist(), strict=True):
        assert one.name == ["dog", "couch", "computer mouse"][int(chance.argmax())]
        assert one.score == pytest.approx(chance.max().item(), abs=1e-5) and one.mask is None
        expected = ((x - w / 2) * 60, (y - h / 2) * 40, (x + w / 2) * 60, (y + h / 2) * 40)
        assert one.box == pytest.approx(
            [min(max(v, 0), s) for v, s in zip(expected, (60, 40, 60, 40), strict=True)], abs=1e-3
        )


def test_mask2former(mask2former):
    from transformers import AutoImageProcessor, Mask2FormerForUniversalSegmentation

    detector = TransformersDetector(mask2former, least=0.0)
    images = pictures(2, 30, 50)
    with torch.no_grad():
        found = detector(images)[1]
        pixels = AutoImageProcessor.from_pretrained(mask2former)(images=images[1], return_tensors="pt")
        assert pixels["pixel_mask"].all(), "nothing is padded"
        outputs = Mask2FormerForUniversalSegmentation.from_pretrained(mask2former).eval()(**pixels)
    chances = outputs.class_queries_logits[0].softmax(-1)[:, :3]
    logits = F.interpolate(outputs.masks_queries_logits, size=(30, 50), mode="bilinear")[0]
    expected = []
    for query in range(6):
        inside = logits[query] > 0
        for label in range(3):
            if inside.any():
                expected.append((chances[query, label] * logits[query].sigmoid()[inside].mean()).item())
    assert 3 < len(expected) == len(found)
    assert sorted(one.score for one in found) == pytest.approx(sorted(expected), abs=1e-4)
    for one in found:
        ys, xs = np.nonzero(one.mask.numpy())
        assert one.box == (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)


@pytest.mark.parametrize("kind", ["detr", "mask2former"])
def test_reward_with_a_detector_of_transformers(kind, request, clip_directory):
    path = request.getfixturevalue(kind)
    reward = load_reward("geneval", weights=path, clip=clip_directory, threshold=0.06, form="dense", device="cpu")
    media = smooth_images(3)
    scores = reward(media, prompts=["a red dog", "a couch left of a dog", "a computer mouse"])
    assert scores.shape == (3,) and all(0 <= score <= 1 for score in scores.tolist())
    half = load_reward("geneval", weights=path, dtype="bf16", device="cpu")
    assert next(half.detector.parameters()).dtype == torch.bfloat16
    assert half(media, prompts=["a dog"] * 3).shape == (3,)


def test_other_models_are_refused(clip_directory, tmp_path):
    from transformers import ViTConfig

    config = ViTConfig(architectures=["ViTForImageClassification"])
    config.save_pretrained(tmp_path)
    with pytest.raises(RewardError, match="is a ViTForImageClassification; a detector is needed"):
        load_reward("geneval", weights=tmp_path)
