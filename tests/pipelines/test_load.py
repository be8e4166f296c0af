from __future__ import annotations

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from diffusers import DiffusionPipeline

from pipelines import PipelineError, fingerprint_model, load_generator
from pipelines.attention import inspect_attention, set_attention


@pytest.fixture
def model(tiny_paths: dict[str, str], tmp_path: Path) -> Path:
    return shutil.copytree(tiny_paths["sd15"], tmp_path / "tiny-model")


def refused(pattern: str, name: object, **options: object) -> Exception:
    with pytest.raises(PipelineError, match=pattern) as caught:
        load_generator(name, **options)
    assert "\n" not in str(caught.value)
    return caught.value


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_family_and_dtype(tiny_path: str) -> None:
    generator = load_generator(tiny_path, dtype=torch.float16, device="cpu")
    assert generator.family == ("sdxl" if "sdxl" in tiny_path else "sd")
    assert {parameter.dtype for parameter in generator.network.parameters()} == {torch.float16}
    # AutoencoderKL overflows in fp16 (force_upcast); AutoencoderTiny does not.
    assert generator.encoder("vae").dtype == (torch.float16 if tiny_path.endswith("sd2") else torch.float32)
    assert generator.encoder("text_encoder").dtype == torch.float16


def test_missing_model_names_the_nearest(model: Path) -> None:
    error = refused("Did you mean 'tiny-model'", model.parent / "tiny-mdoel")
    assert isinstance(error, FileNotFoundError)


def test_directories_that_are_no_pipeline_are_explained(model: Path, tmp_path: Path) -> None:
    refused(r"wrong kind: a UNet2DConditionModel.*did you mean .*tiny-model\?", model / "unet")
    refused(r"wrong kind: a CLIPTextModel", model / "text_encoder")
    refused(r"did you mean .*tiny-model\?", tmp_path)
    (tmp_path / "empty").mkdir()
    refused("no model_index.json", tmp_path / "empty")
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip" / "open_clip_config.json").write_text("{}")
    refused("an open_clip model", tmp_path / "clip")
    (tmp_path / "model.ckpt").write_bytes(b"")
    refused("only safetensors checkpoints are read", tmp_path / "model.ckpt")


def test_pipelines_of_other_kinds_are_refused_before_weights_are_read(model: Path) -> None:
    shutil.rmtree(model / "unet")
    edit(model / "model_index.json", _class_name="SanaPipeline")
    refused("wrong kind: a SanaPipeline; supported: StableDiffusionPipeline", model)
    (model / "model_index.json").write_text("{")
    refused("not valid JSON", model)


def test_incomplete_models_are_refused(model: Path) -> None:
    weights = model / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    refused("holds no safetensors", model)
    shutil.rmtree(model / "unet")
    refused("unet is missing", model)
    edit(model / "model_index.json", unet=[None, None])
    refused("lists no 'unet'", model)


def test_an_incomplete_model_has_no_fingerprint(model: Path) -> None:
    generator = load_generator(model)
    shutil.rmtree(model / "tokenizer")
    with pytest.raises(PipelineError, match="tokenizer is missing"):
        _ = generator.text_id


def test_a_fingerprint_is_that_of_the_model_and_not_of_its_folder(model: Path, tiny_paths: dict[str, str]) -> None:
    original = fingerprint_model(tiny_paths["sd15"])
    (model / "metrics.jsonl").write_text("{}")
    (model / "checkpoints").mkdir()
    (model / "checkpoints" / "weights.safetensors").write_bytes(b"other")
    edit(model / "model_index.json", _diffusers_version="9.9", _name_or_path="elsewhere")
    edit(model / "scheduler" / "scheduler_config.json", _diffusers_version="9.9")
    assert fingerprint_model(model) == original and len(original) == 32
    prints = {original}
    edit(model / "scheduler" / "scheduler_config.json", beta_end=0.02)
    prints.add(fingerprint_model(model))
    edit(model / "tokenizer" / "vocab.json", extra=999)
    prints.add(fingerprint_model(model))
    edit(model / "model_index.json", force_zeros_for_empty_prompt=True)
    prints.add(fingerprint_model(model))
    weights = model / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    prints.add(fingerprint_model(model))
    assert len(prints) == 5


def test_an_adapter_counts_together_with_its_base(model: Path, tiny_paths: dict[str, str], tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    weights = adapter / "pytorch_lora_weights.safetensors"
    weights.write_bytes(b"lora")
    (adapter / "mmalign.json").write_text(json.dumps({"base_model": str(model)}))
    prints = [fingerprint_model(model), fingerprint_model(adapter)]
    assert fingerprint_model(model, adapter=adapter) == fingerprint_model(model, adapter=weights) == prints[1]
    weights.write_bytes(b"LORA!")
    prints.append(fingerprint_model(adapter))
    (adapter / "mmalign.json").write_text(json.dumps({"base_model": tiny_paths["sd2"]}))
    prints.append(fingerprint_model(adapter))
    assert len(set(prints)) == 4
    (adapter / "mmalign.json").unlink()
    with pytest.raises(PipelineError, match="base model is unknown"):
        fingerprint_model(adapter)


def test_what_is_no_supported_model_has_no_fingerprint(model: Path, tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match="holds tiny-model; did you mean"):
        fingerprint_model(tmp_path)
    edit(model / "model_index.json", _class_name="FluxFillPipeline")
    with pytest.raises(PipelineError, match="wrong kind: a FluxFillPipeline"):
        fingerprint_model(model)


def test_a_broken_weight_file_is_named(model: Path) -> None:
    (model / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"nonsense")
    refused("cannot load 'unet'", model)


def test_unets_that_want_more_than_text_are_refused(model: Path, tiny_paths: dict[str, str]) -> None:
    edit(model / "vae" / "config.json", latent_channels=9)
    refused("takes 4 channels, its autoencoder gives 9", model)
    shutil.rmtree(model / "unet")
    shutil.copytree(Path(tiny_paths["sdxl"]) / "unet", model / "unet")
    refused("extra conditioning 'text_time'", model)


def test_fp16_variant_is_read_where_it_is_all_there_is(model: Path) -> None:
    for file in model.glob("*/*.safetensors"):
        file.rename(file.with_suffix(".fp16.safetensors"))
    generator = load_generator(model)
    assert torch.equal(generator.network.conv_in.bias, load_generator(model).network.conv_in.bias)
    generator.load_encoders()


def test_unknown_options_name_the_nearest(model: Path) -> None:
    refused("dtype 'float23' is unknown.*Did you mean 'float32'", model, dtype="float23")
    refused("attention kernel 'xformer' is unknown.*Did you mean 'xformers'", model, attention="xformer")


def test_absent_xformers_is_an_error_that_names_the_fix(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    error = refused("pip install xformers", model, attention="xformers")
    assert isinstance(error, ImportError)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    refused("CUDA devices only", model, attention="xformers")


def test_the_kernel_is_set_and_verified(tiny_paths: dict[str, str]) -> None:
    network = load_generator(tiny_paths["sd15"]).network
    network.set_default_attn_processor()
    assert inspect_attention(network).kernel == "AttnProcessor"
    report = set_attention(network, "sdpa")
    assert report.kernel == "sdpa" and report.processors == {"AttnProcessor2_0": 8}


def test_a_kernel_that_does_not_take_is_an_error(tiny_paths: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    network = load_generator(tiny_paths["sd15"]).network
    network.set_default_attn_processor()
    monkeypatch.setattr(type(network), "set_attn_processor", lambda self, processor: None)
    with pytest.raises(PipelineError, match="layers still run AttnProcessor"):
        set_attention(network, "sdpa")


def test_hub_ids(tiny_paths: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(tiny_paths["sd2"])
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda name, file: str(root / file))
    monkeypatch.setattr(DiffusionPipeline, "download", lambda name, use_safetensors: str(root))
    generator = load_generator("org/tiny-sd")
    assert generator.root == root and generator.name_or_path == "org/tiny-sd"
    asked = []
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda name, file, revision: str(root / file))
    monkeypatch.setattr(
        DiffusionPipeline, "download", lambda name, use_safetensors, revision: asked.append((name, revision)) or root
    )
    load_generator("org/tiny-sd@v1.0")
    assert asked == [("org/tiny-sd", "v1.0")]


def test_a_hub_id_stands_for_its_commit(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prints = []
    for commit in ("aaaa", "aaaa", "bbbb"):
        (model.parent / commit).mkdir(exist_ok=True)
        index = shutil.copy(model / "model_index.json", model.parent / commit)
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda name, file, index=index: str(index))
        prints.append(fingerprint_model("org/tiny-sd"))
    assert prints[0] == prints[1] != prints[2]


def test_hub_ids_that_do_not_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str, file: str) -> str:
        raise OSError("401 Client Error.\n\nRepository Not Found")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    refused(r"neither a directory nor a diffusers model that the Hub gives out \(401 Client Error\.\)", "org/tiny-sd")
