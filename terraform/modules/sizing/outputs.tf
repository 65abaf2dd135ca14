output "parameters" {
  description = "Parameters of the model, by its shapes."
  value       = local.parameters

  precondition {
    condition     = local.m.parameters == null ? true : abs(local.parameters - local.m.parameters) <= 0.02 * local.m.parameters
    error_message = "By its shapes the model has ${local.parameters} parameters, which differs from model.parameters: one of them is wrong."
  }
}

output "tensor_parallel_sizes" {
  description = "Sizes that the model can be cut into."
  value       = local.sizes
}

output "tensor_parallel_size" {
  description = "GPUs of each replica."
  value       = local.size

  precondition {
    condition     = var.tensor_parallel_size == null ? true : contains(local.sizes, var.tensor_parallel_size)
    error_message = "tensor_parallel_size does not work for these heads; these do: ${join(", ", local.sizes)}."
  }

  precondition {
    condition     = local.size != null
    error_message = "The model does not fit: take more GPUs a replica or a node, GPUs with more memory, or a shorter context."
  }
}

output "weight_bytes" {
  description = "Weights on the GPU that has the most."
  value       = local.size == null ? null : local.replica[local.size].weights
}

output "rotary_table_bytes" {
  description = "Tables of the rotary embedding on each GPU."
  value       = local.tables
}

output "step_bytes" {
  description = "Activations of the largest step on each GPU: an estimate."
  value       = local.size == null ? null : local.replica[local.size].step
}

output "usable_bytes" {
  description = "Memory of each GPU for the model, without headroom and what CUDA takes."
  value       = local.usable
}

output "kv_bytes_per_token" {
  description = "KV cache of a token on each GPU."
  value       = local.size == null ? null : local.replica[local.size].per_token
}

output "kv_bytes_per_sequence" {
  description = "KV cache of a sequence of mean length on each GPU."
  value       = local.size == null ? null : local.replica[local.size].per_token * local.mean_slots
}

output "kv_cache_bytes" {
  description = "KV cache to give each GPU: kv_cache_memory of `tidewright serve`."
  value       = local.kv_cache
}

output "kv_blocks" {
  description = "Blocks of that KV cache."
  value       = local.size == null ? null : floor(local.kv_cache / (local.replica[local.size].per_token * var.block_size))
}

output "max_sequences" {
  description = "Sequences of mean length that a replica holds at a time."
  value       = local.size == null ? null : local.sequences[local.size]
}

output "max_longest_sequences" {
  description = "Sequences of the whole context that a replica holds at a time."
  value       = local.size == null ? null : local.longest_sequences[local.size]
}

output "replicas" {
  description = "Replicas for the concurrency."
  value       = local.count
}

output "sequences_per_replica" {
  description = "Sequences of each replica at that concurrency: max_running of `tidewright serve`."
  value       = local.running
}

output "gpus" {
  description = "GPUs of all replicas."
  value       = local.size == null ? null : local.count * local.size
}

output "nodes" {
  description = "Nodes with gpus_per_node GPUs each."
  value       = local.nodes
}

output "nodes_per_replica" {
  description = "Nodes that one replica spans: nodes of `tidewright serve`."
  value       = local.nodes_per_replica
}

output "serve_options" {
  description = "Options of `tidewright serve`, for serving.yaml."
  value = {
    dtype                = var.dtype
    kv_cache_dtype       = var.kv_cache_dtype
    quantization         = var.quantization
    quantize_head        = var.quantize_head
    tensor_parallel_size = local.size
    max_model_len        = var.context
    max_running          = local.running
    kv_cache_memory      = "${local.kv_cache / local.mib}MiB"
    block_size           = var.block_size
    max_batched_tokens   = var.max_batched_tokens
  }
}
