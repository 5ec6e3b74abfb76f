"""The channel to a notebook's kernel loses nothing."""

import asyncio
import time

import pytest
import zmq
import zmq.asyncio
from jupyter_client.channels import AsyncZMQSocketChannel
from jupyter_client.session import Session

from rvlm.cli.kernels import _Channel

SESSION = Session(key=b"key")


async def receive_after_a_send(kind, wait_s):
    """A reply comes while the client is busy; the client sends, and then waits for the reply. Returns the reply's type."""
    with (
        zmq.asyncio.Context() as context,
        zmq.Context() as other,
        context.socket(zmq.DEALER) as mine,
        other.socket(zmq.ROUTER) as kernel,
    ):
        mine.connect(f"tcp://127.0.0.1:{kernel.bind_to_random_port('tcp://127.0.0.1')}")
        channel = kind(mine, SESSION)
        channel.send(SESSION.msg("execute_request"))
        client, *_ = kernel.recv_multipart()
        waiting = asyncio.ensure_future(channel.get_msg())
        await asyncio.sleep(0.05)  # let it wait
        SESSION.send(kernel, "execute_reply", {"status": "ok"}, ident=[client])
        time.sleep(0.1)  # the loop handles an output; the reply arrives meanwhile
        channel.send(SESSION.msg("comm_msg"))
        return (await asyncio.wait_for(waiting, wait_s))["msg_type"]


def test_what_arrives_while_a_message_is_sent_is_received():
    assert asyncio.run(receive_after_a_send(_Channel, 30)) == "execute_reply"


def test_the_librarys_own_channel_still_needs_the_fix():
    """When this fails, `_Channel` can be removed."""
    with pytest.raises(TimeoutError):
        asyncio.run(receive_after_a_send(AsyncZMQSocketChannel, 1))
