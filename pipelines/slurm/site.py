"""What batch jobs ask of a cluster: partition, account, time, GPUs and so on, from a small TOML file.

Keys at the top of the file are for all jobs, those in a table [build], [train], [evaluate] or [cpu] for jobs of that kind.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from pipelines.steps import Kind


@dataclass(frozen=True)
class Resources:
    """What one job asks for.

    time: walltime, as sbatch takes it. nodes, gpus: a training runs one process for each GPU of each node, or one for each node if
    gpus is 0; other jobs use one node and at most one GPU. gpus, cpus, memory: of a node. shards: tasks of the array that a build
    becomes. sbatch: further options of sbatch, such as "--qos=long". setup: lines of shell before the commands.
    """

    time: str
    cpus: int
    memory: str
    gpus: int = 0
    nodes: int = 1
    partition: str = ""
    account: str = ""
    shards: int = 20
    sbatch: tuple[str, ...] = ()
    setup: tuple[str, ...] = ()

    @property
    def processes(self) -> int:
        """Processes of a training on each node."""
        return max(self.gpus, 1)

    @property
    def options(self) -> list[str]:
        """Options of sbatch."""
        values = {
            "partition": self.partition, "account": self.account, "time": self.time, "nodes": self.nodes,
            "ntasks-per-node": 1, "cpus-per-task": self.cpus, "mem": self.memory, "gres": f"gpu:{self.gpus}" if self.gpus else "",
        }  # fmt: skip
        return [*(f"--{name}={value}" for name, value in values.items() if value), *self.sbatch]


# Times are generous for nuScenes' 28,130 keyframes: a training continues after its time, and an array of 20 tasks without GPUs takes half an hour.
DEFAULTS: dict[Kind, Resources] = {
    "build": Resources(time="4:00:00", cpus=2, memory="8G"),
    "train": Resources(time="1-00:00:00", cpus=8, memory="32G", gpus=1),
    "evaluate": Resources(time="2:00:00", cpus=8, memory="16G", gpus=1),
    "cpu": Resources(time="2:00:00", cpus=2, memory="8G"),
}


def read_site(file: Path | None) -> dict[Kind, Resources]:
    """The resources of each kind of job: the defaults, changed by a site file. Raises ValueError that names a wrong entry."""
    if file is None:
        return DEFAULTS
    try:
        content = tomllib.loads(file.read_text())
    except (OSError, tomllib.TOMLDecodeError) as err:
        raise ValueError(
            f"site file {file} cannot be read ({err}): a TOML file such as pipelines/slurm/site.toml is expected"
        ) from err
    kinds = {kind: content.pop(kind) for kind in DEFAULTS if isinstance(content.get(kind), dict)}
    return {kind: _changed(kind, default, content | kinds.get(kind, {}), file) for kind, default in DEFAULTS.items()}


def _changed(kind: Kind, default: Resources, entries: dict[str, Any], file: Path) -> Resources:
    lists = {field.name for field in fields(Resources) if isinstance(getattr(default, field.name), tuple)}
    for name, value in entries.items():
        if not hasattr(default, name):
            known = ", ".join(field.name for field in fields(Resources))
            raise ValueError(
                f"site file {file}: {name} is unknown; expected are {known}, and tables {', '.join(DEFAULTS)}"
            )
        if name in lists:
            is_right, expected = isinstance(value, list) and all(isinstance(v, str) for v in value), "a list of strings"
        elif isinstance(getattr(default, name), int):
            least = 0 if name == "gpus" else 1
            is_right, expected = type(value) is int and value >= least, f"a whole number of at least {least}"
        else:
            is_right, expected = isinstance(value, str), "a string"
        if not is_right:
            raise ValueError(f"site file {file}: {name} = {value!r}, but {expected} is expected")
    given: dict[str, Any] = {name: tuple(value) if name in lists else value for name, value in entries.items()}
    changed = replace(default, **given)
    if kind != "train" and (changed.nodes > 1 or changed.gpus > 1):
        raise ValueError(
            f"site file {file}: {changed.nodes} nodes and {changed.gpus} GPUs for [{kind}], which uses one node and at most one GPU: "
            "put nodes and gpus of trainings into [train]"
        )
    return changed
