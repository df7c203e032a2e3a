"""Structured filters of rows, and the expressions of Milvus that they become, quoted by us.

A filter is a mapping from fields to conditions, all of which must hold: a value, or
{"gte": 0.3, "lt": 1}, {"in": ["dev", "test"]}, {"ne": "train"}. Fields are key, kind, caption,
source, and the names of metadata columns. Nobody's text is ever part of an expression unquoted.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

FIELDS = ("key", "kind", "caption", "source")
_OPERATORS = {"eq": "==", "ne": "!=", "lt": "<", "lte": "<=", "gt": ">", "gte": ">="}
_SIGNS = {sign: name for name, sign in _OPERATORS.items()} | {"=": "eq"}
_CONDITION = re.compile(r"([^=!<>]+?)\s*(==|!=|<=|>=|=|<|>)\s*(.*)", re.DOTALL)
_MEMBERSHIP = re.compile(r"(\S+)\s+in\s+(.+)", re.DOTALL)
_MAX_BYTES = 1 << 20
_ESCAPES = str.maketrans({"\\": "\\\\", '"': '\\"', "\n": "\\n", "\r": "\\r", "\t": "\\t"})

Filter = Mapping[str, Any]


def parse(given: Sequence[str]) -> dict[str, Any]:
    """Returns the filter that options of a command line say.

    Args:
      given: each `field=value`, also with != < <= > >=; or `field in a,b,c`; or a filter as JSON.
        A value is a number where it reads as one, and true or false; "quotes" keep it a text.

    Raises:
      ValueError: one of them is none of these.
    """
    found: dict[str, Any] = {}
    for text in given:
        if text.lstrip().startswith("{"):
            try:
                parts = json.loads(text)
            except ValueError as error:
                raise ValueError(f"--filter {text} is no JSON: {error}.") from None
        elif match := _MEMBERSHIP.fullmatch(text.strip()):
            values = [_value(match[1], part.strip()) for part in match[2].split(",")]
            parts = {match[1]: {"in": values}}
        elif match := _CONDITION.fullmatch(text.strip()):
            field = match[1].strip()
            parts = {field: {_SIGNS[match[2]]: _value(field, match[3])}}
        else:
            raise ValueError(
                f"--filter {text} is unknown; write field=value (also != < <= > >=), or "
                "'field in a,b'."
            )
        for field, condition in parts.items():
            condition = condition if isinstance(condition, Mapping) else {"eq": condition}
            condition = found.get(field, {}) | _without_repeats(field, condition, found)
            found[field] = condition
    return found


def expression(where: Filter | None) -> str:
    """Returns the expression of a filter; "" for none.

    Raises:
      ValueError: a condition or value that is not allowed; names the field.
    """
    terms = []
    for field, condition in (where or {}).items():
        if not isinstance(field, str) or not field:
            raise ValueError(f"filter: a field is a name, not {field!r}.")
        if not isinstance(condition, Mapping):
            condition = {"eq": condition}
        if not condition:
            raise ValueError(f"filter {field}: there is no condition.")
        terms += [_term(field, name, value) for name, value in condition.items()]
    text = " and ".join(terms)
    if len(text.encode()) > _MAX_BYTES:
        raise ValueError(f"The filter has {len(text.encode()):,} bytes; at most {_MAX_BYTES:,}.")
    return text


def _term(field: str, name: str, value: Any) -> str:
    left = field if field in FIELDS else f"metadata[{_literal(field, field)}]"
    if name == "in":
        if isinstance(value, str | Mapping) or not isinstance(value, Sequence) or not value:
            raise ValueError(f"filter {field}: 'in' takes a list of values, not {value!r}.")
        literals = [_literal(field, one) for one in value]
        if field in FIELDS:
            for one in value:
                _check_text(field, one)
            return f"{left} in [{', '.join(literals)}]"
        # Milvus Lite has no `in` for columns of JSON, and a tree of 500 `or` is too deep for it.
        return _any(left, literals)
    if name not in _OPERATORS:
        known = ", ".join([*_OPERATORS, "in"])
        raise ValueError(f"filter {field}: {name!r} is unknown; use one of: {known}.")
    if field in FIELDS:
        _check_text(field, value)
    return f"{left} {_OPERATORS[name]} {_literal(field, value)}"


def _check_text(field: str, value: Any) -> None:
    if not isinstance(value, str):
        raise ValueError(f"filter {field}: {value!r} is no text.")


def _any(left: str, literals: list[str]) -> str:
    if len(literals) == 1:
        return f"{left} == {literals[0]}"
    half = len(literals) // 2
    return f"({_any(left, literals[:half])} or {_any(left, literals[half:])})"


def _literal(field: str, value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ValueError(f"filter {field}: the value holds half a surrogate pair.") from None
        return f'"{value.translate(_ESCAPES)}"'
    if isinstance(value, int) and -(2**63) <= value < 2**63:
        return str(value)
    if isinstance(value, float) and abs(value) < float("inf"):
        return repr(value)
    raise ValueError(f"filter {field}: {value!r} is no text, finite number, true or false.")


def _value(field: str, text: str) -> Any:
    if len(text) > 1 and text[0] == text[-1] == '"':
        return text[1:-1]
    if field in FIELDS:
        return text
    try:
        value = json.loads(text)
    except ValueError:
        return text
    is_finite = isinstance(value, bool | int | float) and abs(value) < float("inf")
    return value if is_finite else text


def _without_repeats(field: str, condition: Mapping, found: Mapping) -> Mapping:
    for name in condition:
        if name in found.get(field, {}):
            raise ValueError(f"--filter gives {field} the condition {name!r} twice.")
    return condition
