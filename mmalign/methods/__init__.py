"""Fine-tuning methods, one a file: how a batch becomes a loss. Others join by the entry point `mmalign.methods`."""

from mmalign.core.registry import Registry

methods = Registry(
    "method",
    {
        "align_prop": "mmalign.methods.align_prop:AlignProp",
        "capo": "mmalign.methods.capo:CaPO",
        "ddpo": "mmalign.methods.ddpo:DDPO",
        "dense_dpo": "mmalign.methods.dense_dpo:DenseDPO",
        "diffusion_dpo": "mmalign.methods.diffusion_dpo:DiffusionDPO",
        "diffusion_dro": "mmalign.methods.diffusion_dro:DiffusionDRO",
        "diffusion_kto": "mmalign.methods.diffusion_kto:DiffusionKTO",
        "inpo": "mmalign.methods.inpo:InPO",
        "lpo": "mmalign.methods.lpo:LPO",
        "mapo": "mmalign.methods.mapo:MaPO",
        "prdp": "mmalign.methods.prdp:PRDP",
        "rdpo": "mmalign.methods.rdpo:RDPO",
        "rrpo": "mmalign.methods.rrpo:RRPO",
        "sft": "mmalign.methods.sft:SFT",
        "smpo": "mmalign.methods.smpo:SmPO",
        "spo": "mmalign.methods.spo:SPO",
        "temple": "mmalign.methods.temple:Temple",
        "tpo": "mmalign.methods.tpo:TPO",
        "vdpo": "mmalign.methods.vdpo:VDPO",
        "vlm_dpo": "mmalign.methods.vlm_dpo:VlmDPO",
        "vlm_sft": "mmalign.methods.vlm_sft:VlmSFT",
    },
    "mmalign.methods",
)

__all__ = ["methods"]
