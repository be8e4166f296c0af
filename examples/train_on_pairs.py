"""Train a LoRA on preference pairs that are made in memory: Direct Preference Optimisation on a tiny model.

Run it as a script, or cell by cell in an editor that knows `# %%` (VS Code, PyCharm, Spyder, Jupyter with jupytext).
It needs no GPU and no download, and takes about ten seconds: Shapes draws coloured shapes in 64 x 64 pixels.
"""

# %% Draw a few candidates for each prompt.
# A preference pair is two images of one prompt, one of which is better. Any source will do: photographs, votes of
# people, or, as here, the model's own images. `mmalign.generate` returns PIL images, in a notebook shown as a grid.
import mmalign

MODEL = "assets/shapes-sd"  # ships with mmalign, and is found wherever you are
prompts = ["a red circle", "two blue stars", "a green square on a white background", "a yellow ring"]
images = mmalign.generate(MODEL, prompts, seeds=range(4), steps=8, guidance=4)
print(f"{len(images)} images, the first of '{images.prompts[0]}'")

# %% Decide which is better.
# A reward gives each image a number. This one compares the image with what the prompt says, by geometry alone; for
# real images it would be "pickscore", "hps" or one of your own (see write_a_reward.py).
scores = mmalign.score(images, rewards="shapes-correctness")["shapes-correctness"]

# %% Make a pair of the best and the worst of each prompt.
# A pair is a dictionary with `prompt`, `chosen` and `rejected`. Images may also be paths, bytes, arrays or tensors,
# and instead of a list you can give a `datasets.Dataset`.
pairs = []
for prompt in prompts:
    own = [index for index, text in enumerate(images.prompts) if text == prompt]
    best, worst = max(own, key=scores.__getitem__), min(own, key=scores.__getitem__)
    pairs.append({"prompt": prompt, "chosen": images[best], "rejected": images[worst]})

# %% Train.
# The first argument is a shipped config, a YAML file, or a dictionary such as this; everything that is not given has a
# default. beta says how far the model may move from where it starts: high is careful. The pairs are written to
# runs/examples/dpo/data, and the config to runs/examples/dpo/config.yaml, so that the run can be repeated; run this
# cell again and it goes on from its last checkpoint.
result = mmalign.train(
    {"model": MODEL, "method": {"name": "diffusion_dpo", "beta": 500}},
    pairs=pairs,
    trainer={"steps": 10, "batch_size": 4, "learning_rate": 1e-4, "log_every": 1},
    output="runs/examples/dpo",
)

# %% Look at what came out.
# In a notebook `result` alone shows the curves. Accuracy is the share of pairs in which the model now prefers the
# chosen image more than it did at first; with four pairs, it learns them by heart.
for step, loss in result.curve("loss"):
    print(f"step {step:2d}: loss {loss:.4f}")
tuned = result.generate(prompts, seeds=[0], steps=8, guidance=4)
tuned.grid().save("runs/examples/dpo.png")
print(f"the adapter is in {result.path}, its images in runs/examples/dpo.png")
