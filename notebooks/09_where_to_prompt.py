# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Beside a trained head, AdaViPro learns not to prompt
#
# AdaViPro decides region by region whether an image gets its share of the frame, by the edges in it. Does it look at
# the image? We compare the decisions for different images by one trained generator with those for one image by
# generators of different seeds (splits, initial weights and noise). Only regions that the frame touches count: in the
# others nothing depends on the decision, and nothing trains it.
#
# The papers' frame starts as noise of a pixel's own size, which a frozen network reads badly through. While it is being
# trained into something useful, a lower loss is had sooner by leaving it out; and what is left out has no gradient. So
# we also count how many regions get the prompt at all (Q-60: fixed when the embedded suite had been seen, and before
# the small one), and start a second generator with a frame of zeros, which does no harm at first. (In the embedded
# suite's few epochs that one switches off as well, so noise is not all there is to it.) Where no region is prompted, a
# verdict on how decisions differ between images is about nothing; read ADA-4 with the share beside it.

# %% tags=["parameters"]
suite: str = "embedded"  # embedded: under a minute, from scratch; small: real images, from a data folder

# %%
import matplotlib.pyplot as plt
import pandas as pd

from apthory import figures, notebooks, pixel_study, records, statistics, sweeps, tasks

folder = records.folder(suite)
study = pixel_study.STUDIES[suite]["masks"]
table = pixel_study.run_study(study, folder)
configs = {(names["part"], names["arm"], c["backbone"]["name"], c["task"]): c for names, c in pixel_study.cells(study)}


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
# and 60 pixels of 224, and AdaViPro with a frame of 30 that started from zero. Sums are cut off at black and white to
# be shown; the network sees them whole.

# %%
ROWS = {
    "vp 30": "VP 30",
    "adavipro 30": "AdaViPro 30",
    "vp 60": "VP 60",
    "adavipro 60": "AdaViPro 60",
    "from zero 30": "from zero 30",
}
shown = {
    (task, arm): sweeps.fetch(
        again("shown", arm, "resnet_micro", task, seed=0, num_images=4), folder, pixel_study.draw_prompt
    )
    for task in study["shown"].tasks
    for arm in ROWS
}
images = {task: tasks.load(task, 64).test.pixels for task in study["shown"].tasks}

with figures.theme(width=1.0, rows=2.5):
    columns = [(task, index) for task in images for index in range(4)]
    figure, axes = plt.subplots(1 + len(ROWS), len(columns))
    drawn = []
    for column, (task, index) in enumerate(columns):
        first = shown[task, "vp 30"]
        raw = images[task][first["images"][index]] / 255
        axes[0, column].imshow(raw.movedim(0, -1))
        for row, arm in enumerate(ROWS, start=1):
            record = shown[task, arm]
            prompted = (raw + pixel_study.unpack(record)[index]).clamp(0, 1)
            axes[row, column].imshow(prompted.movedim(0, -1))
            share = float((pixel_study.unpack(record)[index] != 0).any(0).float().mean())
            drawn.append({"task": task, "image": first["images"][index], "prompt": arm, "share of pixels": share})
        axes[0, column].set_title(task if index == 0 else "", loc="left")
    for row, label in enumerate(("image", *ROWS.values())):
        axes[row, 0].set_ylabel(label)
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
    figures.save(figure, "09_masks", shown.values(), pd.DataFrame(drawn), suite=suite)

# %% [markdown]
# ## Between images, between seeds
#
# Mean share of regions in which two decisions differ, over pairs of test images and over pairs of seeds; two
# independent tosses of a coin differ in half of them. Beside it the share of regions that get the prompt: where it is
# near 0 or 1 there is little left to differ in.

# %%
STARTS = {"adavipro": "start: noise", "from zero": "start: zero"}
judged = [
    (arm, backbone["name"], task)
    for backbone in study["judged"].backbones
    for arm in STARTS
    for task in study["judged"].tasks
]
seeds, num_images = [0, 1, 2], {"embedded": 60, "small": 200}[suite]
measured = [
    sweeps.fetch(again("judged", *place, seeds=seeds, num_images=num_images), folder, pixel_study.measure_masks)
    for place in judged
]
distances = pd.DataFrame(
    {"arm": arm, "backbone": backbone, "task": task, "record": record.key, **record.values}
    for (arm, backbone, task), record in zip(judged, measured, strict=True)
)
MEASURES = {"between_images": "between\nimages", "between_seeds": "between\nseeds", "share": "regions\nprompted"}
groups = list(distances.groupby(["backbone", "arm"], sort=False))
with figures.theme(width=min(1.0, 0.3 + 0.25 * len(groups)), rows=1.2):
    figure, axes = plt.subplots(1, len(groups), sharey=True, squeeze=False)
    for ax, ((backbone, arm), several) in zip(axes[0], groups, strict=True):
        for index, row in enumerate(several.to_dict("records")):
            values = [row[name] for name in MEASURES]
            aside = 0.08 * index - 0.1  # or equal values would hide each other
            ax.plot([aside, 1 + aside], values[:2], "o-", color=f"C{index}", label=row["task"])
            ax.plot(2 + aside, values[2], "s", color=f"C{index}")
        ax.axhline(0.5, color="black", lw=0.5, ls=":")
        ax.axvline(1.5, color="black", lw=0.5)
        ax.set_xticks(range(3), MEASURES.values(), fontsize=6)
        ax.set(title=f"{backbone}\n{STARTS[arm]}", ylim=(-0.03, 1.03), xlim=(-0.4, 2.5))
    axes[0, 0].set_ylabel("share of regions")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    figures.save(figure, "09_distances", measured, distances.drop(columns="record"), suite=suite)

# %% [markdown]
# ## Judgement

# %%
verdicts = []
for (backbone, arm), several in groups:
    values = {"ADA-4": (several["between_images"] - several["between_seeds"]).round(9), "Q-60.share": several["share"]}
    tag = backbone if arm == "adavipro" else f"{backbone}-from_zero"
    for claim, by_task in values.items():
        if claim == "Q-60.share" and arm != "adavipro":
            continue  # the claim is about the method as it is published
        estimate = statistics.over_tasks(by_task)
        verdict = notebooks.verdict(
            claim,
            estimate.value,
            estimate.interval,
            suite=suite,
            backbones=[backbone],
            tasks=list(several["task"]),
            seeds=seeds,
            made_from=list(several["record"]),
            tag=tag,
            note=f"{num_images} images, {several['num_regions'].iloc[0]} regions",
        )
        value = f"{estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"
        row = {"claim": claim, "of": tag, "value": value, "rule": verdict.threshold}
        verdicts.append({**row, "verdict": verdict.verdict})
pd.DataFrame(verdicts)
