"""Two hosts on one machine: network namespaces with addresses of their own, joined by a veth pair. For tests only.

Needs root and iproute2. Processes started in the one cannot reach the other's loopback, nor listen where the other one
listens; what they write to disk both see, as on a shared file system.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any


class Host:
    """One of two: how to start a process in it."""

    def __init__(self, name: str, card: str, address: str) -> None:
        """`name`: of a namespace; empty: this machine as it is."""
        self.name, self.card, self.address = name, card, address
        self.prefix = ("ip", "netns", "exec", name) if name else ()
        # without it gloo takes the address that the machine's name stands for, which may be the loopback
        self.environment = {"GLOO_SOCKET_IFNAME": card}

    @classmethod
    def here(cls) -> "Host":
        """This machine, by its loopback."""
        return cls("", "lo", "127.0.0.1")

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*self.prefix, *command], capture_output=True, text=True, timeout=60)

    def cut(self) -> list[str]:
        """The command that pulls the plug of the network card: nothing is closed, nothing arrives any more."""
        return ["ip", "-n", self.name, "link", "set", self.card, "down"]

    def mend(self) -> None:
        """Plug it in again."""
        _ip("-n", self.name, "link", "set", self.card, "up")


class Hosts:
    """Makes two namespaces, which are named by this process, and removes them. Use it as a context."""

    def __enter__(self) -> list[Host]:
        own = os.getpid()
        network = f"10.{128 + own % 100}.{own // 100 % 250}"
        self.hosts = [Host(f"recllm-{own}-{n}", f"rl{own}{'ab'[n]}", f"{network}.{n + 1}") for n in (0, 1)]
        first, second = self.hosts
        remove_left_over()
        try:
            for host in self.hosts:
                _ip("netns", "add", host.name)
            _ip("link", "add", first.card, "netns", first.name, "type", "veth",
                "peer", "name", second.card, "netns", second.name)  # fmt: skip
            for host in self.hosts:
                _ip("-n", host.name, "addr", "add", f"{host.address}/24", "dev", host.card)
                _ip("-n", host.name, "link", "set", "lo", "up")
                host.mend()
        except BaseException:
            self.__exit__()
            raise
        return self.hosts

    def __exit__(self, *_: object) -> None:
        for host in self.hosts:  # the cards go with them
            subprocess.run(["ip", "netns", "del", host.name], capture_output=True)


def remove_left_over() -> None:
    """Namespaces of test runs that were killed."""
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
    for name, process in re.findall(r"^(recllm-(\d+)-\S+)", listed, re.M):
        if not Path(f"/proc/{process}").exists():
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def reason_against() -> str | None:
    """Why there can be no such hosts here; None where there can."""
    if os.name != "posix" or os.geteuid() != 0:
        return "two hosts are network namespaces, which root alone can make"
    if shutil.which("ip") is None:
        return "two hosts are made by `ip` of iproute2, which is not installed"
    name = f"recllm-{os.getpid()}-try"
    tried = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    subprocess.run(["ip", "netns", "del", name], capture_output=True)
    return None if tried.returncode == 0 else f"`ip netns add` does not work here: {tried.stderr.strip()}"


def machine(hosts: list[Host], number: int, port: str) -> dict[str, Any]:
    """Of a job of on_cpu: where it runs, and where the first host is."""
    return {"number": number, "count": len(hosts), "address": hosts[0].address, "port": port}


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)
