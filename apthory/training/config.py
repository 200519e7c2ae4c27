"""What a bundle shares, and what may differ within it."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """What may differ within a bundle."""

    learning_rate: float = 1e-2
    weight_decay: float = 0.0
    seed: int = 0  # subsample, validation split, initial head and order of examples

    def __post_init__(self) -> None:
        if not self.learning_rate > 0 or self.weight_decay < 0 or self.seed < 0:
            raise ValueError(f"{self}: the learning rate is positive, weight decay and seed are not negative")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a bundle shares."""

    num_epochs: int = 10
    batch_size: int = 32  # examples of each configuration in a step
    optimizer: Literal["adamw", "sgd"] = "adamw"
    momentum: float = 0.9  # of sgd
    warmup: float = 0.1  # share of all steps with a rising learning rate, before the cosine
    num_train: int | None = 400  # at most so many images; None for all
    num_validation: int | None = 100  # held out of the train part
    num_test: int | None = 500
    precision: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 where the hardware has it
    deterministic: bool = False  # refuse kernels whose results may vary from run to run
    cache: bool = True  # keep the prefix's result; False computes it anew at every step

    def __post_init__(self) -> None:
        if self.num_epochs < 1 or self.batch_size < 1:
            raise ValueError(f"num_epochs is {self.num_epochs} and batch_size {self.batch_size}; both are at least 1")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup is {self.warmup}; it is a share of all steps, from 0 to below 1")
        if self.num_validation == 0:
            raise ValueError("num_validation is 0, but validation images choose epoch and configuration; hold some out")
