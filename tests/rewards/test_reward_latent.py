"""The latent reward on tiny models of each family: the network against the full UNet, files, noisy latents, pixels."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from contract import check_contract, smooth_images
from tiny_models import build_tiny_sd, build_tiny_sdxl

from pipelines import load_generator
from rewards import RewardError, load_reward
from rewards.backbones.latent_files import LatentParts
from rewards.backbones.latent_network import LatentNetwork
from rewards.latent import LatentReward

KINDS = ("sd15", "sd21", "sdxl")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("latent")
    return {
        "sd15": build_tiny_sd(folder / "sd15"),
        "sd21": build_tiny_sd(folder / "sd21", "v_prediction", vae="tiny", seed=1),
        "sdxl": build_tiny_sdxl(folder / "sdxl", seed=2),
    }


def parts_of(generator: Any, **options: Any) -> LatentParts:
    suffixes = [name.removeprefix("text_encoder") for name in generator.text_names if name.startswith("text_encoder")]
    torch.manual_seed(0)
    network = LatentNetwork(
        generator.network,
        [generator.encoder(f"text_encoder{suffix}") for suffix in suffixes],
        image_size=generator.image_size,
        **options,
    )
    tokenizers = [generator.encoder(f"tokenizer{suffix}") for suffix in suffixes]
    return LatentParts(network, generator.encoder("vae"), generator.scheduler, tokenizers)


@pytest.fixture(scope="module")
def folders(models: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("saved")
    for kind, model in models.items():
        parts_of(load_generator(model, device="cpu")).save(root / kind)
    return {kind: root / kind for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_features_are_means_within_the_whole_unet(models: dict[str, str], kind: str) -> None:
    """Hooks on the untouched UNet, called as its pipeline does, see what the half computes."""
    generator = load_generator(models[kind], device="cpu")
    unet, seen = generator.network, []
    for block in unet.down_blocks:
        # What a block hands on is its last state; where it shrinks the latents, what the downsampler is given.
        if block.downsamplers is None:
            block.register_forward_hook(lambda module, given, output: seen.append(output[0].mean((2, 3))))
        else:
            block.downsamplers[0].register_forward_pre_hook(lambda module, given: seen.append(given[0].mean((2, 3))))
    unet.mid_block.register_forward_hook(lambda module, given, output: seen.append(output.mean((2, 3))))
    x, t = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([400, 3])
    prompts = ["a red circle", "two blue squares"]
    with torch.no_grad():
        generator.predict(x, t, generator.encode_prompts(prompts))
        prompted = list(seen)
        seen.clear()
        generator.predict(x, t, generator.encode_prompts(["", ""]))
        unprompted = list(seen)
        parts = parts_of(generator, guidance=3.0)
        texts, empty = parts.network.encode(parts.tokens(prompts)), parts.network.encode(parts.tokens([""]))
        found = parts.network.features(x, t, texts, empty)
        parts.network.guidance = 1.0
        plain = parts.network.features(x, t, texts, empty)
    middle = unprompted[-1] + 3.0 * (prompted[-1] - unprompted[-1])
    torch.testing.assert_close(found, torch.cat([*prompted[:-1], middle], 1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(plain, torch.cat(prompted, 1), rtol=1e-5, atol=1e-6)
    assert found.shape == (2, 8 + 16 + 16) and (middle - prompted[-1]).abs().max() > 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_score_is_a_scaled_cosine_of_what_was_saved(
    models: dict[str, str], folders: dict[str, Path], kind: str
) -> None:
    reward = LatentReward(weights=folders[kind], device="cpu")
    parts = parts_of(load_generator(models[kind], device="cpu"))
    x, t = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(2)), torch.tensor([1, 500, 999])
    prompts = ["a red circle", "a star", "a red circle"]
    with torch.no_grad():
        texts, empty = parts.network.encode(parts.tokens(prompts)), parts.network.encode(parts.tokens([""]))
        visual = parts.network.features(x, t, texts, empty) @ parts.network.visual_projection.weight.T
        cosine = torch.cosine_similarity(visual, texts.pooled)  # the text projection starts as the identity
    found = reward.score_latents(x, t, prompts)
    assert found.tolist() == pytest.approx((math.exp(2.6592) * cosine).tolist(), rel=1e-4)
    assert math.exp(2.6592) == pytest.approx(1 / 0.07, rel=1e-4)
    one_by_one = [reward.score_latents(x[i : i + 1], int(t[i]), [prompts[i]]).item() for i in range(3)]
    assert one_by_one == pytest.approx(found.tolist(), rel=1e-4)
    assert not found.requires_grad and found.std() > 1e-3


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_contract(folders: dict[str, Path], kind: str) -> None:
    check_contract(LatentReward(weights=folders[kind], device="cpu"), atol=2e-4, spread=1e-3)


def test_pixels_are_encoded_and_moved_to_the_level_with_one_noise(
    models: dict[str, str], folders: dict[str, Path]
) -> None:
    generator = load_generator(models["sd15"], device="cpu")
    reward = LatentReward(weights=folders["sd15"], device="cpu", level=200)
    images, prompts = smooth_images(2, 16, 16), ["a star", "a red circle"]
    noise = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64).float()
    noisy = generator.process.add_noise(
        generator.encode(images), noise.expand(2, -1, -1, -1), torch.tensor([200, 200])
    )
    torch.testing.assert_close(
        reward(images, prompts=prompts), reward.score_latents(noisy, 200, prompts), rtol=1e-4, atol=1e-4
    )


def test_latents_of_another_autoencoder_are_told_apart(models: dict[str, str], folders: dict[str, Path]) -> None:
    reward = LatentReward(weights=folders["sd15"], device="cpu")
    generators = {kind: load_generator(model, device="cpu") for kind, model in models.items()}
    same = {kind: reward.same_latents(generator.encode) for kind, generator in generators.items()}
    assert same == {"sd15": True, "sd21": False, "sdxl": False}
    assert not reward.same_latents(lambda media: generators["sd15"].encode(media)[:, :3])
    assert not reward.same_latents(lambda media: 0.13025 / 0.18215 * generators["sd15"].encode(media))


def test_directory_holds_no_pickle_and_no_second_half(folders: dict[str, Path]) -> None:
    from safetensors.torch import load_file

    for folder in folders.values():
        assert {path.suffix for path in folder.rglob("*") if path.is_file()} <= {".json", ".safetensors", ".txt"}
        names = load_file(folder / "model.safetensors")
        assert any(name.startswith("unet.mid_block") for name in names)
        assert not [name for name in names if "up_blocks" in name or "conv_out" in name]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give weights=DIR"),
        ({"weights": "nowhere"}, "nowhere holds no latent reward"),
        ({"level": 1000}, "level is 1000; 0 to 999 are allowed"),
    ],
)
def test_wrong_input(folders: dict[str, Path], options: dict[str, Any], message: str) -> None:
    given = {"weights": folders["sd15"], **options} if "level" in options else options
    with pytest.raises(RewardError, match=message):
        load_reward("latent", device="cpu", **given)


def test_half_a_directory_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    import shutil

    copy = Path(shutil.copytree(folders["sd15"], tmp_path / "copy"))
    shutil.rmtree(copy / "vae")
    with pytest.raises(RewardError, match="incomplete"):
        LatentParts.load(copy)
    with pytest.raises(RewardError, match="1 prompts for 2 latents"):
        LatentReward(weights=folders["sd15"], device="cpu").score_latents(torch.zeros(2, 4, 8, 8), 1, ["a"])
