"""The networks of the papers: their numbers of parameters and the shapes of their outputs.

Everything happens on the meta device: nothing is computed.
"""

import pytest
import torch

from scaletrain import plugins

# name, options, input of a sample -> parameters, output of a sample
PUBLISHED = {
    "lenet5": ("lenet5", {}, (1, 28, 28), 431_080, (10,)),
    "lenet1989": ("lenet1989", {}, (1, 16, 16), 9_760, (10,)),
}


@pytest.mark.parametrize("case", PUBLISHED)
def test_parameters_and_outputs_are_those_of_the_publication(case: str):
    name, options, sample, parameters, output = PUBLISHED[case]
    with torch.device("meta"):
        network = plugins.load("model", name)(**options).eval()
        found = network(torch.zeros(2, *sample))
    assert sum(each.numel() for each in network.parameters()) == parameters
    assert found.shape == (2, *output)
