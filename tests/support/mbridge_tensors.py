"""What mbridge, another project's conversion, makes of Hugging Face folders: Megatron tensors by global name.

    python tests/support/mbridge_tensors.py REQUEST.json

The request: ``models``: by name, ``folder``, ``target`` (a safetensors file to write), and ``names``. Names null:
mbridge loads the folder into a GPTModel of megatron-core, and what it puts there is written. mbridge's layer specs ask
for transformer-engine, so the engine's takes their place, which has no experts as mbridge knows them: for models with
experts `names` are global names, and mbridge's mapping is asked for each.
"""

from __future__ import annotations

import json
import re
import sys
import types
from pathlib import Path
from typing import Any

_EXPERT = re.compile(r"(\.mlp\.experts\.)local_experts\.(\d+)\.(linear_fc[12]\.weight)$")


def main(request: Path) -> None:
    from swift_dist.engines.megatron import cpu_shim

    cpu_shim.apply()
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from safetensors.torch import save_file

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(0)
    for model in json.loads(request.read_text())["models"].values():
        folder, names = Path(model["folder"]), model["names"]
        bridge = make_bridge(folder, builds=names is None)
        save_file(loaded(bridge, folder) if names is None else mapped(bridge, folder, names), model["target"])


def make_bridge(folder: Path, builds: bool, dtype: str = "float32") -> Any:
    """mbridge's object for a model; `builds`: it will be asked for megatron-core's model."""
    import torch

    from swift_dist.engines.megatron import spec

    # Only its vision models use einops, which nothing else here needs.
    sys.modules.setdefault("einops", types.SimpleNamespace(rearrange=None))  # type: ignore[arg-type]
    import mbridge  # noqa: F401
    from mbridge.core.bridge import _MODEL_REGISTRY
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    # As transformers 4 had them, which mbridge reads.
    config.rope_theta, config.rope_scaling = config.rope_parameters["rope_theta"], None
    kind = _MODEL_REGISTRY[config.model_type]
    own: dict[str, Any] = {
        # It notes tied embeddings in this table of the class: later models would have them too.
        "_DIRECT_MAPPING": dict(kind._DIRECT_MAPPING),
        "_get_transformer_layer_spec": lambda self, vp_stage=None: spec.block_spec(self.config, vp_stage),
    }
    if not builds:  # this megatron-core's configuration of latent attention lacks a field that mbridge states
        own["TransformerConfigClass"] = types.SimpleNamespace
    return type(kind.__name__, (kind,), own)(config, dtype=getattr(torch, dtype))


def loaded(bridge: Any, folder: Path) -> dict[str, Any]:
    (model,) = bridge.get_model(weight_path=str(folder), bf16=False)
    return {name: values.clone() for name, values in model.state_dict().items() if "_extra_state" not in name}


def mapped(bridge: Any, folder: Path, names: list[str]) -> dict[str, Any]:
    from safetensors.torch import load_file

    weights, found = load_file(folder / "model.safetensors"), {}
    for name in names:
        theirs = _EXPERT.sub(r"\1\3\2", name)  # experts as transformer-engine's grouped linear names them
        sources = bridge._weight_name_mapping_mcore_to_hf(theirs)
        found[name] = bridge._weight_to_mcore_format(theirs, [weights[source] for source in sources]).clone()
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]))
