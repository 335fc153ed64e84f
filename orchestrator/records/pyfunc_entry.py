"""What MLflow runs to serve a detector: encoded images in, one row a detection out.

Stored with the model as source text, beside the `model` package: it needs nothing of the
orchestrator, and no pickle.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlflow.models
import pandas as pd  # type: ignore[import-untyped]
from mlflow.exceptions import MlflowException
from mlflow.pyfunc.model import PythonModel, PythonModelContext

from model.predictor import Predictor

DEFAULT_SCORE = 0.05


class ServedDetector(PythonModel):
    """Input column `image`: JPEG or PNG bytes, in JSON as base64. Boxes in source pixels."""

    predictor: Predictor

    def load_context(self, context: PythonModelContext) -> None:
        self.predictor = Predictor.load(Path(context.artifacts["checkpoint"]))

    def predict(
        self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        """Raises MlflowException (a bad request) naming the first image that cannot be used."""
        threshold = float((params or {}).get("score_threshold", DEFAULT_SCORE))
        found = self.predictor.stream(model_input["image"], score_threshold=threshold)
        columns: dict[str, list[Any]] = {name: [] for name in COLUMNS}
        for index, one in enumerate(found):
            if one.problem is not None:
                raise MlflowException.invalid_parameter_value(f"row {index}: {one.problem}")
            columns["image_index"] += [index] * len(one)
            for name, values in zip(("x", "y", "width", "height"), one.boxes_xywh.T, strict=True):
                columns[name] += values.tolist()
            columns["score"] += one.scores.tolist()
            columns["category_id"] += one.category_ids.tolist()
            columns["category"] += one.names
        return pd.DataFrame(columns).astype(COLUMNS)


COLUMNS = {
    "image_index": "int64", "x": "float64", "y": "float64", "width": "float64",
    "height": "float64", "score": "float64", "category_id": "int64", "category": "object",
}  # fmt: skip

mlflow.models.set_model(ServedDetector())
