"""Claims about export: what any method leaves becomes one graph, for `torch.export` and ONNX, with the same logits."""

import copy

import numpy as np
import pytest
import tiny
import torch
from torch import nn

from apthory import methods
from apthory.heads import CosineHead
from apthory.methods import adapted

SITES = {"vit": "blocks.1:input", "resnet": "layer2.0:input"}
CLASSES = 4
BATCHES = ({0: torch.export.Dim("batch")},)
# The same operations in float32: torch.export calls the same kernels; those of onnxruntime sum in another order.
EXPORT = {"rtol": 1e-6, "atol": 1e-6}
ONNX = {"rtol": 1e-4, "atol": 1e-5}
NUM_IMAGES = {"adavipro": 70}  # its masks are made in chunks of at most 64 such images, which no graph may keep


def methods_at(site: str) -> dict[str, methods.Method]:
    return {
        "full": methods.ActivationPrompting(site=site),
        "channel": methods.ActivationPrompting(site=site, shape="channel"),
        "norm": methods.NormTuning(site=site),
        "linear_probe": methods.LinearProbe(),
        "site_probe": methods.LinearProbe(site=site),
        "random_prompt": methods.FixedPrompt(site=site, norm=5.0),
        "fine_tuning": methods.FineTuning(),
        "partial": methods.FineTuning(site=site),
        "vp": methods.VP(),
        "random_patch": methods.VP(place="random_patch", width=8),
        "evp": methods.EVP(),
        "adavipro": methods.AdaViPro(),
    }


FAST = {("vit", "full"), ("resnet", "norm"), ("vit", "evp")}
CASES = [
    pytest.param(family, name, marks=[] if (family, name) in FAST else pytest.mark.slow)
    for family in SITES
    for name in methods_at("")
]


def adapted_model(family: str, name: str) -> methods.AdaptedBackbone:
    """As training could leave it: none of its values is what it was before."""
    backbone, method = tiny.backbone(family), methods_at(SITES[family])[name]
    prepared = method.build(backbone, 1)
    prepared.start([3])
    generator = torch.Generator().manual_seed(0)
    state = {
        key: value + 0.1 * torch.randn(value.shape, generator=generator) for key, value in prepared.state(0).items()
    }
    with torch.no_grad():
        width = prepared.suffix(*prepared.prefix(tiny.images(family, 1))).shape[1]
    return adapted.adapt(backbone, method, state, nn.Linear(width, CLASSES))


def run_exported(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """What a graph says that was exported with two of the images."""
    with torch.no_grad():
        return torch.export.export(model, (x[:2],), dynamic_shapes=BATCHES).module()(x)


def run_onnx(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed; the extra dev brings it")
    program = torch.onnx.export(model, (x[:2],), dynamo=True, dynamic_shapes=BATCHES, verbose=False)
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1
    session = runtime.InferenceSession(
        program.model_proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    [image] = session.get_inputs()
    [logits] = session.run(None, {image.name: np.ascontiguousarray(x.numpy())})
    return torch.from_numpy(logits)


@pytest.mark.parametrize(("family", "name"), CASES)
def test_an_exported_graph_gives_the_same_logits(family: str, name: str):
    model, x = adapted_model(family, name), tiny.images(family, NUM_IMAGES.get(name, 5))
    with torch.no_grad():
        expected, merged = model(x), model.merged()
        torch.testing.assert_close(merged(x), expected, **EXPORT)
    assert expected.std() > 0.01
    torch.testing.assert_close(run_exported(merged, x), expected, **EXPORT)
    torch.testing.assert_close(run_onnx(merged, x), expected, **ONNX)


@pytest.mark.slow
def test_a_head_of_cosines_is_exported_too():
    prompted = adapted_model("vit", "full")
    directions = torch.randn(CLASSES, 32, generator=torch.Generator().manual_seed(1))
    model = methods.AdaptedBackbone(prompted.backbone, prompted.prompt, CosineHead(directions, 7.0))
    x = tiny.images("vit", 5)
    with torch.no_grad():
        expected, merged = model(x), model.merged()
    torch.testing.assert_close(run_exported(merged, x), expected, **EXPORT)
    torch.testing.assert_close(run_onnx(merged, x), expected, **ONNX)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["swin", "convnext", "mobilenetv2"])
def test_a_prompt_on_other_networks_is_exported_too(family: str):
    backbone, x = tiny.backbone(family), tiny.images(family, 5)
    site = {"swin": "layers.1.blocks.0", "convnext": "stages.1.blocks.0", "mobilenetv2": "blocks.2.0"}[
        family
    ] + ":input"
    prompt = methods.ActivationPrompt.zeros(backbone, site)
    nn.init.normal_(prompt.delta, std=0.3, generator=torch.Generator().manual_seed(1))
    model = methods.AdaptedBackbone(backbone, prompt).requires_grad_(False)
    with torch.no_grad():
        expected, merged = model(x), model.merged()
        assert not torch.allclose(expected, backbone(x), rtol=1e-2)
    torch.testing.assert_close(run_exported(merged, x), expected, **EXPORT)
    torch.testing.assert_close(run_onnx(merged, x), expected, **ONNX)


def test_what_is_exported_shares_nothing_with_the_backbone():
    model = adapted_model("vit", "full")
    x = tiny.images("vit", 2)
    with torch.no_grad():
        expected, merged = model(x), model.merged()
        for parameter in copy.deepcopy(merged).parameters():
            parameter.zero_()
        for parameter in merged.parameters():
            parameter.zero_()
        assert torch.equal(model(x), expected)
        assert not merged(x).any()
