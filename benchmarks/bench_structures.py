"""Cost of each structure as ratios: against the bare backbone on the same tokens, and against the reference implementation.

Each pair of variants takes turns in one process, so a busy machine disturbs both alike; a ratio is the median over rounds of
the two times of one round. The model is the shipped vision-language model, for appending also one of each family; inputs are
noise. Ratios, with their range and the hardware, go to `results/benchmarks.json`.

The reference implementation is rewritten here after RoboVLMs' released code (github.com/Robot-VLAs/RoboVLMs): the
language-model head and all hidden states are always computed, each camera is a separate call of the vision tower, an
interleaved sequence repeats the instruction at every frame, and acting recomputes the whole window at every step.
"""

import json
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from enlarged_families import build_enlarged

from rvlm.data.actions import ActionSpec, StatsAccumulator
from rvlm.files import atomic_write, results_dir
from rvlm.policy.collation import RobotCollator
from rvlm.policy.factory import make_policy
from rvlm.policy.observation_history import FeatureHistory, KVCachedSequence, UncachedSequence
from rvlm.policy.policy import Policy
from rvlm.report.findings import provenance
from rvlm.vlm.backbones import SMALL_VLM, as_encoder_outputs
from rvlm.vlm.prompt_batches import pad
from rvlm.vlm.tiny import FAMILIES

WINDOW, BATCH, N_ROUNDS, N_ROBOTS = 8, 16, 15, 10
ONE_IMAGE = {"kosmos2", "florence2"}  # a prompt: not interleaved
TEXT = "push the red cube towards the camera"
SPEC = ActionSpec.from_card("tabletop_franka7")
STRUCTURES = {
    "one-step": {"structure": "one_step"},
    "policy head (lstm)": {"structure": "policy_head", "history": "lstm", "n_obs_steps": WINDOW},
    "policy head (gpt)": {"structure": "policy_head", "history": "gpt", "n_obs_steps": WINDOW},
    "interleaved": {"structure": "interleaved", "n_obs_steps": WINDOW},
}
RNG = np.random.default_rng(0)


def random_stats(width):
    accumulator = StatsAccumulator()
    accumulator.update(np.random.default_rng(0).uniform(-1, 1, (100, width)))
    return accumulator.finish()


STATS = {"action": random_stats(7), "observation.state": random_stats(7)}


def frames(*shape):
    return RNG.integers(0, 256, (*shape, 2, 96, 96, 3), np.uint8)


def build(settings, vlm=SMALL_VLM):
    torch.manual_seed(0)
    return make_policy(vlm, SPEC, STATS, **settings)


def a_batch(model, processor):
    """A batch with the same number of frames for every structure."""
    t = model.config.n_obs_steps
    samples = [
        {
            "images": frames(t), "state": np.zeros((t, 7), np.float32), "action": np.zeros((t, 4, 7), np.float32),
            "action_mask": np.ones((t, 4, 7), bool), "obs_mask": np.ones(t, bool), "dataset_index": 0, "instruction": TEXT,
        }
        for _ in range(BATCH // t)
    ]  # fmt: skip
    return RobotCollator(model.prompt_builder(processor))(samples)


# -- the reference implementation ---------------------------------------------------------------------------------------
def reference_features(model, input_ids, attention_mask, pixel_values, state):
    """Features at `<act>` as the reference computes them; pixel_values (n, cameras, 3, h, w)."""
    per_camera = [
        torch.stack(list(model.backbone.model.get_image_features(pixel_values[:, [c]], return_dict=True).pooler_output))
        for c in range(pixel_values.shape[1])
    ]
    images = torch.cat(per_camera, dim=1).flatten(1, 2) if per_camera[0].ndim == 4 else torch.cat(per_camera, dim=1)
    is_act = input_ids == model.config.act_id
    state_embedding = model.state_projector(state.flatten(0, 1))
    handle = model.backbone.get_input_embeddings().register_forward_hook(
        lambda module, args, embedded: embedded.index_put((is_act,), state_embedding, accumulate=True)
    )
    out = model.backbone(
        input_ids=input_ids, attention_mask=attention_mask, mm_encoder_outputs=as_encoder_outputs(images),
        output_hidden_states=True, use_cache=False,
    )  # fmt: skip
    handle.remove()
    return out.hidden_states[-1][is_act].unflatten(0, state.shape[:2])


def reference_tokens(model, processor, n, t):
    """Token ids of n samples; an interleaved sequence repeats the whole prompt at every frame."""
    ids = model.prompt_builder(processor).token_ids(TEXT)
    rows = [ids * t] * n if model.config.structure == "interleaved" else [ids] * (n * t)
    return pad(rows, processor.tokenizer.pad_token_id)


# -- timing ------------------------------------------------------------------------------------------------------------
def ratio(name, ours, theirs, n_rounds=N_ROUNDS):
    """Median over rounds of time(ours) / time(theirs), measured in turn."""
    ours(), theirs()
    return summary(name, np.array([[_seconds(ours), _seconds(theirs)] for _ in range(n_rounds)]))


def summary(name, times):
    """A row: median and quartiles of the ratios of these pairs of times (n, 2) [s]."""
    values = times[:, 0] / times[:, 1]
    row = {"name": name, "ratio": np.median(values), "low": np.quantile(values, 0.25), "high": np.quantile(values, 0.75)}
    row |= {"ours_ms": 1000 * np.median(times[:, 0]), "theirs_ms": 1000 * np.median(times[:, 1]), "rounds": len(times)}
    print(
        f"{name:64s} {row['ratio']:5.2f} ({row['low']:.2f} to {row['high']:.2f})   "
        f"{row['ours_ms']:.1f} ms / {row['theirs_ms']:.1f} ms"
    )
    return {k: v if isinstance(v, str) else round(float(v), 4) for k, v in row.items()}


def _seconds(run):
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def training(name, settings):
    """A training step, forward and backward, against the bare backbone and against the reference implementation."""
    model, processor = build(settings)
    batch = a_batch(model, processor)
    bare = {k: batch[k] for k in ("input_ids", "attention_mask", "pixel_values")}
    t = model.config.n_obs_steps
    state, prompts = batch["state"], reference_tokens(model, processor, BATCH // t, t)

    def ours():
        model(**batch).loss.backward()

    def backbone():
        model.backbone.model(**bare, use_cache=False).last_hidden_state.mean().backward()

    def reference():
        features = model.history(reference_features(model, **prompts, pixel_values=batch["pixel_values"], state=state))
        model.head.loss(features, batch["action"], batch["action_mask"])["loss"].backward()

    return [
        ratio(f"train step, {name} / bare forward and backward", ours, backbone),
        ratio(f"train step, {name} / the reference implementation", ours, reference),
    ]


def full_window(kind, model, prompt_builder, n_robots):
    """An observation history whose window is full after the next observation, and that observation."""
    history, state = kind(model, prompt_builder), torch.zeros(n_robots, 7)
    with torch.inference_mode():
        for _ in range(WINDOW - 1):
            history.add(frames(n_robots), state, [TEXT] * n_robots)
    return history, (frames(n_robots), state, [TEXT] * n_robots)


def acting(name, settings):
    """A control step of ten robots at a full window, against the reference implementation."""
    model, processor = build(settings)
    model.eval()
    structure, t = model.config.structure, model.config.n_obs_steps
    prompt_builder, state = model.prompt_builder(processor), torch.zeros(N_ROBOTS, t, 7)
    policy = Policy(model, processor)
    policy.reset(N_ROBOTS)
    observations = [
        [{"images": {"static": i[0], "wrist": i[1]}, "state": np.zeros(7), "instruction": TEXT} for i in frames(N_ROBOTS)]
        for _ in range(2 * WINDOW)
    ]
    t_reference = t if structure == "interleaved" else 1
    prompts = reference_tokens(model, processor, N_ROBOTS, t_reference)
    window = frames(N_ROBOTS * t_reference)

    @torch.inference_mode()
    def ours():
        for observation in observations:  # windows fill and slide on the way
            policy.select_action(observation)

    @torch.inference_mode()
    def reference():
        for _ in observations:
            features = reference_features(
                model, **prompts, pixel_values=prompt_builder.pixels(window), state=state[:, :t_reference]
            )
            model.head.predict(model.history(features)[:, -1])

    rows = [ratio(f"act, {name}, {2 * WINDOW} steps of {N_ROBOTS} robots / the reference implementation", ours, reference, 5)]
    if structure == "interleaved":
        rows.append(_appending(name, model, prompt_builder))
    return rows


def _appending(name, model, prompt_builder, n_robots=N_ROBOTS, n_rounds=N_ROUNDS):
    """The step that fills the window: recomputed against appended to the KV cache."""
    times = []
    for _ in range(n_rounds + 1):
        pair = []
        for kind in (UncachedSequence, KVCachedSequence):
            history, observation = full_window(kind, model, prompt_builder, n_robots)
            with torch.inference_mode():
                pair.append(_seconds(lambda h=history, o=observation: (h.add(*o), h.predict())))
        times.append(pair)
    return summary(f"act, {name}, full window of {WINDOW}: recomputation / appending", np.array(times[1:]))


def families():
    """As `_appending`, in every causal family with several images a prompt, enlarged until computing dominates."""
    for name in (name for name in FAMILIES if name not in ONE_IMAGE):
        with TemporaryDirectory() as folder:
            build_enlarged(name, Path(folder))
            model, processor = build(STRUCTURES["interleaved"], folder)
        yield _appending(f"{name} enlarged", model.eval(), model.prompt_builder(processor), 1, 5)


def flatness():
    """A control step of a policy head with a window of 16 observations against one of 2."""
    histories = {}
    for t in (2, 16):
        model, processor = build({**STRUCTURES["policy head (lstm)"], "n_obs_steps": t})
        histories[t] = FeatureHistory(model.eval(), model.prompt_builder(processor))
    observation = (frames(N_ROBOTS), torch.zeros(N_ROBOTS, 7), [TEXT] * N_ROBOTS)

    @torch.inference_mode()
    def step(t):
        histories[t].add(*observation)
        histories[t].predict()

    for _ in range(16):
        step(2), step(16)
    return [ratio("act, policy head (lstm), window of 16 / window of 2", lambda: step(16), lambda: step(2))]


def main():
    torch.set_num_threads(1)
    rows = [row for name, settings in STRUCTURES.items() for row in training(name, settings)]
    rows += [row for name, settings in STRUCTURES.items() for row in acting(name, settings)]
    rows += flatness()
    rows += families()
    path = results_dir() / "benchmarks.json"
    settings = {"threads": 1, "frames_per_train_step": BATCH, "window": WINDOW, "robots": N_ROBOTS}
    atomic_write(path, json.dumps({**settings, **provenance(), "rows": rows}, indent=1))
    print(f"{len(rows)} ratios: {path}")


if __name__ == "__main__":
    main()
