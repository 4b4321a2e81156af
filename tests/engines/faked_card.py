"""vLLM's own config classes for a GPU that is not here: `python faked_card.py RUNNER OPTIONS` prints what each options dict becomes.

The platform is vLLM's class for CUDA without NVML, with what only a card knows filled in (capability, memory, number of GPUs);
the compiled extension that its module imports is an empty one, and Triton is taken to work. `EngineArgs.create_engine_config`
then runs whole, through every validator of `VllmConfig` and the platform's own. No worker, kernel or allocator is made.
"""

from __future__ import annotations

import json
import os
import sys
import types
from typing import Any

GIB = 2**30


def main(runner: str, given: str) -> None:
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1" if runner == "V2" else "0"
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    sys.modules["vllm._C_stable_libtorch"] = types.ModuleType("vllm._C_stable_libtorch")
    import vllm.platforms as platforms
    from vllm.platforms.cuda import NonNvmlCudaPlatform
    from vllm.platforms.interface import DeviceCapability

    class Card(NonNvmlCudaPlatform):  # type: ignore[misc]
        get_device_capability = classmethod(lambda cls, device_id=0: DeviceCapability(9, 0))
        get_device_name = classmethod(lambda cls, device_id=0: "NVIDIA H100 80GB HBM3")
        get_device_total_memory = classmethod(lambda cls, device_id=0: 80 * GIB)
        device_count = classmethod(lambda cls: 8)
        check_if_supports_dtype = classmethod(lambda cls, dtype: None)
        is_cumem_allocator_available = classmethod(lambda cls: True)

    platforms._current_platform = Card()
    import torch
    import vllm.config.vllm as configs
    import vllm.model_executor.models.registry as registry
    from vllm import EngineArgs
    from vllm.usage.usage_lib import UsageContext

    configs.HAS_TRITON = True
    # Storing what an architecture can do for the next start imports the attention kernels.
    registry._LazyRegisteredModel._save_modelinfo_to_cache = lambda *_: None
    torch.accelerator.device_count = lambda: 8
    found: list[Any] = []
    for options in json.loads(given):
        options.pop("use_tqdm_on_load")  # of vllm.LLM
        try:
            config = EngineArgs(**options).create_engine_config(UsageContext.LLM_CLASS)
        except Exception as error:
            found.append({"error": str(error)})
            continue
        found.append(
            {
                "v2": config.use_v2_model_runner,
                "device": config.device_config.device_type,
                "worker": config.parallel_config.worker_cls,
                "share": config.cache_config.gpu_memory_utilization,
                "cache": config.cache_config.kv_cache_memory_bytes,
                "prefix": config.cache_config.enable_prefix_caching,
                "graphs": str(config.compilation_config.cudagraph_mode),
                "sleep": [config.model_config.enable_sleep_mode, config.model_config.enable_cumem_allocator],
                "head": str(config.model_config.head_dtype),
                "length": config.model_config.max_model_len,
                "logprobs": [config.model_config.max_logprobs, config.model_config.logprobs_mode],
                "executor": str(config.parallel_config.distributed_executor_backend),
                "world": config.parallel_config.world_size,
                "sharded_sampling": config.parallel_config.enable_batch_sharded_sampling,
                "chunked": config.scheduler_config.enable_chunked_prefill,
                "batched": config.scheduler_config.max_num_batched_tokens,
                "sequences": config.scheduler_config.max_num_seqs,
            }
        )
    print("FOUND", json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
