"""Tests of the recurrent models against torch's own layers and the papers' equations."""

import pytest
import torch

from scaletrain import plugins
from scaletrain.training.models.lstm import LSTM


def test_with_forget_gates_it_is_torchs_lstm():
    torch.manual_seed(0)
    ours, theirs = LSTM(3, 5, forget=True, peepholes=False), torch.nn.LSTM(3, 5, batch_first=True)
    # torch's order is input, forget, cell, output; ours input, output, forget, cell.
    order = [0, 3, 1, 2]
    with torch.no_grad():
        for mine, name in (
            (ours.from_input.weight, "weight_ih_l0"),
            (ours.from_output.weight, "weight_hh_l0"),
            (ours.from_input.bias, "bias_ih_l0"),
        ):
            blocks = getattr(theirs, name).split(5)
            mine.copy_(torch.cat([blocks[place] for place in order]))
        theirs.bias_hh_l0.zero_()
    inputs = torch.randn(4, 9, 3)
    torch.testing.assert_close(ours(inputs), theirs(inputs)[0])


def test_without_forget_gates_cells_add_up():
    """The equations of 1997, element by element."""
    torch.manual_seed(1)
    layer = LSTM(2, 1, forget=False, peepholes=False)
    inputs = torch.randn(1, 6, 2)
    with torch.no_grad():
        found = layer(inputs).flatten().tolist()
        cell = output = torch.zeros(1)
        for step in range(6):
            drive = layer.from_input(inputs[0, step]) + layer.from_output(output)
            cell = cell + drive[0].sigmoid() * drive[2].tanh()
            output = drive[1].sigmoid() * cell.tanh()
            assert found[step] == pytest.approx(output.item(), rel=1e-5)


def test_peepholes_show_the_cells_to_the_gates():
    torch.manual_seed(2)
    layer = LSTM(2, 3, forget=True, peepholes=True)
    inputs = torch.randn(2, 4, 2)
    plain = layer(inputs)
    assert layer.peepholes is not None and layer.peepholes.shape == (3, 3)
    with torch.no_grad():
        layer.peepholes[1] = 50.0  # outputs open where cells are positive
        layer.from_input.bias[3:6] = 0.0
        open_or_shut = layer(inputs)
    assert not torch.allclose(plain, open_or_shut)
    first = open_or_shut[:, 0]
    assert (first[first < 0].abs() < 0.05).all() and (first > 0).any()


@pytest.mark.parametrize("name", ["lstm", "gru", "rnn"])
def test_logits_come_after_the_last_step_or_after_each(name: str):
    torch.manual_seed(3)
    inputs = torch.randn(2, 7, 3)
    options = {"inputs": 3, "hidden": 6, "classes": 4}
    last = plugins.load("model", name)(**options)
    every = plugins.load("model", name)(every_step=True, **options)
    every.load_state_dict(last.state_dict())
    assert last(inputs).shape == (2, 4) and every(inputs).shape == (2, 4, 7)
    torch.testing.assert_close(every(inputs)[:, :, -1], last(inputs))
    # A step sees nothing of what comes after it.
    changed = inputs.clone()
    changed[:, 4:] = 0
    torch.testing.assert_close(every(changed)[:, :, :4], every(inputs)[:, :, :4])
