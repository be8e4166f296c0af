"""assets/shapes-flow: a U-Net of rectified flow, opened by plain diffusers and by our family alike."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mmalign.shapes import train_base
from mmalign.shapes.corpus import build_corpus
from pipelines import load_generator, sample
from pipelines.noise import FlowProcess

FLOW = Path(__file__).resolve().parents[2] / "assets" / "shapes-flow"
PROMPT = "a red circle above a blue square"


def test_it_is_a_flow_model_with_plain_levels() -> None:
    generator = load_generator(FLOW, device="cpu")
    assert isinstance(generator.process, FlowProcess) and generator.latent_shape == (4, 16, 16)
    assert generator.schedule(4).levels.tolist() == pytest.approx([1000, 750, 500, 250])


def test_plain_diffusers_draws_the_same_picture() -> None:
    """Its solver starts one level of a thousand lower, with whole numbers for timesteps: nearly the same picture."""
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(FLOW, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    seed = torch.Generator().manual_seed(5)
    drawn = pipe(
        PROMPT, height=64, width=64, num_inference_steps=24, guidance_scale=2.0, generator=seed, output_type="np"
    )
    theirs = torch.from_numpy(drawn.images).permute(0, 3, 1, 2)
    generator = load_generator(FLOW, device="cpu")
    cond = generator.encode_prompts([PROMPT])
    ours = generator.decode(sample(generator, cond, steps=24, guidance=2.0, solver="dpm++", seeds=[5]).latents)
    other = generator.decode(sample(generator, cond, steps=24, guidance=2.0, solver="dpm++", seeds=[6]).latents)
    assert float((ours - theirs).abs().mean()) < 0.02 < 0.1 < float((ours - other).abs().mean())


def test_its_training_learns_the_flow(tmp_path: Path) -> None:
    """Two steps of the recipe: a file that opens, whose prediction is that of noise - x0 and has hardly moved."""
    lines: list[str] = []
    corpus = build_corpus(8, workers=1)
    start = load_generator(FLOW, device="cpu")
    vae = start.encoder("vae")
    train_base.train_denoiser(
        corpus, train_base.encode_corpus(vae, corpus), vae, tmp_path / "out", 16, start=FLOW, flow=True, batch_size=8,
        learning_rate=1e-6, log=lines.append,
    )  # fmt: skip
    loss = float(lines[0].split("loss ")[1].split()[0])
    assert loss < 0.5  # of 2 for a prediction of nothing; that of shapes-sd, taken for a flow, is above 0.5
    x, t = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([300.0, 900.0])
    cond = start.encode_prompts([PROMPT, ""])
    after = load_generator(tmp_path / "out", device="cpu")
    assert after.process.describe() == start.process.describe()
    assert torch.allclose(after.predict(x, t, cond), start.predict(x, t, cond), atol=0.02)
