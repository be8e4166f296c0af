"""Single-file checkpoints: a tiny SD1.5 written in the original layout, read without a network."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from original_names import original_unet, original_vae
from safetensors.torch import save_file

from pipelines import PipelineError, fingerprint_model, load_generator, sample


@pytest.fixture
def checkpoint(tiny_paths: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint of the tiny SD1.5, with its configuration in the folder beside it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    pipe = StableDiffusionPipeline.from_pretrained(tiny_paths["sd15"])
    state = original_unet(pipe.unet) | original_vae(pipe.vae)
    for name, value in pipe.text_encoder.state_dict().items():
        state[f"cond_stage_model.transformer.text_model.{name.removeprefix('text_model.')}"] = value
    save_file({name: value.contiguous() for name, value in state.items()}, tmp_path / "tiny.safetensors")
    source, config = Path(tiny_paths["sd15"]), tmp_path / "tiny"
    for file in [*source.rglob("*.json"), *source.rglob("*.txt")]:
        (config / file.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, config / file.relative_to(source))
    return tmp_path / "tiny.safetensors"


def test_a_checkpoint_is_the_model_that_it_was_made_of(checkpoint: Path, tiny_paths: dict[str, str]) -> None:
    ours, theirs = load_generator(checkpoint, device="cpu"), load_generator(tiny_paths["sd15"], device="cpu")
    images = [
        one.decode(sample(one, one.encode_prompts(["a red circle"]), steps=2, guidance=3.0, seeds=[1]).latents)
        for one in (ours, theirs)
    ]
    assert torch.equal(*images) and ours.name_or_path == str(checkpoint)
    made = [path.stat().st_mtime_ns for path in ours.root.rglob("*.safetensors")]
    assert fingerprint_model(checkpoint) == fingerprint_model(ours.root)
    assert made == [path.stat().st_mtime_ns for path in ours.root.rglob("*.safetensors")]
    ours.add_adapter(2)
    ours.save_lora(checkpoint.parent / "lora")
    assert load_generator(checkpoint.parent / "lora", device="cpu").has_adapter


def test_what_it_needs_is_one_line(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing_cached(*_: object, **options: object) -> str:
        assert options["local_files_only"]
        raise FileNotFoundError

    monkeypatch.setattr("huggingface_hub.snapshot_download", nothing_cached)
    shutil.move(checkpoint.parent / "tiny", checkpoint.parent / "moved")
    with pytest.raises(
        PipelineError, match="configuration and tokenizer are not on this machine.*hf download"
    ) as found:
        load_generator(checkpoint)
    assert "\n" not in str(found.value) and "Stable Diffusion 1 checkpoint" in str(found.value)
    shutil.move(checkpoint.parent / "moved", checkpoint.parent / "tiny")
    config = checkpoint.parent / "tiny" / "unet" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "block_out_channels": [8, 24]}))
    with pytest.raises(PipelineError, match="does not fit the configuration") as found:
        load_generator(checkpoint)
    assert "\n" not in str(found.value) and not list((checkpoint.parent / "cache").rglob("model_index.json"))
    save_file({"a": torch.ones(1)}, checkpoint)
    with pytest.raises(PipelineError, match="no single-file checkpoint of Stable Diffusion 1, 2 or XL"):
        load_generator(checkpoint)
    with pytest.raises(PipelineError, match="is not safetensors"):
        load_generator(config)
