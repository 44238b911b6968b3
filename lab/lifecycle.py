"""Brings a lab up, and takes it down without a trace."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import string
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial

from lab import nodes, pods, topology
from lab.layout import BACKENDS, NODES, RIVAL, SOURCES, STANDARD_CNI, STANDING, STATE_ROOT, VIP, Lab, LabError
from lab.process import cgroup2_root, end, kill_cgroup
from lab.state import State, locked
from lab.table import Paper

MANIFESTS = f"{SOURCES}/lab/manifests"
SERVICE_WITHIN = 10
"""Seconds after which a service that was applied must answer."""
_libc = ctypes.CDLL(None, use_errno=True)


def preflight(lab: Lab) -> None:
    """Whether this machine can carry a lab. Raises LabError naming everything that is missing."""
    wrong = []
    cgroup2_root()
    with open("/proc/filesystems") as filesystems:
        if "\tbpf\n" not in filesystems.read():
            wrong.append("this kernel has no BPF file system (CONFIG_BPF_SYSCALL)")
    if not os.access(f"{STANDARD_CNI}/macvlan", os.X_OK):
        wrong.append(f"{STANDARD_CNI}/macvlan is missing: apt install containernetworking-plugins")
    if shutil.which("ip") is None:
        wrong.append("ip is missing: apt install iproute2")
    if not os.access(f"{nodes.CNI_BUILT}/spiderpool", os.X_OK):
        wrong.append(f"{nodes.CNI_BUILT}/spiderpool is missing: run plugins/shim/build.sh")
    if wrong:
        raise LabError("; ".join(wrong))
    if exists(lab):
        whole = State.load(lab).complete
        raise LabError(
            f"lab {lab.name!r} is {'up already' if whole else 'half-way up'}: "
            f"`{nodes.command_line(lab, 'down')}` removes it"
        )


def exists(lab: Lab) -> bool:
    """Whether anything of the lab is there."""
    return os.path.exists(lab.state) or bool(topology.namespaces(lab)) or os.path.isdir(f"{cgroup2_root()}/{lab.name}")


def not_up(lab: Lab) -> LabError:
    """What to tell somebody who wants to use a lab that is not up."""
    if exists(lab):
        return LabError(f"lab {lab.name!r} is half-way up: `{nodes.command_line(lab, 'down')}` removes it")
    return LabError(f"lab {lab.name!r} is not up: `{nodes.command_line(lab, 'up')}`")


def parallel(work: Iterable[Callable[[], object]]) -> None:
    """Do all at once and wait for all; then raise the first failure.

    An interrupt, too, waits for what is under way: whoever cleans up next must not have somebody behind them who goes
    on making things.
    """
    jobs = list(work)
    pool = ThreadPoolExecutor(max_workers=max(1, len(jobs)))
    try:
        futures: list[Future[object]] = [pool.submit(job) for job in jobs]
        wait(futures)
    finally:
        pool.shutdown(wait=True)
    for future in futures:
        future.result()


def _mount_bpffs(lab: Lab) -> None:
    # A mount of the lab's own: it is there whether or not the machine has one, and takes all pins with it when it goes.
    os.makedirs(lab.bpffs)
    if _libc.mount(b"bpf", os.fsencode(lab.bpffs), b"bpf", 0, b"mode=0700"):
        raise LabError(f"cannot mount a BPF file system at {lab.bpffs}: {os.strerror(ctypes.get_errno())}")


def _mounted(path: str) -> bool:
    with open("/proc/self/mounts") as mounts:
        return any(line.split()[1] == path for line in mounts)


def slices(state: State, service: str) -> str:
    """The EndpointSlices of `service`, one for each family, from the addresses that the backends have."""
    with open(f"{MANIFESTS}/endpointslice.yaml") as file:
        template = string.Template(file.read())
    documents = []
    for index, (family, address_type) in enumerate((("ipv4", "IPv4"), ("ipv6", "IPv6"))):
        endpoints = "\n".join(
            f'  - addresses: ["{state.attachments[pod].addresses()[index]}"]\n'
            f"    nodeName: {state.attachments[pod].node}\n"
            f"    conditions: {{ready: true}}"
            for pod in BACKENDS
        )
        documents.append(
            template.substitute(service=service, family=family, address_type=address_type, endpoints=endpoints)
        )
    return "---\n".join(documents)


def apply(lab: Lab, *files: str) -> None:
    """Apply manifests of the lab in one go. Raises LabError."""
    texts = []
    for name in files:
        with open(f"{MANIFESTS}/{name}") as file:
            texts.append(file.read())
    nodes.ctl(lab, "apply", "-f", "-", stdin="---\n".join(texts))


def await_service(lab: Lab, address: str, port: int) -> str:
    """The backend that answers the pod `client`, as soon as one does. Raises LabError."""
    deadline = time.monotonic() + SERVICE_WITHIN
    while "error" in (reply := pods.ask(lab, "client", "tcp", to=[address, port], timeout=0.25)):
        if time.monotonic() > deadline:
            raise LabError(f"service {address} port {port} does not answer within {SERVICE_WITHIN} s: {reply['error']}")
        time.sleep(0.02)
    return str(reply["answer"]["name"])


def up(lab: Lab, paper: Paper) -> State:
    """Everything, with some pods running; what a failure leaves is removed. Raises LabError."""
    preflight(lab)
    _make_state(lab)
    with locked(lab):
        state = State(lab)
        try:
            _up(state, paper)
        except BaseException:
            _remove(lab)
            raise
    return state


def _make_state(lab: Lab) -> None:
    # The folder of all labs goes with the last of them, maybe just now, between its making and ours.
    for _ in range(10):
        with contextlib.suppress(FileNotFoundError):
            try:
                os.makedirs(lab.state, mode=0o700)
            except FileExistsError:
                raise LabError(f"somebody else brings lab {lab.name!r} up") from None
            return
    raise LabError(f"{STATE_ROOT} vanishes again and again")


def _up(state: State, paper: Paper) -> None:
    lab = state.lab
    paper.heading(f"Lab {lab.name} comes up")

    def timed(text: str, work: Callable[[], object]) -> None:
        begin = time.monotonic()
        work()
        paper.step(text, time.monotonic() - begin)

    for folder in ("actors", "log"):
        os.makedirs(f"{lab.state}/{folder}", mode=0o700)
    _mount_bpffs(lab)
    timed("2 nodes, a router, a host behind it and a rival on one segment", partial(topology.create, lab))
    for node in NODES:
        nodes.prepare(lab, node.name)
    jobs: list[Callable[[], object]] = []
    actors = [(host_actor(node.name), node.name, pods.cgroup(lab, node.name, "host")) for node in NODES]
    actors += [(name, name, pods.cgroup(lab, "elsewhere")) for name in (topology.OUTSIDE_NAME, RIVAL.name)]
    jobs += [partial(nodes.start_agent, state, node.name) for node in NODES]
    jobs += [partial(pods.start_actor, state, *actor) for actor in actors]
    jobs.append(partial(apply, lab, "pools.yaml", "services.yaml"))
    timed("an agent on each node, eBPF programs loaded; pools and services applied", partial(parallel, jobs))
    attaching = [partial(pods.create, state, pod.name, pod.node) for pod in STANDING]
    timed(f"{len(STANDING)} pods: macvlan with spiderpool's addresses, then coordinator", partial(parallel, attaching))

    def endpoints() -> None:
        nodes.ctl(lab, "apply", "-f", "-", stdin=slices(state, "web"))
        for address in VIP:
            await_service(lab, address, 80)

    timed("endpoints of service web applied; it answers", endpoints)
    state.finish()


def host_actor(node: str) -> str:
    """Name of the process that runs on the node itself."""
    return f"{node}-host"


def down(lab: Lab) -> bool:
    """Remove everything of the lab; False if there was nothing. Raises LabError."""
    found = exists(lab)
    with locked(lab) if os.path.isdir(lab.state) else contextlib.nullcontext():
        _remove(lab)
    return found


def _remove(lab: Lab) -> None:
    # In the order in which one thing holds another: processes hold namespaces and pins, pins hold programs in cgroups.
    state = State.load(lab)
    for node in NODES:
        process = state.processes.get(nodes.agent(node.name))
        if process is not None:  # it may say goodbye; if it does not, it is killed with its cgroup
            end(process, signal.SIGTERM, nodes.STOP_WITHIN)
    kill_cgroup(f"{cgroup2_root()}/{lab.name}")
    topology.remove(lab)
    while _mounted(lab.bpffs):
        # Pins are removed and not only unmounted, for some other mount namespace may have a copy of the mount.
        for node in NODES:
            shutil.rmtree(lab.pins(node.name), ignore_errors=True)
        if _libc.umount2(os.fsencode(lab.bpffs), 0):
            raise LabError(f"cannot unmount {lab.bpffs}: {os.strerror(ctypes.get_errno())}")
    shutil.rmtree(lab.state, ignore_errors=True)
    if os.path.exists(lab.state):
        raise LabError(f"{lab.state} cannot be removed")
    with contextlib.suppress(OSError):  # absent, or another lab's folder is in it
        os.rmdir(STATE_ROOT)
