# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # CNNs prefer prompts in deep layers, ViTs in shallow ones
#
# So says the paper on activation prompts, for a ResNet-101 and a ViT-L/16. Here the claim is put to smaller networks,
# with the controls that its reviewers asked for. At places between two blocks of a frozen backbone we train
#
# - an **activation prompt** and a head (at the input it is the **input prompt**: on the whole image, from zero);
# - a head over a **frozen random prompt** of the trained prompt's norm;
# - a **linear probe** on the final features, and one on **the site's own features** (averaged over positions);
# - **normalization tuning**: gamma and beta of the norm layers between this place and the next;
# - a **prompt with a frozen head** (the linear probe's), so that nothing but the prompt can help.
#
# The last two, and full fine-tuning, cost as much as a prompt; they run on the first seed and at some of the sites
# (the table of runs below tells which). Learning rate and epoch are chosen on validation images held out of train;
# the test part is used once. Differences are paired on the same splits and test images; intervals are 95 %, from a
# bootstrap over tasks, seeds and images, with Student's quantile for the number of tasks.

# %% tags=["parameters"]
suite: str = "embedded"  # embedded: minutes, from scratch; small: real images, from a data folder
study_names: str = ""  # layer studies of the suite, with commas between; all of them if left empty
num_processes: int = 2  # of one thread each, to compute what is not on record

# %%
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns

from apthory.lab import claims, figures, intervals, records
from apthory.studies import cells, layers, looks

studies = layers.find_studies(suite, study_names)
with cells.processes(num_processes) as pool:
    fetched = {name: layers.fetch_study(study, records.folder(suite), pool) for name, study in studies.items()}
table = pd.concat([cells.table(several) for several in fetched.values()], ignore_index=True)
made_from = [record for several in fetched.values() for record in several]
backbones = list(table["backbone"].unique())

# %%
runs = table.groupby(["backbone", "method"], sort=False).agg(
    sites=("site", "nunique"), tasks=("task", "nunique"), seeds=("seed", "nunique")
)
# The grid may be extended twice on either side; a choice at its very end would have gone further.
grid = next(iter(studies.values())).protocol.learning_rates
ends = [grid[0] ** 3 / grid[1] ** 2, grid[-1] ** 3 / grid[-2] ** 2]
at_end = np.isclose(table["learning_rate"].to_numpy()[:, None], ends, rtol=1e-3).any(1)
runs["choices at the end of the grid (%)"] = (
    (100 * table.assign(end=at_end).groupby(["backbone", "method"], sort=False)["end"].mean()).round().astype(int)
)
runs

# %% [markdown]
# ## Tasks together
#
# Test accuracy minus the linear probe's, mean over tasks and seeds; the band of the prompt is the 95 % interval of
# the mean over tasks, drawn for more than three of them. Two sites alone are not joined by a line. Values below the
# axis stand in the CSV beside the figure.


# %%
def gains(rows):
    """Accuracy minus the linear probe's on the same split, in points."""
    probe = rows[rows["method"] == "linear_probe"].set_index(["backbone", "task", "seed"])["accuracy"]
    keys = pd.MultiIndex.from_frame(rows[["backbone", "task", "seed"]])
    return rows.assign(gain=rows["accuracy"].to_numpy() - probe.loc[keys].to_numpy())


gain_table = gains(table)
gain_table["method"] = gain_table["method"].replace("input_prompt", "ap")  # the activation prompt at depth 0
by_site = gain_table[gain_table["method"] != "linear_probe"]

summary = []
for (backbone, method, site), rows in by_site.groupby(["backbone", "method", "site"], sort=False):
    mean = intervals.over_tasks(rows.groupby("task")["gain"].mean())
    depth = rows["depth"].iloc[0]
    summary.append({"backbone": backbone, "method": method, "site": site, "depth": depth, **mean.__dict__})
summary = pd.DataFrame(summary)

METHODS = ("ap", "norm", "frozen_head", "random_prompt", "site_probe")
LINES = {"ap": "o-", "norm": "s-", "frozen_head": "^--", "random_prompt": "x:", "site_probe": "d:"}
with figures.theme(width=1.0, rows=1.35):
    figure, axes = plt.subplots(1, len(backbones), sharey=True, squeeze=False)
    num_tasks = table.groupby("backbone")["task"].nunique()
    summary["has_band"] = (summary["method"] == "ap") & (summary["backbone"].map(num_tasks) > 3)
    lowest = summary["value"].where(~summary["has_band"], summary["low"])[summary["method"] == "ap"].min()
    for ax, backbone in zip(axes[0], backbones, strict=True):
        for method in METHODS:
            rows = summary[(summary["backbone"] == backbone) & (summary["method"] == method)].sort_values("depth")
            color = looks.COLORS[method]
            line = LINES[method] if len(rows) > 2 else LINES[method][0]  # no line between two far sites
            ax.plot(rows["depth"], rows["value"], line, color=color, label=looks.LABELS[method], ms=3)
            if rows["has_band"].any():
                ax.fill_between(rows["depth"], rows["low"], rows["high"], color=color, alpha=0.15, lw=0)
        ax.axhline(0, color=looks.COLORS["linear_probe"], lw=0.8, label=looks.LABELS["linear_probe"])
        ax.set(title=backbone, xlabel="depth of the site (0: input, 1: last)")
    axes[0, 0].set_ylim(bottom=min(-6.0, lowest - 2))  # at the end: it fixes the top of all panels
    axes[0, 0].set_ylabel("accuracy minus\nlinear probe (points)")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    figures.save(figure, "03_accuracy_by_site", made_from, summary.drop(columns="has_band"), suite=suite)

# %% [markdown]
# ## Tasks apart
#
# The prompt's gain over the linear probe, site by site. A star marks the best site of a task, as validation data
# chose it.

# %%
prompts = gain_table[gain_table["method"] == "ap"]
apart = prompts.groupby(["backbone", "task", "site", "depth"], sort=False, as_index=False)["gain"].mean()
chosen = {backbone: cells.best_sites(rows) for backbone, rows in prompts.groupby("backbone", sort=False)}
apart["chosen_on_validation"] = [
    bool(((chosen[row.backbone]["task"] == row.task) & (chosen[row.backbone]["site"] == row.site)).any())
    for row in apart.itertuples()
]
with figures.theme(width=1.0, rows=1.4):
    figure, axes = plt.subplots(1, len(backbones), squeeze=False)
    limit, tasks = apart["gain"].abs().max(), sorted(apart["task"].unique())
    for index, (ax, backbone) in enumerate(zip(axes[0], backbones, strict=True)):
        rows = apart[apart["backbone"] == backbone]
        order = list(rows["site"].unique())
        grid = rows.pivot(index="task", columns="site", values="gain").reindex(tasks)[order]  # blank: not run
        starred = rows[rows["chosen_on_validation"]].set_index(["task", "site"]).index
        stars = [["*" if (task, site) in starred else "" for site in order] for task in tasks]
        labels = [site.removesuffix(":input").removeprefix("blocks.") or "input" for site in order]
        sns.heatmap(
            grid,
            cmap="RdBu_r",
            vmin=-limit,
            vmax=limit,
            annot=np.array(stars),
            fmt="",
            xticklabels=labels,
            yticklabels=index == 0,
            cbar=index == len(backbones) - 1,
            cbar_kws={"label": "minus linear probe (points)"},
            ax=ax,
        )
        ax.set(title=backbone, xlabel="site (input of the block)", ylabel="")
        ax.tick_params(axis="x", rotation=90)
    figures.save(figure, "03_tasks", made_from, apart.drop(columns="depth"), suite=suite)

# %% [markdown]
# ## Judgement
#
# Each statistic and its threshold were fixed in `claims.toml` before any run. "At its best layer" means the site that
# validation data chose for each task. The input is left out of the statistics over depth, since a prompt there is the
# input prompt, which the paper calls visual prompting. The last site of a ResNet is followed by average pooling alone:
# there a prompt is a shift that the head's bias can absorb, so its gain is that of a linear probe by construction,
# which pulls the deep end down; at the last site of a ViT only the class token's share of a prompt is read. The
# statistics were fixed with these sites in; the last table tells what they are without them.

# %%
judge = claims.Judge(suite)


def judge_rows(claim, estimate, first, *others):
    """A verdict on tables of one backbone; of the last one the note tells the sites."""
    rows = [first, *others]
    name = first["backbone"].iloc[0]
    judge(claim, estimate, rows=rows, backbones=[name], tag=name, note=f"sites: {', '.join(rows[-1]['site'].unique())}")


for backbone in backbones:
    methods = dict(list(table[table["backbone"] == backbone].groupby("method")))
    ap, probe = methods["ap"], methods["linear_probe"]
    best = cells.best_sites(ap)

    if "input_prompt" in methods:
        at_input, full = methods["input_prompt"], methods["full"]
        judge_rows("AP-1.full", intervals.paired_difference(at_input, full), at_input, full)
        judge_rows("AP-1.linear", intervals.paired_difference(at_input, probe), at_input, probe)
        judge_rows("AP-2.sign", intervals.paired_difference(best, at_input), best, at_input)

    claim = "AP-5b" if backbone.startswith("vit") else "AP-5a"
    place = ["task", "site", "seed"]
    norm = methods["norm"].merge(ap[place])
    beside = ap.merge(norm[place])
    for name, statistic in (("spearman", intervals.spearman), ("thirds", intervals.deep_minus_shallow)):
        judge_rows(f"{claim}.{name}", intervals.over_sites(ap, statistic), ap)
        if norm["site"].nunique() > 2:
            judge_rows(f"AP-6.{name}", intervals.over_sites(beside, statistic, minus=norm), beside, norm)

    judge_rows("AP-11", intervals.paired_difference(best, probe), best, probe)
    for control in ("site_probe", "random_prompt", "frozen_head"):
        there = methods[control].merge(ap[place])
        difference = intervals.paired_difference(*intervals.matched(ap, there))
        judge_rows(f"AP-c.{control}", difference, ap.merge(there[place]), there)

judge.table

# %%
without_last = []
for backbone in backbones:
    ap = table[(table["backbone"] == backbone) & (table["method"] == "ap") & (table["depth"] < 1)]
    for name, statistic in (("spearman", intervals.spearman), ("thirds", intervals.deep_minus_shallow)):
        estimate = intervals.over_sites(ap, statistic)
        without_last.append({"statistic": name, "backbone": backbone, "without the last site": str(estimate)})
pd.DataFrame(without_last)
