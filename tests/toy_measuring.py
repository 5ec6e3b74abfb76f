"""In place of the process that measures rows on a card: it ends, sleeps, or answers, and imports nothing."""

import os
import time


def fake(connection, run):
    connection.send({"about": {"name": "fake", "bytes": None}, "precision": "fp32"})
    while True:
        row = connection.recv()
        if row["name"] == "dies":
            os._exit(3)
        if row["name"] == "sleeps":
            time.sleep(600)
        connection.send({"hz": os.getpid(), "prediction_ms": 1.0, "slowest_ms": 1.0, "restart": row["name"] == "spoils"})
