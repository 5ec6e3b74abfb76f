"""Training stages: data, initial weights and a budget, run resumably in processes of their own.

Modules:
    stages: `Stage`: the configuration of a training, and its folder.
    feature_cache: features of a frozen vision tower, computed once per frame.
    frozen_backbone: what is read at `<act>` of a frozen backbone, computed once per frame.
    detection: stage 0: detection pre-training of the vision tower.
    action_vocabulary: the byte pairs of head "fast", learned from a stage's chunks.
    stage_data: model, processor, samples and collator of each kind of stage.
    trainer_checkpoints: checkpoints of a running training, and resuming from the newest complete one.
    learning_rates: a schedule in two steps, and a learning rate of a part of the weights.
    weight_averaging: an exponential moving average of the trained weights.
    trainer: one process of a stage, on `transformers.Trainer`: optimizer, learning-rate schedule, loss, log.
    launch: run stages, alone or in parallel.
    preload: what the server imports that training processes are forked from.
    search: hyperparameter search with Optuna, one storage for many workers.
    memory_plan: parameters, memory and time of a training step, from configurations alone.
    cost: memory and FLOPs of forward and backward, on fake tensors or measured.
"""
