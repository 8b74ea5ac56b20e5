"""Modules whose float weight is rounded in each forward pass."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from quanto_hf.eager.modules.errors import QConfigError
from quanto_hf.eager.modules.kept import WithReLU, bare
from quanto_hf.nn.observers import is_memoryless


class RoundedWeight(nn.Module):
    """Mixin: a module that rounds its weight with ``weight_fake_quant``. The other base is the float module type."""

    # a ReLU that is fused
    relu = False
    weight_fake_quant: Any
    qconfig: Any

    @classmethod
    def from_float(cls, mod: nn.Module, use_precomputed_fake_quant: bool = False) -> Any:
        """A module that shares the parameters of ``mod``.

        A weight that is computed from other parameters (a parametrization) is one from here on.

        Args:
            mod: a float module, or a fused one whose first child is one, with a qconfig.
            use_precomputed_fake_quant: has a meaning for conversion only.

        Raises:
            QConfigError: there is no qconfig, or it has nothing for weights.
        """
        qconfig: Any = getattr(mod, "qconfig", None)
        if qconfig is None or qconfig.weight is None:
            raise QConfigError(f"{type(mod).__name__} has no qconfig for its weight; it cannot be trained quantized")
        inner: Any = mod[0] if isinstance(mod, nn.Sequential) else mod
        new = bare(cls, inner)
        held = inner._parameters
        new._parameters["weight"] = held["weight"] if "weight" in held else nn.Parameter(inner.weight.detach().clone())
        if hasattr(inner, "bias"):
            new._parameters["bias"] = inner.bias
        new.qconfig = qconfig
        new.weight_fake_quant = qconfig.weight()
        new.weight_fake_quant.to(inner.weight.device)
        new.adopt(mod)
        return new.train(mod.training)

    def adopt(self, mod: nn.Module) -> None:
        """Take over what else a fused module has."""

    def adopted(self) -> list[nn.Module]:
        """What :meth:`adopt` took."""
        return []

    @property
    def rounded_weight(self) -> torch.Tensor:
        """The weight on its grid."""
        weight: torch.Tensor = self.weight_fake_quant(self.weight)
        return weight

    def finish(self, out: torch.Tensor) -> torch.Tensor:
        """The ReLU, if one is fused."""
        return out.relu() if self.relu else out

    def to_float(self) -> nn.Module:
        """A float module with the same parameters; with a fused batch norm or ReLU a sequence of them."""
        kind: Any = next(cls for cls in type(self).__mro__ if cls.__module__.startswith("torch.nn."))
        module: nn.Module = bare(kind, self)
        module._parameters.update(self._parameters)
        after = [*self.adopted(), *[nn.ReLU()] * self.relu]
        return nn.Sequential(module, *after) if after else module


class Linear(RoundedWeight, nn.Linear):
    """``nn.Linear`` with a rounded weight."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """The product with the rounded weight."""
        return self.finish(F.linear(input, self.rounded_weight, self.bias))


class LinearReLU(WithReLU, Linear):
    """``nn.Linear`` with a rounded weight, and ReLU."""


class DynamicLinear(Linear):
    """``nn.Linear`` with a rounded weight, whose input is rounded with a scale of its own."""

    @classmethod
    def from_float(cls, mod: nn.Module, use_precomputed_fake_quant: bool = False) -> Any:
        """The linear layer for training, with the parameters of ``mod``.

        Raises:
            QConfigError: there is no qconfig, or it has nothing for weights.
            ValueError: the observer of activations has a memory.
        """
        qconfig: Any = getattr(mod, "qconfig", None)
        if qconfig is not None and not (qconfig.activation is not None and is_memoryless(qconfig.activation())):
            raise ValueError(
                "dynamic quantization in training needs an observer without memory: "
                "default_dynamic_qat_qconfig, or averaging_constant=1"
            )
        return super().from_float(mod)


class _Conv(RoundedWeight):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        out: Any = self._conv_forward(input, self.rounded_weight, self.bias)  # type: ignore[operator]
        return self.finish(out)


class Conv1d(_Conv, nn.Conv1d):
    """``nn.Conv1d`` with a rounded weight."""


class Conv2d(_Conv, nn.Conv2d):
    """``nn.Conv2d`` with a rounded weight."""


class Conv3d(_Conv, nn.Conv3d):
    """``nn.Conv3d`` with a rounded weight."""


class ConvReLU1d(WithReLU, Conv1d):
    """``nn.Conv1d`` with a rounded weight, and ReLU."""


class ConvReLU2d(WithReLU, Conv2d):
    """``nn.Conv2d`` with a rounded weight, and ReLU."""


class ConvReLU3d(WithReLU, Conv3d):
    """``nn.Conv3d`` with a rounded weight, and ReLU."""


class _Table(RoundedWeight):
    @classmethod
    def from_float(cls, mod: nn.Module, use_precomputed_fake_quant: bool = False) -> Any:
        qconfig: Any = getattr(mod, "qconfig", None)
        scheme = getattr(qconfig.weight(), "qscheme", None) if qconfig is not None and qconfig.weight else None
        if scheme != "per_channel_affine_float_qparams":
            raise QConfigError(
                f"{type(mod).__name__} is trained with default_embedding_qat_qconfig, or another one whose weights "
                f"have the scheme per_channel_affine_float_qparams; this one has {scheme}"
            )
        return super().from_float(mod)


class Embedding(_Table, nn.Embedding):
    """``nn.Embedding`` with a rounded weight."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Rows of the rounded weight."""
        return F.embedding(
            input, self.rounded_weight, self.padding_idx, self.max_norm, self.norm_type, self.scale_grad_by_freq
        )


class EmbeddingBag(_Table, nn.EmbeddingBag):
    """``nn.EmbeddingBag`` with a rounded weight."""

    def forward(
        self,
        input: torch.Tensor,
        offsets: torch.Tensor | None = None,
        per_sample_weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Bags of rows of the rounded weight."""
        return F.embedding_bag(
            input, self.rounded_weight, offsets, self.max_norm, self.norm_type, self.scale_grad_by_freq, self.mode,
            False, per_sample_weights, self.include_last_offset, self.padding_idx,
        )  # fmt: skip
