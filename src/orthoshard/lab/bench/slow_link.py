"""A slow network on one machine: one network namespace for each replica, and one for a bridge between them.

    replica i   eth0, 10.0.0.(i + 1)/24  ----- veth -----  port i   bridge
                token bucket for what it sends             token bucket for what it receives

The namespaces have no names. Each is held by a process that ends when its standard input is closed. So they disappear
with this process, even if it is killed, and the machine's own network is not changed. May import the standard library.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

CLONE_NEWNET = 0x40000000  # linux/sched.h
TOOLS = ("ip", "tc", "unshare", "nsenter")
INTERFACE = "eth0"
MOST = 200  # replicas for which there are addresses
# A bucket holds 2 ms of data: a burst is short beside a step, but has room for large segments. It holds at least
# 16 KiB, because it must hold a frame, and smaller pieces would each cost a timer.
BURST_SECONDS, LEAST_BURST = 2e-3, 16 * 2**10
QUEUE = "64mb"  # more than the sockets have in flight, so that nothing is dropped
WHAT_TO_DO = (
    "be root on Linux, in a container with the capabilities NET_ADMIN and SYS_ADMIN "
    "(docker run --cap-add=NET_ADMIN --cap-add=SYS_ADMIN)"
)


class NotAllowedError(ValueError):
    """This machine or this user cannot make such a network. The message says what would help."""


@dataclass(frozen=True)
class SlowLink:
    """The network, as the ids of the processes that hold the namespaces. It can be sent to other processes."""

    replicas: tuple[int, ...]
    hub: int

    def enter(self, replica: int) -> None:
        """Move this process into the namespace of a replica. Threads that already run stay where they are."""
        descriptor = os.open(_path(self.replicas[replica]), os.O_RDONLY)
        try:
            if ctypes.CDLL(None, use_errno=True).setns(descriptor, CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), "setns")
        finally:
            os.close(descriptor)
        os.environ["GLOO_SOCKET_IFNAME"] = INTERFACE

    def limit(self, mbit: float | None) -> None:
        """Set the bandwidth of every replica, in Mbit/s for each direction; None: as fast as the machine can."""
        for holder in self.replicas:
            _run(holder, "tc", [bucket(INTERFACE, mbit)])
        _run(self.hub, "tc", [bucket(f"port{i}", mbit) for i in range(len(self.replicas))])


def bucket(device: str, mbit: float | None) -> str:
    """Return the line for tc that limits ``device`` to ``mbit`` Mbit/s."""
    if mbit is None:
        return f"qdisc replace dev {device} root noqueue"
    burst = max(LEAST_BURST, round(mbit * 1e6 / 8 * BURST_SECONDS))
    return f"qdisc replace dev {device} root tbf rate {round(mbit * 1e6)}bit burst {burst} limit {QUEUE}"


@contextmanager
def slow_link(replicas: int) -> Generator[SlowLink]:
    """Make such a network, without limits at first. Raises ``NotAllowedError`` if that is not possible."""
    check()
    with ExitStack() as stack:
        hub, *holders = [stack.enter_context(_holder()) for _ in range(replicas + 1)]
        _run(hub, "ip", ["link add bridge type bridge", "link set bridge up"])
        for i, holder in enumerate(holders):
            wire = f"link add port{i} type veth peer name {INTERFACE} netns {holder}"
            _run(hub, "ip", [wire, f"link set port{i} master bridge up"])
            address = f"address add 10.0.0.{i + 1}/24 dev {INTERFACE}"
            _run(holder, "ip", ["link set lo up", address, f"link set {INTERFACE} up"])
        link = SlowLink(tuple(holders), hub)
        link.limit(1000)  # fails here, before any measurement, if the kernel has no token buckets
        link.limit(None)
        yield link


def sent_bytes() -> int:
    """Return the bytes that this process's namespace has sent in all, including headers and acknowledgements."""
    with open("/proc/self/net/dev", encoding="utf-8") as lines:
        numbers = next(line.partition(":")[2] for line in lines if line.strip().startswith(f"{INTERFACE}:"))
    return int(numbers.split()[8])


def check() -> None:
    """Check system, tools and user, without trying to make a network. Raises ``NotAllowedError``."""
    if not sys.platform.startswith("linux"):
        raise NotAllowedError("Only Linux has network namespaces: run this on Linux.")
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        raise NotAllowedError(
            f"There is no {', no '.join(missing)} on the PATH: install iproute2 and util-linux "
            "(apt-get install iproute2 util-linux)."
        )
    if os.geteuid() != 0:
        raise NotAllowedError(f"Only root may make network namespaces: {WHAT_TO_DO}.")


@contextmanager
def _holder() -> Generator[int]:
    """Yield the id of a process in a new namespace. It lives until the context or this process ends."""
    command = ["unshare", "--net", "sh", "-c", "echo; exec cat >&2"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        if not process.stdout.readline():
            raise NotAllowedError(f"No network namespace ({process.stderr.read().strip()}): {WHAT_TO_DO}.")
        yield process.pid


def _path(holder: int) -> str:
    return f"/proc/{holder}/ns/net"


def _run(holder: int, tool: str, lines: Sequence[str]) -> None:
    """Run lines of ip or tc in a namespace."""
    done = subprocess.run(
        ["nsenter", f"--net={_path(holder)}", tool, "-batch", "-"],
        input="\n".join(lines) + "\n",
        capture_output=True,
        text=True,
    )
    if done.returncode:
        why = " ".join(done.stderr.split())
        raise NotAllowedError(f"{tool} could not make the slow network ({why}): {WHAT_TO_DO}.")
