"""A pod's namespace is found by its uid, in /proc as kubelets, runtimes and systemd lay it out."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from pod_groups import pod_group, put

from natkeep.errors import UsageError
from natkeep.kernel.pods import find_netns

UID = "6b2f9c1e-0d3a-4a57-9a41-2f0f2d6f8a11"
OTHER = "6b2f9c1e-0d3a-4a57-9a41-2f0f2d6f8a12"


def add(proc: Path, pid: int, cgroup: str, started: int, name: str = "pause") -> None:
    folder = proc / str(pid)
    folder.mkdir(parents=True)
    (folder / "cgroup").write_text(cgroup)
    (folder / "stat").write_text(f"{pid} ({name}) S {' '.join('0' * 18)} {started} 0 0\n")


@pytest.mark.parametrize(
    "cgroup",
    [
        f"0::/kubepods/besteffort/pod{UID}/4f5e\n",
        f"0::/kubepods.slice/kubepods-pod{UID.replace('-', '_')}.slice/cri-containerd-4f.scope\n",
        f"0::/../../kubepods-burstable-pod{UID.replace('-', '_')}.slice/crio-4f5e.scope\n",
        f"12:pids:/kubepods/pod{UID}/4f5e\n11:memory:/kubepods/pod{UID}/4f5e\n",
    ],
)
def test_it_is_that_of_the_pods_oldest_process(tmp_path: Path, cgroup: str) -> None:
    add(tmp_path, 30, cgroup, 500)
    add(tmp_path, 7, cgroup, 900)  # numbers begin again
    add(tmp_path, 40, cgroup, 400, "a (b) c")
    add(tmp_path, 1, "0::/init.scope\n", 1)
    add(tmp_path, 50, cgroup.replace("8a11", "8a12"), 2)
    (tmp_path / "net").mkdir()
    (tmp_path / "60").mkdir()  # it has ended
    assert find_netns(f"pod:{UID}", str(tmp_path)) == "pid:40"


def test_a_pod_with_its_nodes_network_is_refused(tmp_path: Path) -> None:
    add(tmp_path, 50, f"0::/kubepods/pod{UID}/4f5e\n", 2)
    (tmp_path / "self").symlink_to("50")
    (tmp_path / "50/ns").mkdir()
    (tmp_path / "50/ns/net").touch()
    with pytest.raises(UsageError, match="has no network namespace of its own"):
        find_netns(f"pod:{UID}", str(tmp_path))


def test_a_pod_that_is_not_here_is_never_ours(tmp_path: Path) -> None:
    add(tmp_path, 50, f"0::/kubepods/pod{OTHER}/4f5e\n", 2)
    with pytest.raises(UsageError, match=f"no process of the pod {UID} runs here"):
        find_netns(f"pod:{UID}", str(tmp_path))
    with pytest.raises(UsageError, match="no process of the pod"):
        find_netns(f"pod:{UID}")


@pytest.mark.parametrize("spec", ["pod:", "pod:web", f"pod:{UID}x", f"pod:{UID.upper()}"])
def test_what_is_no_uid_is_refused(spec: str) -> None:
    with pytest.raises(UsageError, match="is not of the form pod:UID"):
        find_netns(spec)


@pytest.mark.parametrize("spec", ["", "web", "pid:1", "/run/netns/web"])
def test_all_else_is_as_it_was(spec: str) -> None:
    assert find_netns(spec) == spec


@pytest.mark.root
def test_a_real_process_in_a_real_control_group() -> None:
    with pod_group(UID) as procs, subprocess.Popen(["sleep", "600"]) as process:
        try:
            put(procs, process.pid)
            with pytest.raises(UsageError, match="has no network namespace of its own"):
                find_netns(f"pod:{UID}")
        finally:
            process.kill()
            process.wait()
    words = ["unshare", "--net", "sh", "-c", "echo; exec sleep 600"]
    with (
        pod_group(UID) as procs,
        subprocess.Popen(words, stdout=subprocess.PIPE) as process,
    ):
        try:
            put(procs, process.pid)
            assert process.stdout
            process.stdout.readline()
            assert find_netns(f"pod:{UID}") == f"pid:{process.pid}"
        finally:
            process.kill()
            process.wait()
