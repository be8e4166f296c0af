"""Every objective as a pure function on tensors: no models, no configuration, no state; imports torch alone."""

from mmalign.losses.capo import capo, capo_logit, noise_level_weight
from mmalign.losses.denoising import denoising_error
from mmalign.losses.dense_dpo import dense_logit, discounted_probabilities, list_mle
from mmalign.losses.diffusion_dpo import diffusion_dpo, diffusion_dpo_logit
from mmalign.losses.diffusion_dro import diffusion_dro
from mmalign.losses.diffusion_kto import diffusion_kto, kto_reference_point
from mmalign.losses.latent_reward import latent_reward, pair_weights
from mmalign.losses.mapo import mapo, mapo_likelihood, mapo_logit
from mmalign.losses.policy_gradient import clamped_policy_gradient, clipped_policy_gradient, gaussian_kl
from mmalign.losses.prdp import prdp
from mmalign.losses.smpo import smpo, smpo_weight
from mmalign.losses.spo import dynamic_threshold, spo, spo_logit, step_preference
from mmalign.losses.tpo import tdpo, tdpo_logit

__all__ = [
    "capo",
    "capo_logit",
    "clamped_policy_gradient",
    "clipped_policy_gradient",
    "denoising_error",
    "dense_logit",
    "diffusion_dpo",
    "diffusion_dpo_logit",
    "diffusion_dro",
    "diffusion_kto",
    "discounted_probabilities",
    "dynamic_threshold",
    "gaussian_kl",
    "kto_reference_point",
    "latent_reward",
    "list_mle",
    "mapo",
    "mapo_likelihood",
    "mapo_logit",
    "noise_level_weight",
    "pair_weights",
    "prdp",
    "smpo",
    "smpo_weight",
    "spo",
    "spo_logit",
    "step_preference",
    "tdpo",
    "tdpo_logit",
]
