"""Write a reward and score with it: alone, beside a built-in one, and as part of a weighted sum.

A reward says how good an image is, as one number. It is a class with a few facts and one method.
"""

# %% Write the class.
# `score` gets a batch of images, a tensor [batch, 3, height, width] in [0, 1], on the reward's device, and returns one
# number an image. What is stated as facts is used: `range` scales charts and sums, and `differentiable` says that
# methods which need a gradient (align_prop, draft) may learn from it. Checks, batches and devices are the base's.
import mmalign


class Redness(mmalign.Reward):
    """How much more red than green and blue an image is on average: -1 for cyan, 1 for pure red."""

    name = "redness"
    differentiable = True
    range = (-1.0, 1.0)

    def score(self, media, prompts, references):
        red, green, blue = media.mean((2, 3)).unbind(1)
        return red - (green + blue) / 2


# %% Score images.
# The class is enough; give an object, `Redness(batch_size=8)`, where it has options to set.
images = mmalign.generate("assets/shapes-sd", ["a red circle", "a blue circle"], seeds=range(4), steps=8, guidance=4)
scores = mmalign.score(images, rewards=[Redness, "shapes-correctness"])
for row in scores:
    print(f"{row['prompt']:<15} redness {row['redness']:+.3f}  correct {row['shapes-correctness']:.2f}")

# %% Summarise. `scores` alone shows this in a notebook, and `scores.to_pandas()` is a DataFrame.
for reward, numbers in scores.summary.items():
    print(f"{reward}: mean {numbers['mean']:.3f}, from {numbers['min']:.3f} to {numbers['max']:.3f}")

# %% Combine.
# With weights there is a column `total`, the weighted sum: here the best image is one that is right and red.
weighted = mmalign.score(
    images, rewards=[{"name": Redness, "weight": 1.0}, {"name": "shapes-correctness", "weight": 0.5}]
)
best = max(range(len(images)), key=weighted["total"].__getitem__)
print(f"the best of all: seed {images.seeds[best]} of '{images.prompts[best]}', {weighted['total'][best]:.3f}")

# %% Where to go from here.
# A reward trains too: mmalign.train("shapes/align_prop", prompts=[...], rewards=[Redness], output="runs/red"). Put the
# class into a module of your own for that, so that the run can be repeated from its config.
