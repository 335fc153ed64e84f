"""What happened: MLflow."""
