"""Train a backbone on an image classification task, resumable to the bit.

One run is one folder: a checkpoint after every epoch, and at the end the averaged weights in half precision
with a model card. Every random draw of an epoch comes from a stream seeded by (seed, epoch), so a checkpoint
holds no generator state, and a run that was killed and resumed ends in the bits of one that was not (on the
same hardware, with the same versions and number of threads).
"""

from dataclasses import fields
from pathlib import Path
from typing import Annotated

import typer

from apthory.pretraining.augmentation import crop_and_flip
from apthory.pretraining.cards import ship
from apthory.pretraining.config import Config
from apthory.pretraining.exports import export
from apthory.pretraining.run import pretrain

__all__ = ["Config", "pretrain", "export", "ship", "crop_and_flip"]


def command(
    backbone: Annotated[str, typer.Argument(help="vit_micro, resnet_micro or any timm name.")],
    output: Annotated[Path, typer.Option(help="Folder of the run; the same call resumes it.")],
    task: Annotated[str, typer.Option(help="What to learn.")] = Config.task,
    data: Annotated[Path | None, typer.Option(help="Folder that holds the task.")] = Config.data,
    size: Annotated[int, typer.Option(help="Side of the images, in pixels.")] = Config.size,
    num_classes: Annotated[int | None, typer.Option(help="Only the first classes.")] = Config.num_classes,
    num_validation: Annotated[int, typer.Option(help="Training images held out.")] = Config.num_validation,
    epochs: Annotated[int, typer.Option(help="Passes over the training images.")] = Config.epochs,
    batch_size: Annotated[int, typer.Option(help="Images of a step.")] = Config.batch_size,
    learning_rate: Annotated[float, typer.Option(help="Of AdamW, at its peak.")] = Config.learning_rate,
    weight_decay: Annotated[float, typer.Option(help="Of AdamW, on matrices and kernels alone.")] = Config.weight_decay,
    warmup_epochs: Annotated[float, typer.Option(help="Epochs before the cosine.")] = Config.warmup_epochs,
    max_gradient_norm: Annotated[float, typer.Option(help="Longer ones are shortened.")] = Config.max_gradient_norm,
    label_smoothing: Annotated[float, typer.Option(help="Of the labels; 0 is off.")] = Config.label_smoothing,
    padding: Annotated[int, typer.Option(help="Reflected pixels around the random crop.")] = Config.padding,
    randaugment: Annotated[int | None, typer.Option(help="Magnitude, 0 to 30; else off.")] = Config.randaugment,
    mixup: Annotated[float, typer.Option(help="Alpha of the Beta distribution; 0 is off.")] = Config.mixup,
    ema_decay: Annotated[float, typer.Option(help="Of the exported moving average.")] = Config.ema_decay,
    seed: Annotated[int, typer.Option(help="Of weights, held-out images and order.")] = Config.seed,
    precision: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = Config.precision,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1.")] = Config.device,
    after: Annotated[Path | None, typer.Option(help="Checkpoint of another run to begin with.")] = None,
    keep: Annotated[list[int] | None, typer.Option(help="Epoch to export at the end as well; 0: the start.")] = None,
    minutes: Annotated[float | None, typer.Option(help="Stop between epochs before this.")] = None,
    note: Annotated[str, typer.Option(help="For the model card, for instance a licence.")] = "",
) -> None:
    """Train a backbone; a killed run goes on, to the bit, by the same call."""
    given = dict(locals())
    config = Config(**{field.name: given[field.name] for field in fields(Config)})
    try:
        path = pretrain(config, output, after=after, keep=keep or (), minutes=minutes, note=note)
    except KeyboardInterrupt as interrupt:
        typer.echo(interrupt, err=True)
        raise typer.Exit(130) from None
    typer.echo(path if path.suffix == ".safetensors" else f"{path}: out of time, the same call goes on")
