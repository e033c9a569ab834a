"""Two nodes on one machine: network namespaces with a link between them. Takes root."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from sharding.errors import UsageError


@dataclass(frozen=True, kw_only=True, slots=True)
class Node:
    """A network namespace, which is connected to another one."""

    name: str
    interface: str
    address: str

    def run(self, *command: str) -> None:
        """Run a command in it."""
        subprocess.run(["ip", "netns", "exec", self.name, *command], check=True)

    def cut(self) -> None:
        """Take the link down."""
        self.run("ip", "link", "set", self.interface, "down")

    def mend(self) -> None:
        """Take it up again."""
        self.run("ip", "link", "set", self.interface, "up")


@contextmanager
def two_nodes() -> Iterator[tuple[Node, Node]]:
    """Two network namespaces with a link between them."""
    names = [f"chaos{os.getpid()}{letter}" for letter in "ab"]
    nodes = tuple(
        Node(name=name, interface=f"v{name}"[:15], address=f"10.213.77.{at}")
        for at, name in enumerate(names, start=1)
    )
    try:
        for name in names:
            ip("netns", "add", name)
        first, second = nodes
        ip("link", "add", first.interface, "netns", first.name, "type", "veth",
           "peer", "name", second.interface, "netns", second.name)  # fmt: skip
        for node in nodes:
            node.run("ip", "address", "add", f"{node.address}/24", "dev", node.interface)
            node.run("ip", "link", "set", "lo", "up")
            node.mend()
        yield first, second
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


def ip(*arguments: str) -> None:
    """Run ip. Raises UsageError where this machine does not allow it."""
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise UsageError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
