"""Social Reward: the preset takes a state dict of OpenAI's layout; QuickGELU and outputs of transformers 5."""

import json
from types import SimpleNamespace

import pytest
import torch
from contract import check_contract, smooth_images
from safetensors.torch import load_file

from rewards import RewardError, load_reward
from rewards.backbones.hf import features
from rewards.social_reward import SocialReward

CAPTIONS = ["a red circle", "two blue squares", "a photo of a cat"]


@pytest.fixture
def checkpoint(tmp_path, clip_directory, monkeypatch):
    """As `model.state_dict()` of OpenAI's code: half precision, and three numbers beside the weights."""
    import open_clip

    config = json.loads((clip_directory / "open_clip_config.json").read_text())["model_cfg"]
    (tmp_path / "tiny-social-quickgelu.json").write_text(json.dumps(config | {"quick_gelu": True}))
    open_clip.add_model_config(tmp_path / "tiny-social-quickgelu.json")
    monkeypatch.setattr(SocialReward, "default_model", "tiny-social-quickgelu")
    state = load_file(clip_directory / "open_clip_model.safetensors")
    numbers = {name: torch.tensor(16) for name in ("input_resolution", "context_length", "vocab_size")}
    torch.save({name: value.half() for name, value in state.items()} | numbers, tmp_path / "social.pt")
    return tmp_path / "social.pt"


def test_the_file_is_read_into_the_architecture_with_quick_gelu(checkpoint, clip_directory):
    images = smooth_images(3)
    reward = load_reward("social-reward", weights=checkpoint)
    plain = load_reward("clip", weights=clip_directory)
    scores = reward(images, prompts=CAPTIONS)
    assert (scores - plain(images, prompts=CAPTIONS)).abs().max() > 1e-3, "the activation changes the embeddings"
    same = load_reward("clip", weights=checkpoint, model="tiny-social-quickgelu")
    assert torch.equal(same(images, prompts=CAPTIONS), scores)
    assert type(reward.encoder.model.transformer.resblocks[0].mlp.gelu).__name__ == "QuickGELU"
    check_contract(reward, long_prompt="cat " * 15)


def test_the_architecture_is_openais_and_weights_are_needed():
    import open_clip

    with pytest.raises(RewardError, match="no weights are published; give weights="):
        load_reward("social-reward")
    assert open_clip.get_model_config(SocialReward.default_model)["quick_gelu"]
    assert SocialReward.default_model == "ViT-L-14-quickgelu"


def test_embeddings_come_out_of_either_version_of_transformers():
    embedding = torch.ones(2, 3)
    assert features(embedding) is embedding
    assert features(SimpleNamespace(pooler_output=embedding)) is embedding
    for other in (SimpleNamespace(last_hidden_state=embedding), SimpleNamespace(pooler_output=None), (embedding,)):
        with pytest.raises(RewardError, match="without a pooled embedding"):
            features(other)
