"""Models are accepted by what is known of their scheduler and UNet; and the variants of weights that are read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import UNet2DConditionModel

from pipelines import NoiseProcess, PipelineError, load_generator

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@pytest.fixture
def model(tiny_paths: dict[str, str], tmp_path: Path) -> Path:
    return shutil.copytree(tiny_paths["sd15"], tmp_path / "tiny-model")


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    "name",
    [
        "EDMEulerScheduler",
        "EDMDPMSolverMultistepScheduler",
        "CMStochasticIterativeScheduler",
        "KarrasVeScheduler",
        "IPNDMScheduler",
        "UnCLIPScheduler",
        "DDPMWuerstchenScheduler",
        "RePaintScheduler",
    ],
)
def test_schedulers_of_other_noise_processes_are_refused(name: str) -> None:
    if not hasattr(diffusers, name):
        pytest.skip(f"this diffusers has no {name}")
    scheduler = getattr(diffusers, name)()
    with pytest.raises(PipelineError, match=f"of the class {name}"):
        NoiseProcess.from_scheduler(scheduler)


@pytest.mark.parametrize(
    "name",
    [
        "DDIMScheduler",
        "DDPMScheduler",
        "PNDMScheduler",
        "EulerDiscreteScheduler",
        "EulerAncestralDiscreteScheduler",
        "HeunDiscreteScheduler",
        "DPMSolverMultistepScheduler",
        "DPMSolverSinglestepScheduler",
        "UniPCMultistepScheduler",
        "LMSDiscreteScheduler",
        "DEISMultistepScheduler",
    ],
)
def test_schedulers_of_ddpm_give_its_levels(name: str) -> None:
    process = NoiseProcess.from_scheduler(getattr(diffusers, name)(**BETAS))
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    expected = (1 - betas).cumprod(0)[[0, 500, 999]].sqrt()
    torch.testing.assert_close(process.alpha(torch.tensor([0, 500, 999])).double(), expected, rtol=1e-5, atol=0)


def test_levels_that_are_not_those_of_the_betas_are_refused() -> None:
    with pytest.raises(PipelineError, match="timestep_type = continuous"):
        NoiseProcess.from_scheduler(diffusers.EulerDiscreteScheduler(**BETAS, timestep_type="continuous"))
    with pytest.raises(PipelineError, match="a flow model's is 'flow_prediction'"):
        NoiseProcess.from_scheduler(diffusers.UniPCMultistepScheduler(**BETAS, use_flow_sigmas=True))


def test_a_model_with_an_edm_scheduler_is_refused(model: Path) -> None:
    diffusers.EDMEulerScheduler().save_pretrained(model / "scheduler")
    edit(model / "model_index.json", scheduler=["diffusers", "EDMEulerScheduler"])
    with pytest.raises(PipelineError, match="of the class EDMEulerScheduler"):
        load_generator(model, device="cpu")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"time_cond_proj_dim": 32}, "a guidance embedding"),
        ({"class_embed_type": "timestep"}, "a class label"),
        ({"num_class_embeds": 5}, "a class label"),
        ({"encoder_hid_dim": 16}, "other embeddings"),
        ({"attention_type": "gated"}, "attention_type: gated, which is not supported"),
        ({"out_channels": 8}, "it predicts a variance too"),
    ],
)
def test_unets_with_other_inputs_or_outputs_are_refused(model: Path, changes: dict[str, Any], reason: str) -> None:
    config = {k: v for k, v in UNet2DConditionModel.load_config(model / "unet").items() if not k.startswith("_")}
    UNet2DConditionModel(**{**config, **changes}).save_pretrained(model / "unet")
    with pytest.raises(PipelineError, match=reason) as caught:
        load_generator(model, device="cpu")
    assert "\n" not in str(caught.value)


def test_unknown_keys_of_a_unet_are_refused_where_they_are_in_use(model: Path) -> None:
    edit(model / "unet" / "config.json", new_idle_key=None, another=False)
    load_generator(model, device="cpu")
    edit(model / "unet" / "config.json", new_key=3)
    with pytest.raises(PipelineError, match="new_key: 3, which is not supported"):
        load_generator(model, device="cpu")


@pytest.mark.parametrize("variant", ["fp16", "bf16", "non_ema"])
@pytest.mark.parametrize("shards", ["one file", "shards"])
def test_variants_are_read_where_they_are_all_there_is(model: Path, variant: str, shards: str) -> None:
    before = load_generator(model, device="cpu").network
    unet = UNet2DConditionModel.from_pretrained(model / "unet")
    shutil.rmtree(model / "unet")
    unet.save_pretrained(model / "unet", variant=variant, max_shard_size="50KB" if shards == "shards" else "1GB")
    assert len(list((model / "unet").glob("*.safetensors"))) > 1 or shards == "one file"
    after = load_generator(model, device="cpu").network
    for one, other in zip(before.parameters(), after.parameters(), strict=True):
        assert torch.equal(one, other)


def test_plain_shards_are_preferred_to_a_variant_beside_them(model: Path) -> None:
    unet = UNet2DConditionModel.from_pretrained(model / "unet")
    shutil.rmtree(model / "unet")
    unet.save_pretrained(model / "unet", max_shard_size="50KB")
    expected = unet.conv_in.weight.detach().clone()
    unet.half().save_pretrained(model / "unet", variant="fp16", max_shard_size="50KB")
    assert torch.equal(load_generator(model, device="cpu").network.conv_in.weight, expected)
