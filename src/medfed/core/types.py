"""Words that several rooms share."""

from typing import Literal

Task = Literal["binary", "multiclass", "regression"]
"""What a model predicts: one of two labels, one of several, or a number."""

JSON = dict[str, object]
"""A JSON-able mapping."""
