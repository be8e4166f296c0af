"""What every test runs under: one thread, no network, tensor shapes of public functions checked at run time."""

from __future__ import annotations

import os

# Before torch is imported: the tests run in parallel processes, each of which would take every core.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from collections.abc import Iterator

import jaxtyping
import pytest

jaxtyping.install_import_hook(["mmalign.losses", "pipelines", "rewards"], "beartype.beartype")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture
def unchecked_shapes() -> Iterator[None]:
    """Switch the shape checks off, for a test of what our own code says about a wrong shape."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
