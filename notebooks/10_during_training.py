# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Does the layer preference come with training?
#
# Does a backbone prefer prompts in some layers because of its architecture, or because of what it learned? Here the
# activation prompts of notebook 03 are trained on the backbone as it was at several stages of its own training: at
# its random start, after some epochs where weights from then ship, and at the end. Five places between blocks, from
# the input of the first block to the output of the last; the linear probe on the final features; the same images,
# splits and seeds at every stage.
#
# The random start is the start of that very training, not a network at large: timm begins a ResNet with silent
# residual branches (the last gamma of each is zero) and with batch statistics of mean zero and variance one, so that
# a prompt there meets little but the shortcuts' convolutions. What lies between the stages is not time alone: both
# backbones were trained in two runs, the second with more augmentation. There is one stage in between, the ViT's
# after eight epochs, at three quarters of its last accuracy. In the embedded suite the head's learning rate is fixed;
# in the small suite the protocol is that of Sweep S, whose cells are the last stage here.

# %% tags=["parameters"]
suite: str = "embedded"  # embedded: under a minute, from scratch; small: real images, from a data folder

# %%
import itertools

import matplotlib.pyplot as plt
import pandas as pd

from apthory import backbones
from apthory.lab import claims, figures, intervals, records
from apthory.pretraining import cards as model_cards
from apthory.studies import cells, during_training, layers

study = during_training.STAGE_STUDIES[suite]["stages"]
made_from = layers.fetch_study(study, records.folder(suite))
table = during_training.with_stage(cells.table(made_from))
table = table[table["method"].isin(["ap", "linear_probe"])]
names, stages = list(table["backbone"].unique()), list(table["stage"].unique())
stages = sorted(stages, key=lambda stage: (stage == "last", stage != "random", stage))  # epochs in between
COLORS = dict(zip(stages, ["#8C8C8C", *["#E69F00", "#999933"][: len(stages) - 2], "#0B3C8C"], strict=True))
FAMILY = dict(zip(names, ("#0072B2", "#D55E00"), strict=True))  # as in 04 and 07
LABELS = {"random": "random weights", "last": "end of training"}
LABELS |= {stage: f"after epoch {int(stage.removeprefix('epoch-'))}" for stage in stages if stage not in LABELS}

# %% [markdown]
# ## The training
#
# From the model cards of the shipped weights. Lines: loss and top-1 on training images held out, by epoch. Dotted:
# where the second run begins, with more augmentation (each run ends with a learning rate of zero, except the ViT's
# first, which was stopped). Squares: top-1 of the shipped files, in half precision, on the official validation images.

# %%
cards = {stage: backbones.card(stage) for name in names for stage in backbones.checkpoints(name)[1:]}
curves = pd.concat(
    pd.DataFrame(model_cards.curve(card), columns=["epoch", "validation_loss", "validation_top1"]).assign(backbone=name)
    for name, card in cards.items()
    if name in names
)
shipped = pd.DataFrame(
    {"backbone": card["backbone"], "epoch": model_cards.num_epochs(card), "top1": 100 * card["test"]["top1"]}
    for card in cards.values()
)
curves["held_out_top1"] = 100 * curves.pop("validation_top1").astype(float)
with figures.theme(width=1.0, rows=1.1):
    figure, (left, right) = plt.subplots(1, 2)
    for name in names:
        curve, files = curves[curves["backbone"] == name], shipped[shipped["backbone"] == name]
        classes = cards[name]["data"]["classes"]
        left.plot(curve["epoch"], curve["validation_loss"].astype(float), color=FAMILY[name])
        right.plot(curve["epoch"], curve["held_out_top1"], color=FAMILY[name])
        right.plot(files["epoch"], files["top1"], "s", color=FAMILY[name], label=f"{name} ({classes} classes)")
        for end in itertools.accumulate(run["epoch"] for run in cards[name].get("before", [])):
            for ax in (left, right):
                ax.axvline(end + 0.5, color=FAMILY[name], ls=":", lw=0.8)
    left.set(xlabel="epoch", ylabel="held-out loss (nats)")
    top = pd.concat([curves["held_out_top1"], shipped["top1"]]).max()
    right.set(xlabel="epoch", ylabel="top-1 (%)", xlim=(0, 1.05 * shipped["epoch"].max()), ylim=(0, 1.1 * top))
    figure.legend(*right.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    drawn = pd.concat([curves.astype({"validation_loss": float}), shipped.rename(columns={"top1": "shipped_top1"})])
    figures.save(figure, "10_training", [], drawn, suite=suite)

# %% [markdown]
# ## Accuracy by site
#
# Mean over tasks and seeds: dots on lines are the prompt at a site, dotted lines the linear probe on the same
# backbone. Below, the difference of the two.

# %%
probe = table[table["method"] == "linear_probe"].set_index(["backbone", "stage", "task", "seed"])["accuracy"]
prompts = table[table["method"] == "ap"]
keys = pd.MultiIndex.from_frame(prompts[["backbone", "stage", "task", "seed"]])
prompts = prompts.assign(probe=probe.loc[keys].to_numpy())
prompts["gain"] = prompts["accuracy"] - prompts["probe"]
by_site = prompts.groupby(["backbone", "stage", "site", "depth"], sort=False, as_index=False)[
    ["accuracy", "probe", "gain"]
].mean()

with figures.theme(width=1.0, rows=2):
    figure, axes = plt.subplots(2, len(names), sharex=True, sharey="row", squeeze=False)
    for column, name in enumerate(names):
        for stage in stages:
            rows = by_site[(by_site["backbone"] == name) & (by_site["stage"] == stage)].sort_values("depth")
            if rows.empty:
                continue
            axes[0, column].plot(rows["depth"], rows["accuracy"], "o-", color=COLORS[stage], label=LABELS[stage])
            axes[0, column].axhline(rows["probe"].iloc[0], color=COLORS[stage], ls=":", lw=0.8)
            axes[1, column].plot(rows["depth"], rows["gain"], "o-", color=COLORS[stage])
        axes[0, column].set(title=name, ylim=(0, 1.1 * by_site[["accuracy", "probe"]].max(axis=None)))
        axes[1, column].axhline(0, color="black", lw=0.6)
        axes[1, column].set(xlabel="depth of the site (0: input, 1: last)")
    axes[0, 0].set_ylabel("accuracy (%)")
    axes[1, 0].set_ylabel("accuracy minus\nlinear probe (points)")
    handles = {label: handle for ax in axes[0] for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    handles["linear probe"] = plt.Line2D([], [], color="black", ls=":", lw=0.8)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles))
    figures.save(figure, "10_accuracy_by_site", made_from, by_site, suite=suite)

# %% [markdown]
# ## The preference, stage by stage
#
# Spearman correlation of depth and accuracy over the five sites: a dot for each task, a bar for their mean. And the
# site that validation data chose.

# %%
preference = pd.DataFrame(
    {
        "backbone": name,
        "stage": stage,
        "task": task,
        "spearman": intervals.spearman(means["depth"], means["accuracy"]),
    }
    for (name, stage, task), rows in prompts.groupby(["backbone", "stage", "task"], sort=False)
    for means in [rows.groupby("site")[["depth", "accuracy"]].mean()]
)
with figures.theme(width=0.8, rows=1.1):
    figure, axes = plt.subplots(1, len(names), sharey=True, squeeze=False)
    for ax, name in zip(axes[0], names, strict=True):
        there = [stage for stage in stages if stage in set(preference.loc[preference["backbone"] == name, "stage"])]
        for position, stage in enumerate(there):
            values = preference.loc[(preference["backbone"] == name) & (preference["stage"] == stage), "spearman"]
            aside = [position + 0.06 * (index - (len(values) - 1) / 2) for index in range(len(values))]
            ax.plot(aside, values, "o", color=COLORS[stage])
            ax.plot([position - 0.25, position + 0.25], 2 * [values.mean()], color=COLORS[stage], lw=2)
        ax.axhline(0, color="black", lw=0.6)
        ax.set(title=name, xlim=(-0.6, len(there) - 0.4), ylim=(-1.08, 1.08))
        ax.set_xticks(range(len(there)), [LABELS[stage].replace(" ", "\n", 1) for stage in there])
    axes[0, 0].set_ylabel("Spearman correlation\nof depth and accuracy")
    figures.save(figure, "10_preference", made_from, preference, suite=suite)

# %%
chosen = {
    (name, LABELS[stage]): cells.best_sites(rows).groupby("task")["site"].first()
    for (name, stage), rows in prompts.groupby(["backbone", "stage"], sort=False)
}
pd.DataFrame(chosen).T

# %% [markdown]
# ## Judgement
#
# Trained minus random weights, per task, on the same splits and test images; intervals are 95 %, from a bootstrap over
# tasks, seeds and images (Q-82: over tasks). Two tasks, as in the embedded suite, leave one degree of freedom: their
# intervals reach beyond what a correlation can be, and decide nothing.

# %%
judge = claims.Judge(suite)
for name in names:
    rows = {stage: several for stage, several in prompts.groupby("stage") if name in set(several["backbone"])}
    rows = {stage: several[several["backbone"] == name] for stage, several in rows.items()}
    probes = table[(table["backbone"] == name) & (table["method"] == "linear_probe")]
    first, last = rows["random"], rows["last"]
    note = f"sites: {', '.join(last['site'].unique())}"
    scope = {"backbones": [f"{name}.random", name], "tag": name, "note": note}

    moved = intervals.over_sites(last, intervals.spearman, minus=first)
    judge("Q-80.vit" if name.startswith("vit") else "Q-80.cnn", moved, rows=[last, first], **scope)

    gains = [during_training.gain(rows[stage], probes[probes["stage"] == stage]) for stage in ("last", "random")]
    ends = probes[probes["stage"].isin(["last", "random"])]
    judge("Q-81", intervals.paired_difference(*gains), rows=[last, first, ends], **scope)

    for stage in [stage for stage in stages if stage in rows and stage not in ("random", "last")]:
        alike = intervals.over_tasks(during_training.agreement(rows[stage], last))
        early = scope | {"backbones": [f"{name}.{stage}", name], "tag": f"{name}-{stage}"}
        judge("Q-82", alike, rows=[rows[stage], last], **early)
judge.table
