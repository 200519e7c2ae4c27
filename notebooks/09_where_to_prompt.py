# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # On real images AdaViPro learns to leave its noise out; masks are not found to follow the image
#
# AdaViPro decides region by region whether an image gets its share of the frame, by the edges in it. Does it look at
# the image? We compare the decisions for different images by one trained generator with those for one image by
# generators of different seeds (splits, initial weights and noise). A region counts by the share of the frame that lies
# in it: outside the frame nothing depends on the decision, and nothing trains it.
#
# The papers' frame starts as noise of a pixel's own size. Our guess is that a frozen network reads badly through it, so
# that, before it is trained into something useful, a lower loss is had by leaving it out; and what is left out has no
# gradient. So we also measure how much of the frame is shown at all (Q-60: fixed when the embedded suite had been
# seen, and before the small one), and start a second generator with a frame of zeros. Where all of it is shown, or
# nothing, a verdict on how decisions differ between images is about nothing; read ADA-4 with the share beside it. What
# then is left are the probabilities behind the decisions (Q-62, fixed before the small suite, together with weights by
# the frame's pixels in place of regions). Ten epochs take the temperature from 5 to 4.2 only, and a ReLU in the
# generator is our assumption.

# %% tags=["parameters"]
suite: str = "embedded"  # embedded: under a minute, from scratch; small: real images, from a data folder

# %%
import matplotlib.pyplot as plt
import pandas as pd

from apthory import tasks
from apthory.lab import claims, figures, intervals, records
from apthory.studies import cells, masks, pixel_grids
from apthory.studies import pixels as pixel_study

folder = records.folder(suite)
study = pixel_grids.PIXEL_STUDIES[suite]["masks"]
table = pixel_study.run_pixel_study(study, folder)
configs = {
    (names["part"], names["arm"], c["backbone"]["name"], c["task"]): c for names, c in pixel_study.pixel_cells(study)
}


def again(part, arm, backbone, task, **fields):
    """The cell's method at the learning rate that validation images chose."""
    row = table[(table["part"] == part) & (table["arm"] == arm)]
    row = row[(row["backbone"] == backbone) & (row["task"] == task)].iloc[0]
    config = configs[part, arm, backbone, task]
    same = {name: config[name] for name in ("backbone", "task", "size", "method", "recipe")}
    return {**same, "learning_rate": row["learning_rate"], **fields}


# %% [markdown]
# ## Over the images
#
# Images of the embedded tasks, alone and with the prompts that were trained on them: VP and AdaViPro with frames of 30
# and 60 pixels of 224, and AdaViPro with a frame of 30 that started from zero. Beside each row stands the share of the
# frame that is shown, in its four images. Sums are cut off at black and white to be
# shown; the network sees them whole.

# %%
ROWS = {
    "vp 30": "VP 30",
    "adavipro 30": "AdaViPro 30",
    "vp 60": "VP 60",
    "adavipro 60": "AdaViPro 60",
    "from zero 30": "from zero 30",
}
NUM = 4  # images of each task
shown = {
    (task, arm): cells.fetch_cell(
        again("shown", arm, "resnet_micro", task, seed=0, num_images=NUM), folder, masks.draw_prompt
    )
    for task in study["shown"].tasks
    for arm in ROWS
}
images = {task: tasks.load(task, 64).test.pixels for task in study["shown"].tasks}

with figures.theme(width=1.0, rows=2.4):
    ratios = [*[1] * NUM, 0.45] * len(images)  # the share of prompted regions stands after a task's images
    figure, axes = plt.subplots(1 + len(ROWS), len(ratios), width_ratios=ratios)
    drawn = []
    for start, (task, pixels) in zip(range(0, len(ratios), NUM + 1), images.items(), strict=True):
        chosen = shown[task, "vp 30"]["images"]
        raw = pixels[chosen] / 255
        axes[0, start].set_title(task, loc="left")
        axes[0, start + NUM].text(0.5, 0.5, "of the frame\nshown", ha="center", va="center", fontsize=6)
        for row, arm in enumerate([None, *ROWS]):
            seen = raw if arm is None else (raw + masks.unpack(shown[task, arm])).clamp(0, 1)
            for column in range(NUM):
                axes[row, start + column].imshow(seen[column].movedim(0, -1))
            if arm is not None:
                shares = shown[task, arm]["share"]
                label = f"{100 * sum(shares) / NUM:.0f} %"
                axes[row, start + NUM].text(0.5, 0.5, label, ha="center", va="center", fontsize=7)
                drawn += [
                    {"task": task, "image": image, "prompt": arm, "share of the frame": share}
                    for image, share in zip(chosen, shares, strict=True)
                ]
    for row, label in enumerate(("image", *ROWS.values())):
        axes[row, 0].set_ylabel(label)
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
    figures.save(figure, "09_masks", shown.values(), pd.DataFrame(drawn), suite=suite)

# %% [markdown]
# ## Between images, between seeds
#
# Mean share of the frame in which two decisions differ, over pairs of test images and over pairs of seeds; two
# independent tosses of a coin differ in half of it. Beside it the share of the frame that is shown: where it is
# near 0 or 1 there is little left to differ in. What is left then are the probabilities behind the decisions: how often
# a region has the prompt while the generator trains, under its noise. They decide at one half; hollow marks are how far
# they are apart, and what they are: the median, with a bar from 5 to 95 % of all regions, images and seeds.

# %%
STARTS = {"adavipro": "start: noise", "from zero": "start: zero"}
judged = [place for place in configs if place[0].startswith("judged")]
seeds, num_images = [0, 1, 2], {"embedded": 60, "small": 200}[suite]
measured = [
    cells.fetch_cell(again(*place, seeds=seeds, num_images=num_images), folder, masks.measure_masks) for place in judged
]
distances = pd.DataFrame(
    {"arm": arm, "backbone": backbone, "task": task, "record": record.key, **record.values}
    for (_, arm, backbone, task), record in zip(judged, measured, strict=True)
)
MEASURES = {"between_images": "between\nimages", "between_seeds": "between\nseeds", "share": "frame\nshown"}
for index, name in enumerate(("low", "median", "high")):
    distances[f"probability_{name}"] = [values[index] for values in distances["probability"]]
distances = distances.drop(columns="probability")
groups = list(distances.groupby(["backbone", "arm"], sort=False))
with figures.theme(width=min(1.0, 0.4 + 0.3 * len(groups)), rows=1.4):
    figure, axes = plt.subplots(1, len(groups), sharey=True, squeeze=False)
    for ax, ((backbone, arm), several) in zip(axes[0], groups, strict=True):
        for index, row in enumerate(several.to_dict("records")):
            color, aside = f"C{index}", 0.13 * (index - (len(several) - 1) / 2)  # or equal values would hide each other
            ax.plot([aside, 1 + aside], [row["between_images"], row["between_seeds"]], "o-", color=color)
            apart = [row["probability_between_images"], row["probability_between_seeds"]]
            ax.plot([aside, 1 + aside], apart, "o:", color=color, mfc="white")
            ax.plot(2 + aside, row["share"], "o", color=color)
            ax.plot([2 + aside] * 2, [row["probability_low"], row["probability_high"]], color=color, lw=0.8)
            ax.plot(2 + aside, row["probability_median"], "o", color=color, mfc="white")
        ax.axhline(0.5, color="black", lw=0.5, ls=":")
        ax.axvline(1.5, color="black", lw=0.5)
        ax.set_xticks(range(3), MEASURES.values())
        ax.set_yscale("symlog", linthresh=0.01)  # linear below: shares of zero are to be seen
        ax.set(title=f"{backbone}, {STARTS[arm]}", ylim=(-0.002, 1.3), xlim=(-0.4, 2.5))
        ax.set_yticks([0, 0.01, 0.1, 0.5, 1], ["0", "0.01", "0.1", "0.5", "1"])
        ax.minorticks_off()
    axes[0, 0].set_ylabel("share, or probability")
    for index, task in enumerate(distances["task"].unique()):
        axes[0, 0].plot([], [], lw=3, color=f"C{index}", label=task)
    for face, label in {"black": "decisions", "white": "probabilities"}.items():
        axes[0, 0].plot([], [], "o", color="black", mfc=face, label=label)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figures.save(figure, "09_distances", measured, distances.drop(columns="record"), suite=suite)

# %% [markdown]
# ## Judgement

# %%
judge = claims.Judge(suite)
for (backbone, arm), several in groups:
    values = {
        "ADA-4": (several["between_images"] - several["between_seeds"]).round(9),
        "Q-60.share": several["share"],
        "Q-62": several["probability_between_images"] - several["probability_between_seeds"],
    }
    tag = backbone if arm == "adavipro" else f"{backbone}-from_zero"
    scope = {"backbones": [backbone], "tasks": list(several["task"]), "seeds": seeds}
    for claim, by_task in values.items():
        if claim == "Q-60.share" and arm != "adavipro":
            continue  # the claim is about the method as it is published
        shown_share = f"{several['share'].mean():.2%} of the frame shown"
        note = f"{num_images} images, {several['num_regions'].iloc[0]} regions, {shown_share}"
        made_from = list(several["record"])
        judge(claim, intervals.over_tasks(by_task), **scope, made_from=made_from, tag=tag, note=note)
judge.table
