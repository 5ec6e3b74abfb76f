"""An environment that renders upright shows what was recorded once it is wrapped."""

import dataclasses

import numpy as np
import pytest

from rvlm.data.actions import ActionSpec
from rvlm.data.errors import SpecMismatch
from rvlm.data.windows import EpisodeDataset
from rvlm.diagnosis.env_checks import check_images
from rvlm.diagnosis.inputs import DiagnosisInputs
from rvlm.envs.stand_in import TASKS, StandIn, record_stand_in
from rvlm.envs.stored_images import StoredImages
from rvlm.envs.suites import Suite

SPEC = ActionSpec.from_card("libero")


class Upright(StandIn):
    """The stand-in of LIBERO's robot, with images as its simulator renders them."""

    def _observation(self):
        observation = super()._observation()
        return observation | {"images": {name: image[::-1, ::-1] for name, image in observation["images"].items()}}


def stored(image_size=None):
    return StoredImages(Upright(SPEC, image_size))


def test_images_are_those_of_the_recording_once_it_is_wrapped(tmp_path):
    data = EpisodeDataset(record_stand_in(StandIn(SPEC), tmp_path / "data", range(2)))
    upright, wrapped = (check_images(DiagnosisInputs(None, data, env, 1)) for env in (Upright(SPEC), stored()))
    assert (upright.fault, wrapped.fault) == ("image rotated by 180 degrees", None)


def test_an_environment_of_a_suite_is_wrapped_and_each_observation_turned():
    env, recording = Suite("mine", SPEC, tuple(TASKS), stored, max_steps=40).make((24, 32)), StandIn(SPEC, (24, 32))
    one, other = (e.reset(seed=3, options={"task": "near"})[0] for e in (env, recording))
    for _ in range(2):
        for camera in SPEC.cameras:
            np.testing.assert_array_equal(one["images"][camera], other["images"][camera])
        one, other = (e.step(recording.expert_action())[0] for e in (env, recording))


def test_images_of_a_card_without_rotation_stay_and_quarter_turns_are_refused():
    spec = dataclasses.replace(SPEC, image_rotation_deg=0.0)
    image = StoredImages(StandIn(spec)).reset(seed=0)[0]["images"]["image"]
    np.testing.assert_array_equal(image, StandIn(spec).reset(seed=0)[0]["images"]["image"])
    with pytest.raises(SpecMismatch, match="libero: expected images upright or turned by 180 degrees, got 90"):
        StoredImages(StandIn(dataclasses.replace(SPEC, image_rotation_deg=90.0)))
