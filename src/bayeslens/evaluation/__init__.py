"""How far to trust a probability: scores, calibration, conformal intervals and sets, kinds of uncertainty."""

from __future__ import annotations

import importlib

_PUBLIC = {
    "Familiarity": "familiarity",
    "QuantileMap": "calibration",
    "Temperature": "calibration",
    "brier_loss": "scores",
    "compare": "model_comparison",
    "conformal_threshold": "conformal",
    "coverage": "scores",
    "cqr_scores": "conformal",
    "crps_loss": "scores",
    "crps_loss_from_quantiles": "scores",
    "crps_loss_from_samples": "scores",
    "entropy_split": "uncertainty",
    "expected_calibration_error": "calibration",
    "interval_loss": "scores",
    "log_score": "scores",
    "pit": "scores",
    "pit_calibration_error": "calibration",
    "prediction_sets": "conformal",
    "reliability": "calibration",
    "split_conformal": "conformal",
    "variance_split": "uncertainty",
}
__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> object:
    if name in _PUBLIC:
        return getattr(importlib.import_module(f"bayeslens.evaluation.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
