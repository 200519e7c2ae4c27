"""What a method costs on a backbone, site by site: parameters, FLOPs, time, memory and throughput."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from apthory import backbones, methods, sites, training
from apthory._tools.progress import progress
from apthory.costs import count_flops, device_name, interleaved_seconds, peak_memory
from apthory.heads import LinearHeads
from apthory.lab import records
from apthory.studies import record_format


@records.versioned(1, name="apthory.efficiency.measure_sites")
def measure_sites(
    backbone: Mapping[str, Any],
    batch_size: int,
    num_classes: int = 10,
    precision: str = "auto",
    last_sites: int | None = None,
    num_repeats: int = 7,
) -> dict[str, Any]:
    """Costs of a step (loss and gradients) with a prompt at every block site, and of inference, for random images.

    Args:
        backbone: Arguments of `backbones.load`; weights do not matter, ``pretrained=False`` will do.
        batch_size: Images in a step.
        num_classes: Outputs of the head.
        precision: As in `training.Recipe`.
        last_sites: Only so many sites, from the last, besides the input.
        num_repeats: Timed calls of each step.

    Returns:
        For each site: parameters of prompt and head; FLOPs of a step, peak bytes and seconds with the whole
        backbone and with a cached prefix; bytes that the cache takes for an image; seconds of a
        forward pass at inference. Times are lists, one entry a repeat, taken in turns. Then the FLOPs of a
        forward pass for an image, and the device.
    """
    model = backbones.load(**backbone)
    device = next(model.parameters()).device
    x, labels = _random_batch(model, batch_size, num_classes)
    with torch.no_grad():
        forward_flops = count_flops(lambda: model(x)) // batch_size
    places = sites.list_sites(model)
    chosen = places if last_sites is None else [places[0], *places[-last_sites:]]
    steps = {
        site: _Step(model, methods.ActivationPrompting(site=site), x, labels, num_classes, precision) for site in chosen
    }
    works = {
        (site, name): getattr(step, name) for site, step in steps.items() for name in ("whole", "cached", "inference")
    }
    seconds = interleaved_seconds(works, num_repeats, device)  # sites as well, since they are compared
    rows = []
    for site, step in progress(steps.items(), desc=f"costs of {backbone['name']}"):
        rows.append(
            {
                "site": site,
                "parameters": step.num_parameters,
                "head_parameters": step.num_head_parameters,
                "step_flops": count_flops(step.whole) // batch_size,
                "cached_step_flops": count_flops(step.cached) // batch_size,
                "suffix_flops": count_flops(step.suffix) // batch_size,
                "step_bytes": peak_memory(step.whole, device),
                "cached_step_bytes": peak_memory(step.cached, device),
                "cache_bytes_per_image": sum(z.numel() * z.element_size() for z in step.crossing) // batch_size,
                "step_seconds": seconds[site, "whole"],
                "cached_step_seconds": seconds[site, "cached"],
                "inference_seconds": seconds[site, "inference"],
            }
        )
    return {"forward_flops": forward_flops, "sites": rows, "device": device_name(device)}


@records.versioned(1, name="apthory.efficiency.measure_methods")
def measure_methods(
    backbone: Mapping[str, Any],
    batch_size: int,
    site: str,
    num_classes: int = 10,
    precision: str = "auto",
    num_repeats: int = 7,
) -> dict[str, Any]:
    """Costs of a step with each method, as `measure_sites` has them for prompts: no cache, random images.

    Args:
        backbone: Arguments of `backbones.load`; weights do not matter, ``pretrained=False`` will do.
        batch_size: Images in a step.
        site: Of the activation prompt.
        num_classes: Outputs of the head.
        precision: As in `training.Recipe`.
        num_repeats: Timed calls of each step.

    Returns:
        For a linear probe, an input prompt, an activation prompt, tuning of all normalization layers and full
        fine-tuning: parameters with and without the head, FLOPs of a step for an image, peak bytes, seconds of a
        step and of a forward pass at inference. Then the device.
    """
    model = backbones.load(**backbone)
    device = next(model.parameters()).device
    x, labels = _random_batch(model, batch_size, num_classes)
    compared: dict[str, dict[str, Any]] = {  # by the name that the values have
        "linear": {"name": "linear_probe"},
        "vp": {"name": "vp", "site": ":input"},
        "ap": {"name": "ap", "site": site},
        "norm": {"name": "norm", "site": ":input", "layers": "all"},
        "full": {"name": "full"},
    }
    steps = {
        name: _Step(model, record_format.method_of(spelled), x, labels, num_classes, precision)
        for name, spelled in compared.items()
    }
    works = {(name, part): getattr(step, part) for name, step in steps.items() for part in ("whole", "inference")}
    seconds = interleaved_seconds(works, num_repeats, device)
    rows = [
        {
            "method": name,
            "parameters": step.num_parameters,
            "head_parameters": step.num_head_parameters,
            "step_flops": count_flops(step.whole) // batch_size,
            "step_bytes": peak_memory(step.whole, device),
            "step_seconds": seconds[name, "whole"],
            "inference_seconds": seconds[name, "inference"],
        }
        for name, step in steps.items()
    ]
    return {"methods": rows, "device": device_name(device)}


def _random_batch(model: nn.Module, batch_size: int, num_classes: int) -> tuple[Tensor, Tensor]:
    """Random images in the layout that the backbone wants, and random labels."""
    device, side = next(model.parameters()).device, backbones.input_size(model)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch_size, 3, side, side, generator=generator).to(device)
    if backbones.is_channels_last(model):
        x = x.contiguous(memory_format=torch.channels_last)
    return x, torch.randint(num_classes, (1, batch_size), generator=generator).to(device)


class _Step:
    """One training step of a method and a head, as closures to be measured."""

    def __init__(
        self, model: nn.Module, method: methods.Method, x: Tensor, labels: Tensor, num_classes: int, precision: str
    ) -> None:
        self.model, self.x, self.labels, self.precision = model, x, labels, precision
        self.prepared = method.build(model, 1)
        self.prepared.suffix.to(x.device)
        with torch.no_grad(), backbones.autocast(model, precision):
            self.crossing = self.prepared.prefix(x)
            features = self.prepared.suffix(*self.crossing)
        self.heads = LinearHeads(1, features.shape[1], num_classes, [torch.Generator()]).to(x.device)
        edits = [trained.parameter for stack in self.prepared.stacks.values() for trained in stack.trained()]
        self.trained = [*edits, *self.heads.parameters()]
        self.num_head_parameters = sum(p.numel() for p in self.heads.parameters())
        self.num_parameters = sum(p.numel() for p in self.trained) - self.num_head_parameters

    def _learn(self, crossing: tuple[Tensor, ...]) -> None:
        with backbones.autocast(self.model, self.precision):
            features = self.prepared.suffix(*crossing)
        training.losses(self.heads(features), self.labels).sum().backward()
        for parameter in self.trained:
            parameter.grad = None

    def cached(self) -> None:
        self._learn(self.crossing)

    def whole(self) -> None:
        with torch.no_grad(), backbones.autocast(self.model, self.precision):
            crossing = self.prepared.prefix(self.x)
        self._learn(crossing)

    @torch.no_grad()
    def inference(self) -> None:
        with backbones.autocast(self.model, self.precision):
            features = self.prepared.suffix(*self.prepared.prefix(self.x))
        self.heads(features)

    @torch.no_grad()
    def suffix(self) -> None:
        with backbones.autocast(self.model, self.precision):
            self.prepared.suffix(*self.crossing)
