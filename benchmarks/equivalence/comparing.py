"""What is compared: two losses with their gradients, or two tensors; and the small network that both sides train."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from pipelines.conditioning import Conditioning
from pipelines.noise import NoiseProcess

SCHEDULE = dict(
    num_train_timesteps=1000,
    beta_start=0.00085,
    beta_end=0.012,
    beta_schedule="scaled_linear",
    clip_sample=False,
    set_alpha_to_one=False,
    steps_offset=1,
)
"""The noise schedule of Stable Diffusion 1.5."""
SHAPE = (4, 8, 8)


@dataclass(frozen=True)
class Comparison:
    """How far two results are apart; `gradients` by input: the largest difference and the largest entry."""

    file: str
    what: str
    settings: str
    ours: float
    theirs: float
    difference: float
    gradients: dict[str, tuple[float, float]] = field(default_factory=dict)
    dtype: str = "float64"

    @property
    def gradient_difference(self) -> float | None:
        """The largest difference of any gradient, or None where values alone are compared."""
        return max((difference for difference, _ in self.gradients.values()), default=None)

    def as_json(self) -> dict[str, Any]:
        """Return everything by name."""
        gradients = {name: {"difference": gap, "largest": size} for name, (gap, size) in self.gradients.items()}
        return {**vars(self), "gradients": gradients}


def losses(
    file: str,
    what: str,
    settings: str,
    theirs: Callable[[], Tensor],
    ours: Callable[[], Tensor],
    inputs: Mapping[str, Tensor],
) -> Comparison:
    """Compare two scalar losses and their gradients by `inputs`; each side has a graph of its own."""
    sides = []
    for loss in (theirs(), ours()):
        found = torch.autograd.grad(loss, list(inputs.values()), allow_unused=True)
        sides.append(
            (
                loss.detach(),
                [torch.zeros_like(x) if g is None else g for x, g in zip(inputs.values(), found, strict=True)],
            )
        )
    (their_loss, their_gradients), (our_loss, our_gradients) = sides
    gradients = {
        name: (_gap(a, b), float(a.abs().max()))
        for name, a, b in zip(inputs, their_gradients, our_gradients, strict=True)
    }
    gap = abs(float(our_loss) - float(their_loss))
    dtype = str(their_loss.dtype).removeprefix("torch.")
    return Comparison(file, what, settings, float(our_loss), float(their_loss), gap, gradients, dtype)


def values(file: str, what: str, settings: str, theirs: Tensor, ours: Tensor) -> Comparison:
    """Compare two tensors of results; their means stand for them in the table."""
    means = (float(x.double().mean()) for x in (ours, theirs))
    return Comparison(file, what, settings, *means, _gap(ours, theirs), dtype=str(theirs.dtype).removeprefix("torch."))


def _gap(a: Tensor, b: Tensor) -> float:
    if a.shape != b.shape:
        raise ValueError(f"cannot compare shapes {tuple(a.shape)} and {tuple(b.shape)}")
    return float((a.double() - b.double()).abs().max())


class Denoiser(nn.Module):
    """A network of a few hundred float64 weights, called as diffusers calls a UNet; its change can be switched off.

    `weight` and `bias` are what training has changed; without them it is the reference. `seen` lists the timesteps
    that it was told.
    """

    def __init__(self, generator: torch.Generator, change: float = 1e-3) -> None:
        """Draw the weights; `change` is the size of the change."""
        super().__init__()
        channels = SHAPE[0]
        draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
        self.register_buffer("base", 0.3 * draw(channels, channels, 3, 3))
        self.weight = nn.Parameter(change * draw(channels, channels, 3, 3))
        self.bias = nn.Parameter(change * draw(channels))
        self.adapter = True
        self.seen: list[list[float]] = []

    def forward(self, x: Tensor, t: Tensor, encoder_hidden_states: Tensor, **_: Any) -> SimpleNamespace:
        """Return the prediction as `.sample`; it depends on the timestep and on the prompts."""
        self.seen.append(t.reshape(-1).tolist())
        weight, bias = (self.base + self.weight, self.bias) if self.adapter else (self.base, None)
        shift = torch.cos(t.to(x.dtype) / 300) + encoder_hidden_states.mean((1, 2))
        return SimpleNamespace(
            sample=torch.nn.functional.conv2d(torch.tanh(x + shift.reshape(-1, 1, 1, 1)), weight, bias, padding=1)
        )

    def disable_adapters(self) -> None:
        """Become the reference, by the name that diffusers gives it."""
        self.adapter = False

    def enable_adapters(self) -> None:
        """Become the policy again."""
        self.adapter = True

    def reference(self, x: Tensor, t: Tensor, encoder_hidden_states: Tensor, **_: Any) -> SimpleNamespace:
        """Return the prediction without the change."""
        self.disable_adapters()
        try:
            return self.forward(x, t, encoder_hidden_states)
        finally:
            self.enable_adapters()

    def inputs(self) -> dict[str, Tensor]:
        """Return the weights that a gradient is taken by, named."""
        return dict(self.named_parameters())


class World:
    """Random tensors of a training step in float64: pairs (chosen first), noise, timesteps, prompts, a network."""

    def __init__(self, pairs: int = 3, seed: int = 0, change: float = 1e-3) -> None:
        """Draw everything from one seed."""
        from diffusers import DDIMScheduler

        self.random = torch.Generator().manual_seed(seed)
        self.network = Denoiser(self.random, change)
        self.scheduler = DDIMScheduler(**SCHEDULE)
        self.process = NoiseProcess.from_scheduler(self.scheduler)
        # The schedulers compute with the coefficients that they hold; ours are their float32 values in float64.
        for name in ("alphas_cumprod", "final_alpha_cumprod"):
            setattr(self.scheduler, name, getattr(self.scheduler, name).double())
        self.latents = self.draw(2 * pairs, *SHAPE)
        self.noise = self.draw(pairs, *SHAPE).repeat(2, 1, 1, 1)
        self.t = torch.randint(0, 1000, (pairs,), generator=self.random).repeat(2)
        self.states = self.draw(pairs, 5, 6).repeat(2, 1, 1)
        self.noisy = self.process.add_noise(self.latents, self.noise, self.t)

    def draw(self, *shape: int) -> Tensor:
        """Return standard normal numbers."""
        return torch.randn(*shape, generator=self.random, dtype=torch.float64)

    # What the samplers ask of a generator.
    latent_shape = SHAPE
    device = torch.device("cpu")
    dtype = torch.float64

    def predict(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """Return the policy's prediction."""
        output: Tensor = self.network(x, t, cond.prompt_embeds).sample
        return output

    def errors(self, *, reference: bool = False) -> tuple[Tensor, Tensor]:
        """Return our denoising errors of the chosen and the rejected images under the policy or the reference."""
        from mmalign.losses import denoising_error

        network = self.network.reference if reference else self.network
        with torch.set_grad_enabled(not reference):
            chosen, rejected = denoising_error(network(self.noisy, self.t, self.states).sample, self.noise).chunk(2)
        return chosen, rejected
