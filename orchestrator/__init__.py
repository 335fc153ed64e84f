"""The cluster around `model`: Ray, MLflow and object storage, each confined to one folder."""
