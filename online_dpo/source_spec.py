"""Where an arm's pairs come from: the forms of the key `source`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, field_validator, model_serializer, model_validator

from online_dpo.spec import Fraction, Positive, Spec


class DatasetSpec(Spec):
    """A preference dataset: a file, a folder, or a hub dataset's id. `dataset: FILE` is short for `{path: FILE}`."""

    path: str
    split: str = "train"
    name: str | None = Field(default=None, description="a hub dataset's configuration")
    limit: Positive | None = Field(default=None, description="that many of its pairs, drawn by the seed 0")

    @model_validator(mode="before")
    @classmethod
    def _shorthand(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value

    @model_serializer(mode="wrap")
    def _what_is_said(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without what is not given."""
        return {key: value for key, value in dump(self).items() if value is not None}


class RefreshSpec(Spec):
    """When what was sampled last is too far from the policy to be trained on again. Either limit refreshes."""

    ess_below: Fraction | None = Field(
        default=None, description="effective sample size of the last answers under the policy, as a share of them"
    )
    kl_above: Annotated[float, Field(gt=0.0)] | None = Field(
        default=None, description="KL(source‖policy) a token on the last answers, nats"
    )
    most_rounds: Positive | None = Field(default=None, description="refresh at the latest after so many rounds")

    @model_validator(mode="after")
    def _some_limit(self) -> RefreshSpec:
        if self.ess_below is None and self.kl_above is None:
            raise ValueError("a limit is needed: ess_below or kl_above")
        return self


class ShareSpec(Spec):
    """One part of a mixture: `share` of the round's prompts have their pairs from `source`."""

    share: Annotated[float, Field(gt=0.0, le=1.0)]
    source: Literal["current", "initial"] | SourceSpec


KINDS = ("every", "lag", "every_steps", "refresh_when", "dataset", "spin", "stream", "history", "mixture")
"""The keys of `SourceSpec` that say where pairs come from; exactly one is given."""

EXTRAS = {"relabel": "dataset", "match": "dataset", "order": "stream", "take": "stream", "decay": "history"}
"""Keys that only one kind reads, and which."""


class SourceSpec(Spec):
    """Where pairs come from, but for the plain words `current` and `initial`. One of `KINDS`, and its extras."""

    every: Positive | None = Field(default=None, description="the source is refreshed every k rounds (semi-online)")
    lag: Annotated[int, Field(ge=0)] | None = Field(
        default=None, description="round t is sampled by the policy of k rounds before its start, t−1−k; 0: current"
    )
    every_steps: Positive | None = Field(
        default=None, description="refreshed every k optimiser steps within the round; 1: fully online"
    )
    refresh_when: RefreshSpec | None = Field(
        default=None, description="the last sampled round's pairs are trained on again until they are too off-policy"
    )
    dataset: DatasetSpec | None = Field(default=None, description="fixed pairs that others made (offline)")
    relabel: bool = Field(default=False, description="dataset: the arm's judge decides which answer is chosen")
    match: Literal["auto", "prompts", "rows"] = Field(
        default="auto",
        description="dataset: pairs of the round's own prompts, or its rows in a seeded order whatever their prompts; "
        "auto: prompts where the dataset has a pair for every training prompt",
    )
    spin: DatasetSpec | None = Field(
        default=None, description="chosen: the dataset's own (chosen) answer, rejected: the current policy's sample"
    )
    stream: str | None = Field(
        default=None, description="pairs that another arm of this run made (ARM), or of a finished one (RUN:ARM)"
    )
    order: Literal["in_order", "shuffled"] = Field(
        default="in_order", description="stream: round t has that arm's round t, or pairs shuffled over all its rounds"
    )
    take: Literal["pairs", "candidates"] = Field(
        default="pairs", description="stream: its pairs as they are, or its answers alone, judged and paired anew"
    )
    history: Positive | None = Field(
        default=None, description="pairs drawn from the arm's own last k rounds, this one's fresh pairs among them"
    )
    decay: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        default=1.0, description="history: a pair of a rounds ago is drawn with weight decay^a"
    )
    mixture: Annotated[list[ShareSpec], Field(min_length=2)] | None = None

    @field_validator("mixture")
    @classmethod
    def _whole(cls, parts: list[ShareSpec] | None) -> list[ShareSpec] | None:
        if parts is not None and abs(sum(part.share for part in parts) - 1) > 1e-6:
            raise ValueError(f"shares must add up to 1, found {sum(part.share for part in parts):g}")
        for part in parts or []:
            if isinstance(part.source, SourceSpec) and part.source.kind in ("mixture", "every_steps", "refresh_when"):
                raise ValueError(f"a part of a mixture cannot be {part.source.kind}")
        return parts

    @model_validator(mode="after")
    def _one_kind(self) -> SourceSpec:
        kinds = [kind for kind in KINDS if getattr(self, kind) is not None]
        if len(kinds) != 1:
            found = f"found {' and '.join(kinds)}" if kinds else "none is given"
            raise ValueError(f"exactly one of {', '.join(KINDS)} is needed: {found}")
        for key, reader in EXTRAS.items():
            if kinds[0] != reader and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"'{key}' belongs to {reader}, not to {kinds[0]}: leave it out")
        return self

    @model_serializer(mode="wrap")
    def _own_keys(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """What the kind reads, and nothing of the others."""
        return {key: value for key, value in dump(self).items() if key == self.kind or EXTRAS.get(key) == self.kind}

    @property
    def kind(self) -> str:
        """Which of `KINDS` it is."""
        return next(kind for kind in KINDS if getattr(self, kind) is not None)


Source = Literal["current", "initial"] | SourceSpec
"""The key's type."""


def source_kind(source: Source) -> str:
    """`current`, `initial`, or which of `KINDS`."""
    return source if isinstance(source, str) else source.kind


def parts_of(source: Source) -> list[Source]:
    """The source itself, or the parts of a mixture."""
    if isinstance(source, SourceSpec) and source.mixture is not None:
        return [part.source for part in source.mixture]
    return [source]
