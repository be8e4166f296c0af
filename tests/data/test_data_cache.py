"""Pairs are encoded once, dealt out reproducibly, and both sides of a pair are treated alike.

The tests named after OneTrainer #1403 guard against bugs found there in pair training: dropout drawn per side, a cache
key without the side of the pair, size conditioning with the wrong batch, and pairs torn apart by batching.
"""

from __future__ import annotations

import math
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tiny_models import build_tiny_sd, build_tiny_sdxl

from mmalign.config.sections import DataConfig
from mmalign.core.errors import UserError
from mmalign.core.hashing import content_key
from mmalign.core.io.images import decode_image, encode_png
from mmalign.data.encoded.cache import CachedPairs, build_pair_cache
from mmalign.data.encoded.store import TensorStore
from mmalign.data.pairs import read_pairs
from pipelines import load_generator

SIZE = 16


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    return {
        "kl": build_tiny_sd(folder / "kl"),
        "tiny": build_tiny_sd(folder / "tiny", vae="tiny"),
        "sdxl": build_tiny_sdxl(folder / "sdxl"),
    }


class Counted:
    """A real generator that counts what it encodes."""

    def __init__(self, path: str) -> None:
        self.generator = load_generator(path)
        self.images, self.prompts = 0, []

    def __getattr__(self, name: str) -> object:
        return getattr(self.generator, name)

    def encode_posterior(self, media: torch.Tensor) -> object:
        self.images += len(media)
        return self.generator.encode_posterior(media)

    def encode_prompts(self, prompts: list[str]) -> object:
        self.prompts += prompts
        return self.generator.encode_prompts(prompts)


@pytest.fixture
def generator(paths) -> Counted:
    return Counted(paths["kl"])


def noise_png(number: int, height: int = SIZE, width: int = SIZE) -> bytes:
    return encode_png(torch.rand(3, height, width, generator=torch.Generator().manual_seed(number)))


def write_pairs(path: Path, rows: list[tuple[str, bytes, bytes]], **columns: list) -> Path:
    captions, first, second = map(list, zip(*rows, strict=True))
    count = len(rows)
    table = {"caption": captions, "jpg_0": first, "jpg_1": second, "label_0": [1] * count, "label_1": [0] * count}
    pq.write_table(pa.table(table | {"uid": [f"p{n}" for n in range(count)]} | columns), path)
    return path


def cache(generator: object, path: Path, **options: object) -> CachedPairs:
    build = {key: options.pop(key) for key in ("batch_size", "memory_limit") if key in options}
    config = DataConfig(pairs=str(path), cache=str(path.parent / "cache"), **options)
    return build_pair_cache(read_pairs(str(path), config), generator, config, **build)


@pytest.fixture
def three_pairs(tmp_path) -> Path:
    """Three pairs over four images and two prompts: the first and the last share an image, and so do prompts."""
    images = [noise_png(number) for number in range(5)]
    rows = [("red circle", images[0], images[1]), ("star", images[2], images[3]), ("red circle", images[1], images[4])]
    return write_pairs(tmp_path / "pairs.parquet", rows)


def test_latents_are_draws_from_the_posterior_of_the_right_image(generator, three_pairs):
    pairs = cache(generator, three_pairs)
    media = torch.stack([decode_image(noise_png(number)) for number in (0, 2, 1, 3)])
    mean, std = generator.generator.encode_posterior(media)
    draws = torch.stack([pairs.batch([0, 1, 2], epoch, seed=7).chosen for epoch in range(400)])
    assert float(std.min()) > 0
    close = dict(atol=float(std.max()) / 4, rtol=0)
    torch.testing.assert_close(draws.mean(0), mean[:3], **close)
    torch.testing.assert_close(draws.std(0), std[:3], atol=0, rtol=0.25)
    rejected = torch.stack([pairs.batch([1], epoch, seed=7).rejected for epoch in range(400)])
    torch.testing.assert_close(rejected.mean(0), mean[3:], **close)


def test_each_unique_image_and_prompt_is_encoded_once(generator, three_pairs, tmp_path):
    pairs = cache(generator, three_pairs, batch_size=2)
    assert generator.images == 5
    assert generator.prompts == ["red circle", "star"]
    shared = pairs.slots[:, :, 0]
    assert shared[0, 1] == shared[2, 0] and len(shared.unique()) == 5
    batch = pairs.batch([0, 2], epoch=1, seed=0)
    assert torch.equal(batch.rejected[0], batch.chosen[1])  # one image, one draw an epoch

    cache(generator, three_pairs)
    assert generator.images == 5 and len(generator.prompts) == 2
    rows = [("red circle", noise_png(0), noise_png(1)), ("ring", noise_png(9), noise_png(3))]
    (tmp_path / "pairs.parquet").unlink()
    cache(generator, write_pairs(tmp_path / "pairs.parquet", rows))
    assert generator.images == 6 and generator.prompts[2:] == ["ring"]


def test_a_batch_depends_on_seed_id_and_epoch_not_on_its_neighbours(generator, three_pairs):
    pairs = cache(generator, three_pairs, caption_dropout=0.5, flip=True)
    whole = pairs.batch([0, 1, 2], epoch=3, seed=1)
    for order in ([2, 0], [1], [1, 2, 0]):
        part = pairs.batch(order, epoch=3, seed=1)
        assert part.ids == [f"p{index}" for index in order]
        for name in ("chosen", "rejected"):
            assert torch.equal(getattr(part, name), getattr(whole, name)[order])
        assert torch.equal(part.cond.prompt_embeds, whole.cond.prompt_embeds[order])
    assert not torch.equal(pairs.batch([0], 4, 1).chosen, whole.chosen[:1])
    assert not torch.equal(pairs.batch([0], 3, 2).chosen, whole.chosen[:1])
    assert whole.epoch == 3


@pytest.mark.parametrize("memory_limit", [0, 2**30])
def test_memory_mapped_and_in_memory_give_the_same(generator, three_pairs, memory_limit):
    pairs = cache(generator, three_pairs, memory_limit=memory_limit)
    assert pairs.latents.in_memory == pairs.prompts.in_memory == bool(memory_limit)
    again = cache(Counted(generator.root), three_pairs).batch([2, 0, 2], 0, 0)
    batch = pairs.batch([2, 0, 2], 0, 0)
    assert torch.equal(batch.chosen, again.chosen) and torch.equal(batch.cond.prompt_embeds, again.cond.prompt_embeds)


def test_autoencoder_without_a_posterior_stores_and_draws_the_mean(paths, three_pairs):
    generator = load_generator(paths["tiny"])
    pairs = cache(generator, three_pairs)
    assert set(pairs.latents[torch.tensor([0])]) == {"mean"}
    expected = generator.encode(decode_image(noise_png(2))[None])
    for epoch in (0, 1):
        torch.testing.assert_close(pairs.batch([1], epoch, 0).chosen, expected, atol=1e-5, rtol=1e-5)


def test_caption_dropout_is_drawn_once_per_pair(generator, three_pairs):
    """OneTrainer #1403: with a draw for each side, chosen and rejected would be compared under different prompts."""
    pairs = cache(generator, three_pairs, caption_dropout=0.3)
    empty = generator.generator.encode_prompts([""]).prompt_embeds[0]
    full = generator.generator.encode_prompts(["star"]).prompt_embeds[0]
    dropped = 0
    for epoch in range(300):
        batch = pairs.batch([1], epoch, seed=5)
        assert len(batch.cond) == 1  # one row, used for both sides
        is_empty = torch.allclose(batch.cond.prompt_embeds[0], empty, atol=1e-5)
        assert is_empty or torch.allclose(batch.cond.prompt_embeds[0], full, atol=1e-5)
        dropped += is_empty
    assert 65 <= dropped <= 115
    assert "" not in generator.prompts  # it comes from `unconditional`, once


def test_flip_and_crop_are_the_same_for_both_sides(generator, tmp_path):
    """A pair of an image with itself must stay one, whatever is drawn."""
    rows = [("star", noise_png(n, 16, 40), noise_png(n, 16, 40)) for n in range(12)]
    pairs = cache(generator, write_pairs(tmp_path / "p.parquet", rows), flip=True, crop="random")
    assert torch.equal(pairs.slots[:, 0], pairs.slots[:, 1])
    flipped = set()
    for epoch in range(6):
        batch = pairs.batch(range(12), epoch, 0)
        assert torch.equal(batch.chosen, batch.rejected)
        flipped |= {(name, pairs._flipped(name, epoch, 0)) for name in batch.ids}
    assert len(flipped) > 18  # nearly every pair was seen both ways
    assert generator.images == 24


def test_flipped_latents_are_those_of_the_mirrored_image(paths, tmp_path):
    generator = load_generator(paths["tiny"])
    pairs = cache(generator, write_pairs(tmp_path / "p.parquet", [("star", noise_png(0), noise_png(1))]), flip=True)
    media = decode_image(noise_png(0))[None]
    for epoch in range(8):
        view = media.flip(-1) if pairs._flipped("p0", epoch, 0) else media
        torch.testing.assert_close(pairs.batch([0], epoch, 0).chosen, generator.encode(view), atol=1e-5, rtol=1e-5)


def test_equal_names_on_both_sides_do_not_share_a_cache_entry(generator, tmp_path):
    """OneTrainer #1403: a key made from the file name served the chosen latents for the rejected image too."""
    for folder, number in (("chosen", 0), ("rejected", 1)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "one.png").write_bytes(noise_png(number))
    (tmp_path / "chosen" / "one.txt").write_text("star")
    first = cache(generator, tmp_path / "chosen" / "..").batch([0], 0, 0)
    assert not torch.allclose(first.chosen, first.rejected)
    (tmp_path / "rejected" / "one.png").write_bytes(noise_png(2))  # a file replaced under its old name
    second = cache(generator, tmp_path / "chosen" / "..").batch([0], 0, 0)
    assert torch.equal(first.chosen, second.chosen) and not torch.allclose(first.rejected, second.rejected)
    assert generator.images == 3


def test_cache_key_holds_resolution_crop_flip_and_model(generator, paths, tmp_path):
    path = write_pairs(tmp_path / "p.parquet", [("star", noise_png(0, 16, 32), noise_png(1, 16, 32))])
    keys = [
        cache(generator, path).latent_keys,
        cache(generator, path, resolution=8).latent_keys,
        cache(generator, path, crop="random").latent_keys,
        cache(generator, path, flip=True).latent_keys[1::2],
        cache(load_generator(paths["tiny"]), path).latent_keys,
        cache(load_generator(paths["kl"], dtype="bf16"), path).latent_keys,
    ]
    assert len({key for group in keys for key in group}) == 12
    assert cache(generator, path, resolution=8).batch([0], 0, 0).chosen.shape == (1, 4, 4, 4)


def test_size_conditioning_has_one_row_a_pair(paths, tmp_path):
    """OneTrainer #1403: SDXL's size ids were batched for one side while the latents held both."""
    generator = load_generator(paths["sdxl"])
    path = write_pairs(tmp_path / "p.parquet", [("star", noise_png(n, 24, 24), noise_png(n + 3)) for n in range(3)])
    batch = cache(generator, path, resolution=8).batch([2, 0], 0, 0)
    assert batch.cond.time_ids.tolist() == [[8, 8, 0, 0, 8, 8]] * 2
    both = batch.cond.repeat_interleave(2)
    x = torch.stack([batch.chosen, batch.rejected], dim=1).flatten(0, 1)
    assert generator.predict(x, torch.full((4,), 500), both).shape == x.shape
    dropped = cache(generator, path, resolution=8, caption_dropout=0.999).batch([0, 1, 2], 0, 0)
    assert not dropped.cond.prompt_embeds.any() and not dropped.cond.pooled.any()  # SDXL guides with zeros
    assert dropped.cond.time_ids.tolist() == [[8, 8, 0, 0, 8, 8]] * 3


def test_pairs_of_unlike_shapes_stay_together_in_any_batch(generator, tmp_path):
    """OneTrainer #1403: bucketing by aspect ratio or timestep tore the sides of a pair apart."""
    shapes = [(16, 16), (16, 48), (48, 16), (32, 32), (16, 20), (20, 16)]
    rows = [(f"number {n}", noise_png(n, *shape), noise_png(100 + n, *shape)) for n, shape in enumerate(shapes)]
    pairs = cache(generator, write_pairs(tmp_path / "p.parquet", rows))
    alone = [pairs.batch([index], 0, 0) for index in range(6)]
    order = [4, 1, 5, 0, 3, 2]
    batch = pairs.batch(order, 0, 0)
    for row, index in enumerate(order):
        assert torch.equal(batch.chosen[row], alone[index].chosen[0])
        assert torch.equal(batch.rejected[row], alone[index].rejected[0])
        assert torch.equal(batch.cond.prompt_embeds[row], alone[index].cond.prompt_embeds[0])


def test_margins_reach_the_batch_pair_by_pair(generator, tmp_path):
    rows = [("star", noise_png(0), noise_png(1)), ("ring", noise_png(2), noise_png(3))]
    path = write_pairs(tmp_path / "p.parquet", rows, score_0=[0.9, 0.25], score_1=[0.4, 0.5])
    assert cache(generator, path).batch([1, 0], 0, 0).margins.tolist() == pytest.approx([-0.25, 0.5])
    path = write_pairs(tmp_path / "some.parquet", rows, score_0=[0.9, None], score_1=[0.4, 0.5])
    pairs = cache(generator, path)
    assert pairs.batch([0], 0, 0).margins.tolist() == [0.5]
    assert pairs.batch([1, 0], 0, 0).margins.tolist() == pytest.approx([math.nan, 0.5], nan_ok=True)
    assert cache(generator, write_pairs(tmp_path / "none.parquet", rows)).batch([1], 0, 0).margins is None


def test_unreadable_image_names_pair_and_side(generator, tmp_path):
    rows = [("star", noise_png(0), noise_png(1)), ("star", noise_png(2), b"no image")]
    path = write_pairs(tmp_path / "p.parquet", rows)
    with pytest.raises(UserError, match=r"p.parquet: pair 'p1', rejected: unreadable image \(8 bytes"):
        cache(generator, path)


def test_progress_counts_pairs(generator, three_pairs):
    done = []
    config = DataConfig(pairs=str(three_pairs), cache=str(three_pairs.parent / "cache"))
    build_pair_cache(read_pairs(str(three_pairs), config), generator, config, progress=done.append)
    assert sum(done) == 3


def test_encoders_are_not_needed_once_everything_is_cached(generator, three_pairs):
    cache(generator, three_pairs)
    generator.generator.free_encoders()
    batch = cache(generator, three_pairs, caption_dropout=0.5).batch([0, 1, 2], 0, 0)
    assert len(batch) == 3 and generator.generator._encoders == {}


def test_store_survives_a_damaged_shard_and_an_interruption(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("mmalign.data.encoded.store.SHARD_ROWS", 2)
    store = TensorStore(tmp_path)
    for number in range(5):
        store.add(content_key(number), {"x": torch.full((2,), float(number))})
    assert len(store) == 4  # the fifth is lost with the process
    again = TensorStore(tmp_path)
    assert [content_key(number) in again for number in range(5)] == [True] * 4 + [False]
    rows = again.rows([content_key(number) for number in (3, 0, 2)], memory_limit=0)
    assert rows[torch.tensor([2, 0])]["x"].tolist() == [[2, 2], [3, 3]]
    broken = next(tmp_path.glob("*.safetensors"))
    broken.write_bytes(broken.read_bytes()[:-4])
    assert len(TensorStore(tmp_path)) == 2
    assert "is damaged" in capsys.readouterr().err
    assert len(list(tmp_path.iterdir())) == 1


def test_keys_keep_parts_apart():
    assert content_key("ab", "c") != content_key("a", "bc") != content_key(b"ab", "c")
    assert content_key("1") != content_key(1)
    assert len(content_key("x")) == 32


def test_pairs_that_cannot_be_read_are_an_error_or_left_out(generator, tmp_path, capsys):
    rows = [("red circle", noise_png(0), noise_png(1)), ("star", b"broken", noise_png(2)), ("ring", noise_png(3), b"")]
    rows += [("star", noise_png(4), noise_png(5))]
    path = write_pairs(tmp_path / "pairs.parquet", rows, score_0=[1.0, 2.0, 3.0, 4.0], score_1=[0.0] * 4)
    with pytest.raises(UserError, match=r"pair 'p1', chosen.*data.on_bad=skip leaves such records out"):
        cache(generator, path)
    pairs = cache(generator, path, on_bad="skip")
    said = capsys.readouterr().err
    assert "pair 'p1', chosen" in said and "2 of 4 are left out of the training" in said
    assert pairs.ids == ["p0", "p3"] and pairs.kept.tolist() == [0, 3] and len(pairs) == 2
    assert pairs.prompt_slots.tolist() == [0, 1] and pairs.margins.tolist() == [1.0, 4.0]
    alone = cache(generator, write_pairs(tmp_path / "alone.parquet", [rows[0], rows[3]], uid=["p0", "p3"]))
    assert torch.equal(pairs.batch([1], 0, 0).chosen, alone.batch([1], 0, 0).chosen)
    with pytest.raises(UserError, match="none of 1 can be encoded"):
        cache(generator, write_pairs(tmp_path / "none.parquet", [rows[1]]), on_bad="skip")
