"""Any text-to-image pipeline of diffusers is drawn with and compared; training with it is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from tiny_models import build_tiny_sd, build_tiny_sd3
from tiny_runs import run_config, write_pairs

import mmalign
from mmalign.cli import main
from mmalign.training.train import train
from pipelines import PipelineError, load_drawer, load_generator

PIPELINE = "StableDiffusion3PAGPipeline"


@pytest.fixture(scope="module")
def sd3(tmp_path_factory: pytest.TempPathFactory) -> str:
    model = Path(build_tiny_sd3(tmp_path_factory.mktemp("models") / "sd3"))
    index = json.loads((model / "model_index.json").read_text())
    # The same components in a pipeline that is none of our families.
    (model / "model_index.json").write_text(json.dumps(index | {"_class_name": PIPELINE}))
    return str(model)


def by_diffusers(model: str, prompts: list[str], seeds: list[int], **options: float) -> np.ndarray:
    pipe = DiffusionPipeline.from_pretrained(model, text_encoder_3=None, tokenizer_3=None)
    pipe.set_progress_bar_config(disable=True)
    random = [torch.Generator().manual_seed(seed) for seed in seeds]
    return np.stack([np.asarray(image) for image in pipe(prompts, generator=random, **options).images]).astype(int)


def test_generate_is_what_diffusers_draws(sd3: str, tmp_path: Path) -> None:
    draw = ["generate", sd3, "--steps", "3", "--guidance", "4", "--seeds", "0,5", "--batch-size", "3"]
    assert main([*draw, "--prompts", "a red circle", "--out", str(tmp_path)]) == 0
    found = np.stack([np.asarray(Image.open(tmp_path / f"00000-{seed}.png")) for seed in (0, 5)]).astype(int)
    wanted = by_diffusers(sd3, ["a red circle"] * 2, [0, 5], num_inference_steps=3, guidance_scale=4.0)
    assert np.abs(found - wanted).max() <= 1 and np.abs(found[0] - found[1]).max() > 3
    large = mmalign.generate(sd3, "a red circle", steps=1, image_size=24, device="cpu")
    assert large[0].size == (24, 24)
    with pytest.raises(PipelineError, match="cannot draw with these settings"):
        mmalign.generate(sd3, "a red circle", steps=1, image_size=27, device="cpu")
    images = mmalign.generate(sd3, "a red circle", seeds=5, steps=3, guidance=4, device="cpu")
    assert np.abs(np.asarray(images[0]).astype(int) - wanted[1]).max() <= 1


def test_pairs_sample_draws_from_it(sd3: str, tmp_path: Path) -> None:
    command = ["pairs", "sample", sd3, "--prompts", "a red circle", "--images-per-prompt", "2", "--steps", "2"]
    assert main([*command, "--out", str(tmp_path)]) == 0
    assert pyarrow.parquet.read_table(tmp_path / "images.parquet").num_rows == 2


def test_it_is_compared_with_a_model_of_ours(sd3: str, tmp_path: Path) -> None:
    ours = build_tiny_sd(tmp_path / "sd")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\na blue star\n")
    command = ["compare", ours, sd3, "--prompts", str(prompts), "--steps", "2", "--rewards", "tiny_runs:Brightness"]
    assert main([*command, "--out", str(tmp_path / "out")]) == 0
    systems = json.loads((tmp_path / "out" / "results.json").read_text())["systems"]
    assert len(systems) == 2


def test_what_it_cannot_do_is_one_line(sd3: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(
        PipelineError, match="a StableDiffusion3PAGPipeline; supported: StableDiffusionPipeline, .*compare"
    ):
        train(run_config(sd3, write_pairs(tmp_path / "data"), tmp_path / "run"))
    capsys.readouterr()
    draw = ["generate", sd3, "--prompts", "a red circle", "--out", str(tmp_path / "out"), "--steps", "2"]
    for option, message in {
        "--eta=0.5": "samples by its own scheduler; leave eta and solver out",
        "--solver=dpm++": "samples by its own scheduler; leave eta and solver out",
        f"--adapter={sd3}/vae/diffusion_pytorch_model.safetensors": "on which adapters are not loaded; merge",
        "--adapter-scale=0.5": "needs an adapter",
    }.items():
        assert main([*draw, option]) == 2
        error = capsys.readouterr().err
        assert message in error and len(error.strip().splitlines()) == 1
    with pytest.raises(PipelineError, match="leave the scale out"):
        load_drawer(sd3, device="cpu").set_adapter_scale(0.5)


def test_code_beside_a_model_is_not_run(sd3: str, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(sd3, model)
    index = json.loads((model / "model_index.json").read_text())
    (model / "mine.py").write_text("raise SystemExit(9)")
    for change in ({"transformer": ["mine", "Net"]}, {"text_encoder": ["transformers", "AutoModel"]}):
        (model / "model_index.json").write_text(json.dumps(index | change))
        config = model / "text_encoder" / "config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), "auto_map": {"AutoModel": "mine.Net"}}))
        with pytest.raises(PipelineError, match="would run code of the model's author"):
            load_drawer(model, device="cpu")
    (model / "model_index.json").write_text(json.dumps(index | {"_class_name": ["mine", "Net"]}))
    with pytest.raises(PipelineError, match="wrong kind"):
        load_drawer(model, device="cpu")
    (model / "model_index.json").write_text(json.dumps(index))
    (model / "transformer" / "diffusion_pytorch_model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(PipelineError, match="cannot load the StableDiffusion3PAGPipeline"):
        load_drawer(model, device="cpu")
    with pytest.raises(PipelineError, match="wrong kind"):
        load_generator(model)
