"""No model of anybody's runs code here by being loaded."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.integration
def test_every_door_to_mlflow_refuses_pickles(tmp_path: Path) -> None:
    """What MLflow itself does with a pickle once anything of ours is imported."""
    code = (
        "import os, sys, importlib\n"
        "importlib.import_module('orchestrator.records')\n"
        "assert os.environ['MLFLOW_ALLOW_PICKLE_DESERIALIZATION'] == 'false'\n"
        "import mlflow\n"
        "class Model(mlflow.pyfunc.PythonModel):\n"
        "    def predict(self, context, model_input): return model_input\n"
        f"path = {str(tmp_path / 'model')!r}\n"
        "mlflow.pyfunc.save_model(path, python_model=Model(), pip_requirements=[])\n"
        "try:\n"
        "    mlflow.pyfunc.load_model(path)\n"
        "except mlflow.exceptions.MlflowException as error:\n"
        "    print('refused:', error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "refused: " in done.stdout, done.stdout + done.stderr
    assert "MLFLOW_ALLOW_PICKLE_DESERIALIZATION" in done.stdout
