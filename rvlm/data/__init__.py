"""Demonstrations: what an action means, statistics, video, the LeRobot format, writing, reading, windows."""
