"""Frozen networks whose activations compare pictures, and the pretrained weights they and encoders start from."""

from __future__ import annotations

import logging
import os
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from .errors import WeightsError

LOG = logging.getLogger(__name__)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
RANDOM_WEIGHTS = "random"
RESNET18_FILE = "resnet18_imagenet_stem_to_layer3.fp16.safetensors"
BOTH_WAYS = "give a folder that holds them with --weights DIR or SR_WEIGHTS_DIR, or start without: --weights random"
# A download is checked against its hash and never unpickled beyond tensors.
SAFE_DOWNLOAD = {"progress": True, "check_hash": True, "weights_only": True}


class Normalise(nn.Module):
    """ImageNet normalisation of (N, 3, H, W) RGB in [0, 1]."""

    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(1, 3, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


def find_weights(source: str | None) -> Path | str | None:
    """Decide where pretrained weights come from: a folder, "random", or None for torchvision's download.

    source: the --weights argument; None falls back to the environment variable SR_WEIGHTS_DIR.
    Raises: WeightsError if the folder does not exist.
    """
    origin = f"--weights {source}" if source else f"SR_WEIGHTS_DIR={os.environ.get('SR_WEIGHTS_DIR')}"
    source = source or os.environ.get("SR_WEIGHTS_DIR") or None
    if source is None or source == RANDOM_WEIGHTS:
        return source
    folder = Path(source)
    if not folder.is_dir():
        raise WeightsError(f"{origin}: no such folder; {BOTH_WAYS}")
    return folder


def load_pretrained(
    name: str,
    source: Path | str | None,
    *,
    files: tuple[str, ...],
    download: Callable[[], Mapping[str, Tensor]] | None,
) -> dict[str, Tensor] | None:
    """Fetch the pretrained state of a network.

    files: file names that may hold it in a weights folder, the best first.
    download: torchvision's loader, called when there is no folder; None where torchvision has no such weights.
    Returns: tensors in float32, or None for random weights.
    Raises: WeightsError that names both ways of getting them.
    """
    if source == RANDOM_WEIGHTS:
        LOG.warning("%s starts from random weights, as --weights random asks", name)
        return None
    if isinstance(source, Path):
        file = next((source / file for file in files if (source / file).is_file()), None)
        if file is None:
            raise WeightsError(f"{source}: no weights for {name} ({' or '.join(files)}); {BOTH_WAYS}")
        try:
            return {key: value.float() for key, value in load_file(file).items()}
        except (OSError, SafetensorError) as exc:
            raise WeightsError(f"{file}: not a readable safetensors file ({exc})") from exc
    if download is None:
        raise WeightsError(f"{name} cannot be downloaded and needs a folder with {' or '.join(files)}: {BOTH_WAYS}")
    try:
        return {key: value.float() for key, value in download().items()}
    except (OSError, HTTPException, RuntimeError) as exc:  # urllib's errors are OSErrors, a wrong hash a RuntimeError
        raise WeightsError(f"the weights of {name} could not be downloaded ({exc}); {BOTH_WAYS}") from exc


def load_weights(module: nn.Module, state: Mapping[str, Tensor], *, name: str, optional: tuple[str, ...] = ()) -> None:
    """Load a pretrained state into a network, complete but for keys that start with one of `optional`.

    Raises: WeightsError that names the first tensors that are missing or have another shape.
    """
    wanted = module.state_dict()
    required = [key for key in wanted if not key.startswith(optional) and not key.endswith("num_batches_tracked")]
    missing = [key for key in required if key not in state]
    if missing:
        raise WeightsError(f"the weights of {name} lack {', '.join(missing[:4])}")
    wrong = [key for key in state if key in wanted and state[key].shape != wanted[key].shape]
    if wrong:
        found, expected = tuple(state[wrong[0]].shape), tuple(wanted[wrong[0]].shape)
        raise WeightsError(f"the weights of {name} do not fit: {wrong[0]} is {found}, expected {expected}")
    module.load_state_dict({key: value for key, value in state.items() if key in wanted}, strict=False)


@dataclass(frozen=True)
class FeatureNetSpec:
    """A network of torchvision and the activations that are compared.

    layers: name -> index in its stack (see feature_stack); the activation behind that module is taken.
    weights_name: torchvision's enum entry, as "VGG16_BN_Weights.IMAGENET1K_V1"; empty: only from a folder.
    file: file name in a weights folder; its keys may carry the prefix "features.".
    """

    builder: str
    weights_name: str
    layers: Mapping[str, int]
    default_layers: tuple[str, ...]
    file: str


FEATURE_NETS: dict[str, FeatureNetSpec] = {
    # The ReLU before pools 3 to 5 (fastai's perceptual loss).
    "vgg16_bn": FeatureNetSpec(
        "vgg16_bn",
        "VGG16_BN_Weights.IMAGENET1K_V1",
        {"relu3_3": 22, "relu4_3": 32, "relu5_3": 42},
        ("relu3_3", "relu4_3", "relu5_3"),
        "vgg16_bn.safetensors",
    ),
    "vgg16": FeatureNetSpec(
        "vgg16",
        "VGG16_Weights.IMAGENET1K_V1",
        {"relu3_3": 15, "relu4_3": 22, "relu5_3": 29},
        ("relu3_3", "relu4_3", "relu5_3"),
        "vgg16.safetensors",
    ),
    "vgg19": FeatureNetSpec(
        "vgg19",
        "VGG19_Weights.IMAGENET1K_V1",
        {
            **{"relu1_2": 3, "relu2_2": 8, "relu3_4": 17, "relu4_4": 26, "relu5_4": 35},
            # Before the ReLU, as ESRGAN has it (Wang et al., arXiv 1809.00219); SRGAN's VGG54 is relu5_4.
            **{"conv1_2": 2, "conv2_2": 7, "conv3_4": 16, "conv4_4": 25, "conv5_4": 34},
        },
        ("relu3_4", "relu4_4", "relu5_4"),
        "vgg19.safetensors",
    ),
    "alexnet": FeatureNetSpec(
        "alexnet",
        "AlexNet_Weights.IMAGENET1K_V1",
        {"relu1": 1, "relu2": 4, "relu3": 7, "relu4": 9, "relu5": 11},  # as in LPIPS
        ("relu1", "relu3", "relu5"),
        "alexnet.safetensors",
    ),
    "resnet18": FeatureNetSpec(
        "resnet18",
        "ResNet18_Weights.IMAGENET1K_V1",
        # Behind 3, 5, 6, 7 and 8 of the network's children.
        {"relu": 2, "layer1": 4, "layer2": 5, "layer3": 6, "layer4": 7},
        ("relu", "layer2"),
        RESNET18_FILE,
    ),
    "squeezenet1_1": FeatureNetSpec(
        "squeezenet1_1",
        "SqueezeNet1_1_Weights.IMAGENET1K_V1",
        # Names as in LPIPS, whose slices end at these modules.
        {"relu1": 1, "fire3": 4, "fire5": 7, "fire6": 9, "fire7": 10, "fire8": 11, "fire9": 12},
        ("fire3", "fire5", "fire7"),
        "squeezenet1_1_features.fp16.safetensors",
    ),
    "vgg19_normalised": FeatureNetSpec(
        "vgg19",
        "",  # torchvision's VGG-19 is not normalised: the same weights of the terms would mean something else
        # conv*: before the ReLU, where the gradient reaches every pixel (Wang et al., arXiv 1809.00219).
        {
            **{"relu1_1": 1, "relu1_2": 3, "relu2_1": 6, "relu2_2": 8, "relu3_1": 11},
            **{"conv1_2": 2, "conv2_2": 7, "conv3_1": 10},
        },
        ("relu1_2", "relu2_2", "relu3_1"),
        "vgg19norm_features_to_relu3_1.fp16.safetensors",
    ),
}


def feature_stack(builder: str) -> nn.Sequential:
    """Give a network of torchvision as modules in a row: its `features`, or where it has none, its children."""
    import torchvision

    network = getattr(torchvision.models, builder)(weights=None)
    features = getattr(network, "features", None)
    return features if features is not None else nn.Sequential(OrderedDict(network.named_children()))


class FeatureNet(nn.Module):
    """Frozen feature extractor in eval mode: (N, 3, H, W) in [0, 1] -> a list of activations (N, C_i, H_i, W_i)."""

    def __init__(self, stack: nn.Sequential, taps: tuple[int, ...]):
        super().__init__()
        self.normalise = Normalise()
        self.stack = stack[: max(taps) + 1]
        for module in self.stack.modules():
            if isinstance(module, nn.ReLU):
                module.inplace = False  # a tap in front of a ReLU must keep its values
        self.taps = taps
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> FeatureNet:
        """Stay in eval mode, whatever the model around it does."""
        return super().train(False)

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.normalise(x)
        taken = {}
        for index, module in enumerate(self.stack):
            x = module(x)
            if index in self.taps:
                taken[index] = x
        return [taken[index] for index in self.taps]


def build_feature_net(name: str, *, layers: tuple[str, ...], weights: Path | str | None) -> FeatureNet:
    """Build a frozen feature network by its name in FEATURE_NETS.

    Raises: WeightsError for an unknown name or layer, or weights that are missing or do not fit.
    """
    import torchvision

    if name not in FEATURE_NETS:
        raise WeightsError(f"unknown feature network {name!r}: one of {', '.join(FEATURE_NETS)}")
    spec = FEATURE_NETS[name]
    layers = layers or spec.default_layers
    unknown = [layer for layer in layers if layer not in spec.layers]
    if unknown:
        raise WeightsError(f"{name} has no layers {unknown}: one of {', '.join(spec.layers)}")
    taps = tuple(spec.layers[layer] for layer in layers)
    stack = feature_stack(spec.builder)[: max(taps) + 1]
    entry = spec.weights_name
    state = load_pretrained(
        name,
        weights,
        files=(spec.file,),
        download=(lambda: torchvision.models.get_weight(entry).get_state_dict(**SAFE_DOWNLOAD)) if entry else None,
    )
    if state is not None:
        load_weights(stack, {key.removeprefix("features."): value for key, value in state.items()}, name=name)
    return FeatureNet(stack, taps)
