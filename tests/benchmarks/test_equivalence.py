"""The comparison with published code: statements are found and run, differences are seen, errors are one line."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.equivalence import PEERS
from benchmarks.equivalence.checkout import Checkout
from benchmarks.equivalence.comparing import losses, values
from mmalign.core.errors import UserError

SCRIPT = """
import package_that_nobody_has

LIMIT = 3.0

@register.decorator(package_that_nobody_has)
def double(value: Unknown) -> Unknown:
    return 2 * value.float()

class Trainer(package_that_nobody_has.Base):
    def loss(self, value):
        return self.weight * value

def train(args):
    scale = 1
    for step in range(args.steps):
        scale = args.scale
        if step:
            total = scale * step
        loss = total.float().cuda() + math.pi
        later = undefined
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    (tmp_path / "train.py").write_text(SCRIPT)
    return Checkout(tmp_path, "somebody/something")


def test_statements_are_taken_from_the_block_that_holds_both_ends(checkout: Checkout) -> None:
    # `scale = ` stands in an outer block first, but no `loss = ` follows it there.
    found = checkout.statements("train.py", r"scale = ", r"loss = ")
    args = type("Args", (), {"scale": torch.tensor(2.0, dtype=torch.float64)})
    names = found.run(args=args, step=5)
    assert names["loss"].dtype == torch.float64 and float(names["loss"]) == pytest.approx(10 + 3.141592653589793)
    assert "later" not in names


def test_functions_come_without_decorators_and_methods_without_their_class(checkout: Checkout) -> None:
    found = checkout.functions("train.py", "double", "Trainer.loss")
    assert float(found.function("double")(torch.tensor(1.5))) == 3.0
    trainer = type("Stand", (), {"weight": 4})()
    assert found.run(self="a name as any other")["loss"](trainer, 2) == 8
    assert checkout.statements("train.py", "LIMIT = ", "LIMIT = ").run()["LIMIT"] == 3.0


def test_float64_is_kept_only_while_their_code_runs(checkout: Checkout) -> None:
    double = checkout.functions("train.py", "double").function("double")
    assert double(torch.ones(1, dtype=torch.float64)).dtype == torch.float64
    assert double(torch.ones(1, dtype=torch.float16)).dtype == torch.float32
    with pytest.raises(UserError):
        double("no tensor")
    assert torch.ones(1, dtype=torch.float64).float().dtype == torch.float32
    assert torch.get_default_dtype() == torch.float32


def test_what_is_missing_is_named_in_one_line(checkout: Checkout) -> None:
    for call, said in (
        (lambda: checkout.statements("train.py", "scale = ", "absent = "), "statement 'absent = ' after 'scale = '"),
        (lambda: checkout.statements("train.py", "absent = ", "loss = "), "statement 'absent = '"),
        (lambda: checkout.functions("train.py", "Trainer.absent"), "definition of 'Trainer.absent'"),
        (lambda: checkout.functions("absent.py", "double"), "absent.py: found no file"),
        (lambda: checkout.statements("train.py", "later = ", "later = ").run(), "line 21 cannot be run"),
    ):
        with pytest.raises(UserError) as caught:
            call()
        assert said in str(caught.value) and "\n" not in str(caught.value)
    (checkout.path / "broken.py").write_text("a = (\n")
    with pytest.raises(UserError, match="broken.py is not Python that can be read: line 1"):
        checkout.functions("broken.py", "double")


def test_the_commit_is_that_of_the_checkout_and_no_other(tmp_path: Path) -> None:
    assert Checkout(tmp_path, "a/b").commit == "unknown"
    git = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "m"], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout
    assert Checkout(tmp_path, "a/b").commit == head[:7]


def test_differences_of_losses_and_gradients_are_the_largest_ones() -> None:
    x, y = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in ([1.0, 2.0], [3.0]))
    # d/dx of x^2 is 2x, of x^2 + x^3 / 3 it is 2x + x^2: 1 and 4 apart. y is used on one side alone.
    row = losses(
        "f", "w", "s", lambda: x.square().sum(), lambda: (x**2 + x**3 / 3).sum() + 5 * y.sum(), {"x": x, "y": y}
    )
    assert row.theirs == 5 and row.ours == pytest.approx(23) and row.difference == pytest.approx(18)
    assert row.gradients == {"x": (4.0, 4.0), "y": (5.0, 0.0)} and row.gradient_difference == 5.0
    same = values("f", "w", "s", torch.tensor([1, 2]), torch.tensor([1, 5]))
    assert same.difference == 3 and same.gradient_difference is None
    with pytest.raises(ValueError, match="shapes"):
        values("f", "w", "s", torch.zeros(2), torch.zeros(3))


def _write_dpo(folder: Path, factor: str) -> None:
    (folder / "train.py").write_text(
        f"""
for batch in data:
    target = noise
    output = unet(noisy_latents, timesteps, encoder_hidden_states).sample
    if args.train_method == 'sft':
        loss = ((output - target) ** 2).mean()
    else:
        with torch.no_grad():
            old = ref_unet(noisy_latents, timesteps, encoder_hidden_states).sample
        gain = (((old - target) ** 2) - ((output - target) ** 2)).flatten(1).mean(1)
        half = len(gain) // 2
        loss = torch.log1p(torch.exp(-{factor} * args.beta_dpo * (gain[:half] - gain[half:]))).mean()
"""
    )


def test_the_command_runs_a_checkout_and_sees_a_wrong_factor(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "report.json"
    command = ["equivalence", "diffusion_dpo", str(tmp_path), "--json", str(report)]
    _write_dpo(tmp_path, "0.5")
    assert main(command) == 0
    assert "SalesforceAIResearch/DiffusionDPO at unknown" in capsys.readouterr().out
    pairs, chosen = json.loads(report.read_text())["comparisons"]
    for row in (pairs, chosen):
        assert row["difference"] < 1e-12 and row["gradients"]["weight"]["difference"] < 1e-9
        assert row["gradients"]["weight"]["largest"] > 0.1 and row["dtype"] == "float64"
    _write_dpo(tmp_path, "1.0")
    assert main(command) == 0
    pairs, chosen = json.loads(report.read_text())["comparisons"]
    assert pairs["difference"] > 0.1 and chosen["difference"] < 1e-12


def test_wrong_arguments_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, said in (
        (["diffusion_dpo", str(tmp_path / "absent")], "there is no directory"),
        (["diffusion_dpo", str(tmp_path)], "found no file; needed: SalesforceAIResearch/DiffusionDPO"),
        (["mapo", str(tmp_path), "--diffusers", str(tmp_path)], "'mapo' takes no scheduler from diffusers"),
    ):
        assert main(["equivalence", *arguments]) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1
    for arguments, said in ((["map", str(tmp_path)], "did you mean 'mapo'?"), (["mapo"], "--list prints both")):
        with pytest.raises(SystemExit):
            main(["equivalence", *arguments])
        assert said in capsys.readouterr().err


def test_the_list_names_every_comparison_with_its_repository(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["equivalence", "--list"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in lines] == list(PEERS)
    assert all("/" in line[1] and len(line) > 4 for line in lines)
