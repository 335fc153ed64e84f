"""Rules for manifests that schemas do not know, each as a list of what is wrong.

The operator's rules restate KubeRay's validation; the API server does not check them, a job that breaks one
is accepted and never starts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from helpers.manifests import Doc, ray_spec

QUANTITY = re.compile(r"(\d+(?:\.\d+)?)(m|k|M|G|T|P|E|Ki|Mi|Gi|Ti|Pi|Ei)?")
FACTORS = {
    None: 1.0, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15, "E": 1e18,
    "Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40, "Pi": 2.0**50, "Ei": 2.0**60,
}  # fmt: skip
DNS_1035 = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
LONGEST_NAME = {"RayJob": 47, "RayCluster": 53, "RayCronJob": 36}
FIRST_WITH_TOKENS = (2, 52)
# Alpha features of the operator: off by default, so a manifest that needs one fails.
GATED_CLUSTER_FIELDS = ("networkPolicy", "tlsOptions", "historyServerOptions")
# Mounts all that the first container does, /dev/shm too, and only asks whether the head is there.
WRITE_NOTHING = ("wait-gcs-ready",)
SAFE_VOLUMES = {
    "configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim",
    "projected", "secret",
}  # fmt: skip
SAFE_SYSCTLS = {
    "kernel.shm_rmid_forced", "net.ipv4.ip_local_port_range", "net.ipv4.ip_unprivileged_port_start",
    "net.ipv4.tcp_syncookies", "net.ipv4.ping_group_range",
}  # fmt: skip


def quantity(text: object) -> float:
    """Raises ValueError: nothing that Kubernetes would take."""
    match = QUANTITY.fullmatch(str(text))
    if match is None:
        raise ValueError(f"{text!r} is no quantity")
    return float(match[1]) * FACTORS[match[2]]


def quantities(value: Any, path: str = "") -> Iterator[tuple[str, object]]:
    """(path, value) of everything that must be a quantity."""
    if isinstance(value, list):
        for number, item in enumerate(value):
            yield from quantities(item, f"{path}[{number}]")
    if not isinstance(value, dict):
        return
    for key, item in value.items():
        here = f"{path}.{key}"
        inside = key in ("requests", "limits", "hard", "defaultRequest", "default", "capacity")
        if inside and isinstance(item, dict):
            yield from ((f"{here}.{name}", amount) for name, amount in item.items())
        elif key in ("sizeLimit", "nominalQuota"):
            yield here, item
        else:
            yield from quantities(item, here)


def bad_quantities(doc: Doc) -> list[str]:
    found = []
    for path, value in quantities(doc):
        try:
            quantity(value)
        except ValueError as error:
            found.append(f"{path}: {error}")
    return found


def bad_resources(spec: Doc) -> list[str]:
    """Every container says what it needs; memory and GPUs are not overcommitted where it counts."""
    found = []
    for container in [*spec.get("initContainers", ()), *spec["containers"]]:
        requests = container.get("resources", {}).get("requests", {})
        limits = container.get("resources", {}).get("limits", {})
        name = container["name"]
        found += [f"{name}: no {key} requested" for key in ("cpu", "memory") if key not in requests]
        if "memory" not in limits:
            found.append(f"{name}: memory without limit")
        for key, limit in limits.items():
            if key in requests and quantity(requests[key]) > quantity(limit):
                found.append(f"{name}: requests more {key} than its limit")
        if requests.get("nvidia.com/gpu") != limits.get("nvidia.com/gpu"):
            found.append(f"{name}: GPUs must be requested as limited")
    return found


def bad_volumes(spec: Doc) -> list[str]:
    """Every emptyDir has a size, and all of a kind fit into the limits even when they are full.

    Those in memory count as memory of the containers that mount them, the others as ephemeral storage
    of the pod, which has the sum of its containers' limits.
    """
    found, on_disk = [], 0.0
    in_memory: dict[str, float] = {}
    for volume in spec.get("volumes", ()):
        if "emptyDir" not in volume:
            continue
        size = volume["emptyDir"].get("sizeLimit")
        if size is None:
            found.append(f"{volume['name']}: emptyDir without sizeLimit")
        elif volume["emptyDir"].get("medium") == "Memory":
            in_memory[volume["name"]] = quantity(size)
        else:
            on_disk += quantity(size)
    for container in [*spec.get("initContainers", ()), *spec["containers"]]:
        limit = quantity(container["resources"]["limits"]["memory"])
        mounted = {mount["name"] for mount in container.get("volumeMounts", ())}
        full = sum(size for name, size in in_memory.items() if name in mounted)
        if full > limit and container["name"] not in WRITE_NOTHING:
            found.append(f"{container['name']}: volumes in memory larger than its memory")
    limits = [container["resources"]["limits"] for container in spec["containers"]]
    if all("ephemeral-storage" in limit for limit in limits):
        room = sum(quantity(limit["ephemeral-storage"]) for limit in limits)
        if on_disk > room:
            found.append(
                f"volumes of {on_disk / 2**30:.1f} GiB, ephemeral storage {room / 2**30:.1f}"
            )
    return found


def not_restricted(template: Doc) -> list[str]:
    """What the Pod Security Standard *restricted* would refuse."""
    spec, found = template["spec"], []
    pod = spec.get("securityContext", {})
    for key in ("hostNetwork", "hostPID", "hostIPC"):
        if spec.get(key):
            found.append(key)
    if spec.get("hostUsers") is True:
        found.append("hostUsers")
    for volume in spec.get("volumes", ()):
        kinds = set(volume) - {"name"}
        if not kinds <= SAFE_VOLUMES or not kinds:
            found.append(f"volume {volume['name']}: {', '.join(sorted(kinds)) or 'of no kind'}")
    for sysctl in pod.get("sysctls", ()):
        if sysctl["name"] not in SAFE_SYSCTLS:
            found.append(f"sysctl {sysctl['name']}")
    for part in ("initContainers", "containers", "ephemeralContainers"):
        for container in spec.get(part, ()):
            found += [f"{container['name']}: {what}" for what in _unrestricted(container, pod)]
    return found


def _unrestricted(container: Doc, pod: Doc) -> Iterator[str]:
    own = container.get("securityContext") or {}
    if own.get("privileged"):
        yield "privileged"
    if own.get("allowPrivilegeEscalation") is not False:
        yield "allowPrivilegeEscalation is not false"
    if own.get("runAsNonRoot", pod.get("runAsNonRoot")) is not True:
        yield "runAsNonRoot is not true"
    if own.get("runAsUser", pod.get("runAsUser")) == 0:
        yield "runAsUser is 0"
    profile = own.get("seccompProfile", pod.get("seccompProfile")) or {}
    if profile.get("type") not in ("RuntimeDefault", "Localhost"):
        yield "no seccomp profile"
    capabilities = own.get("capabilities") or {}
    if "ALL" not in capabilities.get("drop", ()):
        yield "does not drop all capabilities"
    if set(capabilities.get("add", ())) - {"NET_BIND_SERVICE"}:
        yield "adds capabilities"
    if own.get("procMount", "Default") != "Default":
        yield "procMount"
    if any(port.get("hostPort") for port in container.get("ports", ())):
        yield "hostPort"


def refused_by_operator(doc: Doc) -> list[str]:
    """What KubeRay's controller refuses although its CRD lets it through."""
    kind, found = doc["kind"], []
    name = doc["metadata"]["name"]
    if kind in LONGEST_NAME:
        if len(name) > LONGEST_NAME[kind]:
            found.append(f"name of more than {LONGEST_NAME[kind]} characters")
        if not DNS_1035.fullmatch(name):
            found.append("name is no DNS-1035 label")
    if kind == "RayCronJob":
        found.append("RayCronJob needs an alpha feature gate")
        if "TZ=" in doc["spec"].get("schedule", ""):
            found.append("TZ= in a schedule: use timeZone")
    if kind == "RayJob":
        found += _refused_job(doc["spec"])
    spec = ray_spec(doc)
    if spec is not None:
        found += _refused_cluster(spec, in_job=kind == "RayJob")
    return found


def _refused_job(spec: Doc) -> Iterator[str]:
    shutdown = spec.get("shutdownAfterJobFinishes", False)
    mode = spec.get("submissionMode", "K8sJobMode")
    if spec.get("ttlSecondsAfterFinished") and not shutdown:
        yield "ttlSecondsAfterFinished needs shutdownAfterJobFinishes"
    if spec.get("suspend") and not shutdown:
        yield "suspend needs shutdownAfterJobFinishes"
    if spec.get("ttlSecondsAfterFinished", 0) < 0 or spec.get("backoffLimit", 0) < 0:
        yield "negative ttlSecondsAfterFinished or backoffLimit"
    if "activeDeadlineSeconds" in spec and spec["activeDeadlineSeconds"] <= 0:
        yield "activeDeadlineSeconds must be positive"
    if (spec.get("deletionStrategy") or {}).get("deletionRules") and shutdown:
        yield "deletionRules exclude shutdownAfterJobFinishes"
    if "rayClusterSpec" not in spec and "clusterSelector" not in spec:
        yield "neither rayClusterSpec nor clusterSelector"
    if spec.get("clusterSelector"):
        if spec.get("suspend") or spec.get("backoffLimit"):
            yield "clusterSelector excludes suspend and backoffLimit"
        if mode == "SidecarMode":
            yield "clusterSelector excludes SidecarMode"
    if not spec.get("entrypoint") and mode != "InteractiveMode":
        yield "no entrypoint"
    template = spec.get("submitterPodTemplate")
    if template and mode == "SidecarMode":
        yield "SidecarMode excludes submitterPodTemplate"
    if template and template["spec"].get("restartPolicy") not in ("Never", "OnFailure"):
        yield "the submitter's restartPolicy must be Never or OnFailure"


def _refused_cluster(spec: Doc, *, in_job: bool) -> Iterator[str]:
    auth = spec.get("authOptions") or {}
    if auth.get("mode") == "token":
        version = re.match(r"(\d+)\.(\d+)", str(spec.get("rayVersion", "")))
        if version is None or (int(version[1]), int(version[2])) < FIRST_WITH_TOKENS:
            yield "tokens need rayVersion 2.52 or later"
    if auth.get("enableK8sTokenAuth") and in_job:
        yield "enableK8sTokenAuth is not for a RayJob"
    if spec.get("upgradeStrategy") and in_job:
        yield "upgradeStrategy is not for a RayJob"
    yield from (
        f"{field} needs an alpha feature gate" for field in GATED_CLUSTER_FIELDS if field in spec
    )
    tolerance = spec.get("gcsFaultToleranceOptions")
    if tolerance is not None and tolerance.get("backend") == "rocksdb":
        yield "the backend rocksdb needs an alpha feature gate"
    if tolerance is not None and not tolerance.get("redisAddress"):
        yield "gcsFaultToleranceOptions without redisAddress"
    if spec.get("autoscalerOptions") and not spec.get("enableInTreeAutoscaling"):
        yield "autoscalerOptions without enableInTreeAutoscaling"
    groups = [spec["headGroupSpec"], *spec.get("workerGroupSpecs", ())]
    if len({group.get("groupName") for group in groups}) < len(groups):
        yield "two worker groups of one name"
    v2 = (spec.get("autoscalerOptions") or {}).get("version") == "v2"
    for group in groups:
        name = group.get("groupName", "head")
        yield from (
            f"{name}: {what}" for what in _refused_group(group, tolerance is not None, v2=v2)
        )


def _refused_group(group: Doc, fault_tolerant: bool, *, v2: bool) -> Iterator[str]:
    least, most = group.get("minReplicas", 0), group.get("maxReplicas", 0)
    if "groupName" in group and not least <= group.get("replicas", least) <= most:
        yield "not minReplicas <= replicas <= maxReplicas"
    start = group.get("rayStartParams", {})
    if not all(isinstance(value, str) for value in start.values()):
        yield "rayStartParams must be strings"
    if group.get("resources") and any(
        key.startswith("num-") or key == "resources" for key in start
    ):
        yield "resources and rayStartParams num-* exclude each other"
    if "labels" in start:
        yield "labels belong beside rayStartParams"
    pod = group["template"]["spec"]
    names = {env["name"] for env in pod["containers"][0].get("env", ())}
    if fault_tolerant and names & {"REDIS_PASSWORD", "RAY_REDIS_ADDRESS"}:
        yield "Redis must be named in gcsFaultToleranceOptions only"
    if "redis-password" in start and fault_tolerant:
        yield "redis-password must be in gcsFaultToleranceOptions"
    if v2 and pod.get("restartPolicy") != "Never":
        yield "autoscaler v2 needs restartPolicy Never"
