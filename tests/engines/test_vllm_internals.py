"""What the project relies on inside vLLM, held against the installed sources: of runner V1 (CPU, GPU) and V2 (GPU).

The CPU wheel has the GPU's Python files, so this says on any machine whether a new version breaks a GPU run. What is asserted is
what the code says, not what a GPU does.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from vllm_sources import arguments, fields, file_of, find, installed, names, source, tree

import distill

pytestmark = pytest.mark.skipif(installed() is None, reason="vLLM is not installed")

OURS = Path(distill.__file__).parent
WORKER, CPU_WORKER = "v1/worker/gpu_worker.py", "v1/worker/cpu_worker.py"
RUNNERS = {"V1": "v1/worker/gpu_model_runner.py", "V2": "v1/worker/gpu/model_runner.py"}
LAYERWISE = "model_executor/model_loader/reload/layerwise.py"


def imports() -> list[tuple[str, str]]:
    """Every (module, name) that the project imports from vLLM."""
    found = []
    for path in sorted(OURS.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "vllm":
                found += [(str(node.module), each.name) for each in node.names]
    return found


def test_every_imported_name_is_there():
    asked = imports()
    assert len(asked) > 12
    assert [(module, name) for module, name in asked if name not in names(file_of(module))] == []


# ---------------------------------------------------------------------------------------- requests and rows


def test_a_capture_can_take_the_place_of_a_requests_processor():
    """vllm_patches.Capture, attach."""
    assert fields("v1/engine/logprobs.py", "LogprobsProcessor")[:6] == [
        "tokenizer", "logprobs", "prompt_logprobs", "cumulative_logprob", "num_logprobs", "num_prompt_logprobs",
    ]  # fmt: skip
    processor = source("v1/engine/output_processor.py", "OutputProcessor")
    assert "self.request_states: dict[str, RequestState] = {}" in processor
    assert "req_state.logprobs_processor.update_from_output(engine_core_output)" in processor
    assert {"new_logprobs", "new_prompt_logprobs_tensors"} <= {*fields("v1/engine/__init__.py", "EngineCoreOutput")}
    assert fields("v1/outputs.py", "LogprobsLists")[:2] == ["logprob_token_ids", "logprobs"]
    assert fields("v1/outputs.py", "LogprobsTensors")[:3] == ["logprob_token_ids", "logprobs", "selected_token_ranks"]
    assert "return req_id" in source("v1/engine/llm_engine.py", "LLMEngine.add_request")


def test_the_engine_core_is_in_this_process_with_its_scheduler():
    """vllm_patches.chunked and drain, vllm._chunks_scores."""
    assert "self.engine_core = EngineCore(" in source("v1/engine/core_client.py", "InprocClient.__init__")
    core = source("v1/engine/core.py", "EngineCore.__init__")
    assert re.search(r"self\.scheduler(: \w+)? = ", core)
    assert "self.batch_queue" in core
    scheduler = source("v1/core/sched/scheduler.py", "Scheduler.schedule")
    assert "token_budget = self.max_num_scheduled_tokens" in scheduler
    assert "not self.scheduler_config.enable_chunked_prefill" in source("v1/core/sched/scheduler.py", "Scheduler")
    step = source("v1/engine/core.py", "EngineCore.step_with_batch_queue")
    assert "elif not batch_queue:" in step
    assert "batch_queue.pop()" in step
    assert "self.vllm_config = vllm_config" in source("v1/engine/llm_engine.py", "LLMEngine.__init__")


def test_which_runner_a_device_gets():
    """V2 wherever Triton works, whatever the engine's options of this project; V1 on a CPU."""
    chosen = source("config/vllm.py", "VllmConfig.use_v2_model_runner")
    assert "if not HAS_TRITON" in chosen
    assert chosen.rstrip().endswith("return True")
    reasons = source("config/vllm.py", "VllmConfig._get_v2_model_runner_unsupported_features")
    assert "'external_launcher' and self.parallel_config.pipeline_parallel_size > 1" in reasons
    assert not re.search("sleep|prompt_logprobs|tensor_parallel_size", reasons)


# ------------------------------------------------------------------------------------------------- logits


@pytest.mark.parametrize("runner", RUNNERS)
def test_logits_are_computed_through_the_model_outside_of_the_forward_pass(runner):
    """vllm_patches.cap_vocabulary: the runner looks compute_logits up on the model at every call."""
    text = source(RUNNERS[runner], "GPUModelRunner")
    assert "self.model.compute_logits(sample_hidden_states)" in text
    prompts = {
        "V1": "self.model.compute_logits(prompt_hidden_states)",
        "V2": "self.model.compute_logits, hidden_states",
    }
    assert prompts[runner] in text


def test_cuda_graphs_and_compilation_leave_compute_logits_alone():
    decorated = find("model_executor/models/llama.py", "LlamaModel")
    whole = find("model_executor/models/llama.py", "LlamaForCausalLM")
    assert isinstance(decorated, ast.ClassDef)
    assert isinstance(whole, ast.ClassDef)
    assert "support_torch_compile" in ast.unparse(decorated.decorator_list[0])
    assert whole.decorator_list == []
    assert "def compute_logits" in ast.unparse(whole)
    # V1 wraps the model; the wrapper gives the model's own attributes, those of the instance too.
    assert "getattr(self.runnable, key)" in source("compilation/cuda_graph.py", "CUDAGraphWrapper.__getattr__")
    assert "self.model.unwrap()" in source(RUNNERS["V1"], "GPUModelRunner.get_model")
    # V2 captures the forward pass, not the sampling.
    assert "compute_logits" not in ast.unparse(tree("v1/worker/gpu/cudagraph_utils.py"))


def test_sharded_sampling_goes_past_compute_logits_and_is_off_unless_asked_for():
    """The reason for enable_batch_sharded_sampling in vllm_options."""
    sample = source(RUNNERS["V2"], "GPUModelRunner.sample")
    assert "compute_logits_local" in sample
    assert "if self.batch_sharder is not None" in sample
    assert "if self.parallel_config.enable_batch_sharded_sampling:" in source(
        RUNNERS["V2"], "GPUModelRunner.load_model"
    )
    assert "enable_batch_sharded_sampling" in fields("config/parallel.py", "ParallelConfig")
    assert "compute_logits_local" not in source(RUNNERS["V1"], "GPUModelRunner")


def test_prompt_logits_come_in_chunks_with_v2_and_whole_with_v1():
    """vllm._chunks_scores: with V1 the scheduler bounds them."""
    chunked = source("v1/worker/gpu/sample/prompt_logprob.py", "compute_prompt_logprobs_with_chunking")
    assert "range(0, prompt_token_ids.shape[0], CHUNK_SIZE)" in chunked
    assert "CHUNK_SIZE = 1024" in ast.unparse(tree("v1/worker/gpu/sample/prompt_logprob.py"))
    assert "CHUNK" not in source(RUNNERS["V1"], "GPUModelRunner._get_prompt_logprobs_dict")


def test_the_cpus_sampler_and_head_can_be_replaced():
    """vllm_patches.take_tails and float32_head, on runner V1."""
    assert arguments("v1/sample/sampler.py", "Sampler.gather_logprobs") == ["logprobs", "num_logprobs", "token_ids"]
    assert "self.gather_logprobs(" in source("v1/sample/sampler.py", "Sampler.forward")
    assert "self.sampler.gather_logprobs(scores, num_prompt_logprobs, tgt_token_ids)" in source(
        RUNNERS["V1"], "GPUModelRunner"
    )
    runner = source(RUNNERS["V1"], "GPUModelRunner._get_prompt_logprobs_dict")
    assert "for req_id, num_prompt_logprobs in num_prompt_logprobs_dict.items()" in runner
    assert "start_idx = request.num_computed_tokens" in runner
    assert "num_remaining_tokens = num_prompt_tokens - start_tok" in runner
    assert arguments(RUNNERS["V1"], "GPUModelRunner._get_prompt_logprobs_dict") == [
        "hidden_states",
        "num_scheduled_tokens",
    ]
    assert {"sampling_params", "output_token_ids", "num_computed_tokens"} <= {
        *fields("v1/worker/gpu_input_batch.py", "CachedRequestState")
    }
    assert "extra_args" in fields("sampling_params.py", "SamplingParams")
    head = "model_executor/layers/logits_processor.py"
    assert arguments(head, "LogitsProcessor._apply_head") == ["lm_head", "hidden_states", "embedding_bias"]
    assert "self._apply_head(lm_head, hidden_states, embedding_bias)" in source(head, "LogitsProcessor._get_logits")
    assert "model_config.head_dtype" in source(head, "LogitsProcessor.__init__")
    assert "class CPUModelRunner(GPUModelRunner)" in ast.unparse(tree("v1/worker/cpu_model_runner.py"))


# ------------------------------------------------------------------------------------------------ weights


@pytest.mark.parametrize("runner", RUNNERS)
def test_weights_are_reloaded_in_place(runner):
    """vllm_weights.reload."""
    assert arguments(RUNNERS[runner], "GPUModelRunner.reload_weights")[0] == "weights_iterator"
    text = source(RUNNERS[runner], "GPUModelRunner.reload_weights")
    assert re.search(r"reload_weights\(\s*(self\.)?vllm_config", text)
    assert "self.reset_encoder_cache()" in text
    assert "get_model" in source(RUNNERS[runner], "GPUModelRunner")


def test_a_reload_copies_into_the_tensors_that_graphs_hold_and_warns_of_layers_without_new_ones():
    """vllm_weights.MISSED, reload_across."""
    finish = source(LAYERWISE, "finalize_layerwise_processing")
    assert "logger.warning('%s: Failed to load weights', layer.__class__.__name__)" in finish
    assert "_copy_and_restore_kernel_tensors(layer, info)" in source(LAYERWISE, "_layerwise_process")
    assert arguments(LAYERWISE, "finalize_layerwise_processing") == ["model", "model_config"]
    assert arguments(LAYERWISE, "initialize_layerwise_reload") == ["model"]
    whole = source("model_executor/model_loader/reload/inplace.py", "reload_weights")
    parts = ["initialize_layerwise_reload(model)", "model.load_weights(weights_iterator)", "finalize_layerwise_reload("]
    assert [whole.index(part) for part in parts] == sorted(whole.index(part) for part in parts)
    # The library's own transfer between processes loads part by part between the same two calls.
    ipc = "distributed/weight_transfer/ipc_engine.py"
    assert "initialize_layerwise_reload(self.model)" in source(ipc, "IPCWeightTransferEngine.start_weight_update")
    assert "self.model.load_weights(weights)" in source(ipc, "IPCWeightTransferEngine.receive_weights")
    assert "finalize_layerwise_reload(self.model, self.model_config)" in source(
        ipc, "IPCWeightTransferEngine.finish_weight_update"
    )


def test_what_workers_are_asked_for():
    worker = source(WORKER, "Worker")
    assert "self.model_runner.reload_weights(*args, **kwargs)" in worker
    assert "return self.model_runner.get_model()" in source(WORKER, "Worker.get_model")
    assert "self.vllm_config = vllm_config" in source("v1/worker/worker_base.py", "WorkerBase.__init__")
    assert "self.model_config = vllm_config.model_config" in source("v1/worker/worker_base.py", "WorkerBase.__init__")
    assert "class CPUWorker(Worker)" in ast.unparse(tree(CPU_WORKER))


def test_experts_of_a_cpu_are_packed_again_without_a_kernel():
    """vllm_weights._forget_cpu_experts."""
    packed = source(
        "model_executor/layers/fused_moe/unquantized_fused_moe_method.py",
        "UnquantizedFusedMoEMethod",
    )
    assert "self.moe_kernel is not None" in packed


def test_the_decoration_of_transformers_classes_can_be_undone():
    """vllm_patches.restore_classes."""
    decorate = source("compilation/decorators.py", "_support_torch_compile")
    assert "cls.__bases__ = cls.__bases__ + (TorchCompileWithNoGuardsWrapper,)" in decorate
    assert "old_init = cls.__init__" in decorate
    assert "cls.__init__ = __init__" in decorate
    assert "cls.__call__ = __call__" in decorate


def test_what_is_sent_to_workers_can_be_sent_to_another_process():
    """Functions travel by name and their arguments by pickle: no closures, bound methods or iterators but in this process."""
    multi = source("v1/executor/multiproc_executor.py", "MultiprocExecutor.collective_rpc")
    assert "cloudpickle.dumps(method" in multi
    assert "enqueue((send_method, args, kwargs, output_rank))" in multi
    sent = []
    for path in (OURS / "engines").glob("vllm*.py"):
        module = ast.parse(path.read_text(encoding="utf-8"))
        own = {node.name for node in module.body if isinstance(node, ast.FunctionDef)}
        for call in ast.walk(module):
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute):
                assert call.func.attr != "apply_model", "its function is an argument: a closure cannot be pickled"
                if call.func.attr == "collective_rpc":
                    (method,) = call.args
                    name = ast.unparse(method)
                    # `transfer` names a worker's own method (test_nccl_transfer holds the names).
                    assert name in own or (path.name, name) == ("vllm.py", "call"), name
                    sent.append(name)
    assert {"_cap", "_begin", "_load_part", "_finish", "_names_head", "_undecorate"} <= {*sent}


# ------------------------------------------------------------------------------------------------- memory


def test_a_share_is_of_the_whole_card_and_must_be_free_with_a_sized_cache_too():
    """vllm_options.memory_share."""
    request = source("v1/worker/utils.py", "request_memory")
    assert "math.ceil(init_snapshot.total_memory * cache_config.gpu_memory_utilization)" in request
    assert "if init_snapshot.free_memory < requested_memory:\n        raise ValueError" in request
    assert "kv_cache_memory_bytes" not in request
    assert "request_memory(init_snapshot, self.cache_config" in source(WORKER, "Worker.init_device")
    measured = source(WORKER, "Worker.determine_available_memory")
    assert "if (kv_cache_memory_bytes := self.cache_config.kv_cache_memory_bytes):" in measured
    # Only what the engine itself adds after its start counts against its share.
    assert "self.requested_memory - profile_result.non_kv_cache_memory" in measured
    assert "gpu_memory_utilization: float = Field(default=0.92" in source("config/cache.py", "CacheConfig")


def test_level_two_keeps_the_buffers_and_wakes_in_parts():
    """vllm.sleep and sync: weights, then new ones, then the cache; scheduling goes on when all is there."""
    sleep, wake = source(WORKER, "Worker.sleep"), source(WORKER, "Worker.wake_up")
    assert "for name, buffer in model.named_buffers()" in sleep
    assert "if level == 2:" in sleep
    assert "buffer.data.copy_(self._sleep_saved_buffers[name].data)" in wake
    assert "'weights' in tags" in wake
    assert "SLEEP_TAGS = frozenset(('weights', 'kv_cache'))" in ast.unparse(tree("v1/executor/abstract.py"))
    assert "torch.accelerator.empty_cache()" in source("device_allocator/cumem.py", "CuMemAllocator.wake_up")
    core = source("v1/engine/core.py", "EngineCore.wake_up")
    assert "if fully_awake:\n        self.resume_scheduler()" in core
    assert "assert result is None" in source("v1/engine/core_client.py", "InprocClient.sleep")
    assert arguments("entrypoints/llm.py", "LLM.sleep")[0] == "level"
    assert arguments("entrypoints/llm.py", "LLM.wake_up") == ["tags"]


def test_one_engine_of_a_process_can_sleep():
    """The reason why the teacher's engine does not."""
    pool = source(WORKER, "Worker._maybe_get_memory_pool_context")
    assert "allocator.get_current_usage() == 0" in pool
    assert "one instance per process" in pool
    assert "not self.vllm_config.model_config.enable_cumem_allocator" in pool


def test_nothing_sleeps_on_a_cpu():
    """The reason for the refusal in vllm_options."""
    assert "sleep mode is not supported on CPU" in source(CPU_WORKER, "CPUWorker.sleep")
    available = source("platforms/interface.py", "Platform.is_sleep_mode_available")
    assert "CPU" not in available
    assert "PlatformEnum.CUDA" in available
    assert "Sleep mode is not supported on current platform." in source("config/model.py", "ModelConfig.__post_init__")


# ------------------------------------------------------------------------------------------ process groups


def test_an_engine_uses_the_group_that_is_there_and_destroys_it():
    """vllm_patches.keeping_group."""
    state = "distributed/parallel_state.py"
    assert "if not torch.distributed.is_initialized():" in source(state, "init_distributed_environment")
    assert "torch.distributed.destroy_process_group()" in source(state, "destroy_distributed_environment")
    assert "destroy_distributed_environment()" in source(state, "cleanup_dist_env_and_memory")


def test_an_engine_beside_each_process_takes_its_gpu_from_the_launcher():
    launched = source("v1/executor/uniproc_executor.py", "ExecutorWithExternalLauncher._distributed_args")
    assert "'env://'" in launched
    assert "os.environ['LOCAL_RANK']" in launched
