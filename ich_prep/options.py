"""The options of ``ich-prep build``: those of the spec, and those that do not change the bytes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, field_validator

from ich_prep.dataset.spec import Spec
from ich_prep.errors import UsageError
from ich_prep.recipe import read_section, validate

if TYPE_CHECKING:
    from ich_prep.execute import Tls


class BuildOptions(Spec):
    """The options that a recipe's ``[build]`` and the command line may set."""

    labels: Path | None = Field(
        default=None,
        description="Label table: CSV, TSV, Parquet or XLSX. [default: the CSV or TSV found in the source]",
    )
    label_key: tuple[str, ...] = Field(
        default=(), description="KEY or KEY=COLUMN: what joins the labels to the files. May be repeated."
    )
    label_column: tuple[str, ...] = Field(
        default=(), description="CLASS=COLUMN: the column with the labels of a class. May be repeated."
    )
    ignore_columns: tuple[str, ...] = Field(
        default=(), description="Columns of the label table to leave out, as a,b; or all that have no meaning."
    )
    keep_columns: tuple[str, ...] = Field(
        default=(), description="Columns of the label table to carry into the dataset, as a,b; a is then x_a."
    )
    build_dir: Path | None = Field(
        default=None, description="Working folder, needed to resume. [default: the dataset's path with .build appended]"
    )
    key: Path | None = Field(
        default=None, description="Key of the pseudonyms. [default: identifiers.key in the working folder, made once]"
    )
    endpoint: str | None = Field(
        default=None,
        description="Where the buckets are, as https://HOST:PORT. [default: what the environment names, or the cloud]",
    )
    atomic: bool = Field(
        default=True,
        description="Write only to buckets whose store honours conditions; without it, only one build may run.",
    )
    workers: int | None = Field(
        default=None, ge=0, le=4096, description="Processes; 0: this one. [default: one per core]"
    )
    scheduler: str | None = Field(
        default=None,
        description="A Dask scheduler to use instead: tcp://HOST:PORT, tls://HOST:PORT, or its scheduler file.",
    )
    tls_ca: Path | None = Field(default=None, description="For tls://: PEM file of the certificate authority.")
    tls_cert: Path | None = Field(default=None, description="For tls://: PEM file of this client's certificate.")
    tls_key: Path | None = Field(default=None, description="For tls://: PEM file of its key.")
    max_quarantined: float = Field(default=0.01, ge=0, le=1, description="Largest share of damaged files.")
    allow_unlabelled: bool = Field(default=False, description="Keep slices without a label.")
    allow_missing_images: bool = Field(default=False, description="Continue when labels have no image.")
    allow_lost_labels: bool = Field(
        default=False, description="Continue when a rule of the build removes all images of a label."
    )
    allow_kept_columns: bool = Field(default=False, description="Publish --keep-columns as they are beside pseudonyms.")
    allow_contradictions: bool = Field(default=False, description="Take contradictory labels as unknown.")

    allow_full_disk: bool = Field(default=False, description="Start though the disk is expected to be too small.")
    log_json: bool = Field(
        default=False, description="Report on standard error as lines of JSON (docs/cli.md has their keys)."
    )
    report: bool = Field(
        default=False, description="Write a page that shows the dataset, at its path with .report.html appended."
    )

    @field_validator("label_key", "label_column", "ignore_columns", "keep_columns", mode="before")
    @classmethod
    def _columns_as_list(cls, value: Any) -> Any:  # not the name of a validator of Spec, which it would replace
        # Not split at commas: a column's name may contain one.
        return [value] if isinstance(value, str) else value

    def _tls(self) -> Tls | None:
        from ich_prep.execute import Tls

        if self.tls_ca is None and self.tls_cert is None and self.tls_key is None:
            return None
        if self.tls_ca is None or self.tls_cert is None or self.tls_key is None:
            raise UsageError("--tls-ca, --tls-cert and --tls-key belong together: give all three, or none.")
        if self.scheduler is None:
            raise UsageError("--tls-ca, --tls-cert and --tls-key are for a --scheduler at tls://, and there is none.")
        return Tls(self.tls_ca, self.tls_cert, self.tls_key)

    def spec(self) -> Spec:
        """Return the part that changes the bytes."""
        return Spec(**{name: getattr(self, name) for name in Spec.model_fields})

    def buckets(self) -> dict[str, Any]:
        """Return what places in buckets need, as keyword arguments of ``build``, ``dry_run`` and ``place_of``."""
        return {"endpoint": self.endpoint, "atomic": self.atomic}

    def arguments(self) -> dict[str, Any]:
        """Return the rest as the keyword arguments that ``build``, ``dry_run`` and ``append`` share."""
        from ich_prep.layouts.labels import LabelOptions
        from ich_prep.stages.checks import Allowances

        return {
            "labels": self.labels,
            "label_options": LabelOptions(
                key=self.label_key, column=self.label_column, ignore=self.ignore_columns, keep=self.keep_columns
            ),
            "build_dir": self.build_dir,
            "workers": self.workers,
            "scheduler": self.scheduler,
            "tls": self._tls(),
            "allow": Allowances(
                unlabelled=self.allow_unlabelled,
                missing_images=self.allow_missing_images,
                contradictions=self.allow_contradictions,
                lost_labels=self.allow_lost_labels,
                kept_columns=self.allow_kept_columns,
                full_disk=self.allow_full_disk,
                max_quarantined=self.max_quarantined,
            ),
        }


def resolve(recipe: Path | None, given: Mapping[str, Any]) -> BuildOptions:
    """Return the options of a ``recipe``, if there is one, overridden by those ``given``."""
    written = {} if recipe is None else read_section(recipe, "build")
    validate(BuildOptions, written, where=f"{recipe} [build]")
    return validate(BuildOptions, {**written, **given}, where="ich-prep build")
