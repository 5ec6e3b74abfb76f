"""What each kind of row of `benchmarks/gpu.py` measures, in a process that does nothing else."""

import contextlib
import dataclasses
import gc
import math
import statistics
import tempfile

import gpu_models
import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoConfig

from rvlm.policy.factory import make_policy
from rvlm.policy.policy import Policy
from rvlm.provenance import provenance
from rvlm.training.cost import measure_step, synchronized_time
from rvlm.training.memory_plan import plans
from rvlm.vlm.backbones import SMALL_VLM, language_model, vision_modules
from rvlm.vlm.quantization import precision

SEED, CHUNK = 0, 8
SIZES = {
    "true": {"batch": 8, "small_batch": 64, "window": 8, "steps": 24, "rounds": 5},
    "tiny": {"batch": 2, "small_batch": 4, "window": 3, "steps": 4, "rounds": 1},
}
ONE_STEP = {"structure": "one_step", "head": "mlp", "chunk_size": 4}
POLICIES = {
    "one step": ONE_STEP,
    "policy head": {**ONE_STEP, "structure": "policy_head", "history": "lstm"},
    "interleaved": {**ONE_STEP, "structure": "interleaved"},
    "chunked": {**ONE_STEP, "chunk_size": CHUNK, "n_action_steps": CHUNK},
}
PRECISION_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def measure(row, run):
    """Measure one row; a failure becomes its reason.

    Args:
        row: As of `gpu.rows`.
        run: `device`, `size`, and `home`, a folder for configurations.

    Returns:
        The measured numbers, or `failed` with the reason; `restart` if the process should do nothing more.
    """
    torch.manual_seed(SEED)
    try:
        result = KINDS[row["kind"]](row, run)
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        result = {"failed": text if len(text) < 600 else f"{text[:600]} ..."}
        result |= {"batch_size": SIZES[run["size"]]["batch"]} if row["kind"] == "training" else {}
        error.__traceback__ = None  # holds the row's tensors
    return {**result, "provenance": provenance(), "restart": not _is_clean(run["device"])}


def about(run):
    """The device, and what it computes in.

    Raises:
        RuntimeError: There is no card.
    """
    if run["device"] == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("expected a card, got none; to try the code: make gpu DEVICE=cpu SIZE=tiny")
    card = torch.cuda.get_device_properties(0) if run["device"] == "cuda" else None
    about = {"name": card.name, "bytes": card.total_memory} if card else {"name": "CPU", "bytes": None}
    return {"about": about, "precision": PRECISION_NAMES[compute_precision(run["device"])]}


def _is_clean(device):
    """Whether the device works, with little memory in use."""
    torch._dynamo.reset()
    gc.collect()
    if device != "cuda":
        return True
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return torch.cuda.memory_allocated() < 256e6
    except RuntimeError:
        return False


def compute_precision(device):
    """What the device computes in: float32 on a CPU, bfloat16 where the card has it, else float16."""
    return precision() if device == "cuda" else torch.float32


# -- training -----------------------------------------------------------------------------------------------------------
def plan(model, finetuning, run):
    """Plans of a step without and with gradient checkpointing [byte], computed on the CPU."""
    folder = gpu_models.vlm_folder(model, run["size"], run["home"])
    n_image_tokens, n_text_tokens = gpu_models.token_counts(folder)
    settings = {"finetuning": finetuning, "lora_rank": gpu_models.LORA_RANK, "batch_size": SIZES[run["size"]]["batch"]}
    settings |= {"precision": run["precision"], "n_text_tokens": n_text_tokens}
    made = plans(AutoConfig.from_pretrained(folder), n_image_tokens, ONE_STEP, **settings)
    return [{**dataclasses.asdict(part), "peak": part.peak} for part in made]


def _autocast(dtype, device):
    return lambda: torch.autocast(device, dtype, enabled=dtype != torch.float32)


def _policy(row, run, settings, finetuning):
    """Policy and processor, frozen weights in the computation's precision, trained ones in float32."""
    dtype = torch.float32 if finetuning == "full" else compute_precision(run["device"])
    folder = gpu_models.vlm_folder(row["model"], run["size"], run["home"])
    return gpu_models.random_policy(folder, settings, finetuning, dtype, run["device"])


def training(row, run):
    """Peak memory and time of a step, and of forward and backward against the bare backbone's on the same inputs."""
    model, processor = _policy(row, run, ONE_STEP, row["finetuning"])
    if row["gradient_checkpointing"]:
        older = not hasattr(model, "activation_checkpointing_enable")  # before transformers 5.23
        (model.gradient_checkpointing_enable if older else model.activation_checkpointing_enable)({"use_reentrant": False})
    batch = gpu_models.random_batch(model, processor, SIZES[run["size"]]["batch"], run["device"])
    measured = _measured_step(model.train(), batch, run)
    ours, bare = _against_bare(model, batch, run)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    times = {"forward_backward_s": ours, "bare_forward_backward_s": bare, "ratio_to_bare": ours / bare}
    return {**measured, **times, "trained": trained}


def _measured_step(model, batch, run, wrapped=None):
    """Peak [byte] and time [s] of a whole step of the model, or of a wrapper of it."""
    dtype = compute_precision(run["device"])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    scaler = torch.amp.GradScaler(run["device"], enabled=dtype == torch.float16)

    def step():
        with _autocast(dtype, run["device"])():
            loss = (wrapped or model)(**batch).loss
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    step()
    states = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
    held = [*model.parameters(), *batch.values(), *states]
    measured = measure_step(step, sum(t.numel() * t.element_size() for t in held))
    return {**measured, "batch_size": len(batch["state"]), "precision": PRECISION_NAMES[dtype]}


def _against_bare(model, batch, run):
    """Medians of the times [s] of forward and backward, in turn: of the policy, and of its backbone alone."""
    autocast = _autocast(compute_precision(run["device"]), run["device"])
    own = ("state", "action", "action_mask", "obs_mask", "dataset_index")
    inputs = {name: value for name, value in batch.items() if name not in own}
    embedding = model.backbone.get_input_embeddings()

    def ours():
        with autocast():
            loss = model(**batch).loss
        loss.backward()

    def bare():
        handle = embedding.register_forward_hook(lambda module, args, out: out if out.requires_grad else out.requires_grad_())
        with autocast():
            hidden = model.backbone.base_model(**inputs, use_cache=False).last_hidden_state
        hidden.float().mean().backward()
        handle.remove()

    times = [(timed(ours), timed(bare)) for _ in range(SIZES[run["size"]]["rounds"] + 1)][1:]
    return [statistics.median(column) for column in zip(*times, strict=True)]


def timed(call):
    """Seconds of a call, the device's work included."""
    started = synchronized_time()
    call()
    return synchronized_time() - started


# -- acting -------------------------------------------------------------------------------------------------------------
@torch.inference_mode()
def acting(row, run):
    """Control steps of one robot, images included; the window is full, and slides."""
    settings, size = POLICIES[row["policy"]], SIZES[run["size"]]
    if settings["structure"] != "one_step":
        settings = {**settings, "n_obs_steps": size["window"]}
    model, processor = _policy(row, run, settings, "head")
    policy = Policy(model, processor)
    seen = gpu_models.observations(model, policy.prompt_builder, 2)
    difference = {}
    if row["compile"]:
        eager = policy.predict_action_chunk(seen[0])
        compile_s = timed(
            lambda: (compile_parts(model, run["device"], row["policy"]), policy.reset(), policy.select_action(seen[0]))
        )
        policy.reset()
        difference = {"compile_s": compile_s, "difference": float(np.abs(policy.predict_action_chunk(seen[0]) - eager).max())}
    policy.reset()
    n_before = 2 * size["window"]
    for i in range(n_before):
        policy.select_action(seen[i % 2])
    times = [timed(lambda i=i: policy.select_action(seen[i % 2])) for i in range(size["steps"])]
    history = type(policy.history).__name__
    return {**_rates(times, n_before, policy.n_action_steps), "steps": len(times), "history": history, **difference}


def _rates(times, n_before, n_action_steps):
    """Median of the steps that predict, the slowest step (of a window that is read anew, say), and the rate over all."""
    predicting = [seconds for i, seconds in enumerate(times, n_before) if i % n_action_steps == 0]
    milliseconds = {"prediction_ms": 1000 * statistics.median(predicting), "slowest_ms": 1000 * max(times)}
    return {**milliseconds, "hz": len(times) / math.fsum(times)}


def compile_parts(model, device, policy):
    """Compile language model, vision tower and connector in place; on a CPU nothing is generated, only traced.

    CUDA graphs take one shape, and reuse their outputs' memory: not for interleaved policies, whose key-value cache grows.
    """
    options = {"dynamic": True} if policy == "interleaved" else {"mode": "reduce-overhead"}
    options = options if device == "cuda" else {"backend": "eager", "dynamic": policy == "interleaved"}
    for part in (language_model(model.backbone), *vision_modules(model.backbone)):
        part.compile(**options)


# -- several processes' wrappers, with one; the small model -------------------------------------------------------------
@contextlib.contextmanager
def process_group(device):
    with tempfile.TemporaryDirectory() as folder:
        backend = "nccl" if device == "cuda" else "gloo"
        dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=0, world_size=1)
        try:
            yield
        finally:
            dist.destroy_process_group()


def sharded(row, run):
    """A full step under DDP or FSDP2, of one process."""
    model, processor = _policy(row, run, ONE_STEP, "full")
    batch = gpu_models.random_batch(model, processor, SIZES[run["size"]]["batch"], run["device"])
    model.train()
    with process_group(run["device"]):
        if row["wrapper"] == "DDP":
            wrapped = DistributedDataParallel(model, device_ids=[0] if run["device"] == "cuda" else None)
        else:
            mesh, wrapped = init_device_mesh(run["device"], (1,)), None
            for layer in language_model(model.backbone).layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(model, mesh=mesh)
        measured = _measured_step(model, batch, run, wrapped)
        return {**measured, "samples_per_s": measured["batch_size"] / measured["seconds"]}


def small(row, run):
    """Training throughput of the shipped model: steps on a batch that is there, and with its collation."""
    model, processor = make_policy(SMALL_VLM, gpu_models.SPEC, gpu_models.STATS, **ONE_STEP)
    n = SIZES[run["size"]]["small_batch"]
    batch = gpu_models.random_batch(model.to(run["device"]).train(), processor, n, run["device"])
    measured = _measured_step(model, batch, run)
    collation = timed(lambda: gpu_models.random_batch(model, processor, n, run["device"]))
    rates = {"samples_per_s": n / measured["seconds"], "samples_per_s_with_collation": n / (measured["seconds"] + collation)}
    return {**measured, **rates}


KINDS = {"training": training, "acting": acting, "sharded": sharded, "small": small}
