"""Demonstrations: what actions mean, their statistics, recording, reading, and training samples.

Modules:
    errors: `SpecMismatch`, `CardError`, `EpisodeError`.
    instruction_checks: validation of instructions.
    observations: images by camera.
    dimensions: names of dimensions in other spellings, and their order.
    episode_checks: checks of an episode before it is recorded.
    video: frames to mp4 and back.
    tables: parquet and JSON files; an error names the file.
    cards: data cards, and the values that each field allows.
    groups: groups of dimensions of actions and states, and their conventions.
    spec_dimensions: dimensions of all groups as one vector.
    pairing: which dimension of the state shows one of the action, in which units.
    rotations: layouts of rotations, and conversion.
    normalization: statistics of actions and states; half spheres of quaternions; normalise and unnormalise.
    augmentation: random shift, crop and light of images.
    sampling: fixed budgets and weighted mixtures, deterministic in the sample position.
    actions: `ActionSpec`: conventions of actions and state, from a data card.
    holding: the action that holds a robot still.
    representations: chunks relative to the state.
    dataset_statistics: statistics of a dataset in LeRobot's format.
    lerobot_format: LeRobotDataset v3.0 on disk: features, statistics, meta files.
    shards: groups of episodes that are written together, whole or not at all.
    writer: record demonstrations as a LeRobotDataset, in parallel and resumable.
    camera_names: which features are colour cameras, and which of them a name means.
    meta: meta files of a dataset, validated.
    row_checks: index columns of the rows, compared with the tables.
    frame_alignment: alignment of video frames and table rows.
    resizing: images of all cameras in one size.
    frame_cache: decoded frames on disk, within a size limit.
    cameras: images of one camera of a dataset.
    pooled_statistics: statistics for normalisation, over datasets of one robot.
    dataset: read a LeRobotDataset, v3.0 or v2.1.
    hub_datasets: datasets by folder or name on the Hub.
    scenes: stored scenes and records of their state, for vision-language training.
    windows: training samples: windows, masks, splits.
"""
