"""What the tests hold rewards to whose authors published no score, for `mmalign rewards verify`."""

from __future__ import annotations

HELD_TO = {
    "dino-i": ("test_reward_references", "the mean over pairs of tiny towers, worked out one by one"),
    "geneval": ("test_reward_geneval", "its rules on synthetic boxes, and GenEval's published metadata"),
    "group-diversity": ("test_reward_group_diversity", "its formula, and the Gini-Simpson index of clusters"),
    "hps-v3": ("test_reward_hps3", "transformers' own model and processor, on a tiny Qwen2-VL in its layout"),
    "jpeg-compressibility": (
        "test_reward_jpeg",
        "the negative of jpeg-incompressibility, which has a published score",
    ),
    "block-motion": ("test_reward_block_motion", "squares moved by known distances, flicker and noise"),
    "frame-consistency": ("test_reward_block_motion", "the formula by loops over the embeddings of a tiny CLIP"),
    "latent": ("test_reward_latent", "the full UNet on tiny models of each family"),
    "motion-smoothness": ("test_reward_video_motion", "interpolators whose frames are known"),
    "mps": ("test_reward_mps", "a second implementation by explicit loops, on a tiny model in its layout"),
    "ocr": ("test_reward_ocr", "edit distances by hand, and a rendered sign read by RapidOCR"),
    "pickscore": ("test_reward_pickscore", "a tiny CLIP of transformers in the published layout"),
    "ref-clipscore": ("test_reward_clip", "the formula on a tiny CLIP"),
    "social-reward": ("test_reward_social", "a state dict of OpenAI's layout, and its QuickGELU"),
    "text-norm": ("test_reward_text_norm", "its algebra, by hand"),
    "vbench-aesthetic-quality": ("test_reward_vbench", "the models' own libraries, frame by frame, on tiny models"),
    "vbench-appearance-style": ("test_reward_vbench", "the models' own libraries, frame by frame, on tiny models"),
    "vbench-background-consistency": (
        "test_reward_vbench",
        "the models' own libraries, frame by frame, on tiny models",
    ),
    "vbench-dynamic-degree": ("test_reward_video_motion", "torchvision's own RAFT, and numbers by hand"),
    "vbench-subject-consistency": ("test_reward_vbench", "the models' own libraries, frame by frame, on tiny models"),
    "vbench-temporal-flickering": ("test_reward_vbench", "differences of frames, by hand"),
    "video-align": (
        "test_reward_video_align",
        "transformers' own model and processor, on a tiny Qwen2-VL in its layout",
    ),
    "video-score": (
        "test_reward_video_score",
        "transformers' own model and processor, on a tiny Idefics2 in its layout",
    ),
    "vlm-judge": ("test_reward_vlm_judge", "a chat endpoint on this machine with known answers"),
    "vlm-rm": ("test_reward_vlm_rm", "the projection built as a matrix, on a tiny CLIP"),
    "vqa-score": ("test_reward_vqa_score", "P(Yes) worked out by hand on tiny models of the real classes"),
}
"""name -> (the file in tests/rewards/, what it compares with)"""


def held_to(name: str) -> str | None:
    """Return one line on what the tests hold a reward to; None for one with a published score, and for others."""
    if name not in HELD_TO:
        return None
    file, what = HELD_TO[name]
    return f"{name}: no published score to check; tests/rewards/{file}.py compares it with {what}"
