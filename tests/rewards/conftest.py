"""A tiny CLIP of open_clip's own classes, saved in open_clip's own layout."""

import json

import pytest
import torch

MODEL = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
PREPROCESS = {
    "size": [32, 32],
    "mean": [0.48145466, 0.4578275, 0.40821073],
    "std": [0.26862954, 0.26130258, 0.27577711],
    "interpolation": "bicubic",
    "resize_mode": "shortest",
    "fill_color": 0,
}


def _write_clip(path, **text_options):
    """Write a randomly initialised CLIP to `path`; the options are those of its text tower."""
    import open_clip
    from safetensors.torch import save_file

    model_config = {**MODEL, "text_cfg": {**MODEL["text_cfg"], **text_options}}
    torch.manual_seed(0)
    model = open_clip.CLIP(**model_config)
    path.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), path / "open_clip_model.safetensors")
    config = {"model_cfg": model_config, "preprocess_cfg": PREPROCESS}
    (path / "open_clip_config.json").write_text(json.dumps(config))


@pytest.fixture(scope="session")
def write_clip():
    """The function that writes a tiny CLIP to a directory."""
    return _write_clip


@pytest.fixture(scope="session")
def clip_directory(tmp_path_factory):
    """The directory of the tiny CLIP."""
    path = tmp_path_factory.mktemp("tiny-clip")
    _write_clip(path)
    return path


@pytest.fixture
def images():
    """Eight images [8, 3, 48, 40] in [0, 1], smooth enough for bicubic resampling to stay inside."""
    noise = torch.rand(8, 3, 6, 5, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.interpolate(noise, size=(48, 40), mode="bilinear")


@pytest.fixture
def captions():
    """One caption for each of the eight images."""
    things = ["red circle", "blue square", "green star", "yellow ring", "pink cross", "cyan triangle", "cat", "dog"]
    return [f"a photo of a {thing}" for thing in things]
