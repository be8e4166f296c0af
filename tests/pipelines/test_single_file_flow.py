"""Single-file checkpoints of SD3 and FLUX.1: a tiny SD3 under the original names; of FLUX.1 what needs no weights.

diffusers' converter takes FLUX.1's transformer for 3072 wide, whatever its configuration says, so that no tiny one can
be converted: of FLUX.1 the kind, the parts and the errors are tested.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from flow_tools import OPTIONS, PROMPTS
from original_names import original_sd3, original_vae
from safetensors.torch import save_file
from tiny_models import build_tiny_sd3
from torch import Tensor

from pipelines import PipelineError, load_generator, sample
from pipelines.load import distillation, family_of
from pipelines.single_file import kind_of


def write(path: Path, state: dict[str, Tensor]) -> Path:
    save_file({name: value.contiguous().clone() for name, value in state.items()}, path)
    return path


def copy(source: Path, target: Path, patterns: Iterable[str]) -> None:
    for file in (file for pattern in patterns for file in source.glob(pattern) if file.is_file()):
        (target / file.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target / file.relative_to(source))


@pytest.fixture(params=[False, True], ids=["3", "3.5 medium"])
def sd3(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny SD3 and, beside it, ``tiny.safetensors`` with its CLIPs and ``bare.safetensors`` without them."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = Path(build_tiny_sd3(tmp_path / "model", second=24, medium=request.param))
    pipe = StableDiffusion3Pipeline.from_pretrained(model, text_encoder_3=None, tokenizer_3=None)
    with torch.no_grad():  # the original code has no projection after CLIP-L
        pipe.text_encoder.text_projection.weight.copy_(torch.eye(16))
    pipe.save_pretrained(model)
    state = original_sd3(pipe.transformer) | original_vae(pipe.vae)
    write(tmp_path / "bare.safetensors", state)
    for name, encoder in (("clip_l", pipe.text_encoder), ("clip_g", pipe.text_encoder_2)):
        state |= {f"text_encoders.{name}.transformer.{key}": value for key, value in encoder.state_dict().items()}
    write(tmp_path / "tiny.safetensors", state)
    for name in ("tiny", "bare"):
        copy(model, tmp_path / name, ("**/*.json", "**/*.txt"))
    return tmp_path


def images(model: Path) -> Tensor:
    generator = load_generator(model, device="cpu", flow=OPTIONS)
    cond = generator.encode_prompts(PROMPTS)
    return generator.decode(sample(generator, cond, steps=2, guidance=3.0, seeds=[1, 2]).latents)


def test_sd3_is_read_from_a_file_with_its_text_encoders(sd3: Path) -> None:
    assert family_of(sd3 / "tiny.safetensors").family == "sd3"
    assert not (sd3 / "cache").exists()  # its family is known before it is converted
    torch.testing.assert_close(images(sd3 / "tiny.safetensors"), images(sd3 / "model"), rtol=0, atol=1e-6)


def test_text_encoders_come_from_the_folder_beside_the_file(sd3: Path) -> None:
    with pytest.raises(PipelineError, match=r"holds no 'text_encoder', and neither does .*hf download") as found:
        images(sd3 / "bare.safetensors")
    assert len(str(found.value).splitlines()) == 1
    copy(sd3 / "model", sd3 / "bare", ("text_encoder*/*.safetensors",))
    torch.testing.assert_close(images(sd3 / "bare.safetensors"), images(sd3 / "model"), rtol=0, atol=1e-6)


def test_t5_comes_from_there_too(sd3: Path) -> None:
    medium = kind_of(sd3 / "bare.safetensors").repo.endswith("3.5-medium")
    model = Path(build_tiny_sd3(sd3 / "with-t5", second=24, t5=True, medium=medium))
    copy(model, sd3 / "bare", ("*.json", "text_encoder*/*", "tokenizer*/*"))
    generator = load_generator(sd3 / "bare.safetensors", device="cpu", flow=OPTIONS)
    theirs = load_generator(model, device="cpu", flow=OPTIONS)
    torch.testing.assert_close(
        generator.encode_prompts(PROMPTS).prompt_embeds, theirs.encode_prompts(PROMPTS).prompt_embeds
    )


def test_files_of_flux_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: (_ for _ in ()).throw(OSError()))
    state = {"double_blocks.0.img_attn.norm.key_norm.scale": torch.ones(1), "vector_in.in_layer.weight": torch.ones(1)}
    schnell = write(tmp_path / "fast.safetensors", state)
    dev = write(tmp_path / "dev.safetensors", state | {"guidance_in.in_layer.weight": torch.ones(1)})
    assert family_of(dev).family == family_of(schnell).family == "flux"
    assert distillation(dev) is None and "schnell" in str(distillation(schnell))
    with pytest.raises(PipelineError, match="hf download black-forest-labs/FLUX.1-dev --include"):
        load_generator(dev)
    other = write(tmp_path / "chroma.safetensors", {"double_blocks.0.img_attn.norm.key_norm.scale": torch.ones(1)})
    with pytest.raises(PipelineError, match="of Stable Diffusion 3 or of FLUX.1; give a diffusers directory"):
        family_of(other)
