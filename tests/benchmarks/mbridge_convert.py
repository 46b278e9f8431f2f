"""mbridge's way from a Hugging Face folder to a torch_dist checkpoint, for bench_convert: it builds the model, on CPU.

python tests/benchmarks/mbridge_convert.py SOURCE TARGET
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))


def main(source: Path, target: Path) -> None:
    from swift_dist.engines.megatron import cpu_shim

    cpu_shim.apply()
    import torch.distributed as dist
    from mbridge_tensors import make_bridge
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(0)
    bridge = make_bridge(source, builds=True, dtype="bfloat16")
    (model,) = bridge.get_model(weight_path=str(source), bf16=False)
    model.bfloat16()
    target.mkdir()
    style = {"non_homogeneous_layers": True}
    dist_checkpointing.save(model.sharded_state_dict(metadata=style), str(target), content_metadata=style)


if __name__ == "__main__":  # the save starts a process that imports this file again
    main(Path(sys.argv[1]), Path(sys.argv[2]))
