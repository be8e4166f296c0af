"""Compare two models fairly: the same prompts and seeds, several rewards, and intervals for every difference.

The second model is the first after a short training on images that are right by the oracle of Shapes.
"""

# %% Train a second model.
# `labels` are single images that are good or bad; sft learns from the good ones. See train_on_pairs.py for more.
import mmalign

MODEL = "assets/shapes-sd"
drawn = mmalign.generate(MODEL, ["a red circle", "two blue stars"], seeds=range(6), steps=8, guidance=4)
right = mmalign.score(drawn, rewards="shapes-strict")["shapes-strict"]
labels = [
    {"prompt": prompt, "image": image, "label": score > 0.5}
    for prompt, image, score in zip(drawn.prompts, drawn, right, strict=True)
]
tuned = mmalign.train(
    {"model": MODEL, "method": "sft"},
    labels=labels,
    trainer={"steps": 6, "batch_size": 1, "learning_rate": 1e-4},
    output="runs/examples/sft",
)

# %% Compare.
# Every system draws every prompt from every seed, so that differences are paired: the same prompt, the same noise.
# The first system is the baseline. A system is a path, a hub id, or what `mmalign.train` returned; a mapping sets
# more, such as {"model": ..., "guidance": 6}. Use prompts that you have not trained on, and hundreds of them.
outcome = mmalign.compare(
    {"base": MODEL, "sft": tuned},
    prompts=["a green star", "three red squares", "a blue ring left of a red cross", "a white circle on black"],
    rewards=["shapes-correctness", "shapes-quality"],
    seeds=[0, 1],
    steps=8,
    guidance=4,
    output="runs/examples/compare",
)

# %% Read the table. In a notebook, `outcome` alone shows it.
# An interval of the difference that holds 0 says that these prompts cannot tell the models apart.
for row in outcome.table:
    print(" | ".join(row.values()))

# %% Read the verdict, and open the report: a page with all images side by side.
print(*outcome.verdicts, sep="\n")
print(f"report: {outcome.report}")
