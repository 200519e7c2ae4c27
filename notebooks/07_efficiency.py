# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A prompt inside the network costs less to train than one at the input, and no more at inference
#
# A training step of a prompt at a site runs the frozen prefix forward and the suffix forward and backward; with the
# prefix's result cached, the suffix alone. So the deeper the site, the cheaper the step. FLOPs are counted, seconds
# and bytes measured; weights do not matter to any of them.

# %% tags=["parameters"]
suite: str = "embedded"  # embedded or small: small networks; paper: its shapes, which want a GPU
batch_size: int = 0  # images in a step; 0: 64 for the paper's shapes, else 32

# %%
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from apthory import training
from apthory.lab import claims, figures, intervals, records
from apthory.studies import costs as cost_study
from apthory.studies import looks

batch_size = batch_size or (64 if suite == "paper" else 32)
if suite == "paper":  # the shapes of the paper, with random weights: costs do not depend on them
    specs = [{"name": name, "pretrained": False} for name in ("vit_large_patch16_224", "resnet101")]
else:
    specs = [
        {"name": "vit_micro"},
        {"name": "resnet_micro"},
        {"name": "mobilenetv2_100", "pretrained": False, "pad_type": "same", "input_size": 64},
    ]


def measure(function, spec, **config):
    config = {"backbone": spec, "batch_size": batch_size, "num_repeats": 5, **config}
    return records.fetch(function, config, sources=[training], folder=records.folder(suite))


measured = [measure(cost_study.measure_sites, spec) for spec in specs]

# %%
TIMES = ("step_seconds", "cached_step_seconds", "inference_seconds")
rows = []
for record in measured:
    for index, row in enumerate(record["sites"]):
        seconds = {name: float(np.median(row[name])) for name in TIMES}
        depth = index / (len(record["sites"]) - 1)
        backbone = record.config["backbone"]["name"]
        rows.append({"backbone": backbone, "depth": depth, "forward_flops": record["forward_flops"], **row, **seconds})
table = pd.DataFrame(rows)
table["inference_images_per_second"] = batch_size / table["inference_seconds"]
print("hardware:", measured[0]["device"])

# %% [markdown]
# ## Cost by site
#
# Solid: the whole backbone runs at every step. Dashed: the prefix is cached. The leftmost point of each solid line is
# the visual prompt. Memory is the most that a step's own tensors hold at once; the cache comes on top (its size for
# one image is in the CSV).

# %%
PANELS = {
    "step time (ms an image)": (("step_seconds", 1e3 / batch_size), ("cached_step_seconds", 1e3 / batch_size)),
    "step / forward FLOPs": (("step_flops", None), ("cached_step_flops", None)),
    "peak memory (MiB)": (("step_bytes", 2.0**-20), ("cached_step_bytes", 2.0**-20)),
    "prompt parameters": (("parameters", 1),),
}
COLORS = dict(zip((spec["name"] for spec in specs), ("#0072B2", "#D55E00", "#009E73"), strict=False))
with figures.theme(width=1.0, rows=2):
    figure, axes = plt.subplots(2, 2)
    for ax, (title, columns) in zip(axes.flat, PANELS.items(), strict=True):
        for backbone, part in table.groupby("backbone", sort=False):
            for style, (column, scale) in zip(("o-", ".--"), columns, strict=False):
                values = part[column] * (1 / part["forward_flops"] if scale is None else scale)
                label = backbone if style == "o-" else None
                ax.plot(part["depth"], values, style, ms=2.5, color=COLORS[backbone], label=label)
        ax.set(ylabel=title)
        if title == "prompt parameters":
            ax.set_yscale("log")
        else:
            ax.set_ylim(bottom=0)
    for ax in axes[1]:
        ax.set_xlabel("depth of the site (0: input, 1: last)")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    figures.save(figure, "07_cost_by_site", measured, table, suite=suite)

# %% [markdown]
# ## Cost by method
#
# The activation prompt is at the paper's default site: the input of the third block of a ViT, of the third-to-last
# block of a ResNet (recalled, not verified). Normalization tuning means gamma and beta of all layers. A step is loss
# and gradients without a cache; an optimizer's own memory, two numbers a parameter for Adam, comes on top. At inference
# tuned normalization runs as an extra scale and shift here, which folded into the layers would cost nothing.


# %%
def default_site(record):
    places = [row["site"] for row in record["sites"]]
    return places[3] if record.config["backbone"]["name"].startswith("vit") else places[-4]  # the last is an output


by_method = [measure(cost_study.measure_methods, r.config["backbone"], site=default_site(r)) for r in measured]
# Under the names that these records have; their "vp" is the prompt on the whole image.
KINDS = {"linear": "linear_probe", "ap": "ap", "vp": "input_prompt", "norm": "norm", "full": "full"}
NAMES = {name: looks.LABELS[kind] for name, kind in KINDS.items()}
rows = []
for record in by_method:
    for row in record["methods"]:
        seconds = {name: float(np.median(row[name])) for name in ("step_seconds", "inference_seconds")}
        rows.append({"backbone": record.config["backbone"]["name"], **row, **seconds})
costs = pd.DataFrame(rows)
costs["method"] = costs["method"].map(NAMES)
PANELS = {
    "step time (ms an image)": ("step_seconds", 1e3 / batch_size),
    "peak memory (MiB)": ("step_bytes", 2.0**-20),
    "parameters, head apart": ("parameters", 1),
    "images a second, inference": ("inference_seconds", None),
}
with figures.theme(width=1.0, rows=2):
    figure, axes = plt.subplots(2, 2, sharex=True)
    offsets = np.linspace(-0.3, 0.3, len(specs))
    for ax, (title, (column, scale)) in zip(axes.flat, PANELS.items(), strict=True):
        for offset, (backbone, part) in zip(offsets, costs.groupby("backbone", sort=False), strict=True):
            values = part.set_index("method").loc[list(NAMES.values()), column]
            values = batch_size / values if scale is None else values * scale
            ax.bar(np.arange(len(NAMES)) + offset, values, 0.6 / len(specs), color=COLORS[backbone], label=backbone)
        ax.set(ylabel=title, xticks=range(len(NAMES)))
        ax.set_xticklabels(NAMES.values(), rotation=30, ha="right")
        if column == "parameters":
            ax.set(yscale="log", ylim=(100, None))  # a probe has none
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    figures.save(figure, "07_cost_by_method", by_method, costs, suite=suite)

# %% [markdown]
# ## Judgement
#
# The paper's figures compare a prompt at its default site with one at the input, as above. The ratio's
# interval is a bootstrap over timings taken in turns. No cache is used: this is the comparison that the paper makes. At
# inference both prompts run the same network, so a throughput ratio of one is what to expect, and noise decides on
# which side of it the timings fall.

# %%
judge = claims.Judge(suite)
for record in measured:
    backbone = record.config["backbone"]["name"]
    places = record["sites"]
    at_input = places[0]
    ap = next(row for row in places if row["site"] == default_site(record))
    # Throughput is images a second: the ratio of the two is that of their times upside down.
    ratios = {
        "AP-3.time": intervals.ratio(ap["step_seconds"], at_input["step_seconds"]),
        "AP-3.memory": ap["step_bytes"] / at_input["step_bytes"],
        "AP-3.throughput": intervals.ratio(at_input["inference_seconds"], ap["inference_seconds"]),
    }
    if backbone == "resnet101":
        ratios |= {"AP-3.size_time": ratios["AP-3.time"], "AP-3.size_memory": ratios["AP-3.memory"]}
    for claim, estimate in ratios.items():
        note = f"{ap['site']} against the input; {record['device']}"
        scope = {"backbones": [backbone], "tasks": ["random images"], "seeds": [0], "made_from": [record]}
        judge(claim, estimate, tag=backbone, note=note, **scope)
judge.table
