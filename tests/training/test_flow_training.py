"""Methods train the flow families, by LoRA and whole, and what they export is plain diffusers'."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import torch
from diffusers import UniPCMultistepScheduler
from flow_tools import Models
from PIL import Image
from tiny_models import build_tiny_sd
from tiny_runs import BRIGHTNESS, losses, online_config, run_config, write_pairs

from mmalign.cli import main
from mmalign.config.run import RunConfig, load_config
from mmalign.core.errors import UserError
from mmalign.core.io.parquet import read_metadata
from mmalign.methods import methods
from mmalign.training.family import check_family
from mmalign.training.latent_reward.config import LatentRewardConfig
from mmalign.training.latent_reward.training import train_reward
from mmalign.training.train import train
from pipelines import load_generator
from pipelines.flow import FlowOptions

OPTIONS = FlowOptions(image_size=16, text_length=64)
DRAWN = {"sampling_steps": 2, "guidance": 1.0, "images_per_prompt": 2}
OFFLINE: dict[str, dict[str, Any]] = {
    "sft": {},
    "diffusion_dpo": {},
    "diffusion_dpo ipo": {"loss_type": "ipo"},
    "diffusion_dpo hinge": {"loss_type": "hinge"},
    "diffusion_dpo robust": {"loss_type": "robust", "label_smoothing": 0.1},
    "diffusion_kto": {},
    "mapo": {},
    "capo": {},
    "smpo": {"inversion_steps": 2, "scale": 0.2},
    "inpo": {"inversion_steps": 2},
    "tpo": {},
    "diffusion_dro": {"sampling_steps": 2},
}
ONLINE: dict[str, dict[str, Any]] = {
    "align_prop": {"sampling_steps": 2, "guidance": 1.0},
    "align_prop guided": {"sampling_steps": 2, "guidance": 4.0},
    "align_prop refl": {"sampling_steps": 2, "guidance": 1.0, "truncation": "refl"},
    "prdp": {**DRAWN, "updates_per_round": 2},
    "ddpo": DRAWN,
    "flow_grpo": {**DRAWN, "sampling_steps": 4, "mini_batches": 1, "kl": {"weight": 0.1}},
    "flow_grpo guard": {**DRAWN, "window": {"size": 1}, "kernel": "flow_sde", "ratio": "guard", "same_noise": True},
    "spo": {"sampling_steps": 2, "guidance": 1.0, "candidates": 2, "threshold": [0.0, 0.0]},
    "dense_dpo": {**DRAWN, "clip": 1.0, "updates_per_round": 2},
    "nft": {"sampling_steps": 2, "images_per_prompt": 2, "levels": 2, "solver": "dpm++"},
    "awm": {"sampling_steps": 2, "images_per_prompt": 2, "levels": 2, "sampler_steps": [0, 2]},
    "dgpo": {"sampling_steps": 2, "images_per_prompt": 2, "levels": 2, "sampler_steps": [0, 2]},
}
QUICK = {
    *(
        ("sd3", "lora", name)
        for name in (
            "sft",
            "diffusion_kto",
            "align_prop",
            "ddpo",
            "flow_grpo",
            "dense_dpo",
            "diffusion_dro",
            "nft",
            "awm",
            "dgpo",
        )
    ),
    *((family, kind, "diffusion_dpo") for family in ("flux", "z_image") for kind in ("lora", "full")),
    *(("qwen_image", "lora", name) for name in ("diffusion_dpo", "align_prop guided")),
    ("flux2", "full", "diffusion_dpo"),
}
GRID = [
    pytest.param(family, kind, name, marks=[] if (family, kind, name) in QUICK else pytest.mark.slow)
    for family in ("sd3", "flux", "z_image", "qwen_image", "flux2")
    for kind in ("lora", "full")
    for name in (*OFFLINE, *ONLINE)
    if (family, name) != ("flux", "align_prop guided")  # its guidance is an input of the network
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return Models(tmp_path_factory.mktemp("flow"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Pairs without and with calibrated scores, and images with captions that do not fit."""
    plain = write_pairs(tmp_path_factory.mktemp("data"), 4)
    rows = [json.loads(line) for line in plain.read_text().splitlines()]
    scored = plain.with_name("scored.jsonl")
    scores = [{"score_0": 0.6 + 0.05 * row, "score_1": 0.4 - 0.05 * row} for row in range(len(rows))]
    scored.write_text("\n".join(json.dumps({**row, **one}) for row, one in zip(rows, scores, strict=True)))
    captions = plain.with_name("captions.parquet")
    assert main(["pairs", "perturb", str(plain), "--out", str(captions)]) == 0
    return {"capo": scored, "smpo": scored, "tpo": captions, "plain": plain}


def recipe(model: str, data: dict[str, Path], output: Path, name: str, **sections: Any) -> RunConfig:
    """Two steps of a method on 16 x 16 images."""
    chosen = name.split()[0]
    options = {"steps": 2, "flow": {"text_length": 64}, **sections}
    if name in ONLINE:
        config = online_config(model, output, {"name": chosen, **ONLINE[name]}, **options)
        return config.model_copy(update={"data": config.data.model_copy(update={"resolution": 16})})
    source = data.get(chosen, data["plain"])
    given: dict[str, Any] = {"resolution": 16}
    if chosen == "tpo":
        given |= {"pairs": None, "labels": str(source)}
    return run_config(model, source, output, {"name": chosen, **OFFLINE[name]}, data=given, **options)


@pytest.mark.parametrize(("family", "kind", "name"), GRID)
def test_methods_train_families(
    models: dict[str, str], data: dict[str, Path], tmp_path: Path, family: str, kind: str, name: str
) -> None:
    adapter = {"kind": "lora", "rank": 2} if kind == "lora" else {"kind": "full"}
    output = train(recipe(models[family], data, tmp_path / "run", name, adapter=adapter))
    found = losses(output)
    assert set(found) == {1, 2} and all(torch.tensor(list(found.values())).isfinite())
    check_export(models[family], output, kind)


def check_export(base: str, output: Path, kind: str) -> None:
    """Compare the export, read by plain diffusers, with what `load_generator` makes of it; it is not the base."""
    import diffusers

    index = json.loads((Path(base) / "model_index.json").read_text())
    network = getattr(diffusers, index["transformer"][1])
    ours, untrained = (load_generator(path, device="cpu", flow=OPTIONS) for path in (output, base))
    if kind == "full":
        theirs = network.from_pretrained(output, subfolder="transformer")
    else:
        absent = {name: None for name in ("text_encoder_3", "tokenizer_3") if index.get(name) == [None, None]}
        pipe = diffusers.DiffusionPipeline.from_pretrained(base, **absent)
        pipe.load_lora_weights(str(output), weight_name="pytorch_lora_weights.safetensors")
        theirs = pipe.transformer
    x = torch.randn(1, *ours.latent_shape, generator=torch.Generator().manual_seed(0))
    t, cond = torch.tensor([600.0]), ours.encode_prompts(["a red circle"])
    with torch.no_grad():
        expected, before = ours.predict(x, t, cond), untrained.predict(x, t, cond)
        untrained.network = theirs.eval()
        torch.testing.assert_close(untrained.predict(x, t, cond), expected, rtol=1e-5, atol=1e-5)
    assert not torch.equal(expected, before)


def test_every_method_of_images_is_in_the_grid_or_refused() -> None:
    images = {name for name in methods.names() if methods.get(name).needs.modality == "image"}
    trained = {name.split()[0] for name in (*OFFLINE, *ONLINE)}
    refused = {name for name in images if not methods.get(name).needs.flow}
    assert not trained & refused
    # A method of its own section of the tests may be missing here, but never both.
    assert {"lpo"} == refused and trained <= images


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": {"name": "diffusion_dro", "guidance": 3.0}}, r"^method.guidance 3: 'flux' models have guidance"),
        (
            {
                "method": {"name": "dgpo", "reference_guidance": 4.5},
                "data": {"pairs": None, "prompts": "shapes-train"},
                "rewards": [BRIGHTNESS],
            },
            r"^method.reference_guidance 4.5: 'flux' models have",
        ),
        (
            {"evaluate": {"prompts": "shapes-validation", "rewards": ["clip"], "every": 5}},
            r"^evaluate.guidance 7.5: .* set evaluate.guidance: 1.0",
        ),
        (
            {
                "method": {"name": "lpo", "latent_reward": "no/such"},
                "data": {"pairs": None, "prompts": "shapes-train"},
            },
            "^method.name 'lpo' does not train flow models, and .* is one",
        ),
    ],
)
def test_what_cannot_work_is_one_line_before_a_weight_is_read(
    models: dict[str, str], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    model = tmp_path / "index-alone"
    model.mkdir()
    (model / "model_index.json").write_bytes((Path(models["flux"]) / "model_index.json").read_bytes())
    values = {"model": str(model), "method": "sft", "output": str(tmp_path / "out"), "data": {"pairs": "no/such"}}
    with pytest.raises(UserError, match=message) as caught:
        train(load_config({**values, **changes}))
    assert len(str(caught.value).splitlines()) == 1


def test_the_scheduler_alone_says_that_a_model_is_not_trained(tmp_path: Path) -> None:
    model = Path(build_tiny_sd(tmp_path / "sd"))
    for weights in model.rglob("*.safetensors"):
        weights.unlink()
    online = {"data": {"prompts": "shapes-train"}, "rewards": [BRIGHTNESS], "evaluate": None}
    values = {"model": str(model), "output": str(tmp_path / "out"), **online}
    with pytest.raises(UserError, match="^nft is for models that predict a velocity .*; this one predicts epsilon"):
        check_family(load_config({**values, "method": "nft"}))
    solver = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    solver.save_pretrained(model / "scheduler")
    index = json.loads((model / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "UniPCMultistepScheduler"]
    (model / "model_index.json").write_text(json.dumps(index))
    check_family(load_config({**values, "method": "nft"}))
    with pytest.raises(UserError, match=f"^method.name 'lpo' does not train flow models, and {model} is one; choose"):
        check_family(load_config({**values, "method": {"name": "lpo", "latent_reward": "no/such"}, "rewards": []}))
    write_pairs(tmp_path, 2)
    pairs = {"pairs": str(tmp_path / "pairs.jsonl")}
    reward = LatentRewardConfig.model_validate(
        {"model": str(model), "data": pairs, "output": str(tmp_path / "reward")}
    )
    with pytest.raises(UserError, match="is a flow model; a latent reward is built from the UNet"):
        train_reward(reward)


def test_choices_for_flow_models_are_refused_elsewhere(tmp_path: Path) -> None:
    config = run_config(build_tiny_sd(tmp_path / "sd"), tmp_path, tmp_path / "out", "sft", flow={"density": "mode"})
    with pytest.raises(UserError, match="flow: is for flow models"):
        train(config)
    with pytest.raises(UserError, match=r"flow.density: .*allowed: uniform, logit_normal, mode"):
        load_config({"model": "m", "method": "sft", "output": "o", "flow": {"density": "normal"}})


def test_density_and_guidance_of_the_recipe_reach_the_training(
    models: dict[str, str], data: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = {"text_length": 64, "density": "logit_normal", "density_mean": -1.0, "embedded_guidance": 2.0}
    first = train(recipe(models["flux"], data, tmp_path / "chosen", "sft", flow=chosen))
    line = "flux: 16 x 16 pixels, 64 text tokens, embedded guidance 2; sampling levels shifted by size, mu 0.4594;"
    assert f"{line} training levels logit_normal(-1, 1) on the unshifted grid" in capsys.readouterr().err
    second = train(recipe(models["flux"], data, tmp_path / "plain", "sft"))
    assert losses(first)[1] != losses(second)[1]
    config = json.dumps(load_config(first / "config.yaml").model_dump(mode="json"))
    assert '"embedded_guidance": 2.0' in config


@pytest.mark.slow
def test_a_run_is_evaluated_and_resumed(models: dict[str, str], data: dict[str, Path], tmp_path: Path) -> None:
    prompts = tmp_path / "held-out.txt"
    prompts.write_text("a red circle\na blue star\n")
    evaluate = {"prompts": str(prompts), "every": 2, "rewards": [BRIGHTNESS], "steps": 2, "guidance": 4.5}
    config = recipe(models["sd3"], data, tmp_path / "whole", "diffusion_dpo", evaluate=evaluate, steps=4)
    whole = losses(train(config))
    assert set(losses(tmp_path / "whole", f"evaluation/{BRIGHTNESS}")) == {0, 2, 4}
    halves = config.model_copy(update={"output": str(tmp_path / "halves")})
    train(halves.model_copy(update={"trainer": config.trainer.model_copy(update={"steps": 2})}))
    assert losses(train(halves)) == whole and len(whole) == 4


@pytest.mark.slow
def test_rounds_draw_at_the_size_and_with_the_options_of_the_recipe(models: dict[str, str], tmp_path: Path) -> None:
    """FLUX.1's own size is 256 pixels here."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\na blue square\n")
    rounds = {"count": 2, "prompts": str(prompts), "reward": BRIGHTNESS, "images_per_prompt": 2, "steps": 2}
    sections: dict[str, Any] = {"data": {"pairs": None, "resolution": 16}, "flow": {"text_length": 64}, "steps": 2}
    wrong = run_config(models["flux"], prompts, tmp_path / "out", rounds={**rounds, "guidance": 3.0}, **sections)
    with pytest.raises(UserError, match="^rounds.guidance 3: .* set rounds.guidance: 1.0"):
        train(wrong)
    output = train(
        run_config(models["flux"], prompts, tmp_path / "out", rounds={**rounds, "guidance": 1.0}, **sections)
    )
    for number in ("1", "2"):
        sampling = read_metadata(output / "rounds" / number / "pairs.parquet")["sampling"]
        assert sampling["flow"] == "image_size 16, text_length 64"
    table = pyarrow.parquet.read_table(output / "rounds" / "1" / "samples" / "images.parquet")
    assert Image.open(io.BytesIO(table["image"][0].as_py())).size == (16, 16)


def test_a_trained_adapter_draws_and_merges(
    models: dict[str, str], data: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train(recipe(models["sd3"], data, tmp_path / "run", "sft", learning_rate=0.1))
    assert main(["merge", str(run), "--out", str(tmp_path / "merged")]) == 0
    pixels = []
    for number, model in enumerate((run, tmp_path / "merged", models["sd3"])):
        draw = ["generate", str(model), "--steps", "2", "--guidance", "4", "--eta", "0.5", "--prompts", "a red circle"]
        assert main([*draw, "--out", str(tmp_path / str(number))]) == 0
        pixels.append(torch.tensor(list(Image.open(tmp_path / str(number) / "00000-0.png").getdata())).float())
    assert (pixels[0] - pixels[1]).abs().max() <= 1 and (pixels[0] - pixels[2]).abs().max() > 1
    capsys.readouterr()
    assert (
        main([*draw[:1], models["sd3"], *draw[2:6], "--solver", "dpm++", *draw[8:], "--out", str(tmp_path / "3")]) == 0
    )
    command = ["generate", models["flux"], "--prompts", "a red circle", "--out", str(tmp_path / "no")]
    assert main([*command, "--steps=1"]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert "without classifier-free guidance: give guidance 1, not 7.5" in error[-1]
