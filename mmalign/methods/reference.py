"""The reference model: a frozen copy of the model before training, for methods that compare the policy with it.

With an adapter the reference is the same network with the adapter switched off, which costs no memory; with full
fine-tuning it is a frozen copy in the compute precision. Both give the same numbers, and at the start of training
exactly the policy's: dropout is off, no graph is kept, and the copy rounds only what autocast would round anyway.
Another model's network may take the place of the copy.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn

from mmalign.core.precision import Precision, round_frozen
from mmalign.methods.two_pass import predict_by_sample
from pipelines.conditioning import Conditioning
from pipelines.vlm.batch import VlmBatch

TokenValues = tuple[Float[Tensor, "batch tokens"], Bool[Tensor, "batch tokens"]]
"""What a model says about every token of some completions, and which columns are tokens."""


class Reference:
    """The reference model of a run; inside `with reference.active():` the generator computes its outputs."""

    def __init__(
        self,
        generator: Any,
        kind: Literal["adapter", "copy"],
        *,
        network: nn.Module | None = None,
        precision: Precision = "fp32",
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        """Freeze the generator's current network as the reference.

        Args:
            generator: the generator that is about to be trained.
            kind: "adapter" if only an adapter will change, "copy" if the network's own weights will.
            network: of another model, which is frozen instead of a copy.
            precision: of the run; a copy keeps its weights in it.
            autocast: makes the context in which the policy is called too.

        Raises:
            ValueError: "adapter" without an adapter.
        """
        if kind == "adapter" and not generator.has_adapter:
            raise ValueError("reference 'adapter' needs a generator with an adapter; use kind 'copy'")
        self.generator = generator
        self.autocast = autocast
        self.by_sample = False  # whether `predict` takes one sample at a time, as the policy of a run with `two_pass`
        self.frozen: nn.Module | None = None
        if network is not None:
            self.frozen = network.eval().requires_grad_(False)
            round_frozen(self.frozen, precision)
        elif kind == "copy":
            self.frozen = _frozen_copy(generator.network, precision)
        # Listed once, because walking over all modules at every step is slow for small models.
        layers = [] if self.frozen is not None else generator.network.modules()
        self._dropouts = [layer for layer in layers if isinstance(layer, nn.Dropout) and layer.p > 0]

    @contextmanager
    def active(self) -> Iterator[None]:
        """Inside the context, use the initial weights, without a graph and without dropout."""
        with torch.no_grad(), self._in_place(), _dropout_off(self._dropouts):
            yield

    def predict(
        self, x_t: Float[Tensor, "batch *latent"], t: Shaped[Tensor, " batch"], cond: Conditioning
    ) -> Float[Tensor, "batch *latent"]:
        """Return the reference's output, without a graph, float32."""
        with self.active():
            return predict_by_sample(self._predict, x_t, t, cond) if self.by_sample else self._predict(x_t, t, cond)

    def _predict(
        self, x_t: Float[Tensor, "batch *latent"], t: Shaped[Tensor, " batch"], cond: Conditioning
    ) -> Float[Tensor, "batch *latent"]:
        with self.autocast():
            output: Tensor = self.generator.predict(x_t, t, cond)
            return output.float()

    def log_probs(self, batch: VlmBatch) -> TokenValues:
        """Return the result of `Run.log_probs` for the reference, without a graph."""
        with self.active(), self.autocast():
            found: TokenValues = self.generator.log_probs(batch)
            return found

    def logits(self, batch: VlmBatch) -> Float[Tensor, "batch tokens vocabulary"]:
        """Return the result of `Run.logits` for the reference, without a graph."""
        with self.active(), self.autocast():
            found: Tensor = self.generator.completion_logits(batch)
            return found

    @contextmanager
    def _in_place(self) -> Iterator[None]:
        if self.frozen is None:
            with self.generator.adapter_disabled():
                yield
            return
        policy = self.generator.network
        self.generator.network = self.frozen
        try:
            yield
        finally:
            self.generator.network = policy


def _frozen_copy(network: nn.Module, precision: Precision) -> nn.Module:
    frozen = copy.deepcopy(network).eval().requires_grad_(False)
    round_frozen(frozen, precision)
    # Used under no_grad alone. torch chooses a kernel for strided inputs by whether the weights want gradients, and
    # on some processors these kernels round differently.
    for parameter, own in zip(frozen.parameters(), network.parameters(), strict=True):
        parameter.requires_grad_(own.requires_grad)
    return frozen


@contextmanager
def _dropout_off(layers: list[nn.Dropout]) -> Iterator[None]:
    live = [layer for layer in layers if layer.training]
    for layer in live:
        layer.eval()
    try:
        yield
    finally:
        for layer in live:
            layer.train()
