"""The flow model of Shapes: what its training writes opens in plain diffusers and in our own family alike."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mmalign.core.errors import UserError
from mmalign.shapes.train_flow import build_flow, train_flow
from pipelines import PipelineError, load_generator, sample
from pipelines.flow import FlowOptions

ROOT = Path(__file__).resolve().parents[2]
BASE = ROOT / "assets" / "shapes-sd"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline after two steps of training."""
    out = tmp_path_factory.mktemp("flow") / "model"
    train_flow(out, start=BASE, scenes=8, images=8, batch_size=4, workers=1, log=lambda line: None)
    return out


def test_plain_diffusers_draws_what_the_family_draws(written: Path) -> None:
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(written, torch_dtype=torch.float32).to("cpu")
    pipe.set_progress_bar_config(disable=True)
    seed = torch.Generator().manual_seed(3)
    options = {"height": 64, "width": 64, "num_inference_steps": 4, "guidance_scale": 1.0, "generator": seed}
    theirs = torch.from_numpy(pipe("a red circle above a blue star", output_type="np", **options).images)
    generator = load_generator(written, device="cpu")
    cond = generator.encode_prompts(["a red circle above a blue star"])
    # The pipeline's guidance_scale is added to the conditional prediction: one less than the usual scale.
    drawn = sample(generator, cond, steps=4, guidance=2.0, seeds=[3])
    assert torch.allclose(generator.decode(drawn.latents), theirs.permute(0, 3, 1, 2), atol=2e-4)


def test_its_size_and_text_length_are_those_of_the_world(written: Path) -> None:
    generator = load_generator(written, device="cpu")
    assert generator.latent_shape == (4, 16, 16)
    assert generator.encode_prompts(["a red circle"]).prompt_embeds.shape[1] == 32


def test_training_predicts_as_the_family_does(written: Path) -> None:
    model = build_flow(written)
    prompts = ["two green rings", ""]
    generator = load_generator(written, device="cpu")
    tokens = torch.tensor(model.tokenizer(prompts, padding="max_length", max_length=32).input_ids)
    x, sigma = torch.randn(2, 4, 16, 16), torch.tensor([0.3, 0.9])
    with torch.no_grad():
        ours = model.velocity(x, sigma, tokens)
        theirs = generator.predict(x, 1000 * sigma, generator.encode_prompts(prompts))
    assert torch.allclose(ours, theirs, atol=1e-4)


def test_a_directory_of_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no directory of a pipeline such as assets/shapes-sd"):
        build_flow(tmp_path)


def test_a_size_beyond_the_positions_is_refused_with_the_nearest(written: Path) -> None:
    with pytest.raises(PipelineError, match=r"multiples of 8 up to 64, not 128 x 128; the nearest size is 64 x 64"):
        load_generator(written, device="cpu", flow=FlowOptions(image_size=128))
