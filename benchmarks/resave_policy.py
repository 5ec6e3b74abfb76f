"""Save the policy that ships under the names that its parts have now: `state_in` is `state_projector`. Every weight stays equal.

Needed once, at the commit that renames them; it goes with the next one.
"""

import json
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from rvlm.experiments.recipes import POLICY
from rvlm.policy.checkpoints import load_vla
from rvlm.provenance import provenance

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as parent:
        old = shutil.copytree(POLICY, Path(parent) / "policy")
        weights = load_file(old / "model.safetensors")
        renamed = {name.replace("state_in.", "state_projector."): value for name, value in weights.items()}
        save_file(renamed, old / "model.safetensors", {"format": "pt"})
        model, processor = load_vla(old)
        model.save_pretrained(Path(parent) / "new", processor, card="")
        saved = load_file(Path(parent) / "new" / "model.safetensors")
        assert saved.keys() == renamed.keys() and all(torch.equal(saved[name], renamed[name]) for name in saved)
        for name in ("config.json", "model.safetensors"):
            shutil.copy(Path(parent) / "new" / name, POLICY / name)
    made = json.loads((POLICY / "made.json").read_text())
    made["resaved"] = {"command": "python benchmarks/resave_policy.py", **{k: provenance()[k] for k in ("commit", "date")}}
    (POLICY / "made.json").write_text(json.dumps(made, indent=1))
