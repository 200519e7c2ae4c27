# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A prompt at the input can reach less, costs more, and does not stay universal
#
# One perturbation of the image, the same for all images, against one inside the network. Three statements, each with
# its own limits: what an input prompt can do to the first block's tokens (V1, and V2 for frames), what a training step
# costs (V3), and how much of what arrives at a later layer is still the same for all images (V4).

# %% tags=["parameters"]
suite: str = "embedded"  # where records and figures go: embedded, small or paper
task_names: str = "textures, orientation, color_shape"  # embedded tasks on which prompts are trained

# %%
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.colors import ListedColormap

from apthory import backbones, equivalence, metrics, sites, training
from apthory.costs import attention_flops, step_flops
from apthory.lab import claims, figures, intervals, records
from apthory.studies import costs as cost_study
from apthory.studies import input_limits, looks

task_list = [name.strip() for name in task_names.split(",")]
recipe = {"num_epochs": 5, "num_train": 128, "num_validation": 64, "num_test": 72}
protocol = {"recipe": recipe, "learning_rate": 4e-3, "seed": 0}


def fetch(function, **config):
    """The record of a measurement."""
    return records.fetch(function, config, sources=[equivalence, metrics, training], folder=records.folder(suite))


# %% [markdown]
# ## Less reach
#
# Let patches be cut without overlap and embedded by one matrix $W$ ($C$ channels by $3p^2$ pixels), with no
# normalization behind it. Then a prompt on the image adds $W d_t$ to patch token $t$, whatever the image: it is a full
# prompt at the first block, held to the column space of $W$ on patch tokens and to zero on the class token. The rank
# is computed from the weights: the shipped ones of vit_micro, random ones of the other architectures.

# %%
architectures = {
    "vit_micro": {},
    "deit_small_patch16_224": {"depth": 1},
    "vit_base_patch16_224": {"depth": 1},
    "vit_large_patch16_224": {"depth": 1},
    "vit_base_patch32_clip_224": {"depth": 1},
    "swin_tiny_patch4_window7_224": {"depths": [1, 1, 1, 1]},
    "convnext_tiny": {"depths": [1, 1, 1, 1]},
    "resnet18": {},
}
ranks = {}
for name, shape in architectures.items():
    spec = {"name": name, **shape, **({} if name in backbones.SHIPPED else {"pretrained": False})}
    ranks[name] = fetch(input_limits.measure_rank, backbone=spec)
rank_table = pd.DataFrame({name: record.values for name, record in ranks.items() if "rank" in record.values}).T
rank_table = rank_table.astype(dict.fromkeys(("rank", "dim", "pixels", "tokens", "extra_tokens"), int))
# The mean square of a random prompt's share out of reach is 1 - rank / dim * patches / tokens.
patches = rank_table["tokens"] - rank_table["extra_tokens"]
rank_table["random residual"] = np.sqrt(1 - rank_table["rank"] / rank_table["dim"] * patches / rank_table["tokens"])
rank_table["sigma ratio"] = rank_table["smallest"] / rank_table["largest"]
rank_table.drop(columns=["largest", "smallest", "tolerance"]).round(4)

# %% [markdown]
# Elsewhere the statement does not hold: there is no fixed shift of the tokens, and `equivalence.input_span` says why.

# %%
for record in ranks.values():
    if reason := record.values.get("reason"):
        print("-", reason.split(". It is")[0])

# %% [markdown]
# vit_micro's $W$ has full rank, so all that is out of reach is the class token: $1/65$ of a random prompt's square. Is
# what training finds more, or less, out of reach? Prompts are trained at the first block, one value for every unit
# (full) or for every channel; a channel prompt shifts the class token as much as any other token, so its share is fixed
# at $\sqrt{1/65}$. In reach does not mean near: `relative_image_norm` is the size of the least input prompt that does
# the reachable part, relative to images, to be compared with the prompt's own `relative_norm` at the tokens.

# %%
residuals = {
    task: fetch(input_limits.measure_residuals, backbone={"name": "vit_micro"}, task=task, **protocol)
    for task in task_list
}
residual_table = pd.DataFrame(
    [
        {"task": task, "prompt": shape, **values}
        for task, record in residuals.items()
        for shape, values in record.values.items()
    ]
)
with figures.theme(width=1.0, rows=1.1):
    figure, axes = plt.subplots(1, 2, width_ratios=[1.25, 1])
    labels = [name.removesuffix("_224").replace("_patch", "/").replace("_", " ") for name in rank_table.index]
    axes[0].barh(labels, rank_table["dim"], color="none", edgecolor="black", lw=0.7, label="channels")
    axes[0].barh(labels, rank_table["rank"], color=looks.COLORS["input_prompt"], height=0.5, label="rank: in reach")
    for row, (rank, dim) in enumerate(zip(rank_table["rank"], rank_table["dim"], strict=True)):
        axes[0].text(dim + 15, row, f"{rank} of {dim}", va="center", fontsize=7)
    axes[0].set(xlabel="dimensions of a patch token", xlim=(0, 1330), title="reach of an input prompt")
    axes[0].legend(loc="lower right", bbox_to_anchor=(1.0, 0.05))
    for column, (_, part) in enumerate(residual_table.groupby("prompt", sort=False)):
        for offset, name, color in ((-0.12, "residual", "ap"), (0.12, "random_residual", "random_prompt")):
            label = {"residual": "trained", "random_residual": "random"}[name] if column == 0 else None
            spread = column + offset + np.linspace(-0.05, 0.05, len(part))
            axes[1].plot(spread, part[name], "o", color=looks.COLORS[color], label=label)
    axes[1].axhline(np.sqrt(1 / 65), color="black", lw=0.6, ls=":", label=r"$\sqrt{1/65}$")
    axes[1].set_xticks([0, 1], ["full prompt", "channel prompt"])
    axes[1].set(ylabel="share of norm out of reach", title="prompts at vit_micro's first block")
    axes[1].set(xlim=(-0.5, 1.5), ylim=(0, 0.2))
    axes[1].legend(loc="lower center", ncols=3, handlelength=1.0, columnspacing=0.8)
    drawn = pd.concat(
        [
            rank_table.reset_index(names="architecture")[["architecture", "rank", "dim", "tokens"]],
            residual_table.rename(columns={"prompt": "shape"}),
        ]
    )
    figures.save(figure, "02_reach", [*ranks.values(), *residuals.values()], drawn, suite=suite)
residual_table.round(3)

# %% [markdown]
# ## A frame is prompt tokens
#
# EVP shrinks the image and trains the pixels around it. If the frame is made of whole patches, its tokens are
# $\mathrm{pos}_t + b + W(\mathrm{pixels}_t)$, the same for every image: VPT's shallow prompt tokens, held to an affine
# set. So the backbone on the framed image equals its blocks on [class token, image tokens, prompt tokens]. The image's
# tokens must keep the positions of the middle ("elsewhere": they do not), and the class token, or a pool with the
# frame in it, must be read. A frame of 30 pixels, EVP's default, holds no whole patch of 32.

# %%
frames = {
    (name, width): fetch(input_limits.measure_frame, backbone=spec, width=width)
    for name, width, spec in (
        ("vit_micro", 8, {"name": "vit_micro"}),
        ("vit_micro", 16, {"name": "vit_micro"}),
        ("deit_small_patch16_224", 32, {"name": "deit_small_patch16_224", "pretrained": False, "depth": 2}),
    )
}
frame_table = pd.DataFrame(
    [
        {
            "backbone": name,
            "frame (px)": width,
            **record["tokens"],
            **{k: record[k] for k in ("difference", "elsewhere")},
        }
        for (name, width), record in frames.items()
    ]
)
for (name, width), record in frames.items():
    difference, elsewhere = record["difference"], record["elsewhere"]
    print(f"{name}, {width} px: largest relative difference {difference:.1e} (elsewhere {elsewhere:.2f})")
print("224 px, frame of 30, patches of 32:", equivalence.frame_tokens(224, 30, 32))
frame_table.drop(columns=["difference", "elsewhere"])


# %%
def token_kinds(size, width, patch):
    """0 where a patch shows the image alone, 2 the frame alone, 1 both."""
    is_frame = np.ones((size, size))
    is_frame[width : size - width, width : size - width] = 0
    share = is_frame.reshape(size // patch, patch, size // patch, patch).mean((1, 3))
    return np.where(share == 1, 2, np.where(share == 0, 0, 1))


pictures = {
    "p = 8, frame of 8 px": (64, 8, 8),
    "p = 16, frame of 30 px": (224, 30, 16),
    "p = 32, frame of 30 px": (224, 30, 32),
}
KINDS = {0: ("image", "#DDDDDD"), 1: ("mixed", looks.COLORS["ap_channel"]), 2: ("prompt", looks.COLORS["evp"])}
with figures.theme(width=0.9, rows=1.05):
    figure, axes = plt.subplots(1, 3)
    rows = []
    for ax, (title, (size, width, patch)) in zip(axes, pictures.items(), strict=True):
        kinds, counts = token_kinds(size, width, patch), equivalence.frame_tokens(size, width, patch)
        assert tuple((kinds == kind).sum() for kind in (2, 1, 0)) == counts
        ax.pcolormesh(kinds, cmap=ListedColormap([color for _, color in KINDS.values()]), edgecolors="white", lw=0.4,
                      vmin=0, vmax=2)  # fmt: skip
        inner = np.array([width, size - width]) / patch
        ax.plot(inner[[0, 1, 1, 0, 0]], inner[[0, 0, 1, 1, 0]], color="black", lw=0.9)
        ax.set(title=title, aspect="equal", xticks=[], yticks=[])
        ax.spines[["left", "bottom"]].set_visible(False)
        ax.set_xlabel(f"{counts.prompt} prompt, {counts.mixed} mixed, {counts.image} image")
        rows.append({"picture": title, "size": size, "width": width, "patch": patch, **counts._asdict()})
    handles = [plt.Rectangle((0, 0), 1, 1, color=color) for _, color in KINDS.values()]
    handles.append(plt.Line2D([], [], color="black", lw=0.9))
    names = [f"{name} token" for name, _ in KINDS.values()]
    figure.legend(handles, [*names, "edge of the shrunk image"], loc="outside lower center", ncols=4)
    figures.save(figure, "02_frames", list(frames.values()), pd.DataFrame(rows), suite=suite)

# %% [markdown]
# ## More cost
#
# Let $F$ be the FLOPs of a forward pass, $S$ those after the site, $A$ and $A_S$ those of the products of two
# activations inside attention, whose backward pass needs both factors' gradients. With frozen weights a step costs
#
# - a prompt at the input $2F + A$,
# - an activation prompt $F + S + A_S$,
# - the same with the prefix's result kept $2S + A_S$,
#
# and three passes of the head (1.5 times the $A$ where a fused kernel computes the scores anew). Lines are the
# formula, points are counted while a step runs.

# %%
costs = {}
cost_rows = []
for name in backbones.SHIPPED:
    spec = {"name": name, "device": "cpu"}  # there attention runs unfused
    costs[name] = fetch(cost_study.measure_sites, backbone=spec, batch_size=2, num_repeats=1)
    model, x = backbones.load(**spec), torch.zeros(1, 3, 64, 64)
    with torch.no_grad():
        attention = attention_flops(lambda model=model, x=x: model(x))
        width = model(x).shape[1]
    for index, row in enumerate(costs[name]["sites"]):
        prefix, suffix = sites.split(model, row["site"])
        with torch.no_grad():
            crossing = prefix(x)
            late = attention_flops(lambda suffix=suffix, crossing=crossing: suffix(*crossing))
        formula = step_flops(
            forward=costs[name]["forward_flops"],
            suffix=row["suffix_flops"],
            attention=attention,
            suffix_attention=late,
            head=2 * width * 10,
        )
        cost_rows.append(
            {
                "backbone": name,
                "site": row["site"],
                "depth": index / (len(costs[name]["sites"]) - 1),
                "forward": costs[name]["forward_flops"],
                "counted": row["step_flops"],
                "formula": formula.activation,
                "counted_cached": row["cached_step_flops"],
                "formula_cached": formula.cached,
                "visual": formula.visual,
            }
        )
cost_table = pd.DataFrame(cost_rows)
pairs = (("counted", "formula"), ("counted_cached", "formula_cached"))
cost_table["difference"] = np.max([(cost_table[c] / cost_table[f] - 1).abs() for c, f in pairs], axis=0)

NETWORKS = {"vit_micro": looks.COLORS["ap"], "resnet_micro": looks.COLORS["input_prompt"]}
with figures.theme(width=0.75, rows=1.15):
    figure, ax = plt.subplots()
    for name, part in cost_table.groupby("backbone", sort=False):
        for (count, formula), style, marker in zip(pairs, ("-", "--"), ("o", "s"), strict=True):
            cached = ", prefix cached" if style == "--" else ""
            ax.plot(
                part["depth"], part[formula] / part["forward"], style, color=NETWORKS[name], label=f"{name}{cached}"
            )
            ax.plot(part["depth"], part[count] / part["forward"], marker, color=NETWORKS[name], mfc="white", mew=0.8)
    ax.plot([], [], "o", color="black", mfc="white", mew=0.8, label="counted")
    ax.plot([], [], "-", color="black", label="formula")
    ax.set(xlabel="depth of the site (0: input, 1: last)", ylabel="FLOPs of a step / forward pass", ylim=(0, None))
    figure.legend(loc="outside right center")
    figures.save(figure, "02_cost", list(costs.values()), cost_table, suite=suite)
print(f"largest relative difference of counted from formula: {cost_table['difference'].max():.1e}")

# %% [markdown]
# ## Less universal
#
# What arrives at site $l$ is, to first order, $J_l(x)\,d$, and depends on the image. Its universality
# $u_l = |\mathbb{E} J_l(x) d|^2 / \mathbb{E} |J_l(x) d|^2$ is one for a perturbation that all images share and zero for
# one in which they have nothing in common; a prompt placed at site $l$ has one there, and so has an input prompt at a
# ViT's first block, by the first section. Derivatives are taken in forward mode at the prompt zero; a trained prompt is
# not small, so this describes its direction. The twins' weights are the same numbers in random order. Thick lines are
# means over tasks, thin ones single tasks.

# %%
measured = {
    (name, task): fetch(input_limits.measure_universality, backbone={"name": name}, task=task, **protocol)
    for name in backbones.SHIPPED
    for task in task_list
}
universality = pd.DataFrame(
    [
        {"backbone": name, "task": task, "network": row["network"], "prompt": row["prompt"], "group": row["group"],
         "site": site, "depth": index / (len(record["sites"]) - 1), "universality": value}
        for (name, task), record in measured.items()
        for row in record["rows"]
        for index, (site, value) in enumerate(zip(record["sites"], row["values"], strict=True))
    ]
)  # fmt: skip
by_task = universality.groupby(
    ["backbone", "network", "prompt", "task", "site", "depth"], sort=False, as_index=False
)["universality"].mean()  # fmt: skip
LINES = {
    ("trained", "trained"): ("o-", looks.COLORS["input_prompt"], "trained prompt"),
    ("trained", "random"): ("s-", looks.COLORS["random_prompt"], "random prompt"),
    ("shuffled", "trained"): ("o:", looks.COLORS["input_prompt"], "trained prompt, shuffled weights"),
    ("shuffled", "random"): ("s:", looks.COLORS["random_prompt"], "random prompt, shuffled weights"),
}
with figures.theme(width=1.0, rows=1.35):
    figure, axes = plt.subplots(1, 2, sharey=True)
    for ax, name in zip(axes, backbones.SHIPPED, strict=True):
        for (network, prompt), rows in by_task[by_task["backbone"] == name].groupby(["network", "prompt"], sort=False):
            style, color, label = LINES[network, prompt]
            ax.plot(
                *rows.groupby("depth")["universality"].mean().reset_index().to_numpy().T,
                style,
                color=color,
                label=label,
            )
            for _, part in rows.groupby("task"):
                ax.plot(part["depth"], part["universality"], style[1:], color=color, lw=0.5, alpha=0.5)
        ax.axhline(1, color=looks.COLORS["ap"], lw=0.8, label="prompt placed at the site")
        ax.set(title=name, xlabel="depth of the site (0: input, 1: last)", ylim=(-0.05, 1.08))
    axes[0].set_ylabel(r"universality $u_l$ of an input prompt")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    figures.save(figure, "02_universality", list(measured.values()), by_task, suite=suite)

# %% [markdown]
# ## Judgement
#
# Statistics and thresholds stand in `claims.toml`; those of V-1 and V-4 were written down after a smoke run on one task
# (64 images, 2 epochs) had been seen, and not changed since. Intervals are Student's over tasks. In a network with
# shuffled weights universality may fall faster or slower than in the trained one: the last statistic asks whether the
# loss is learned.

# %%
judge = claims.Judge(suite)
full = residual_table[residual_table["prompt"] == "full"]
for claim, values in {"residual": full["residual"], "excess": full["residual"] - full["random_residual"]}.items():
    note = "W has full rank here: what is out of reach is the class token"
    scope = {"backbones": ["vit_micro"], "tasks": task_list, "seeds": [0], "made_from": residuals.values()}
    judge(f"V-1.{claim}", intervals.over_tasks(values), tag="vit_micro", note=note, **scope)
for name, rows in frame_table.groupby("backbone", sort=False):
    made_from = [record for (backbone, _), record in frames.items() if backbone == name]
    scope = {"backbones": [name], "tasks": ["random images"], "seeds": [0], "made_from": made_from}
    judge("V-2", rows["difference"].max(), tag=name, **scope)
for name, rows in cost_table.groupby("backbone", sort=False):
    inside = rows[rows["depth"] > 0].iloc[1:]  # without the input and the first block
    scope = {"backbones": [name], "tasks": ["random images"], "seeds": [0], "made_from": [costs[name]]}
    judge("V-3.formula", rows["difference"].max(), tag=name, **scope)
    judge("V-3.cost", rows["counted"].iloc[0] / inside["counted"].mean(), tag=name, **scope)
for name, rows in by_task.groupby("backbone", sort=False):
    made_from = [record for (backbone, _), record in measured.items() if backbone == name]
    scope = {"backbones": [name], "tasks": task_list, "seeds": [0], "made_from": made_from}
    learned = rows[rows["network"] == "trained"]
    for prompt in ("trained", "random"):
        several = learned[learned["prompt"] == prompt].round({"universality": 4}).groupby("task")  # equal where it is 1
        values = [intervals.spearman(part["depth"].to_numpy(), part["universality"].to_numpy()) for _, part in several]
        judge(f"V-4.{prompt}", intervals.over_tasks(values), tag=name, **scope)
    last = rows[(rows["depth"] == 1) & (rows["prompt"] == "random")].pivot(
        index="task", columns="network", values="universality"
    )
    difference = last["trained"] - last["shuffled"]
    judge("V-4.learned", intervals.over_tasks(difference), tag=name, **scope)
judge.table
