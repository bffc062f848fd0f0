"""Errors: each has a code of its own, and all stand in the tree that is drawn at the head of the module."""

from __future__ import annotations

import inspect

from editors import errors

ALL = [error for _, error in inspect.getmembers(errors, inspect.isclass) if issubclass(error, errors.EditorsError)]


def test_codes_are_unique_and_stable():
    assert {error.__name__: error.code for error in ALL} == {
        "ArchiveMismatch": "archive_mismatch",
        "ArchiveUnreadable": "archive_unreadable",
        "ArchiveUnsafe": "archive_unsafe",
        "BaseModelError": "base_model_error",
        "BaseModelMismatch": "base_model_mismatch",
        "BaseModelNotFound": "base_model_not_found",
        "BaseModelUnreadable": "base_model_unreadable",
        "ChatRefused": "chat_refused",
        "DeviceUnusable": "device_unusable",
        "CheckpointError": "checkpoint_error",
        "CheckpointNotFound": "checkpoint_not_found",
        "CheckpointUnreadable": "checkpoint_unreadable",
        "DataFileError": "data_file_error",
        "EditorsError": "editors_error",
        "EmptyTextError": "empty_text",
        "UnknownLabel": "unknown_label",
        "SubjectNotFound": "subject_not_found",
        "ExportUnwritable": "export_unwritable",
        "FactorsCorrupt": "factors_corrupt",
        "FactorsNotHeld": "factors_not_held",
        "NoChatTemplate": "no_chat_template",
        "NothingToExport": "nothing_to_export",
        "ReportError": "report_error",
        "ResumeRefused": "resume_refused",
        "StateError": "state_error",
        "StateOverflow": "state_overflow",
        "TargetsError": "targets_error",
        "TrainingDiverged": "training_diverged",
        "TrainingError": "training_error",
        "TrainingOptionsInvalid": "training_options_invalid",
    }


def test_the_tree_at_the_head_shows_every_one_under_its_parent():
    lines = [line for line in (errors.__doc__ or "").splitlines() if line.strip(" │├└─")]
    drawn = {line.strip(" │├└─").split()[0]: len(line) - len(line.lstrip(" │├└─")) for line in lines}
    parents = {error.__name__: error.__mro__[1].__name__ for error in ALL if error is not errors.EditorsError}
    for name, parent in parents.items():
        assert drawn[name] == drawn[parent] + 4, name


def test_facts_are_kept():
    error = errors.DataFileError("wrong", file="a", line=3)
    assert (str(error), error.facts) == ("wrong", {"file": "a", "line": 3})
