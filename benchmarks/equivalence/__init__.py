"""Our objectives against the published ones: the same tensors through both, and how far values and gradients differ.

`python -m benchmarks equivalence NAME CHECKOUT` runs the loss code of a public repository, read from a checkout of it
that you bring; none of that code is here. A comparison is a module of this package with `REPOSITORY` and
`compare(checkout) -> list[Comparison]`; the first line of its docstring describes it.
"""

PEERS = (
    "diffusion_dpo",
    "diffusers_dpo",
    "diffusion_kto",
    "mapo",
    "spo",
    "lpo",
    "smpo",
    "inpo",
    "dense_dpo",
    "ddpo",
    "nft",
    "awm",
    "dgpo",
    "gdpo",
    "trl_ddpo",
    "diffusion_dro",
    "align_prop",
    "trl_align_prop",
)
