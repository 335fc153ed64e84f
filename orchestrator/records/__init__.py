"""What happened: MLflow."""

import os

# Before MLflow is imported: checkpoints and models of ours hold no pickles, and none is loaded.
os.environ.setdefault("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
