"""Damaged models: whatever a file holds, one line says which file, and no code beside a model is run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from mmalign.core.resources import find
from pipelines import PipelineError, load_generator
from pipelines.vlm import load_vlm

DEEP = "[" * 100_000
SD = {
    "text_encoder/model.safetensors": [b"", b"\xff" * 1000, b"\xff\xff\xff\xff\xff\xff\xff\x7f{}"],
    "unet/config.json": ["{", "[]", "null", DEEP, f'{{"a": {"9" * 6000}}}'],
    "tokenizer/tokenizer.json": ["{}", "[]", "5", DEEP],
    "scheduler/scheduler_config.json": ["[]", '{"num_train_timesteps": 0}', '{"num_train_timesteps": "x"}'],
    "model_index.json": ["[]", "{", DEEP],
}
VLM = {
    "chat_template.jinja": ["{% for x in %}", "{{ messages.foo.bar }}", "nothing of the message", b"\xff\xfe"],
    "tokenizer.json": ["{}", "[]"],
    "model.safetensors": [b"", b"\xff" * 1000],
    "processor_config.json": ["{}", "["],
    "config.json": ["[]", "{"],
}


def write(path: Path, content: str | bytes) -> None:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def one_line(load: object, folder: Path) -> str:
    with pytest.raises(PipelineError) as caught:
        load(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def draw(folder: Path) -> None:
    generator = load_generator(folder, device="cpu")
    generator.encode_prompts(["a red circle"])


@pytest.mark.parametrize(("file", "content"), [(file, one) for file, many in SD.items() for one in many])
def test_damaged_files_of_a_generator_are_named(tmp_path: Path, file: str, content: str | bytes) -> None:
    folder = shutil.copytree(find("assets/shapes-sd"), tmp_path / "model")
    write(folder / file, content)
    assert file in one_line(draw, folder).replace("\\", "/")


@pytest.mark.parametrize(
    "entry",
    [
        {"unet": ["diffusers", "__version__"]},
        {"unet": ["diffusers", "utils"]},
        {"unet": ["os", "system"]},
        {"unet": ["diffusers", 5]},
        {"text_encoder": ["transformers", "AutoModel"]},
        {"text_encoder": ["transformers", "pipeline"]},
        {"tokenizer": ["transformers", "BertTokenizer"]},
    ],
)
def test_an_index_names_classes_of_its_kind(tmp_path: Path, entry: dict[str, list[object]]) -> None:
    folder = shutil.copytree(find("assets/shapes-sd"), tmp_path / "model")
    index = json.loads((folder / "model_index.json").read_text())
    write(folder / "model_index.json", json.dumps(index | entry))
    assert "model_index.json names" in one_line(draw, folder)


@pytest.mark.parametrize("config", [{"hidden_act": "nope"}, {"num_attention_heads": 0}, {"num_hidden_layers": "x"}])
def test_mistyped_configurations_are_named(tmp_path: Path, config: dict[str, object]) -> None:
    folder = shutil.copytree(find("assets/shapes-sd"), tmp_path / "model")
    path = folder / "text_encoder" / "config.json"
    write(path, json.dumps(json.loads(path.read_text()) | config))
    message = one_line(draw, folder)
    assert str(folder / "text_encoder") in message and "config.json" in message


@pytest.mark.parametrize(("file", "content"), [(file, one) for file, many in VLM.items() for one in many])
def test_damaged_files_of_a_vlm_are_one_line(tmp_path: Path, file: str, content: str | bytes) -> None:
    folder = shutil.copytree(find("assets/shapes-vlm"), tmp_path / "model")
    write(folder / file, content)
    assert str(folder) in one_line(lambda path: load_vlm(path, device="cpu"), folder)


def test_no_code_beside_a_model_is_run_or_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`yes |` lets transformers run such code: it must not ask."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on standard input"))
    folder = shutil.copytree(find("assets/shapes-vlm"), tmp_path / "model")
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass P: pass\n")
    for file, key in (("processor_config.json", "AutoProcessor"), ("config.json", "AutoConfig")):
        path = folder / file
        write(path, json.dumps(json.loads(path.read_text()) | {"auto_map": {key: "evil.P"}}))
    try:
        load_vlm(folder, device="cpu")
    except PipelineError as error:
        assert "\n" not in str(error)
    assert not (tmp_path / "ran").exists()


def test_faults_of_our_own_stay_tracebacks(monkeypatch: pytest.MonkeyPatch) -> None:
    from pipelines import load

    def broken(name: str) -> None:
        raise NameError("name 'library' is not defined")

    monkeypatch.setattr(load, "local_path", broken)
    with pytest.raises(NameError):
        load_generator(find("assets/shapes-sd"))


def test_an_adapter_whose_base_moved_names_the_record(tmp_path: Path) -> None:
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "pytorch_lora_weights.safetensors").touch()
    write(tmp_path / "lora" / "mmalign.json", json.dumps({"base_model": str(tmp_path / "gone")}))
    message = one_line(load_generator, tmp_path / "lora")
    assert "gone" in message and str(tmp_path / "lora" / "mmalign.json") in message and "base_model" in message
