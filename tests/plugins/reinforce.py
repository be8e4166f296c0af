# As the contributors' guide of release 0.1.0 had it; never edited, since plug-ins of that time are not either.
"""REINFORCE on the sampler's steps, the round's mean as the baseline (Williams 1992)."""

from mmalign.methods.base import LossOutput
from mmalign.methods.trajectory import TrajectoryConfig, TrajectoryMethod


class Reinforce(TrajectoryMethod[TrajectoryConfig]):
    """Raise the log-probs of images in proportion to how much better than the mean they are."""

    name = "reinforce"
    Config = TrajectoryConfig

    def loss(self, run, batch):
        advantages = batch.rewards - batch.rewards.mean()
        return LossOutput(-(advantages * batch.log_probs).mean())
