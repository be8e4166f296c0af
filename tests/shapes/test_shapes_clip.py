"""The training of the Shapes CLIP: twins, losses, agreement with the oracle, and both stages on a few pictures."""

import math
from collections import Counter
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from mmalign.core.errors import UserError
from mmalign.shapes.agreement import Samples, agreement, read_samples
from mmalign.shapes.language import caption, parse
from mmalign.shapes.oracle import Reading, judge, read
from mmalign.shapes.train_clip import (
    KINDS,
    build_clip_corpus,
    contrastive_loss,
    edit,
    mirrored,
    preferred,
    probe_loss,
    shifted,
    train_clip,
    twin_accuracy,
)
from mmalign.shapes.world import inside, is_held_out, render, sample_scene


def test_an_edit_changes_one_thing_and_stays_in_the_training_world():
    rng = np.random.default_rng(0)
    seen = Counter()
    for _ in range(300):
        scene = sample_scene(rng)
        twin, kind = edit(rng, scene)
        seen[kind] += 1
        assert not is_held_out(twin) and all(map(inside, twin.objects))
        assert (twin.background, twin.quality) == (scene.background, scene.quality)
        if kind == "count":
            assert abs(len(twin.objects) - len(scene.objects)) == 1
            continue
        fields = {"shape": {"shape"}, "colour": {"colour"}, "size": {"size", "radius"}, "order": {"x", "y"}}[kind]
        changed = [
            {name for name in vars(a) if getattr(a, name) != getattr(b, name)}
            for a, b in zip(scene.objects, twin.objects, strict=True)
        ]
        assert set.union(*changed) <= fields and sum(map(bool, changed)) == (2 if kind == "order" else 1)
    assert set(seen) == {"shape", "colour", "size", "count", "order"}


def test_captions_are_true_of_their_own_picture_and_false_of_the_twin():
    corpus = build_clip_corpus(40, wordings=2, workers=1)
    assert corpus.images.shape == (40, 2, 64, 64, 3) and len(corpus.captions) == 40 * 2 * 2
    own, other = [], []
    for index in range(40):
        readings = [read(picture) for picture in corpus.images[index]]
        for w in range(2):
            for side in (0, 1):
                query = parse(corpus.captions[(index * 2 + w) * 2 + side])
                own.append(judge(query, readings[side]))
                other.append(judge(query, readings[1 - side]))
    assert np.mean(np.array(own) > 1 - 1e-6) > 0.93  # the oracle misreads a few of the degraded ones
    assert np.mean(np.array(other) < 1 - 1e-6) > 0.93


def test_the_same_seed_gives_the_same_corpus():
    one, two = (build_clip_corpus(12, workers=workers) for workers in (1, 2))
    assert one.captions == two.captions and np.array_equal(one.images, two.images)
    assert (one.contents.sum(-1) > 0).all() and one.contents.shape == (12, 2, len(KINDS))


def test_contrastive_loss_of_embeddings_without_a_clue():
    """All cosines equal: cross-entropy over the 2B captions, and log 2 a tenth for the worse picture."""
    images, texts = torch.ones(2 * 4 + 1, 3), torch.ones(2 * 4, 3)
    contents = torch.eye(8, len(KINDS), dtype=torch.long)
    loss = contrastive_loss(images, texts, contents, torch.tensor(7.0))
    assert loss.item() == pytest.approx(math.log(8) + 0.1 * math.log(2), rel=1e-6)


def test_captions_of_other_scenes_with_the_same_contents_are_no_negatives_but_the_twin_is():
    images, texts = torch.ones(2 * 4 + 1, 3), torch.ones(2 * 4, 3)
    contents = torch.zeros(8, len(KINDS), dtype=torch.long)  # all equal: only the twin is left as a negative
    loss = contrastive_loss(images, texts, contents, torch.tensor(7.0))
    assert loss.item() == pytest.approx(math.log(2) * 1.1, rel=1e-6)


def test_twin_accuracy_compares_a_caption_with_both_pictures():
    images = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    texts = torch.tensor([[1.0, 0.1], [0.1, 1.0], [0.1, 1.0], [0.2, 1.0]])  # the third caption is wrong
    assert twin_accuracy(images, texts) == 0.75


def test_probe_loss_of_a_blind_probe():
    contents = torch.zeros(3, len(KINDS), dtype=torch.long)
    assert probe_loss(torch.zeros(3, len(KINDS) * 5), contents).item() == pytest.approx(len(KINDS) * math.log(5))


def test_agreement_counts_pairs_of_one_prompt_and_ties_as_halves():
    samples = Samples(
        images=np.zeros((6, 64, 64, 3), np.uint8),
        prompts=["a", "a", "a", "b", "b", "b"],
        correctness=np.array([0.0, 0.5, 1.0, 0.5, 0.5, 0.5]),
        readings=[Reading((), "white", quality, 1.0, 1.0) for quality in (0.1, 0.1, 0.1, 0.2, 0.9, 0.25)],
    )
    found = agreement("r", np.array([1.0, 1.0, 2.0, 0.0, 1.0, 3.0]), samples)
    assert (found.correctness_pairs, found.quality_pairs) == (3, 2)  # 0.2 against 0.25 differ by too little
    assert found.correctness == pytest.approx(2.5 / 3)
    assert found.quality == 0.5  # 0.9 above 0.2, but not above 0.25


def test_a_picture_is_preferred_when_clearly_more_correct_or_equal_and_clearly_finer():
    better = preferred(np.array([1.0, 0.5, 0.5, 0.52]), np.array([0.0, 0.9, 0.3, 0.1]))
    assert {(int(a), int(b)) for a, b in np.argwhere(better)} == {(0, 1), (0, 2), (0, 3), (1, 2)}


def test_a_mirrored_prompt_is_true_of_the_mirrored_picture():
    rng, checked = np.random.default_rng(5), 0
    while checked < 30:
        scene = sample_scene(rng, crisp=1.0)
        text = caption(rng, scene)
        if scene.relation is None or "left" not in text and "right" not in text:
            continue
        picture = render(scene)
        assert judge(parse(mirrored(text)), read(picture[:, ::-1])) == judge(parse(text), read(picture))
        assert mirrored(mirrored(text)) == text
        checked += 1


def test_shifting_repeats_the_border():
    image = np.arange(12).reshape(1, 3, 4, 1)
    assert np.array_equal(shifted(image, 0, 0), image)
    assert shifted(image, 1, -2)[0, :, :, 0].tolist() == [[2, 3, 3, 3], [2, 3, 3, 3], [6, 7, 7, 7]]


def png(pixels):
    file = BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder, rng = tmp_path_factory.mktemp("samples"), np.random.default_rng(3)
    rows = []
    while len(rows) < 24:
        scene = sample_scene(rng, crisp=1.0)
        if len(scene.objects) == 1:
            thing = scene.objects[0]
            prompt = f"a {thing.colour} {thing.shape}"
            rows += [{"prompt": prompt, "image": png(render(s))} for s in (scene, edit(rng, scene)[0])]
    pq.write_table(pa.Table.from_pylist(rows), folder / "images.parquet")
    return folder


def test_samples_are_read_and_judged(samples):
    read = read_samples(samples)
    assert read.images.shape == (24, 64, 64, 3) and (read.correctness[::2] == 1).all()
    assert len(read.pairs()) > 6


def test_both_stages_write_a_model_that_open_clip_loads(samples, tmp_path):
    from rewards import load_reward

    said: list[str] = []
    first, second = tmp_path / "first", tmp_path / "second"
    train_clip(first, scenes=12, steps=2, batch_size=4, log=said.append)
    train_clip(second, start=first, samples=[samples], preference_steps=2, batch_size=4, log=said.append)
    assert any("twins told apart" in line for line in said) and any("pairs told apart" in line for line in said)
    read = read_samples(samples)
    media = torch.from_numpy(read.images).permute(0, 3, 1, 2).float() / 255
    one, two = (load_reward("clip", weights=folder)(media, prompts=read.prompts) for folder in (first, second))
    assert one.isfinite().all() and not torch.equal(one, two)
    train_clip(tmp_path / "mixed", start=second, anchor=first, samples=[samples], preference_steps=0, log=said.append)
    weights = [load_file(folder / "open_clip_model.safetensors") for folder in (first, second, tmp_path / "mixed")]
    for name, mixed in weights[2].items():
        expected = 0.15 * weights[0][name].double() + 0.85 * weights[1][name].double()
        assert torch.allclose(mixed.double(), expected, rtol=2e-3, atol=1e-4), name


def test_agreement_needs_samples(tmp_path):
    with pytest.raises(UserError, match="pairs sample"):
        read_samples(tmp_path)
