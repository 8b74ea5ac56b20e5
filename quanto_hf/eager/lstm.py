"""The LSTM that is quantized inside: its products, sums and states are observed one by one."""

from typing import Any

import torch
from torch import nn

from quanto_hf.eager.custom import register
from quanto_hf.eager.inside import QuantizedInside, linear_of
from quanto_hf.eager.modules import FloatFunctional, QConfigError

__all__ = ["ObservedLSTM", "QuantizedLSTM"]

State = tuple[torch.Tensor, torch.Tensor]


class LSTMStep(nn.Module):
    """One step of one direction of one layer, in modules that can be observed.

    Args:
        weights: ``weight_ih``, ``weight_hh``, ``bias_ih`` and ``bias_hh`` of the layer; the biases may be None.
    """

    def __init__(self, weight_ih: Any, weight_hh: Any, bias_ih: Any, bias_hh: Any) -> None:
        super().__init__()
        self.hidden_size: int = weight_hh.shape[1]
        self.igates, self.hgates = linear_of(weight_ih, bias_ih), linear_of(weight_hh, bias_hh)
        self.gates = FloatFunctional()
        self.input_gate, self.forget_gate, self.output_gate = nn.Sigmoid(), nn.Sigmoid(), nn.Sigmoid()
        self.cell_gate, self.cell_output = nn.Tanh(), nn.Tanh()
        self.fgate_cx, self.igate_cgate = FloatFunctional(), FloatFunctional()
        self.fgate_cx_igate_cgate, self.ogate_cy = FloatFunctional(), FloatFunctional()

    def forward(self, x: torch.Tensor, state: State) -> State:
        """The next hidden and cell state.

        Args:
            x: shape (batch, input_size).
            state: hidden and cell state, shape (batch, hidden_size).
        """
        h, c = state
        gates = self.gates.add(self.igates(x), self.hgates(h))
        i, f, g, o = gates.chunk(4, 1)
        kept = self.fgate_cx.mul(self.forget_gate(f), c)
        new = self.igate_cgate.mul(self.input_gate(i), self.cell_gate(g))
        c = self.fgate_cx_igate_cgate.add(kept, new)
        return self.ogate_cy.mul(self.output_gate(o), self.cell_output(c)), c


class ObservedLSTM(QuantizedInside):
    """An LSTM of steps that are observed.

    Inputs and outputs are those of ``nn.LSTM`` with a batch dimension.
    """

    def __init__(self, mod: nn.LSTM) -> None:
        super().__init__()
        self.input_size, self.hidden_size, self.num_layers = mod.input_size, mod.hidden_size, mod.num_layers
        self.bias, self.batch_first, self.bidirectional = mod.bias, mod.batch_first, mod.bidirectional
        self.dropout = mod.dropout
        self.steps = nn.ModuleList(
            LSTMStep(*(getattr(mod, f"{name}_l{layer}{back}", None) for name in _NAMES))
            for layer in range(mod.num_layers)
            for back in (("", "_reverse") if mod.bidirectional else ("",))
        )

    @classmethod
    def from_float(cls, mod: nn.LSTM) -> nn.Module:
        """The observed LSTM, with the parameters of ``mod``.

        Raises:
            QConfigError: ``mod`` has projections, which there is no observed module for, or no qconfig.
        """
        if mod.proj_size:
            raise QConfigError(
                "an LSTM with proj_size has no static quantization; use quantize_dynamic, or qconfig None"
            )
        return super().from_float(mod)

    def flatten_parameters(self) -> None:
        """Nothing to do: weights are not in one piece of memory."""

    def forward(self, input: torch.Tensor, hx: State | None = None) -> tuple[torch.Tensor, State]:
        """The output of every step, and the last state, as ``nn.LSTM`` gives them.

        Args:
            input: shape (length, batch, input_size), or with the batch first.
            hx: hidden and cell state, shape (layers * directions, batch, hidden_size); None is zeros.

        Returns:
            Outputs, shape (length, batch, directions * hidden_size), or with the batch first; and the state, of the
            shape of ``hx``.
        """
        x = input.transpose(0, 1) if self.batch_first else input
        directions = 2 if self.bidirectional else 1
        if hx is None:
            zeros = x.new_zeros(self.num_layers * directions, x.shape[1], self.hidden_size)
            hx = (zeros, zeros)
        ends = []
        for layer in range(self.num_layers):
            outs = []
            for direction in range(directions):
                number = layer * directions + direction
                out, end = self._run(number, x.flip(0) if direction else x, (hx[0][number], hx[1][number]))
                outs.append(out.flip(0) if direction else out)
                ends.append(end)
            x = torch.cat(outs, 2) if self.bidirectional else outs[0]
            if self.dropout and self.training and layer < self.num_layers - 1:
                x = nn.functional.dropout(x, self.dropout)
        state = torch.stack([h for h, _ in ends]), torch.stack([c for _, c in ends])
        return (x.transpose(0, 1) if self.batch_first else x), state

    def _run(self, number: int, x: torch.Tensor, state: State) -> tuple[torch.Tensor, State]:
        step, outs = self.steps[number], []
        for one in x.unbind(0):
            state = step(one, state)
            outs.append(state[0])
        return torch.stack(outs), state


_NAMES = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


class QuantizedLSTM(ObservedLSTM):
    """An LSTM whose products have int8 weights, and whose sums and states are on grids."""


register(nn.LSTM, ObservedLSTM, QuantizedLSTM)
