"""All objectives as pure functions on tensors, without models, configuration or state; they import only torch."""

from mmalign.losses.awm import awm_log_prob
from mmalign.losses.capo import capo, capo_logit, noise_level_weight
from mmalign.losses.denoising import denoising_error
from mmalign.losses.dense_dpo import dense_logit, discounted_probabilities, list_mle
from mmalign.losses.dgpo import dgpo, moved_enough
from mmalign.losses.diffusion_dpo import beta_of_margin, diffusion_dpo, diffusion_dpo_logit, segment_dpo
from mmalign.losses.diffusion_dro import diffusion_dro
from mmalign.losses.diffusion_kto import diffusion_kto, kto_reference_point
from mmalign.losses.dpo import beta_of_gap, chosen_anchor, dpo, dpo_logit
from mmalign.losses.flow_grpo import flash_weights, guard_log_ratio, squared_error_log_prob, temp_weights
from mmalign.losses.latent_reward import latent_reward, pair_weights
from mmalign.losses.mapo import mapo, mapo_likelihood, mapo_logit
from mmalign.losses.nft import nft, old_policy_decay, optimality
from mmalign.losses.pair_loss import pair_loss
from mmalign.losses.policy_gradient import (
    clamped_policy_gradient,
    clipped_policy_gradient,
    gaussian_kl,
    masked_policy_gradient,
)
from mmalign.losses.prdp import prdp
from mmalign.losses.rrpo import rrpo, rrpo_logit
from mmalign.losses.smpo import smpo, smpo_weight
from mmalign.losses.spo import dynamic_threshold, spo, spo_logit, step_preference
from mmalign.losses.tokens import completion_mean, completion_sum, sampled_kl, sft, span_masks, token_jsd, token_kl
from mmalign.losses.tpo import tdpo, tdpo_logit
from mmalign.losses.visual_dpo import rdpo, runner_up_log_probs, select_by_divergence, vdpo

__all__ = [
    "awm_log_prob",
    "beta_of_gap",
    "beta_of_margin",
    "capo",
    "capo_logit",
    "chosen_anchor",
    "clamped_policy_gradient",
    "clipped_policy_gradient",
    "completion_mean",
    "completion_sum",
    "denoising_error",
    "dense_logit",
    "dgpo",
    "diffusion_dpo",
    "diffusion_dpo_logit",
    "diffusion_dro",
    "diffusion_kto",
    "discounted_probabilities",
    "dpo",
    "dpo_logit",
    "dynamic_threshold",
    "flash_weights",
    "gaussian_kl",
    "guard_log_ratio",
    "kto_reference_point",
    "latent_reward",
    "list_mle",
    "mapo",
    "mapo_likelihood",
    "mapo_logit",
    "masked_policy_gradient",
    "moved_enough",
    "nft",
    "noise_level_weight",
    "old_policy_decay",
    "optimality",
    "pair_loss",
    "pair_weights",
    "prdp",
    "rdpo",
    "rrpo",
    "rrpo_logit",
    "runner_up_log_probs",
    "sampled_kl",
    "segment_dpo",
    "select_by_divergence",
    "sft",
    "smpo",
    "smpo_weight",
    "span_masks",
    "spo",
    "spo_logit",
    "squared_error_log_prob",
    "step_preference",
    "tdpo",
    "tdpo_logit",
    "temp_weights",
    "token_jsd",
    "token_kl",
    "vdpo",
]
