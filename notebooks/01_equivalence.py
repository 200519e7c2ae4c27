# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # After normalization, a channel prompt is a bias shift
#
# A *channel* prompt adds one vector $d$ at every position of an activation. At the output of a normalization layer that
# is its bias: $\mathrm{BN}(x) + d$ and $\mathrm{LN}(x) + d$ are the same layers with $\beta + d$ (E1, E3), whatever
# $\gamma$ and the statistics are. At BatchNorm's input, with running statistics, it is
# $\beta + \gamma d / \sqrt{\mathrm{var} + \epsilon}$ (E2); before a linear map or an unpadded convolution,
# $b + (\sum W) d$ (E5). Folded into the bias, the prompt costs nothing, and trained, it moves as the bias does (E6).
#
# The identity ends at the input of a layer norm (E4), at zero padding, at batch statistics, and with *full* prompts,
# which have a value for each position (E7). Some prompts do nothing at all (E8). All distances are of the backbone's
# features, in float64.

# %% tags=["parameters"]
suite: str = "embedded"  # where records and figures go: embedded, small or paper
task: str = "textures"  # embedded task on which prompts are trained

# %%
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from IPython.display import Markdown

from apthory import equivalence
from apthory.lab import claims, figures, records
from apthory.studies import equivalence as equivalence_study

SPECS = {
    "vit_micro": {"name": "vit_micro"},
    "resnet_micro": {"name": "resnet_micro"},
    "mobilenetv2_100": {"name": "mobilenetv2_100", "pretrained": False, "pad_type": "same", "input_size": 32},
}
SHIPPED = ("vit_micro", "resnet_micro")


def fetch(function, **config):
    return records.fetch(function, config, sources=[equivalence], folder=records.folder(suite))


# %% [markdown]
# ## Every layer
#
# At both edges of every layer with a bias, a random prompt as large as the activations; the same prompt folded into
# the bias; the largest relative difference of the two networks' features. MobileNetV2 has random weights here,
# and every third layer is taken.

# %%
EVERY = {"vit_micro": 1, "resnet_micro": 1, "mobilenetv2_100": 3}  # every so many-th layer
by_layer = {
    name: fetch(equivalence_study.measure_layers, backbone=spec, every=EVERY[name]) for name, spec in SPECS.items()
}
rows = pd.concat([pd.DataFrame(record["rows"]).assign(backbone=name) for name, record in by_layer.items()])
WHERE = {
    ("E1", True): "BatchNorm output",
    ("E2", True): "BatchNorm input, running statistics",
    ("E3", True): "LayerNorm output",
    ("E5", True): "linear map",
    ("E4", False): "LayerNorm input: not exact",
}
rows["where"] = [WHERE[row.statement, row.exact] for row in rows.itertuples()]
summary = rows.pivot_table(
    index=["statement", "where"], columns="backbone", values="difference", aggfunc=["max", "count"]
)
shown = pd.DataFrame(index=summary.index)
for name in SPECS:
    cells = zip(summary["max"][name], summary["count"][name], strict=True)
    shown[name] = ["" if np.isnan(value) else f"{value:.0e} ({count:.0f} edges)" for value, count in cells]
shown

# %% [markdown]
# ## Every site
#
# `diagnose` tries a site of any backbone: the biases next to it, and the kernel of the features' Jacobian. Between the
# blocks of a ViT a channel prompt is a bias shift too, of the block before (its last linear layer), and the value that
# is the same in every channel is lost in all later layer norms. On queries, keys and values together, the keys' third
# is lost as well (E8). A ResNet's blocks end in a ReLU: there none of the (at most four) biases tried equals a channel
# prompt. "Varying": behind a layer norm the prompt is another shift for each token.

# %%
PLACES = {
    "vit_micro": [
        ":input",
        "blocks.0:input",
        "blocks.4:input",
        "blocks.4.norm1:input",
        "blocks.4.norm1:output",
        "blocks.4.attn.qkv:output",
        "norm:output",
    ],
    "resnet_micro": [
        ":input",
        "conv1:output",
        "bn1:output",
        "layer1.0:input",
        "layer3.0:input",
        "layer3.1.bn1:input",
        "layer3.1.bn1:output",
        "layer4.1:output",
    ],
}
diagnosed = {
    name: fetch(equivalence_study.measure_diagnoses, backbone=SPECS[name], places=PLACES[name]) for name in SHIPPED
}
sites = pd.concat([pd.DataFrame(record["diagnoses"]).assign(backbone=name) for name, record in diagnosed.items()])
sites["null_directions"] = sites["null_directions"].map("; ".join)
columns = [
    "backbone",
    "site",
    "statement",
    "kind",
    "relative_difference",
    "target",
    "null_dimension",
    "null_directions",
]
sites[columns].assign(relative_difference=sites["relative_difference"].map("{:.0e}".format))

# %%
KINDS = {
    "exact": "#009E73",
    "absorbed": "#56B4E9",
    "border": "#E69F00",
    "varying": "#CC79A7",
    "not found": "#D55E00",
}
with figures.theme(width=1.0, rows=1.55):
    figure, axes = plt.subplots(1, 2)
    box = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
    for ax, name in zip(axes, SHIPPED, strict=True):
        part = sites[sites["backbone"] == name].reset_index(drop=True)
        distance = part["relative_difference"].clip(lower=1e-17)
        for kind, color in KINDS.items():
            chosen = part["kind"] == kind
            ax.barh(part.index[chosen], np.log10(distance[chosen]) + 17, left=-17, color=color, height=0.65)
        for index, row in part.iterrows():
            share = f"{row['null_dimension']} of {row['num_channels']} null" if row["null_dimension"] else ""
            label = f"{row['statement']}  {share}"
            inside = row["relative_difference"] > 1e-8
            ax.text(
                -16.6 if inside else np.log10(distance[index]) + 0.4,
                index,
                label,
                va="center",
                fontsize=6,
                bbox=None if inside else box,
            )
        ax.set_yticks(part.index, part["site"].str.removesuffix(":output"), fontsize=6)
        ax.axvline(-12, color="black", lw=0.6, ls=":", zorder=0)
        ax.invert_yaxis()
        ax.set(xlim=(-17, 1), title=name, xlabel="difference from the closest bias tried")
        ax.set_xticks([-16, -12, -8, -4, 0], [f"$10^{{{power}}}$" for power in (-16, -12, -8, -4, 0)])
    handles = [plt.Rectangle((0, 0), 1, 1, color=color) for color in KINDS.values()]
    figure.legend(handles, list(KINDS), loc="outside lower center", ncols=5)
    figures.save(figure, "01_diagnosis", list(diagnosed.values()), sites, suite=suite)

# %% [markdown]
# The dotted line is what counts as exact, $10^{-12}$. "Absorbed": the prompt shifts all images' features alike, so a
# linear head's bias does the same (and the bar is the prompt's whole effect). "Border": a bias shift but for the
# outputs whose kernel touches zero padding.

# %% [markdown]
# ## How far it is where it is not exact
#
# A random prompt by its norm, and how far it is, at most, from tuning that layer's $\gamma$ and $\beta$: the nearest
# tuning that least squares finds, on the 8 random images on which it is measured. Hollow markers: the search has not
# converged. At a layer norm's input, $\mathrm{LN}(x + d) = \mathrm{LN}(x) + \frac{\gamma}{s}(I - NN'/C)\Pi d +
# O(|d|^2)$: even the first order is no one shift, since each token has its own $s$ and $N$. So the nearest tuning stays
# away in proportion to the norm (slope 1), and only the shift that every token has of its own leaves a remainder of
# slope 2. With batch statistics BatchNorm removes the prompt: what is drawn is the shift that it would be with running
# statistics.

# %%
norms = [float(norm) for norm in np.logspace(-4, 0, 5)]
CASES = {
    "channel, LayerNorm input": ("vit_micro", "blocks.7.norm1:input", "blocks.7.norm1", "channel", False),
    "full, LayerNorm output": ("vit_micro", "blocks.7.norm1:output", "blocks.7.norm1", "full", False),
    "full, BatchNorm output": ("resnet_micro", "layer3.1.bn1:output", "layer3.1.bn1", "full", False),
    "channel, BatchNorm input,\nbatch statistics": (
        "resnet_micro",
        "layer3.1.bn1:input",
        "layer3.1.bn1",
        "channel",
        True,
    ),
}
gaps = {
    case: fetch(
        equivalence_study.measure_gap,
        backbone=SPECS[name],
        site=site,
        layer=layer,
        shape=shape,
        norms=norms,
        is_training=is_training,
    )
    for case, (name, site, layer, shape, is_training) in CASES.items()
}
distances = pd.concat(
    [pd.DataFrame(record["gaps"]).assign(case=case.replace("\n", " ")) for case, record in gaps.items()]
)
layer_norm = pd.DataFrame(gaps["channel, LayerNorm input"]["gaps"])

COLORS = dict(zip(CASES, ("#D55E00", "#0072B2", "#009E73", "#CC79A7"), strict=True))
with figures.theme(width=1.0, rows=1.5):
    figure, axes = plt.subplots(1, 2, sharey=True)
    axes[0].loglog(layer_norm["norm"], layer_norm["effect"], "o:", color="#6B6B6B", label="from no prompt")
    axes[0].loglog(
        layer_norm["norm"], layer_norm["tuning"], "o-", color="#D55E00", label="from the nearest tuning found"
    )
    axes[0].loglog(layer_norm["norm"], layer_norm["first_order"], "s-", color="#0072B2", label="from the first order")
    for power, style in ((1, "--"), (2, "-.")):
        guide = layer_norm["first_order"][2] * (layer_norm["norm"] / layer_norm["norm"][2]) ** power
        axes[0].loglog(layer_norm["norm"], guide / 4, style, color="black", lw=0.6, label=f"slope {power}")
    for case, record in gaps.items():
        values = pd.DataFrame(record["gaps"])
        axes[1].loglog(values["norm"], values["tuning"], "o-", color=COLORS[case], label=case)
        open_ones = values[~values["is_converged"]]
        axes[1].loglog(open_ones["norm"], open_ones["tuning"], "o", color=COLORS[case], mfc="white")
    axes[0].set(title="channel prompt at a LayerNorm's input", ylabel="distance / norm of features")
    axes[1].set(title="distance from tuning, at most")
    for ax in axes:
        ax.set(xlabel="norm of the prompt / norm of the activation", ylim=(1e-11, 3))
        ax.legend(loc="lower right")
    figures.save(figure, "01_gap", list(gaps.values()), distances, suite=suite)

# %% [markdown]
# How much of the prompt's effect is left, in percent, and what the derivatives alone leave of it: in the limit of small
# prompts that is exact for tunings that are small as well. (An asterisk: not converged.)

# %%
shares = {
    case.replace("\n", " "): {
        f"norm {row['norm']:g}": f"{100 * row['tuning'] / row['effect']:.2g}{'' if row['is_converged'] else ' *'}"
        for row in record["gaps"]
    }
    | {"derivatives": f"{100 * record['gaps'][0]['linear'] / record['gaps'][0]['effect']:.2g}"}
    for case, record in gaps.items()
    if "batch statistics" not in case
}
pd.DataFrame(shares).T

# %%
left = 100 * layer_norm["tuning"] / layer_norm["effect"]
Markdown(
    f"No identity, but near one: at this layer norm's input the nearest tuning found leaves {left.min():.2g} to "
    f"{left.max():.2g} % of the prompt's effect, at every norm."
)

# %% [markdown]
# ## The same training
#
# A tied prompt and $\beta$ at one norm layer, the same images, a fixed random head: the losses agree to rounding,
# under Adam as under SGD. A full prompt that is given its gradients along $\beta$'s path goes, averaged over its $P$
# positions, $1/P$ of $\beta$'s way under SGD, with momentum too, and not under Adam. At BatchNorm's input the rates are
# matched channel by channel:
# $\gamma^2/(\mathrm{var}+\epsilon)$.

# %%
LAYERS = {"vit_micro": "blocks.6.norm2", "resnet_micro": "layer3.1.bn1"}
trained_alike = {
    name: fetch(equivalence_study.measure_trajectories, backbone=SPECS[name], task=task, layer=layer)
    for name, layer in LAYERS.items()
}
alike = pd.DataFrame(
    [
        {
            "backbone": name,
            "optimizer": optimizer,
            "largest difference of losses": f"{values['difference']:.0e}",
            "P x mean way of a full prompt / way of beta": f"{values['mean_way_ratio']:.3g}"
            if "mean_way_ratio" in values
            else "",
            "largest distance from it": f"{values['mean_way_spread']:.0e}" if "mean_way_spread" in values else "",
            "P": record["num_positions"],
        }
        for name, record in trained_alike.items()
        for optimizer, values in record["optimizers"].items()
    ]
)
alike

# %%
STYLES = {"SGD": "#0072B2", "momentum": "#009E73", "Adam": "#D55E00", "momentum, input": "#CC79A7"}
curves = pd.DataFrame(
    [
        {"backbone": name, "optimizer": optimizer, "step": step, "prompt": prompt, "beta": beta}
        for name, record in trained_alike.items()
        for optimizer, values in record["optimizers"].items()
        for step, (prompt, beta) in enumerate(zip(values["prompt"], values["beta"], strict=True))
    ]
)
with figures.theme(width=1.0, rows=1.3):
    figure, axes = plt.subplots(1, 2)
    for ax, name in zip(axes, SHIPPED, strict=True):
        for optimizer, part in curves[curves["backbone"] == name].groupby("optimizer", sort=False):
            ax.plot(part["step"], part["beta"], "-", color=STYLES[optimizer], lw=2.2, alpha=0.35)
            ax.plot(part["step"], part["prompt"], "--", color=STYLES[optimizer], lw=0.9, label=optimizer)
        ax.set(title=f"{name}, {LAYERS[name]}", xlabel="step", ylabel="loss")
    handles, labels = axes[1].get_legend_handles_labels()
    handles += [plt.Line2D([], [], color="gray", ls="--", lw=0.9), plt.Line2D([], [], color="gray", lw=2.2, alpha=0.35)]
    figure.legend(handles, [*labels, "tied prompt", "beta"], loc="outside lower center", ncols=6)
    figures.save(figure, "01_trajectories", list(trained_alike.values()), curves, suite=suite)

# %% [markdown]
# ## After training
#
# Prompts trained on an embedded task: what they change, and how much of that the nearest tuning found of the same
# layer's $\gamma$ and $\beta$ leaves unexplained, at most, on the 8 test images for which it is found.

# %%
TRAINED = {
    ("vit_micro", "channel", "LayerNorm input"): ("blocks.7.norm1:input", "blocks.7.norm1"),
    ("vit_micro", "full", "LayerNorm output"): ("blocks.7.norm1:output", "blocks.7.norm1"),
    ("resnet_micro", "full", "BatchNorm output"): ("layer3.1.bn1:output", "layer3.1.bn1"),
}
trained = {
    key: fetch(
        equivalence_study.measure_trained, backbone=SPECS[key[0]], task=task, site=site, layer=layer, shape=key[1]
    )
    for key, (site, layer) in TRAINED.items()
}
pd.DataFrame(
    [
        {
            "backbone": name,
            "prompt": shape,
            "place": place,
            "prompt norm / activation norm": round(record["norm"], 2),
            "change of the features": f"{record['effect']:.1e}",
            "left by the nearest tuning": f"{record['tuning']:.1e}",
            "share": f"{100 * record['tuning'] / record['effect']:.2g} %",
            "converged": record["is_converged"],
        }
        for (name, shape, place), record in trained.items()
    ]
)

# %% [markdown]
# ## Judgement
#
# Statistics and thresholds stand in `claims.toml`. Those of AP-4 were fixed before any run; the slopes of E-4 had been
# seen near 2 and 1 in trials when their thresholds were written down, so that row confirms rather than tests.

# %%
judge = claims.Judge(suite)
images = {"tasks": ["random images"], "seeds": [0]}
for name, record in by_layer.items():
    exact = [row["difference"] for row in record["rows"] if row["exact"]]
    note = f"{len(exact)} edges of layers"
    judge("AP-4.logits", max(exact), backbones=[name], made_from=[record], tag=name, note=note, **images)
for name in SHIPPED:
    largest = max(values["difference"] for values in trained_alike[name]["optimizers"].values())
    scope = {"tasks": [task], "seeds": [0], "made_from": [trained_alike[name]]}
    judge("AP-4.trajectory", largest, backbones=[name], tag=name, note="SGD, momentum, Adam; 12 steps", **scope)
for name in SHIPPED:
    beyond = sites[(sites["backbone"] == name) & sites["kind"].isin(["border", "varying", "not found"])]
    note = f"channel prompts at {', '.join(beyond['site'])}, from the closest bias tried"
    scope = {"backbones": [name], "made_from": [diagnosed[name]], **images}
    judge("AP-4.unconditional", beyond["relative_difference"].max(), tag=name, note=note, **scope)
for case in ("full, LayerNorm output", "full, BatchNorm output"):
    name, smallest = CASES[case][0], gaps[case]["gaps"][0]
    note = (
        f"full prompt of norm {smallest['norm']:g}: what the derivatives leave of it after least squares over gamma "
        f"and beta, relative to the features' norm; the best tuning found leaves {smallest['tuning']:.2g}, "
        "an upper bound. That no large tuning comes closer is not shown"
    )
    scope = {"backbones": [name], "made_from": [gaps[case]], **images}
    judge("AP-4.unconditional", smallest["linear"], tag=f"{name}_full", note=note, **scope)

small = layer_norm[layer_norm["norm"] < 0.05]
for statistic, column in (("remainder", "first_order"), ("tuning", "tuning")):
    slope = float(np.polyfit(np.log(small["norm"]), np.log(small[column]), 1)[0])
    judge(f"E-4.{statistic}", slope, backbones=["vit_micro"], made_from=[gaps["channel, LayerNorm input"]], **images)
judge.table
