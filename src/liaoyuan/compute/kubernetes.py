"""A job as a Kubernetes manifest: an indexed Job with one pod, and in it one launcher, for each host.

A pod that is evicted or whose node is lost is made again by Kubernetes and joins the others at the rendezvous.
"""

import json
from typing import Any

from liaoyuan.compute.scheduler import JobRequest

MOUNT = "/run-folder"  # where the shared volume appears in each pod
PODS_LOST = 1000  # pods that may fail over the whole job: giving up is the launchers' decision
USER = 1000  # never root


def kubernetes_manifest(job: JobRequest, program: tuple[str, ...] = ("liaoyuan",)) -> str:
    """Return the YAML for `kubectl apply -f`."""
    manifest = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": job.name, "labels": {"app.kubernetes.io/name": "liaoyuan"}},
        "spec": {
            "completionMode": "Indexed",
            "completions": job.nodes,
            "parallelism": job.nodes,
            "backoffLimit": PODS_LOST,
            "template": {
                "metadata": {"labels": {"app.kubernetes.io/name": "liaoyuan", "liaoyuan/job": job.name}},
                "spec": _pod(job, program),
            },
        },
    }
    return "\n".join(_yaml(manifest)) + "\n"


def _pod(job: JobRequest, program: tuple[str, ...]) -> dict[str, Any]:
    return {
        "restartPolicy": "OnFailure",
        "terminationGracePeriodSeconds": job.grace,
        "securityContext": {"runAsNonRoot": True, "runAsUser": USER, "fsGroup": USER},
        "containers": [_container(job, program)],
        "volumes": [
            {"name": "run-folder", "persistentVolumeClaim": {"claimName": job.claim}},
            {"name": "shared-memory", "emptyDir": {"medium": "Memory"}},
        ],
    }


def _container(job: JobRequest, program: tuple[str, ...]) -> dict[str, Any]:
    limits = {job.accelerator: str(job.processes)} if job.accelerator else {}
    return {
        "name": "launcher",
        "image": job.image,
        "command": list(program),
        "args": list(job.command),
        "workingDir": MOUNT,
        "env": [{"name": "POD_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}}],
        "resources": {"requests": {"cpu": str(job.processes * job.cores)}, **({"limits": limits} if limits else {})},
        "securityContext": {"allowPrivilegeEscalation": False},
        "volumeMounts": [
            {"name": "run-folder", "mountPath": MOUNT},
            {"name": "shared-memory", "mountPath": "/dev/shm"},
        ],
    }


def _yaml(value: dict[str, Any], indent: str = "") -> list[str]:
    """Return YAML lines; every scalar is written as JSON, which is YAML that no reader can take for another type."""
    lines = []
    for key, item in value.items():
        name = key if key.replace("-", "").isalnum() else json.dumps(key)
        if isinstance(item, dict):
            lines += [f"{indent}{name}:", *_yaml(item, indent + "  ")]
        elif isinstance(item, list):
            lines += [f"{indent}{name}:", *(line for part in item for line in _item(part, indent))]
        else:
            lines.append(f"{indent}{name}: {json.dumps(item, ensure_ascii=False)}")
    return lines


def _item(value: Any, indent: str) -> list[str]:
    if not isinstance(value, dict):
        return [f"{indent}- {json.dumps(value, ensure_ascii=False)}"]
    first, *rest = _yaml(value, indent + "  ")
    return [f"{indent}- {first.strip()}", *rest]
