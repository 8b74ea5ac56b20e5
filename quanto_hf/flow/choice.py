"""How one slot is quantized, as a value: number type, group size, zero and fit."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from quanto_hf.fit import Fit
from quanto_hf.qtypes import QType
from quanto_hf.schemes import Scheme, make_scheme


@dataclass(frozen=True)
class Choice:
    """How one slot is quantized: arguments of :func:`quanto_hf.schemes.make_scheme`, or a scheme; and the fit."""

    weights: str | QType | Scheme
    group_size: int | None = None
    symmetric: bool | None = None
    fit: Fit | str | None = None

    def scheme(self) -> Scheme:
        """The scheme.

        Raises:
            ValueError: the values do not go together.
        """
        if isinstance(self.weights, Scheme):
            return self.weights
        return make_scheme(self.weights, self.group_size, self.symmetric)

    def refusal(self, learn: bool = False) -> str | None:
        """Why no float weight can be quantized so, whatever its shape, in one sentence, or None.

        Args:
            learn: whether its scales are to be trained.
        """
        try:
            scheme = self.scheme()
        except ValueError as error:
            return str(error)
        return scheme.refuses_fit(self.fit) or (scheme.refuses_learning() if learn else None)

    def override(self, values: Mapping[str, Any]) -> "Choice":
        """The same with some values replaced. Another number type starts from its own defaults."""
        if "weights" in values:
            return Choice(**values)
        return Choice(**{**self.__dict__, **values})


# Columns that share a scale in embeddings and heads of a type that has one for a whole row. With a real small model,
# SmolLM2-135M, an int8 head by rows alone is 0.0017 to 0.0022 away from the float model (KL), in groups half of that.
EMBEDDING_COLUMNS = 64


def embeddings_choice(weights: str | QType | Scheme) -> Choice:
    """What embeddings and heads get by a number type: its default scheme, in groups of columns if it can have some.

    Example:
        >>> [f"{embeddings_choice(name).scheme()}" for name in ("int8", "int4", "float8")]
        ['int8 g64', 'int4 g64 asym', 'float8_e4m3fn']
    """
    choice = Choice(weights)
    asked = {} if choice.refusal() else choice.scheme().asked()
    if asked.get("group_size") != -1 or Choice(weights, EMBEDDING_COLUMNS).refusal() is not None:
        return choice
    return Choice(weights, EMBEDDING_COLUMNS)


# what an override may say
OVERRIDABLE = tuple(field.name for field in fields(Choice))
