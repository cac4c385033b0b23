"""The experiments' models."""

import pytest
import torch
from torch import nn

from examples.paper.models import MODELS, build


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("channels", "size", "classes"), [(1, 8, 10), (3, 32, 2)])
def test_models_map_images_to_scores_and_every_parameter_learns(name, channels, size, classes):
    torch.manual_seed(0)
    model = build(name, channels, size, classes)
    scores = model(torch.randn(4, channels, size, size))
    assert scores.shape == (4, classes)
    scores.square().sum().backward()
    for path, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, path


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("linear", 3072 * 10 + 10),
        ("mlp", 3072 * 200 + 200 + 2 * (200 * 200 + 200) + 200 * 10 + 10),
        ("lenet1", 3 * 4 * 25 + 4 + 4 * 12 * 25 + 12 + 300 * 10 + 10),
        ("resnet18", 11_173_962),  # the well-known CIFAR ResNet-18
    ],
)
def test_models_have_the_published_sizes(name, parameters):
    assert sum(p.numel() for p in build(name, 3, 32, 10).parameters()) == parameters


def test_resnet0_has_two_residual_blocks_that_add_their_input():
    model = build("resnet0", 3, 32, 10)
    blocks = [m for m in model.modules() if type(m).__name__ == "BasicBlock"]
    assert len(blocks) == 2
    # With its last norm silenced, the first block passes its (non-negative) input on.
    nn.init.zeros_(blocks[0].norm2.weight)
    x = torch.rand(2, 16, 8, 8)
    torch.testing.assert_close(blocks[0].eval()(x), x)
    assert blocks[1](x).shape == (2, 32, 4, 4)


def test_initialisation_follows_the_global_seed():
    def weights(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return nn.utils.parameters_to_vector(build("lenet1", 1, 8, 10).parameters())

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("alexnet", 3, 32, 10), "alexnet"),
        (("mlp", 0, 32, 10), "in_channels.*0"),
        (("mlp", 3, 7, 10), "image_size.*7"),
        (("mlp", 3, 32, 1), "classes.*1"),
    ],
)
def test_build_refuses_by_name(arguments, words):
    with pytest.raises(ValueError, match=words):
        build(*arguments)
