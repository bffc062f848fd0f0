"""Every error that editing can raise.

    EditorsError
    ├── BaseModelError              the base model cannot be read
    │   ├── BaseModelNotFound
    │   ├── BaseModelUnreadable     truncated, damaged or not a model
    │   └── DeviceUnusable          no such device here
    ├── CheckpointError             an editor checkpoint cannot be used
    │   ├── CheckpointNotFound
    │   ├── CheckpointUnreadable
    │   ├── BaseModelMismatch       trained for another base model
    │   ├── ArchiveUnreadable       no archive of the original code, or a damaged one
    │   ├── ArchiveUnsafe           a file that would run code when it is loaded
    │   └── ArchiveMismatch         an archive that does not fit its configuration or the base model
    ├── DataFileError               a data file cannot be read (names the record and the field)
    ├── TargetsError                no such layers, or layers that must not be edited
    ├── EmptyTextError              a prompt or correction without tokens
    ├── UnknownLabel                a correction that is none of a classifier's labels
    ├── NoChatTemplate              chat messages for a tokenizer that knows of none
    ├── ChatRefused                 chat messages that the model's template cannot put into words
    ├── SubjectNotFound             a subject that the prompt does not name
    ├── ReportError                 measurements that cannot be read, compared or drawn
    ├── TrainingError               a training run cannot begin or go on
    │   ├── TrainingOptionsInvalid  options that make no sense, alone or together
    │   ├── ResumeRefused           the run to resume had other options or other data
    │   └── TrainingDiverged        NaN or infinity in a loss; the last good checkpoint is kept
    ├── NothingToExport             an adapter of no edits
    ├── ExportUnwritable            the disk is full, or the folder cannot be written
    └── StateError                  the exact state cannot take these factors
        ├── FactorsCorrupt          bytes that are not the factors they claim to be
        ├── FactorsNotHeld          factors to be taken out that are not in
        └── StateOverflow           outside the grid of the accumulators, or of what float64 can solve

Errors carry facts as attributes and a stable `code`; they know nothing of HTTP.
"""

from __future__ import annotations


class EditorsError(Exception):
    """Base of all errors of this package. `facts` is what a caller may show or log."""

    code = "editors_error"

    def __init__(self, message: str, **facts: object) -> None:
        super().__init__(message)
        self.facts = facts


class BaseModelError(EditorsError):
    code = "base_model_error"


class BaseModelNotFound(BaseModelError):
    code = "base_model_not_found"


class BaseModelUnreadable(BaseModelError):
    code = "base_model_unreadable"


class DeviceUnusable(BaseModelError):
    code = "device_unusable"


class CheckpointError(EditorsError):
    code = "checkpoint_error"


class CheckpointNotFound(CheckpointError):
    code = "checkpoint_not_found"


class CheckpointUnreadable(CheckpointError):
    code = "checkpoint_unreadable"


class BaseModelMismatch(CheckpointError):
    """The editor was trained for another base model; using it would give arbitrary edits."""

    code = "base_model_mismatch"

    def __init__(self, trained_for: str, loaded: str) -> None:
        super().__init__(
            f"this editor was trained for the base model with digest {trained_for}, "
            f"but the loaded base model has digest {loaded}; "
            "load that base model, train an editor for this one with `mend train`, "
            "or name `training-free` instead of an editor",
            trained_for=trained_for,
            loaded=loaded,
        )


class ArchiveUnreadable(CheckpointError):
    code = "archive_unreadable"


class ArchiveUnsafe(CheckpointError):
    """The file asks for classes or functions that tensors and plain values do not need. Nothing was imported."""

    code = "archive_unsafe"


class ArchiveMismatch(CheckpointError):
    code = "archive_mismatch"


class DataFileError(EditorsError):
    code = "data_file_error"


class TargetsError(EditorsError):
    code = "targets_error"


class EmptyTextError(EditorsError):
    code = "empty_text"


class UnknownLabel(EditorsError):
    code = "unknown_label"


class NoChatTemplate(EditorsError):
    code = "no_chat_template"


class ChatRefused(EditorsError):
    code = "chat_refused"


class SubjectNotFound(EditorsError):
    code = "subject_not_found"


class ReportError(EditorsError):
    code = "report_error"


class TrainingError(EditorsError):
    code = "training_error"


class TrainingOptionsInvalid(TrainingError):
    code = "training_options_invalid"


class ResumeRefused(TrainingError):
    code = "resume_refused"


class TrainingDiverged(TrainingError):
    code = "training_diverged"


class NothingToExport(EditorsError):
    code = "nothing_to_export"


class ExportUnwritable(EditorsError):
    code = "export_unwritable"


class StateError(EditorsError):
    code = "state_error"


class FactorsCorrupt(StateError):
    code = "factors_corrupt"


class FactorsNotHeld(StateError):
    code = "factors_not_held"


class StateOverflow(StateError):
    code = "state_overflow"
