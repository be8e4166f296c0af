"""Fine-tuning methods, one a file: how a batch becomes a loss. Others join by the entry point `mmalign.methods`."""

from mmalign.registry import Registry

methods = Registry(
    "method",
    {
        "sft": "mmalign.methods.sft:SFT",
        "diffusion_dpo": "mmalign.methods.diffusion_dpo:DiffusionDPO",
    },
    "mmalign.methods",
)

__all__ = ["methods"]
