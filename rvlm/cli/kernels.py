"""The kernel that papermill runs a notebook in: this interpreter's, spoken to over a channel that misses nothing."""

from typing import Any

import zmq
from ipykernel.kernelspec import get_kernel_dict
from jupyter_client import AsyncKernelManager
from jupyter_client.asynchronous import AsyncKernelClient
from jupyter_client.channels import AsyncZMQSocketChannel
from jupyter_client.kernelspec import KernelSpec
from traitlets import Type, default


class _Channel(AsyncZMQSocketChannel):
    """A channel that looks for arrivals after it has sent.

    jupyter_client sends on the bare socket, and ZeroMQ's edge-triggered wake-up for a message that arrives in that moment
    is lost: nbclient then waits for ever (an `interact` in a cell is enough, for its output travels back to the kernel).
    """

    def send(self, msg: dict[str, Any]) -> None:
        super().send(msg)
        self.socket.get(zmq.EVENTS)  # pyzmq wakes the waiting receivers if something is there


class _Client(AsyncKernelClient):
    shell_channel_class = Type(_Channel)


def kernel_manager(environment: dict[str, str]) -> type[AsyncKernelManager]:
    """A manager that ignores installed kernelspecs, for "python3" may be registered for another environment.

    Args:
        environment: Variables that its kernels get beside this process's own, which importing `rvlm` has completed.
    """

    class ThisInterpreter(AsyncKernelManager):
        client_factory = Type(_Client)

        @default("transport_encryption")
        def _encrypt(self) -> str:
            return "auto"  # or the kernel warns that others on this machine could read along

        @property
        def kernel_spec(self) -> KernelSpec:
            return KernelSpec(**get_kernel_dict(), env=environment)

    return ThisInterpreter
