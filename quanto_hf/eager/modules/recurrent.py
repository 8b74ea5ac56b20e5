"""Recurrent layers and cells with stored weights, for dynamic quantization.

Weights are read at the start of a forward pass and torch's own loop runs on them: everything that the float layer can
do stays, and activations are not rounded, which is more exact and not faster than the float layer.
"""

from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

from quanto_hf.eager.modules.errors import QConfigError
from quanto_hf.eager.modules.kept import bare
from quanto_hf.eager.modules.stored_weights import StoredWeights, observer_for

Hidden = torch.Tensor | tuple[torch.Tensor, torch.Tensor]


class StoredRecurrent(StoredWeights):
    """What recurrent layers and cells share."""

    @classmethod
    def from_float(cls, mod: nn.Module, use_precomputed_fake_quant: bool = False) -> Any:
        """The layer, or cell, with the weights of ``mod`` stored as its qconfig says.

        Raises:
            QConfigError: the number type is neither qint8 nor float16.
        """
        new: Any = bare(cls, mod)
        for name, tensor in list(mod.named_parameters(recurse=False)):
            if not name.startswith("weight"):
                new.register_parameter(name, tensor)
                continue
            observer = observer_for(mod)
            if observer.dtype not in ("qint8", "int8", "float16"):
                raise QConfigError(f"{type(mod).__name__} is quantized to qint8 or float16, not to {observer.dtype}")
            observer(tensor)
            new.hold(name, tensor, observer)
        return new

    def float_weights(self, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """Weights and biases by name, in the order in which torch wants them."""
        held, found = self.__dict__["held"], {}
        for name in self._weight_names():
            if name in held:
                found[name] = self.weight_of(name, dtype)
            elif (bias := self._parameters.get(name)) is not None:
                found[name] = bias.to(dtype)
        return found

    def _weight_names(self) -> list[str]:
        return ["weight_ih", "weight_hh", "bias_ih", "bias_hh"]

    def extra_repr(self) -> str:
        """Sizes and weights."""
        return f"{self.input_size}, {self.hidden_size}, {self.weights_repr()}"


class StoredRNN(StoredRecurrent):
    """What LSTM and GRU share: sequences, layers, directions, packed sequences."""

    # not nn.RNNBase, which torch.compile does not enter
    input_size: int
    hidden_size: int
    num_layers: int
    bias: bool
    batch_first: bool
    dropout: float
    bidirectional: bool
    proj_size: int
    # tensors of the hidden state
    states = 1

    @classmethod
    def from_float(cls, mod: nn.Module, use_precomputed_fake_quant: bool = False) -> Any:
        """The layer with the weights of ``mod``, an LSTM or a GRU, stored as its qconfig says.

        Raises:
            QConfigError: the number type is neither qint8 nor float16.
        """
        new: Any = super().from_float(mod)
        # weights of the float layer, by which nn.RNNBase passes them on
        for name in ("_flat_weights", "_flat_weights_names", "_flat_weight_refs", "_all_weights"):
            new.__dict__.pop(name, None)
        return new

    def _weight_names(self) -> list[str]:
        parts = ["weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr"]
        ends = [f"_l{n}{back}" for n in range(self.num_layers) for back in ("", "_reverse")[: self.bidirectional + 1]]
        return [part + end for end in ends for part in parts]

    def flatten_parameters(self) -> None:
        """Nothing to do: weights are not in one piece of memory."""

    def forward(self, input: Any, hx: Any = None) -> tuple[Any, Any]:
        """Output and hidden state; see ``nn.LSTM`` and ``nn.GRU``.

        Args:
            input: a tensor, with or without a batch dimension, or a PackedSequence.
            hx: the hidden state, of an LSTM two tensors; None is zeros.
        """
        if isinstance(input, PackedSequence):
            return self._packed(input, hx)
        single = input.dim() == 2
        batch_dim = 0 if self.batch_first else 1
        x = input.unsqueeze(batch_dim) if single else input
        if hx is not None:
            hx = self._each(hx, lambda h: (h.unsqueeze(1) if single else h).to(x.dtype))
        hidden = self._zeros(x, x.shape[batch_dim]) if hx is None else hx
        out, hidden = self._run(x, hidden)
        if single:
            out, hidden = out.squeeze(batch_dim), self._each(hidden, lambda h: h.squeeze(1))
        return out, hidden

    def _packed(self, input: PackedSequence, hx: Any) -> tuple[PackedSequence, Any]:
        data, sizes, order, back = input
        hidden = self._zeros(data, int(sizes[0])) if hx is None else hx
        if hx is not None and order is not None:
            hidden = self._each(hx, lambda h: h.index_select(1, order))
        out, hidden = self._run(data, hidden, sizes)
        if back is not None:
            hidden = self._each(hidden, lambda h: h.index_select(1, back))
        return PackedSequence(out, sizes, order, back), hidden

    def _zeros(self, x: torch.Tensor, batch: int) -> Hidden:
        layers = self.num_layers * (2 if self.bidirectional else 1)
        states = [x.new_zeros(layers, batch, size) for size in (self.proj_size or self.hidden_size, self.hidden_size)]
        return states[0] if self.states == 1 else (states[0], states[1])

    def _each(self, hidden: Any, what: Any) -> Hidden:
        return what(hidden) if self.states == 1 else tuple(what(state) for state in hidden)

    def _run(self, x: torch.Tensor, hidden: Any, sizes: torch.Tensor | None = None) -> tuple[torch.Tensor, Hidden]:
        flat = list(self.float_weights(x.dtype).values())
        run: Any = torch.gru if self.states == 1 else torch.lstm
        how = (self.bias, self.num_layers, self.dropout, self.training, self.bidirectional)
        if sizes is not None:
            out, *state = run(x, sizes, hidden, flat, *how)
        else:
            out, *state = run(x, hidden, flat, *how, self.batch_first)
        return out, state[0] if self.states == 1 else tuple(state)


class LSTM(StoredRNN):
    """``nn.LSTM`` with stored weights."""

    states = 2


class GRU(StoredRNN):
    """``nn.GRU`` with stored weights."""


class LSTMCell(StoredRecurrent, nn.LSTMCell):
    """``nn.LSTMCell`` with stored weights."""

    def forward(self, input: torch.Tensor, hx: Any = None) -> tuple[torch.Tensor, torch.Tensor]:
        """The next hidden and cell state; see ``nn.LSTMCell``."""
        if hx is None:
            zeros = input.new_zeros(*input.shape[:-1], self.hidden_size)
            hx = (zeros, zeros)
        x, states = _batched(input, tuple(hx))
        h, c = torch.lstm_cell(x, states, **_cell_weights(self, input))
        return _like(h, input), _like(c, input)


class GRUCell(StoredRecurrent, nn.GRUCell):
    """``nn.GRUCell`` with stored weights."""

    def forward(self, input: torch.Tensor, hx: torch.Tensor | None = None) -> torch.Tensor:
        """The next hidden state; see ``nn.GRUCell``."""
        hx = input.new_zeros(*input.shape[:-1], self.hidden_size) if hx is None else hx
        x, (h,) = _batched(input, (hx,))
        return _like(torch.gru_cell(x, h, **_cell_weights(self, input)), input)


class RNNCell(StoredRecurrent, nn.RNNCell):
    """``nn.RNNCell`` with stored weights."""

    def forward(self, input: torch.Tensor, hx: torch.Tensor | None = None) -> torch.Tensor:
        """The next hidden state; see ``nn.RNNCell``."""
        hx = input.new_zeros(*input.shape[:-1], self.hidden_size) if hx is None else hx
        x, (h,) = _batched(input, (hx,))
        step = torch.rnn_tanh_cell if self.nonlinearity == "tanh" else torch.rnn_relu_cell
        return _like(step(x, h, **_cell_weights(self, input)), input)


def _cell_weights(cell: StoredRecurrent, input: torch.Tensor) -> dict[str, Any]:
    names = {"weight_ih": "w_ih", "weight_hh": "w_hh", "bias_ih": "b_ih", "bias_hh": "b_hh"}
    return {names[name]: tensor for name, tensor in cell.float_weights(input.dtype).items()}


def _batched(input: torch.Tensor, states: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    single = input.dim() == 1
    rows = [(state.unsqueeze(0) if single else state).to(input.dtype) for state in states]
    return (input.unsqueeze(0) if single else input), rows


def _like(state: torch.Tensor, input: torch.Tensor) -> torch.Tensor:
    return state.squeeze(0) if input.dim() == 1 else state
