# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A frozen backbone is prompted in five lines, and the prompt is a file of a few kilobytes
#
# An *activation prompt* is one perturbation $\delta$, the same for every image, added to one intermediate activation
# of a frozen network: $z \mapsto z + \delta$. At the input it is a prompt on the image. Only $\delta$ and a linear
# head are trained; the backbone never changes.

# %% tags=["parameters"]
suite: str = "embedded"  # where the figures go: embedded, small or paper
backbone_name: str = "resnet_micro"  # vit_micro, resnet_micro, or any timm name
task_name: str = "textures"  # an embedded task, or folder:PATH with one folder of images for each class
seed: int = 0  # subsample, split, initial head and order

# %%
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch

import apthory as ap
from apthory import backbones
from apthory.lab import claims, figures
from apthory.studies import looks

# %% [markdown]
# ## Five lines

# %%
backbone = ap.load_backbone(backbone_name)
task = ap.load_task(task_name, size=64)
method = ap.ActivationPrompting(site=ap.list_sites(backbone)[3])
fit = ap.fit(backbone, task, method, ap.Configuration(learning_rate=4e-3, seed=seed))
evaluation = ap.evaluate(fit, task)

# %% [markdown]
# The site is a place between two blocks; `list_sites` names them all. The head alone, on the same split, is the
# yardstick.

# %%
probe = ap.fit(backbone, task, ap.LinearProbe(), ap.Configuration(learning_rate=4e-3, seed=seed))
probe_evaluation = ap.evaluate(probe, task)
pd.DataFrame(
    {
        "site": [fit.method.site, probe.method.site],
        "test accuracy (%)": [round(evaluation.accuracy, 1), round(probe_evaluation.accuracy, 1)],
        "best epoch": [fit.epoch, probe.epoch],
        "prompt norm / activation norm": [round(fit.relative_norm, 2), 0.0],
    },
    index=["activation prompt", "linear probe"],
)

# %% [markdown]
# ## See the prompt
#
# What the prompt adds, as its norm over channels at each position, beside what it is added to, averaged over images.

# %%
images = backbones.normalize(backbone, task.test[fit.split.test[:64]])
activation = ap.capture(backbone, [fit.method.site], images)[fit.method.site]
prompt = fit.prompt
maps = {
    "activation": activation.float().norm(dim=-3).mean(0),
    "prompt": prompt.delta.norm(dim=-3),
}
with figures.theme(width=0.75):
    figure, axes = plt.subplots(1, 3, width_ratios=[1, 1, 1.25])
    for ax, (name, values) in zip(axes, maps.items(), strict=False):
        picture = ax.imshow(values, cmap="viridis", vmin=0)
        ax.set(title=f"{name}: norm", xlabel="column", ylabel="row" if name == "activation" else "")
        figure.colorbar(picture, ax=ax, shrink=0.7)
    epochs = np.arange(1, len(fit.validation_curve) + 1)
    for label, one, style in (("prompt", fit, "-"), ("linear probe", probe, "--")):
        key = "ap" if label == "prompt" else "linear_probe"
        axes[2].plot(epochs, one.validation_curve, style, color=looks.COLORS[key], label=label)
    axes[2].set(xlabel="epoch", ylabel="validation accuracy (%)", title="training")
    axes[2].legend()
    table = pd.concat(
        [
            pd.DataFrame({"quantity": f"{name} norm", "x": x, "y": y, "value": float(values[y, x])}, index=[0])
            for name, values in maps.items()
            for y in range(values.shape[0])
            for x in range(values.shape[1])
        ]
        + [
            pd.DataFrame({"quantity": f"{label} validation accuracy", "x": epochs, "y": 0, "value": curve})
            for label, curve in (("prompt", fit.validation_curve), ("linear probe", probe.validation_curve))
        ]
    )
    figures.save(figure, "00_prompt", [], table, suite=suite)

# %% [markdown]
# ## Save it, load it
#
# The file holds the prompt, the head and their configuration, never the backbone. Loading it onto another backbone,
# other weights or another site is refused.

# %%
with tempfile.TemporaryDirectory() as folder:
    path = fit.save(Path(folder) / "prompt.safetensors")
    kilobytes = path.stat().st_size / 1024
    loaded = ap.load_prompt(path, backbone)
with torch.no_grad():
    before, after = fit.model(images), loaded(images)
difference = float((before - after).abs().max())
print(f"{kilobytes:.0f} KiB; largest difference of logits after loading: {difference}")

# %% [markdown]
# ## Verdict

# %%
claims.verdict(
    "Q-1",
    difference,
    None,
    suite=suite,
    backbones=[backbone_name],
    tasks=[task_name],
    seeds=[seed],
    made_from=[],
    tag=backbone_name,
)
