"""The divergences that a recipe may name, with their parameters."""

from typing import Annotated, Any

from pydantic import AfterValidator, WithJsonSchema

from kdkernels import (
    JSD,
    TVD,
    AlphaBeta,
    Decoupled,
    Divergence,
    ForwardKL,
    ReverseKL,
    SkewKL,
    SkewReverseKL,
)

DIVERGENCES: dict[str, type[Divergence]] = {
    "forward_kl": ForwardKL,
    "reverse_kl": ReverseKL,
    "jsd": JSD,
    "skew_kl": SkewKL,
    "skew_reverse_kl": SkewReverseKL,
    "tvd": TVD,
    "alpha_beta": AlphaBeta,
    "decoupled": Decoupled,
}


def divergence_of(choice: str | dict[str, Any]) -> Divergence:
    """The divergence that a recipe names: a name, or a mapping of `name` and parameters.

    Raises:
        ValueError: no such divergence or parameter, or one out of range; the sentence is for the reader of a recipe.
    """
    content: dict[str, Any] = {"name": choice} if isinstance(choice, str) else dict(choice)
    name = content.pop("name", None)
    if name not in DIVERGENCES:
        raise ValueError(f"method.divergence must be one of {', '.join(DIVERGENCES)}, got {name!r}")
    try:
        return DIVERGENCES[name](**content)
    except TypeError:
        fields = list(getattr(DIVERGENCES[name], "__dataclass_fields__", {}))
        raise ValueError(
            f"method.divergence {name} has {'the parameters ' + ', '.join(fields) if fields else 'no parameters'}, got "
            f"{content}"
        ) from None
    except ValueError as error:
        raise ValueError(f"method.divergence {name}: {error}") from None


def _checked(choice: str | dict[str, Any]) -> str | dict[str, Any]:
    divergence_of(choice)
    return choice


_NAMES = {"enum": list(DIVERGENCES)}
_SCHEMA = {"anyOf": [_NAMES, {"type": "object", "properties": {"name": _NAMES}, "required": ["name"]}]}
DivergenceChoice = Annotated[str | dict[str, Any], AfterValidator(_checked), WithJsonSchema(_SCHEMA)]
"""A field of a recipe: the name of a divergence, or {name: ..., and its parameters}."""
