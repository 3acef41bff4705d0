"""What every section of a recipe is: a frozen pydantic model whose errors are sentences for the reader of the YAML file."""

import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, Strict, ValidationError
from pydantic_core import ErrorDetails

from kdtrain.errors import KdtrainError

SYNONYMS = {
    "lr": "learning_rate",
    "rate": "learning_rate",
    "wd": "weight_decay",
    "decay": "weight_decay",
    "bs": "batch_size",
    "batch": "batch_size",
    "train_batch_size": "batch_size",
    "per_device_train_batch_size": "batch_size",
    "grad_accum": "gradient_accumulation_steps",
    "accumulation": "gradient_accumulation_steps",
    "accumulate_grad_batches": "gradient_accumulation_steps",
    "checkpointing": "gradient_checkpointing",
    "epochs": "num_train_epochs",
    "num_epochs": "num_train_epochs",
    "steps": "max_steps",
    "num_steps": "max_steps",
    "warmup": "warmup_ratio",
    "schedule": "lr_scheduler_type",
    "scheduler": "lr_scheduler_type",
    "clip_norm": "max_grad_norm",
    "grad_clip": "max_grad_norm",
    "gradient_clip_val": "max_grad_norm",
    "evaluate_every": "eval_steps",
    "eval_every": "eval_steps",
    "save_every": "save_steps",
    "log_every": "logging_steps",
    "best_metric": "metric_for_best_model",
    "dtype": "precision",
    "temp": "temperature",
    "tau": "temperature",
    "alpha": "kd_weight",
    "signal": "targets",
    "k": "top_k",
    "max_len": "max_length",
    "max_seq_length": "max_length",
    "d_model": "hidden_size",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "model": "path",
    "model_name_or_path": "path",
    "output_dir": "output",
}
"""Names that other trainers, or earlier versions, use for a field here."""


def _number(value: Any) -> Any:
    # YAML 1.1 reads 3e-4 as text, and a bool is an int in Python.
    if isinstance(value, str):
        with suppress(ValueError):
            return float(value)
    return value


def _text(value: Any) -> Any:
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


Whole = Annotated[int, Strict()]
"""A whole number; true and 1.0 are none."""
Number = Annotated[float, Strict(), BeforeValidator(_number)]
"""Any number, infinity too where the field does not bound it."""
Flag = Annotated[bool, Strict()]
"""true or false."""
Text = Annotated[str, BeforeValidator(_text)]
"""Text; a number in YAML is taken as its digits."""

POSITIVE: Any = Field(gt=0)
NOT_NEGATIVE: Any = Field(ge=0)
FINITE: Any = Field(allow_inf_nan=False)
SHARE: Any = Field(ge=0, lt=1)
"""A share of a whole, or a probability: in [0, 1)."""
PART: Any = Field(gt=0, lt=1)
"""A share of a whole that leaves something on both sides."""


class Section(BaseModel):
    """A section of a recipe. Unknown fields are refused; nothing can be changed after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @classmethod
    def parse(cls, content: Any, prefix: str = "") -> Self:
        """Build the section from plain dicts, lists and scalars.

        Args:
            content: the section as it stands in the YAML file.
            prefix: the place of the section in the file, such as `method.`, for the sentences.

        Raises:
            KdtrainError: a field is unknown, missing or wrong; names every such field and the fix.
        """
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            raise KdtrainError(sentence_of(error, cls, prefix)) from None

    def plain(self) -> dict[str, Any]:
        """Plain dicts, lists and scalars, as they stand in YAML and JSON; `parse` reads them back."""
        return _plain(self.model_dump(serialize_as_any=True))

    def replaced(self, **changes: Any) -> Self:
        """The same section with other values, checked like a new one; what was left to the default still is."""
        return type(self).parse({**{name: getattr(self, name) for name in self.model_fields_set}, **changes})

    def given(self, name: str) -> bool:
        """Whether the file, and not the default, set this field."""
        return name in self.model_fields_set


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


# ---- errors as sentences

_TYPES = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "string": "text",
    "tuple": "a list",
    "list": "a list",
    "dict": "a section with fields",
    "model": "a section with fields",
}


def sentence_of(error: ValidationError, kind: type[Section], prefix: str = "") -> str:
    """One sentence for each wrong field; a single one stands alone."""
    sentences = list(dict.fromkeys(_sentence(detail, kind, prefix) for detail in error.errors()))
    if len(sentences) == 1:
        return sentences[0]
    return f"{len(sentences)} fields of the recipe are wrong:" + "".join(f"\n  {one}" for one in sentences)


def _sentence(detail: ErrorDetails, kind: type[Section], prefix: str) -> str:
    path, section = _place(detail["loc"], kind)
    path = prefix + path if path else prefix.rstrip(".")
    value, context, what = detail.get("input"), detail.get("ctx", {}), detail["type"]
    if what == "value_error":
        return str(context["error"])
    if what == "extra_forbidden":
        name = str(detail["loc"][-1])
        prefix = path.removesuffix(name)
        fields = list(section.model_fields)
        near = nearest(name, fields)
        hint = "" if near is None else f"; did you mean {prefix}{near}?"
        return f"unknown recipe key {path}{hint} (valid here: {', '.join(fields)})"
    if what == "missing":
        field = section.model_fields.get(str(detail["loc"][-1]))
        help = "" if field is None or not field.description else f": {field.description}"
        return f"{path} is missing{help}"
    if what in ("literal_error", "union_tag_invalid", "enum"):
        expected = context.get("expected", context.get("expected_tags", ""))
        choices = str(expected).replace("'", "").replace(" or ", ", ")
        return f"{path} must be one of {choices}, got {value!r}"
    if what == "greater_than":
        return f"{path} must be greater than {context['gt']:g}, got {value}"
    if what == "greater_than_equal":
        return f"{path} must be {context['ge']:g} or more, got {value}"
    if what == "less_than":
        return f"{path} must be below {context['lt']:g}, got {value}"
    if what == "less_than_equal":
        return f"{path} must be {context['le']:g} or less, got {value}"
    if what == "finite_number":
        return f"{path} must be finite, got {value}"
    if what in ("too_short", "too_long"):
        bound = context.get("min_length", context.get("max_length"))
        return f"{path} must have {bound} entries, got {value!r}"
    for start, words in _TYPES.items():
        if what.startswith(start):
            hint = ""
            if start == "string" and isinstance(value, bool):
                hint = "; YAML reads no, off, yes and on so: put the word into quotes"
            return f"{path} must be {words}, got {value!r}{hint}"
    return f"{path}: {detail['msg']}, got {value!r}"


def _place(loc: tuple[int | str, ...], kind: type[Section]) -> tuple[str, type[Section]]:
    """The dotted path of an error, and the section that holds the field in question."""
    path, section, holder = "", kind, kind
    for part in loc:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
        holder = section
        field = None if isinstance(part, int) else section.model_fields.get(part)
        inner = None if field is None else next(iter(_sections(field.annotation)), None)
        section = inner or section
    return path, holder


def section_of(annotation: Any) -> type[Section] | None:
    """The class of a field that holds one section."""
    return annotation if isinstance(annotation, type) and issubclass(annotation, Section) else None


def _sections(annotation: Any) -> Iterable[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    for inner in typing.get_args(annotation):
        yield from _sections(inner)


def literal_values(annotation: Any) -> tuple[Any, ...]:
    """The values of a `Literal`, or of one inside a union with None."""
    if typing.get_origin(annotation) is Literal:
        return typing.get_args(annotation)
    if typing.get_origin(annotation) in (types.UnionType, typing.Union, Annotated):
        return tuple(value for inner in typing.get_args(annotation) for value in literal_values(inner))
    return ()


def nearest(name: str, fields: Iterable[str]) -> str | None:
    """The field that a reader most likely meant: by meaning first, then by spelling; None when nothing is near."""
    names = list(fields)
    meant = SYNONYMS.get(name)
    if meant in names:
        return meant
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
    return near[0] if near else None


class MethodOptions(Section):
    """The recipe's `method:` section, or one entry of it; each method declares a subclass with its own fields.

    A subclass narrows `name` to `Literal["..."]` with that default; fields that the method does not read are refused.
    """

    name: Any = Field(description="which method the student learns by; kdtrain methods lists them")


def parse_method(
    content: Any, methods: Mapping[str, type[MethodOptions]], prefix: str = "method."
) -> MethodOptions:
    """Parse one entry of a `method:` section by its `name`.

    Args:
        content: the entry as it stands in the YAML file, or options that are parsed already.
        methods: every method that the recipe may name.
        prefix: the place of the entry in the file, for the sentences.

    Raises:
        KdtrainError: no such method, or wrong options.
    """
    if isinstance(content, MethodOptions):
        return content
    if not isinstance(content, Mapping):
        raise KdtrainError(f"{prefix.rstrip('.')} must be a section with fields, got {content!r}")
    name = content.get("name")
    if not isinstance(name, str) or name not in methods:
        near = nearest(name, methods) if isinstance(name, str) else None
        hint = "" if near is None else f"; did you mean {near}?"
        raise KdtrainError(f"{prefix}name must be one of {', '.join(methods)}, got {name!r}{hint}")
    return methods[name].parse(dict(content), prefix)
