"""The kernel that papermill runs a notebook in: this interpreter's, over a channel that loses no message."""

from typing import Any

import zmq
from ipykernel.kernelspec import get_kernel_dict
from jupyter_client import AsyncKernelManager
from jupyter_client.asynchronous import AsyncKernelClient
from jupyter_client.channels import AsyncZMQSocketChannel
from jupyter_client.kernelspec import KernelSpec
from traitlets import Type, default


class _Channel(AsyncZMQSocketChannel):
    """A channel that polls for received messages after each send.

    jupyter_client sends on the bare socket, which can lose ZeroMQ's edge-triggered event for a message that arrives at that
    moment: nbclient then waits forever (an `interact` in a cell is enough, as its output is sent back to the kernel).
    """

    def send(self, msg: dict[str, Any]) -> None:
        super().send(msg)
        self.socket.get(zmq.EVENTS)  # pyzmq wakes the receivers if a message is there


class _Client(AsyncKernelClient):
    shell_channel_class = Type(_Channel)


def kernel_manager(environment: dict[str, str]) -> type[AsyncKernelManager]:
    """A kernel manager that ignores installed kernelspecs, as "python3" may be registered for another environment.

    Args:
        environment: Variables for its kernels, in addition to this process's own.
    """

    class ThisInterpreter(AsyncKernelManager):
        client_factory = Type(_Client)

        @default("transport_encryption")
        def _encrypt(self) -> str:
            return "auto"  # otherwise the kernel warns of an unencrypted connection

        @property
        def kernel_spec(self) -> KernelSpec:
            return KernelSpec(**get_kernel_dict(), env=environment)

    return ThisInterpreter
