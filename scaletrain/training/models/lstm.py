"""A long short-term memory, with or without forget gates and peepholes."""

from typing import Annotated

import torch
from annotated_types import Ge
from torch import Tensor, nn

from scaletrain.training.models.recurrent import Readout


class LSTM(nn.Module):
    """Memory cells behind gates: (n, t, inputs) -> (n, t, hidden).

    Without forget gates it is the network of Hochreiter and Schmidhuber 1997, whose cells add up
    what they let in. With them it is that of Gers et al. 2000, equation 3.4. Peepholes let gates
    see the cells (Gers, Schraudolph and Schmidhuber 2002, section 2).

    Args:
        inputs: of each step.
        hidden: memory cells, with gates of their own.
        forget: whether cells can forget.
        peepholes: whether gates see the cells.
    """

    def __init__(self, inputs: int, hidden: int, forget: bool, peepholes: bool):
        super().__init__()
        self.hidden = hidden
        num_gates = 3 if forget else 2
        self.from_input = nn.Linear(inputs, (num_gates + 1) * hidden)
        self.from_output = nn.Linear(hidden, (num_gates + 1) * hidden, bias=False)
        self.peepholes = nn.Parameter(torch.zeros(num_gates, hidden)) if peepholes else None
        self.forget = forget
        with torch.no_grad():
            # Gates that let in and out begin nearly closed, forget gates open (2000, section 4.2).
            self.from_input.bias[:hidden].fill_(-1.0)
            self.from_input.bias[hidden : 2 * hidden].fill_(-1.0)
            if forget:
                self.from_input.bias[2 * hidden : 3 * hidden].fill_(1.0)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the outputs of all steps, from empty cells on."""
        drives = self.from_input(inputs).unbind(1)
        output = inputs.new_zeros(len(inputs), self.hidden)
        cell = output
        outputs = []
        for drive in drives:
            output, cell = self._step(drive + self.from_output(output), cell)
            outputs.append(output)
        return torch.stack(outputs, dim=1)

    def _step(self, drive: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
        """Return the next output and cells: (n, hidden) each."""
        let_in, let_out, *rest = drive.split(self.hidden, dim=1)
        if self.peepholes is not None:
            let_in = let_in + self.peepholes[0] * cell
        kept = cell
        if self.forget:
            keep = rest[0]
            if self.peepholes is not None:
                keep = keep + self.peepholes[2] * cell
            kept = keep.sigmoid() * cell
        cell = kept + let_in.sigmoid() * rest[-1].tanh()
        if self.peepholes is not None:
            let_out = let_out + self.peepholes[1] * cell
        return let_out.sigmoid() * cell.tanh(), cell


def model(
    *,
    inputs: Annotated[int, Ge(1)] = 1,
    hidden: Annotated[int, Ge(1)] = 64,
    classes: Annotated[int, Ge(1)] = 10,
    every_step: bool = False,
    forget: bool = True,
    peepholes: bool = False,
) -> nn.Module:
    """Return the network: (n, t, inputs) -> (n, classes) logits.

    Args:
        inputs: features of each step.
        hidden: memory cells.
        classes: number of logits.
        every_step: logits after every step, (n, classes, t), not after the last alone.
        forget: with forget gates; without, cells add up what they let in.
        peepholes: gates see the cells.
    """
    return Readout(LSTM(inputs, hidden, forget, peepholes), hidden, classes, every_step)
