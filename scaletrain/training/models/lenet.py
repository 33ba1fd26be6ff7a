"""LeNet as Caffe trains it: 28 x 28 grey images, 431,080 parameters."""

from collections import OrderedDict
from typing import Annotated

from annotated_types import Ge
from torch import nn


def model(*, classes: Annotated[int, Ge(1)] = 10) -> nn.Module:
    """Return the network: (n, 1, 28, 28) -> (n, classes) logits.

    LeCun et al. 1998 with the two wide layers of Caffe's ``lenet.prototxt``. Papers on compression
    call it LeNet-5 (Han et al. 2016, table 4).

    Args:
        classes: number of logits.
    """
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(1, 20, 5),  # -> (n, 20, 24, 24)
            pool1=nn.MaxPool2d(2),
            conv2=nn.Conv2d(20, 50, 5),  # -> (n, 50, 8, 8)
            pool2=nn.MaxPool2d(2),
            flatten=nn.Flatten(),
            fc1=nn.Linear(800, 500),
            relu=nn.ReLU(),
            fc2=nn.Linear(500, classes),
        )
    )
