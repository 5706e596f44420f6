"""What all sections of an experiment have in common."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[int, Field(ge=1, lt=2**31)]
DOTTED = r"[A-Za-z_][\w.]*:[A-Za-z_]\w*"
"""A regular expression of "module:name", as users name their own judges and losses."""


class Spec(BaseModel):
    """Base of all sections: frozen, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """YAML reads `yes` and `on` as true, and pydantic would read true as 1."""
        field = cls.model_fields.get(info.field_name or "")
        if (
            isinstance(value, bool)
            and field is not None
            and field.annotation is not bool
            and field.annotation != bool | None
        ):
            raise ValueError("true and false are no value for this key")
        return value
