"""Training a tiny Wan on its own videos, by video rewards and by image rewards on frames."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny_models import build_tiny_sd
from tiny_motion import build_tiny_animatediff, build_tiny_cogvideox
from tiny_runs import BRIGHTNESS, losses, online_config
from tiny_videos import GEOMETRY, build_tiny_ltx, build_tiny_wan

from mmalign.config import load_config
from mmalign.core.errors import UserError
from mmalign.training.train import train
from pipelines import VideoOptions, load_generator

MOTION = "tiny_runs:Motion"
FLOW = {"text_length": 32}
METHODS: dict[str, dict[str, Any]] = {
    "nft": {"images_per_prompt": 2, "sampling_steps": 3, "guidance": 1.0},
    "flow_grpo": {"images_per_prompt": 2, "sampling_steps": 3, "window": {"size": 1, "range": [0, 2]}},
    "align_prop": {"sampling_steps": 3, "eta": 0.0, "truncation": "last-k"},
}


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> str:
    return build_tiny_wan(tmp_path_factory.mktemp("wan") / "wan")


def config(wan: str, output: Path, name: str, **changes: Any) -> Any:
    method = {"name": name, **METHODS[name], **changes.pop("method", {})}
    given = {"flow": FLOW, "video": GEOMETRY, "steps": 2, "rewards": [{"name": MOTION}], **changes}
    return online_config(wan, output, method, **given)


@pytest.mark.parametrize("name", METHODS)
def test_an_online_method_trains_on_videos(wan: str, tmp_path: Path, name: str) -> None:
    prompts = tmp_path / "held-out.txt"
    prompts.write_text("a green star\n")
    evaluate = {"prompts": str(prompts), "every": 2, "rewards": [MOTION, BRIGHTNESS], "frames": 2, "steps": 2}
    output = train(config(wan, tmp_path / "run", name, evaluate={**evaluate, "guidance": 1.0}))
    assert set(losses(tmp_path / "run")) == {1, 2}
    motion = losses(tmp_path / "run", "monitor/motion")
    assert all(0 < value < 1 for value in motion.values()) and motion
    assert set(losses(tmp_path / "run", f"evaluation/{BRIGHTNESS}")) == {0, 2}
    with Image.open(tmp_path / "run" / "evaluation" / "step_2.png") as strip:
        assert strip.width > 5 * 96  # five frames beside each other
    trained = load_generator(str(output), device="cpu", video=VideoOptions(**GEOMETRY))
    assert trained.has_adapter and any(bool(one.abs().max() > 0) for one in trained.trainable_parameters())


def test_an_image_reward_is_the_mean_over_frames_and_their_gradient_needs_no_whole_video(
    wan: str, tmp_path: Path
) -> None:
    rewards = [{"name": BRIGHTNESS, "frames": 2}]
    train(config(wan, tmp_path / "run", "align_prop", rewards=rewards, method={"decode_frames": 2}))
    assert all(0 < value < 1 for value in losses(tmp_path / "run", "reward").values())


def test_both_experts_learn_and_are_exported(tmp_path: Path) -> None:
    model = build_tiny_wan(tmp_path / "experts", experts=True)
    flow = {**FLOW, "low_noise_guidance": 2.0}
    given: dict[str, Any] = {"flow": flow, "method": {"guidance": 3.0, "sampling_steps": 4}, "batch_size": 4}
    whole = train(config(model, tmp_path / "run", "nft", **given))
    trained = load_generator(str(whole), device="cpu", video=VideoOptions(**GEOMETRY))
    for network in trained.networks.values():
        assert any(bool(one.abs().max() > 0) for name, one in network.named_parameters() if ".lora_B." in name)
    assert 'load_lora_weights("' in (whole / "README.md").read_text()
    assert "load_into_transformer_2=True" in (whole / "README.md").read_text()
    assert set(losses(whole)) == {1, 2}


def test_ltx_learns_from_videos(tmp_path: Path) -> None:
    model, size = build_tiny_ltx(tmp_path / "ltx"), {"height": 32, "width": 32, "frames": 9}
    output = train(config(model, tmp_path / "run", "nft", video=size))
    assert all(0 < value < 1 for value in losses(output, "reward").values())


def said(values: dict[str, Any], changed: dict[str, Any]) -> str:
    with pytest.raises(UserError) as caught:
        load_config({**values, **changed})
    return str(caught.value)


def test_what_does_not_fit_videos_is_refused_before_a_model_is_read(tmp_path: Path) -> None:
    values: dict[str, Any] = {
        "model": "no/such-model",
        "method": "nft",
        "data": {"prompts": "shapes-train"},
        "rewards": [{"name": "jpeg-compressibility"}],
        "output": str(tmp_path),
        "video": {"frames": 5},
    }
    assert "'jpeg-compressibility' scores images, and the section video" in said(values, {})
    assert "give rewards.0.frames" in said(values, {})
    fitting = {"rewards": [{"name": "jpeg-compressibility", "frames": 2}]}
    assert load_config({**values, **fitting}).modality == "video"
    assert "rewards.0.frames: is for image rewards on video models" in said(values, {**fitting, "video": None})
    both = {"rewards": [{"name": "vbench-dynamic-degree", "frames": 2}]}
    assert "is for image rewards on videos, and 'vbench-dynamic-degree' scores videos" in said(values, both)
    videos = {"rewards": [{"name": "vbench-dynamic-degree"}], "video": None}
    assert "scores videos, and the method generates images" in said(values, videos)
    assert "data.resolution" in said(values, {**fitting, "data": {"prompts": "shapes-train", "resolution": 64}})
    evaluate = {"prompts": "shapes-test", "every": 1, "rewards": ["jpeg-compressibility"]}
    assert "give evaluate.frames" in said(values, {**fitting, "evaluate": evaluate})
    of_images = {"video": None, "evaluate": {**evaluate, "frames": 2}}
    assert "evaluate.frames: is for image rewards on video models" in said(values, of_images)


def test_the_section_and_the_model_must_agree(wan: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"makes videos \('wan'\); give a section video"):
        train(config(wan, tmp_path / "a", "nft", video=None, rewards=[{"name": BRIGHTNESS}]))
    sd = build_tiny_sd(tmp_path / "sd")
    with pytest.raises(UserError, match=r"video: is for video models, and .* makes images \('sd'\)"):
        train(config(sd, tmp_path / "b", "nft", flow=None))


def test_the_monitor_sees_videos_stand_still() -> None:
    from mmalign.config.sections import MonitorConfig
    from mmalign.training.monitors import Monitors

    monitors = Monitors(MonitorConfig(patience=2))
    source = torch.Generator().manual_seed(0)
    for step in range(12):
        moving = torch.rand(4, 5, 3, 16, 16, generator=source)
        share = 1.0 if step < 4 else 0.05
        videos = 0.5 + share * (moving - moving.mean(1, keepdim=True)) / 4
        values = monitors.images(step, videos, ["a", "a", "b", "b"])
        monitors.sampled(videos, ["a", "a", "b", "b"])
    assert values["monitor/motion"] < 0.02
    assert {alarm.name for alarm in monitors.alarms()} >= {"motion"}


def test_methods_say_what_they_trained(wan: str, tmp_path: Path) -> None:
    train(config(wan, tmp_path / "run", "nft", steps=1))
    card = (tmp_path / "run" / "README.md").read_text()
    assert "pipeline_tag: text-to-video" in card and "num_frames" in card
    assert json.loads((tmp_path / "run" / "mmalign.json").read_text())["family"] == "wan"


def test_animatediff_trains_from_the_recipe_to_a_plain_pipeline(tmp_path: Path) -> None:
    """Motion modules alone are adapted; what the run exports is read by diffusers."""
    from diffusers import AnimateDiffPipeline

    model, video = build_tiny_animatediff(tmp_path / "model", "flow_prediction"), {"frames": 3}
    adapter = {"kind": "lora", "rank": 2, "targets": ["motion"]}
    given = {"video": video, "steps": 2, "rewards": [{"name": MOTION}], "adapter": adapter}
    output = train(online_config(model, tmp_path / "run", {"name": "nft", **METHODS["nft"]}, **given))
    trained = load_generator(str(output), device="cpu", video=VideoOptions(**video))
    changed = [one for one in trained.trainable_parameters() if bool(one.abs().max() > 0)]
    assert trained.family == "animatediff" and changed
    pipe = AnimateDiffPipeline.from_pretrained(model)
    pipe.load_lora_weights(output, weight_name="pytorch_lora_weights.safetensors")
    names = [name for name, _ in pipe.unet.named_parameters() if ".lora_A." in name]
    assert names and all(".motion_modules." in name for name in names)


def test_cogvideox_trains_whole_on_its_own_videos(tmp_path: Path) -> None:
    from diffusers import CogVideoXPipeline

    model = build_tiny_cogvideox(tmp_path / "model", "1.5")
    given = {"video": {"frames": 9}, "steps": 1, "rewards": [{"name": MOTION}], "adapter": {"kind": "full"}}
    output = train(online_config(model, tmp_path / "run", {"name": "nft", **METHODS["nft"]}, **given))
    before, after = (CogVideoXPipeline.from_pretrained(path).transformer for path in (model, output))
    moved = [bool((one != other).any()) for one, other in zip(before.parameters(), after.parameters(), strict=True)]
    assert sum(moved) > len(moved) / 2


def test_a_reward_on_latents_of_images_is_refused_for_videos(tmp_path: Path) -> None:
    model = build_tiny_animatediff(tmp_path / "model")
    given = {"video": {"frames": 3}, "rewards": [{"name": MOTION}]}
    method = {"name": "lpo", "latent_reward": str(tmp_path / "reward")}
    with pytest.raises(UserError, match=r"'lpo' does not train video models, and .* \('animatediff'\)"):
        train(online_config(model, tmp_path / "run", method, **given))
