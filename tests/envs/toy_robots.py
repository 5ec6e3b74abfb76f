"""Stubs of LeRobot's `Robot`, with the names that its robots have; they reach every target at once."""

import numpy as np

SO101_JOINTS = ("shoulder_pan.pos", "shoulder_lift.pos", "elbow_flex.pos", "wrist_flex.pos", "wrist_roll.pos")
SO101 = (*SO101_JOINTS, "gripper.pos")


class Robot:
    """As `lerobot.robots.Robot`: numbers by name, cameras by name and (h, w, 3)."""

    def __init__(self, numbers, cameras, told=()):
        self.values, self.cameras = {name: 0.0 for name in numbers} | dict(told), dict(cameras)
        self.action_features = dict.fromkeys(numbers, float)
        self.observation_features = {**dict.fromkeys(self.values, float), **self.cameras}
        self.is_connected, self.sent, self.fault = False, [], None

    def connect(self, calibrate=True):
        self.is_connected = True

    def disconnect(self):
        self.is_connected = False

    def images(self):
        return {name: np.full(shape, 10 * (i + 1), np.uint8) for i, (name, shape) in enumerate(self.cameras.items())}

    def get_observation(self):
        assert self.is_connected
        return {**self.values, **self.images()}

    def send_action(self, action):
        assert self.is_connected and action.keys() <= self.action_features.keys()
        if self.fault:
            raise self.fault
        self.sent.append(action)
        self.values.update(action)
        return action


class Operator:
    """An operator with one answer to every question, who stops at a step."""

    def __init__(self, answer=True, stops_at=None):
        self.answer, self.stops_at, self.questions, self.n_polls = answer, stops_at, [], 0

    def confirm(self, question):
        self.questions.append(question)
        return self.answer

    def is_stopped(self):
        self.n_polls += 1
        return self.n_polls == self.stops_at


class Time:
    """A clock that only waiting and working move."""

    def __init__(self):
        self.now = 100.0

    def sleep(self, seconds):
        assert seconds >= 0
        self.now += seconds

    def clock(self):
        return self.now
