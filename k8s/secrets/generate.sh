#!/usr/bin/env bash
# Prints the platform's Secrets with new random passwords; S3's credentials come from the environment.
#   bash k8s/secrets/generate.sh | kubectl create -f -
# `create` on purpose: it never replaces a password that is in use. Nothing of this belongs into git.
set -euo pipefail
namespace=${NAMESPACE:-efficientdet}

random() { head -c 24 /dev/urandom | od -An -tx1 | tr -d ' \n'; }

secret() {  # NAME KEY VALUE...
    printf -- '---\napiVersion: v1\nkind: Secret\nmetadata:\n  name: %s\n  namespace: %s\nstringData:\n' "$1" "$namespace"
    shift
    while [ $# -gt 0 ]; do
        printf '  %s: "%s"\n' "$1" "$2"
        shift 2
    done
}

secret postgres password "$(random)"
secret redis password "$(random)"
secret mlflow admin-password "$(random)" flask-secret-key "$(random)"
secret mlflow-client MLFLOW_TRACKING_USERNAME trainer MLFLOW_TRACKING_PASSWORD "$(random)"
if [ -n "${AWS_ACCESS_KEY_ID:-}" ]; then
    secret s3 AWS_ACCESS_KEY_ID "$AWS_ACCESS_KEY_ID" AWS_SECRET_ACCESS_KEY "${AWS_SECRET_ACCESS_KEY:?}"
fi
