# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # One backward pass does not tell which layer to prompt
#
# Training a prompt at every layer is dear. Can the layer be told before any prompt is trained? We fit a linear probe,
# whose head rests on one half of the training images, and take on the other half the gradients
# $g_i = \partial L_i / \partial d$ for a prompt $d$ at every site at once: every image goes forward once, one half of
# them backward. Scores:
#
# - **T1, coherence** $|\mathrm{E}g|^2 / \mathrm{E}|g|^2$: how much of the gradient all images share. The halves are
#   stratified by class, so $|\mathrm{E}g|^2$ is estimated by $|\bar g|^2 - \sum_c (n_c / n)^2 s_c^2 / n_c$, with
#   $s_c^2$ the variance within class $c$. (Products of different images alone, right for independent draws, would be
#   low by the variance between classes over $n - 1$: enough to turn signs.);
# - **T2, windows**: positions that all gradients cover together, over the positions that one reaches;
# - **T3, gain**: to first order a prompt of norm $\rho$ lowers the loss by $\rho\,|\mathrm{E}g|$, where $\rho$ is the
#   norm of the site's own activation; to second order (Gauss-Newton $H$) by
#   $\tfrac12 g^\top (H + \lambda I)^{-1} g$, the step from a few images, $g$ from all others in the half, each class
#   with the weight that it has in the half ("newton": three steps of conjugate gradients);
# - **T4, alignment** of the tangent kernel $\operatorname{tr} J(x) J(x')^\top$ with the labels, over pairs of different
#   images (an image aligns with itself whatever the labels are).
#
# **What a head at rest hides.** At the head that minimises the expected cross-entropy, with bias,
# $\mathrm{E}[p - y] = 0$ and $\mathrm{E}[(p - y)\,\phi^\top] = 0$ for the features $\phi(x)$. The prompt's gradient
# is $\mathrm{E}g = \mathrm{E}[J(x)^\top (p - y)]$, with $J$ the Jacobian of the logits. So *if the entries of $J(x)$
# are affine in $\phi(x)$, then $\mathrm{E}g = 0$, exactly*: for a $J$ that is the same for all images (after the last
# pooling), always. The first order therefore sees no more than what the features do not span, and on a finite sample
# the head's own error. It says nothing of what a prompt gains when the head is trained with it. The statement ends
# where the head is not at rest.
#
# Each score is held against the accuracy of trained prompts: rank correlation over sites, and the points lost at the
# suggested site. Two references tell what to expect of any score: the depth of a site, which costs nothing, and the
# validation accuracy of the trained prompts themselves, which costs the whole sweep. Then a search on a budget.

# %% tags=["parameters"]
suite: str = "embedded"  # embedded: seconds, from scratch; small: real images, from a data folder

# %%
import itertools
from dataclasses import asdict

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns

from apthory import backbones, selection, sites
from apthory.lab import claims, figures, intervals, records
from apthory.studies import cells, layers, looks, record_format, site_search

folder = records.folder(suite)
studies = layers.find_studies(suite)
num_second_order = {"embedded": 12, "small": 100}[suite]  # images for the slow scores
budget = 1 / 8  # of the exhaustive sweep's FLOPs
MICRO = ("vit_micro", "resnet_micro")  # the score was found on these backbones
FINDING = ("cifar10", "caltech101", "pacs", "sign_digits")  # and these tasks of the small suite
# By the names that records and claims have for them.
SCORES = {record_format.spell_score(name): score for name, score in selection.SCORES.items()}

trained, scored, searched = [], [], []
for study in studies.values():
    prompts = [cell for cell in layers.layer_cells(study) if cell["method"]["name"] == "ap"]
    trained += cells.fetch_all(prompts, folder)
    recipe = record_format.recipe(study.protocol.recipe)
    for _, several in itertools.groupby(prompts, lambda cell: (cell["backbone"]["name"], cell["task"])):
        several = list(several)
        where = {key: several[0][key] for key in ("backbone", "task", "size")}
        where["places"] = [cell["method"]["site"] for cell in several]
        examples = {"num_examples": recipe["num_train"], "num_validation": recipe["num_validation"], "seed": 0}
        config = {**where, **examples, "num_second_order": num_second_order}
        scored.append(cells.fetch_cell(config, folder, site_search.score, site_search.SITE_SEARCH_SOURCES))
        rates = list(study.protocol.learning_rates)
        config = {**where, "recipe": recipe, "learning_rates": rates, "budget": budget, "score": "found", "seed": 0}
        searched.append(cells.fetch_cell(config, folder, site_search.search, site_search.SITE_SEARCH_SOURCES))

# %%
ap = cells.table(trained)
table = pd.DataFrame(
    {"backbone": record.config["backbone"]["name"], "task": record.config["task"], **row}
    for record in scored
    for row in record["sites"]
)
means = ap.groupby(["backbone", "task", "site"], as_index=False)[["accuracy", "validation_accuracy"]].mean()
table = table.merge(means, on=["backbone", "task", "site"], validate="one_to_one")
for name, score in SCORES.items():
    table[f"score:{name}"] = score(table)
table["score:depth"] = table["depth"]
table["score:trained, on validation"] = table["validation_accuracy"]
models = list(dict.fromkeys(table["backbone"]))


def unseen(rows):
    """Whether the score, and so the search that starts from it, was found without these backbones and tasks."""
    return (suite != "small") | ~rows["task"].isin(FINDING) | ~rows["backbone"].isin(MICRO)


is_judged = unseen(table)

costs = pd.DataFrame(
    {"backbone": record.config["backbone"]["name"], "order": order, **cost}
    for record in scored
    for order, cost in record["cost"].items()
)
costs["GFLOP"] = costs["flops"] / 1e9
costs.groupby(["backbone", "order"], sort=False)[["examples", "GFLOP", "seconds"]].median().round(1)

# %% [markdown]
# ## A score found on other tasks
#
# In the small suite four of the eight tasks serve to find a score among products of powers (-1, 0, 1) of the norm of
# the activation, the gradient of single images, reach and coverage; the other four, and MobileNetV2 on all of its
# tasks, judge it. The tasks were divided before any score was seen. `selection.SCORES["windows_times_gradient"]` is the
# choice: windows (coverage over reach) times gradient. Records, claims and figures call it "found". It was found on the
# starter weights that shipped before and was left as it is: on the present ones it is no longer among the first. Even
# the best of the 80 products is no good ranking of the tasks that it was found on.

# %%
FACTORS = {
    "norm": table["norm"],
    "gradient": table["individual"] / table["norm"],
    "reach": table["reach"],
    "coverage": table["coverage"],
}


def spearman_by_task(rows, score):
    """Rank correlation of a score with mean accuracy, for each backbone and task."""
    groups = rows.assign(score=score).groupby(["backbone", "task"], sort=False)
    return groups[["score", "accuracy"]].apply(lambda part: intervals.spearman(part["score"], part["accuracy"]))


if suite == "small":
    finding, family = table[~is_judged], []
    for powers in itertools.product((-1, 0, 1), repeat=len(FACTORS)):
        if any(powers):
            product = sum(power * np.log(factor) for power, factor in zip(powers, FACTORS.values(), strict=True))
            found_there = spearman_by_task(finding, product[finding.index]).mean()
            family.append({**dict(zip(FACTORS, powers, strict=True)), "Spearman, finding tasks": found_there})
    family = pd.DataFrame(family).sort_values("Spearman, finding tasks", ascending=False, ignore_index=True)
    print(f"found on {', '.join(FINDING)}; the best of {len(family)}:")
    print(family.head(5).round(3).to_string(index=False))

# %% [markdown]
# ## Rank correlation with accuracy
#
# Spearman's correlation over sites of each score with test accuracy, mean over tasks, with 95 % intervals from a
# bootstrap over tasks, seeds and test images, given the scores, which come from the first seed's images. The found
# score is shown on tasks that it was not found on. The two dear scores, newton and alignment, take 100 images,
# in pairs of one class, and a frame of random directions: one draw each. How they are estimated was mended twice after
# results had been seen: at first they took 40 images without regard to classes, then alignment counted the diagonal.
# First the means, then every task.


# %%
def correlation(backbone, score, among):
    """Mean over tasks of the rank correlation of a score with accuracy, by bootstrap."""
    rows = table[(table["backbone"] == backbone) & among].copy()
    rows["depth"] = rows.groupby("task")[f"score:{score}"].rank(method="first")  # `over_sites` ranks by depth
    runs = ap[ap["backbone"] == backbone].drop(columns="depth").merge(rows[["task", "site", "depth"]])
    return intervals.over_sites(runs, intervals.spearman, num_draws=400)


everywhere = pd.Series(data=True, index=table.index)
shown = [*SCORES, "depth", "trained, on validation"]
correlations = {
    (backbone, score): correlation(backbone, score, is_judged if score == "found" else everywhere)
    for backbone in models
    for score in shown
}
rows = [
    {"backbone": backbone, "score": score, **asdict(estimate)} for (backbone, score), estimate in correlations.items()
]
numbers = pd.DataFrame(rows)
with figures.theme(width=1.0, rows=1.35):
    figure, axes = plt.subplots(1, len(models), sharey=True, sharex=True, squeeze=False)
    for ax, backbone in zip(axes[0], models, strict=True):
        own = numbers[numbers["backbone"] == backbone]
        place = np.arange(len(own))
        low, high = own["low"].clip(-1, 1), own["high"].clip(-1, 1)  # a correlation lies between -1 and 1
        colors = [looks.COLORS["ap" if score in SCORES else "full"] for score in own["score"]]
        ax.hlines(place, low, high, color=colors, lw=1.2)
        ax.scatter(own["value"], place, color=colors, s=10, zorder=3)
        ax.axvline(0, color="black", lw=0.6)
        ax.axvline(0.8, color=looks.COLORS["norm"], lw=0.8, ls="--")
        ax.set(title=backbone, xlabel="Spearman with accuracy", xlim=(-1.05, 1.05))
    axes[0, 0].set_yticks(range(len(shown)), shown)
    axes[0, 0].invert_yaxis()
    handles = [plt.Line2D([], [], color=looks.COLORS[kind], marker="o", lw=1.2) for kind in ("ap", "full")]
    handles.append(plt.Line2D([], [], color=looks.COLORS["norm"], ls="--", lw=0.8))
    figure.legend(handles, ["score", "reference", "aim: 0.8"], loc="outside lower center", ncols=3)
    figures.save(figure, "08_spearman", [*trained, *scored], numbers, suite=suite)

# %%
by_task = pd.concat({score: spearman_by_task(table, table[f"score:{score}"]) for score in shown}, names=["score"])
by_task = by_task.rename("spearman").reset_index()
num_tasks = [by_task.loc[by_task["backbone"] == backbone, "task"].nunique() for backbone in models]
with figures.theme(width=1.0, rows=1.6):
    figure, axes = plt.subplots(1, len(models), sharey=True, squeeze=False, width_ratios=num_tasks)
    for ax, backbone in zip(axes[0], models, strict=True):
        own = by_task[by_task["backbone"] == backbone].pivot_table(
            "spearman", "score", "task", sort=False, dropna=False
        )
        look = {"cmap": "RdBu_r", "vmin": -1, "vmax": 1, "cbar": False, "annot_kws": {"size": 6}}
        sns.heatmap(own.loc[shown], ax=ax, annot=True, fmt=".1f", **look)
        seen = pd.DataFrame({"backbone": backbone, "task": own.columns})
        for column in np.flatnonzero(~unseen(seen)):
            place = (column, shown.index("found"))
            ax.add_patch(plt.Rectangle(place, 1, 1, fill=False, hatch="////", edgecolor="gray", lw=0))
        ax.set(title=backbone, xlabel="", ylabel="")
        ax.tick_params(axis="x", rotation=60, length=0)
        ax.tick_params(axis="y", rotation=0, length=0)
    hatched = " (hatched: the score was found there)" if suite == "small" else ""
    figure.supxlabel(f"Spearman of score and accuracy over sites, by task{hatched}", size=7)
    figures.save(figure, "08_by_task", [*trained, *scored], by_task, suite=suite)

# %% [markdown]
# ## Why: little to tell, and a gradient that is noise
#
# Left: coherence by depth, one line a task. Most values lie near zero, as the proposition above would have it if the
# Jacobian were nearly affine in the features and the head at rest without decay; neither is tested here. In the model
# of notebook 05 coherence is $1 / (2 K)$ for $K$ windows, and windows, T2, estimates the same $K$: the table holds them
# side by side. They differ by a hundredfold and more, so that model does not describe these networks as it stands.
# Right: for each task, how far accuracy spreads over sites against how well two scores rank them (`found` on the tasks
# that it was found on as well). Where sites differ by no more than the test's own noise (the band: twice the standard
# error of a difference of two sites, median over pairs with the best one), no score can rank them.

# %%
spread, lines = [], []
for (backbone, task), rows in table.groupby(["backbone", "task"], sort=False):
    runs = ap[(ap["backbone"] == backbone) & (ap["task"] == task)]
    by_site = runs.groupby("site")["correct"].agg(lambda several: np.mean(np.stack(list(several)), axis=0))
    best = by_site[rows.loc[rows["accuracy"].idxmax(), "site"]]
    errors = [100 * np.std(best - other) / len(best) ** 0.5 for other in by_site if other is not best]
    row = {"backbone": backbone, "task": task, "range": np.ptp(rows["accuracy"]), "noise": 2 * np.median(errors)}
    for score in ("gain", "found"):
        row[f"spearman of {score}"] = intervals.spearman(rows[f"score:{score}"], rows["accuracy"])
    spread.append(row)
spread = pd.DataFrame(spread)
estimates = table.assign(**{"K by windows": table["windows"], "K by coherence": 1 / (2 * table["coherence"])})
estimates = estimates[estimates["coherence"] > 0]  # noise aside
print(estimates.groupby("backbone", sort=False)[["K by windows", "K by coherence"]].median().round(1).to_string())
with figures.theme(width=1.0, rows=1.35):
    figure, (left, right) = plt.subplots(1, 2)
    marks = {
        backbone: (looks.COLORS[c], m)
        for backbone, c, m in zip(models, ("input_prompt", "ap", "norm"), "osd", strict=False)
    }
    for (backbone, _), rows in table.sort_values("depth").groupby(["backbone", "task"], sort=False):
        left.plot(rows["depth"], rows["coherence"], color=marks[backbone][0], lw=0.7, alpha=0.8)
    left.axhline(0, color="black", lw=0.6)
    left.set(xlabel="depth of the site (1: last)", ylabel="coherence on unseen images")
    for backbone in models:
        own = spread[spread["backbone"] == backbone]
        color, mark = marks[backbone]
        right.scatter(own["range"], own["spearman of found"], color=color, marker=mark, s=14, label=backbone)
        right.scatter(own["range"], own["spearman of gain"], edgecolor=color, facecolor="none", marker=mark, s=14)
    right.axvspan(0, spread["noise"].median(), color="black", alpha=0.12, lw=0, label="test noise")
    right.axhline(0, color="black", lw=0.6)
    right.set(xlabel="best minus worst site (points)", ylabel="Spearman\n(full: found, open: gain)", ylim=(-1.05, 1.05))
    right.set_xlim(left=0)
    handles, labels = right.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4)
    kept = table[["backbone", "task", "site", "depth", "coherence", "gain", "windows", "reach", "accuracy"]]
    figures.save(figure, "08_why", [*trained, *scored], kept.merge(spread, on=["backbone", "task"]), suite=suite)

# %% [markdown]
# ## Points lost
#
# Accuracy at the site that the exhaustive sweep chose on validation, minus accuracy at
#
# - the site of the largest first-order **gain**, and of the **found** score (on the tasks that it was not found on);
# - the paper's **default** as recalled: the input of the third block of a ViT, of the third-to-last block of a CNN (if
#   that was not run: of the last one before it that was);
# - a **random** site, in expectation;
# - what the **search** chose and trained on an eighth of the sweep's FLOPs, with one seed: both sides of the pair are
#   the first seed's. It starts from the found score, so it is judged on the tasks that this was not found on; *search,
#   seen* is the search on the others, for comparison only. In the embedded suite the budget buys a single training.
#
# Whiskers: 95 % intervals from a bootstrap over tasks, seeds and images (not drawn for the embedded suite's two tasks).

# %%
runs_of = {backbone: ap[ap["backbone"] == backbone] for backbone in models}
exhaustive = {backbone: cells.best_sites(runs) for backbone, runs in runs_of.items()}


def at(backbone, chosen):
    """Runs at one site of each task."""
    runs = runs_of[backbone]
    return runs[[chosen.get(row.task) == row.site for row in runs.itertuples()]]


def suggested(backbone, score, among):
    rows = table[(table["backbone"] == backbone) & among]
    best = rows.loc[rows.groupby("task")[f"score:{score}"].idxmax()]
    return at(backbone, dict(zip(best["task"], best["site"], strict=True)))


def default(backbone):
    spec = next(r.config["backbone"] for r in trained if r.config["backbone"]["name"] == backbone)
    places = sites.list_sites(backbones.load(**{**spec, "weights": None, "pretrained": False}))
    wanted = 3 if backbone.startswith("vit") else len(places) - 4
    ran = set(runs_of[backbone]["site"])
    site = next(place for place in places[wanted::-1] if place in ran)
    return at(backbone, dict.fromkeys(runs_of[backbone]["task"], site))


def pooled(runs):
    """The expected outcome of a site drawn at random."""
    means = runs.groupby(["task", "seed"])["correct"].agg(lambda several: np.mean(np.stack(list(several)), axis=0))
    return means.reset_index()


found_runs = pd.DataFrame(
    {
        "backbone": record.config["backbone"]["name"],
        "task": record.config["task"],
        "seed": record.config["seed"],
        "site": record["site"],
        "accuracy": record["accuracy"],
        "correct": np.array(record["correct"], bool),
        "share": record["flops"] / record["exhaustive_flops"],
        "key": record.key,
    }
    for record in searched
)
is_found_unseen = unseen(found_runs)
lost = []
for backbone in models:
    best = exhaustive[backbone]
    choices = {
        "gain": suggested(backbone, "gain", everywhere),
        "found": suggested(backbone, "found", is_judged),
        "default": default(backbone),
        "random": pooled(runs_of[backbone]),
        "search": found_runs[(found_runs["backbone"] == backbone) & is_found_unseen],
        "search, seen": found_runs[(found_runs["backbone"] == backbone) & ~is_found_unseen],
    }
    for choice, runs in choices.items():
        if len(runs):
            lost.append({"backbone": backbone, "choice": choice, **asdict(intervals.paired_difference(best, runs))})
lost = pd.DataFrame(lost)
with figures.theme(width=1.0, rows=1.35):
    figure, axes = plt.subplots(1, len(models), sharey=True, squeeze=False)
    for ax, backbone in zip(axes[0], models, strict=True):
        own = lost[lost["backbone"] == backbone]
        errors = [own["value"] - own["low"], own["high"] - own["value"]]
        errors = None if suite == "embedded" else errors  # two tasks: wider than the figure, they are in the CSV
        is_ours = own["choice"].isin(["gain", "found", "search"])
        colors = np.where(is_ours, looks.COLORS["ap"], looks.COLORS["full"])
        ax.bar(own["choice"], own["value"], yerr=errors, color=colors, error_kw={"lw": 0.8}, width=0.65)
        ax.axhline(1, color=looks.COLORS["norm"], lw=0.8, ls="--")
        ax.axhline(0, color="black", lw=0.6)
        ax.set(title=backbone)
        ax.tick_params(axis="x", rotation=35)
    axes[0, 0].set_ylabel("below the exhaustive\nsweep's choice (points)")
    handles = [plt.Rectangle((0, 0), 1, 1, color=looks.COLORS[kind]) for kind in ("ap", "full")]
    handles.append(plt.Line2D([], [], color=looks.COLORS["norm"], ls="--", lw=0.8))
    figure.legend(handles, ["ours", "for comparison", "aim: 1 point"], loc="outside lower center", ncols=3)
    figures.save(figure, "08_points_lost", [*trained, *scored, *searched], lost, suite=suite)

# %%
trials = [len(record["trials"]) for record in searched]
beside = [
    found_runs.assign(trials=trials, judged=is_found_unseen).set_index(["backbone", "task"])[
        ["site", "accuracy", "share", "trials", "judged"]
    ],
    pd.concat(exhaustive.values())
    .query("seed == 0")
    .set_index(["backbone", "task"])[["site", "accuracy"]]
    .add_prefix("sweep's "),
]
pd.concat(beside, axis=1, join="inner").round(3)

# %% [markdown]
# ## Judgement
#
# Statistics and thresholds were fixed in `claims.toml` before any score was seen.
#
# What came out on real images (small suite): no score reaches a rank correlation of 0.8 on any backbone: refuted on the
# two micro backbones, open on MobileNetV2. The best is alignment on the CNN, at 0.35 [0.01, 0.70]; on the ViT none is
# above 0.2. (With the starter weights that shipped before it was newton on the CNN, at 0.44 [0.18, 0.70]; 0.28 now.)
# The validation accuracy of the trained prompts themselves reaches 0.36 on the CNN and 0.52 on the ViT: on most tasks
# the sites differ by 2.5 to 7.4 points, of which some two would be noise. On the two tasks where they differ most
# (traffic signs and hand signs) the gain ranks them at 0.79 and 0.72 on the CNN, at 0.60 and 0.88 on the ViT, and depth
# alone, shallower being better, at 0.35 to 0.81. That division was seen afterwards, on the starters, and is no verdict.
# The found score is at -0.25, 0.02 and 0.06 on tasks it was not found on: it tells nothing. Windows follow depth so
# closely that they say no more than it does; the hypothesis on reach wants few windows to be good, and their
# correlations are negative on both micro backbones (-0.24 and -0.26), though neither can be told from zero.
#
# The search stays within an eighth of the sweep's FLOPs (counted with three rates and one seed) and loses, in the
# mean, 1.2 points on the CNN, 1.3 on the ViT and 3.0 on MobileNetV2, with intervals that reach far beyond the one
# point that we aim at. The sweep has the advantage of a grid that extends at its edges, to 1e-3 on MobileNetV2, and of
# a site chosen over three seeds. All of MobileNetV2's loss is Caltech-101's (9.0 points), where at the same site the
# sweep's rate of 0.004 gives 76.2 % instead of 69.0 %. How it spends was settled on the finding tasks with
# the starters, among five designs whose mean accuracies there lay between 52.5 and 53.8 %; but that was after earlier
# versions had been seen on all tasks of the micro backbones, so on these its verdict is not a blind one.

# %%
judge = claims.Judge(suite)
for backbone in models:
    runs = runs_of[backbone]
    own = [record for record in [*trained, *scored] if record.config["backbone"]["name"] == backbone]
    of = {"backbones": [backbone], "tag": backbone}
    for score in SCORES:
        among = is_judged if score == "found" else everywhere
        there = runs[runs["task"].isin(table[(table["backbone"] == backbone) & among]["task"])]
        judge(f"Q-20.{score}", correlations[backbone, score], rows=[there], made_from=own, **of)
    for claim, score, among in (("Q-21", "gain", everywhere), ("Q-22", "found", is_judged)):
        chosen = suggested(backbone, score, among)
        scope = {"rows": [chosen], "made_from": own, **of}
        note = "; ".join(f"{row.task}: {row.site}" for row in chosen.drop_duplicates("task").itertuples())
        judge(f"{claim}.best", intervals.paired_difference(exhaustive[backbone], chosen), note=note, **scope)
        against = default(backbone)
        note = f"default: {against['site'].iloc[0]}"
        judge(f"{claim}.default", intervals.paired_difference(chosen, against), note=note, **scope)
        judge(f"{claim}.random", intervals.paired_difference(chosen, pooled(runs)), **scope)
    searches = found_runs[(found_runs["backbone"] == backbone) & is_found_unseen]
    note = "; ".join(f"{row.task}: {row.site}" for row in searches.itertuples())
    used = [*own, *(record for record in searched if record.key in set(searches["key"]))]
    scope = {"rows": [searches], "made_from": used, **of}
    difference = intervals.paired_difference(exhaustive[backbone], searches)
    judge("Q-23.accuracy", difference, note=note, **scope)
    note = "the largest share of a task: the search stops before it spends more"
    judge("Q-23.cost", searches["share"].max(), note=note, **scope)
judge.table
