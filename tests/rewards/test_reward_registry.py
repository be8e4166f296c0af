"""Finding rewards: by name, by dotted path, by entry point; and the README's example, used as a third party would."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import rewards
from rewards import Reward, RewardError, check_options, list_rewards, load_reward, register
from rewards import registry as registry_module

README = Path(rewards.__file__).with_name("README.md")


@pytest.fixture
def example(tmp_path, monkeypatch):
    """The example of rewards/README.md as an importable module `my_module`, forgotten afterwards."""
    code, declaration = (
        re.search(rf"```{language}\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL).group(1)
        for language in ("python", "toml")
    )
    assert len(code.splitlines()) < 30
    (tmp_path / "my_module.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path, declaration
    sys.modules.pop("my_module", None)


def declare(path, *lines, project="mine"):
    """Install a distribution as pip leaves it: a dist-info directory with entry points."""
    info = path / f"{project}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("\n".join(["[mmalign.rewards]", *lines, ""]))


def test_example_by_dotted_path(example):
    reward = load_reward("my_module:Colourfulness", gain=2.0, device="cpu")
    grey = torch.rand(1, 1, 16, 16, generator=torch.Generator().manual_seed(0)).expand(1, 3, 16, 16)
    striped = torch.zeros(1, 3, 16, 16)
    striped[:, 0, :, ::2] = 0.5
    scores = reward(torch.cat([grey, striped]))
    # Red alternates 0, 0.5: red-green has variance 1/16 * 256/255, yellow-blue a quarter of it; gain 2.
    assert scores.tolist() == pytest.approx([0.0, 2 * (5 / 64 * 256 / 255) ** 0.5], abs=1e-4)
    media = (striped + 0.1).requires_grad_()
    reward(media).sum().backward()
    assert media.grad.abs().max() > 0


def test_own_module_in_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "cwd_rewards.py").write_text(
        "from rewards import Reward\n\nclass Mine(Reward):\n    name = 'mine'\n    def score(self, *_): return None\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    assert rewards.reward_class("cwd_rewards:Mine").name == "mine"
    sys.modules.pop("cwd_rewards")


def test_example_by_entry_point(example):
    path, declaration = example
    name, target = re.search(r'^(\S+) = "(.*)"$', declaration, re.MULTILINE).groups()
    assert '[project.entry-points."mmalign.rewards"]' in declaration
    declare(path, f"{name} = {target}")
    assert type(load_reward("colourfulness")).__name__ == "Colourfulness"
    facts = {fact.name: fact for fact in list_rewards()}
    assert facts["colourfulness"].range == (0.0, 1.0) and facts["colourfulness"].differentiable
    assert facts["colourfulness"].summary.startswith("Spread of the colour-opponent channels")
    with pytest.raises(RewardError, match="unknown reward 'colourfullness'; did you mean 'colourfulness'"):
        load_reward("colourfullness")


def test_entry_points_that_cannot_work(example):
    path, _ = example
    declare(path, "clip = my_module:Colourfulness", "vivid = my_module:Colourfulness", "gone = my_nothing:Gone")
    with pytest.raises(RewardError, match="reward name 'clip' is claimed by my_module:.*, rewards.clip:ClipReward"):
        load_reward("clip")
    with pytest.raises(RewardError, match="declared as reward 'vivid' but its name is 'colourfulness'"):
        load_reward("vivid")
    with pytest.raises(RewardError, match="reward 'gone': cannot import my_nothing"):
        load_reward("gone")
    with pytest.warns(UserWarning) as caught:
        names = [fact.name for fact in list_rewards()]
    assert len(caught) == 3 and any("cannot import my_nothing" in str(warning.message) for warning in caught)
    assert "gone" not in names and "vivid" not in names


def test_one_target_declared_twice_is_one_reward(example):
    path, _ = example
    declare(path, "colourfulness = my_module:Colourfulness")
    declare(path, "colourfulness = my_module:Colourfulness", project="mine-editable")
    assert load_reward("colourfulness").name == "colourfulness"


def test_unknown_names_and_options(example):
    for name, options, message in [
        ("clop", {}, "unknown reward 'clop'; did you mean 'clip'"),
        ("my_module:Colorfulness", {}, "my_module has no 'Colorfulness'; did you mean 'Colourfulness'"),
        ("nowhere.at_all:Thing", {}, "cannot import nowhere.at_all: .*PYTHONPATH"),
        ("my_module:torch", {}, "'my_module:torch' is not a subclass of rewards.Reward"),
        ("rewards.base:Reward", {}, "lacks score"),
        ("my_module:Colourfulness", {"gian": 1}, "has no option 'gian'; did you mean 'gain'"),
        ("my_module:Colourfulness", {"weights": "x"}, "has no weights to choose"),
        ("clip", {"knid": "hessel"}, "no option 'knid'; did you mean 'kind'.*batch_size.*weights"),
    ]:
        with pytest.raises(RewardError, match=message):
            load_reward(name, **options)
        with pytest.raises(RewardError, match=message):
            check_options(name, options)
    assert check_options("clip", {"kind": "hessel", "batch_size": 2}).name == "clip"  # and nothing was loaded


def test_register_in_process(monkeypatch):
    monkeypatch.setattr(registry_module._LOOKUP, "_registered", {})

    @register
    class Constant(Reward):
        """Always one."""

        name = "constant"

        def score(self, media, prompts, references):
            return torch.ones(len(media))

    assert load_reward("constant")(torch.rand(2, 3, 4, 4)).tolist() == [1.0, 1.0]
    assert "constant" in [fact.name for fact in list_rewards()]
    register(Constant)
    place = {"__module__": Constant.__module__, "__qualname__": Constant.__qualname__}
    again = type("Constant", (Constant,), place)  # a notebook's cell, run again
    register(again)
    assert registry_module.reward_class("constant") is again
    with pytest.raises(RewardError, match="name 'constant' is taken"):
        register(type("Other", (Constant,), {"name": "constant"}))
    with pytest.raises(RewardError, match="name 'clip' is taken"):
        register(type("Other", (Constant,), {"name": "clip"}))
    with pytest.raises(RewardError, match="set a class attribute `name`"):
        register(type("Nameless", (Constant,), {"name": ""}))


def test_import_is_light():
    code = (
        "import sys, time; start = time.process_time(); import rewards; spent = time.process_time() - start; "
        "heavy = {'torch', 'transformers', 'open_clip', 'diffusers', 'mmalign', 'pipelines'} & set(sys.modules); "
        "assert not heavy, heavy; assert spent < 1, spent; "
        "rewards.reward_class('clip'); heavy = {'transformers', 'open_clip'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=README.parents[1])
