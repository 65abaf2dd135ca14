variable "model" {
  description = "Shapes of the model, as in its config.json; `tidewright plan --json` prints this object as sizing_model."
  type = object({
    hidden_size       = number
    intermediate_size = number
    layers            = number
    query_heads       = number
    kv_heads          = number
    head_dim          = number
    vocab_size        = number
    max_positions     = number
    parameters        = optional(number)      # as published, for a check of the others
    tied_embeddings   = optional(bool, false) # the embedding is also the head
    qkv_bias          = optional(bool, false)
    output_bias       = optional(bool, false)
    mlp_bias          = optional(bool, false)
    qk_norm           = optional(bool, false)
    norms_after       = optional(bool, false) # norms after attention and MLP, too (Gemma)
    float32_norms     = optional(bool, false) # likewise
    rotary_tables     = optional(number, 1)   # 2 where windowed layers turn differently (Gemma 3)
  })

  validation {
    condition = alltrue([
      for name in ["hidden_size", "intermediate_size", "layers", "query_heads", "kv_heads", "head_dim", "vocab_size", "max_positions", "rotary_tables"] :
      try(var.model[name] >= 1 && floor(var.model[name]) == var.model[name], false)
    ])
    error_message = "Each size of the model must be a positive whole number."
  }

  validation {
    condition     = var.model.kv_heads <= 1024 && try(var.model.query_heads % var.model.kv_heads == 0, false)
    error_message = "query_heads must be a multiple of kv_heads, of which there are at most 1024."
  }
}

variable "dtype" {
  description = "Number format of weights: bfloat16, float16 or float32."
  type        = string
  default     = "bfloat16"

  validation {
    condition     = contains(["bfloat16", "float16", "float32"], var.dtype)
    error_message = "dtype must be bfloat16, float16 or float32."
  }
}

variable "kv_cache_dtype" {
  description = "Number format of the KV cache: auto (as dtype), bfloat16, float16, float32, int8 or fp8."
  type        = string
  default     = "auto"

  validation {
    condition     = contains(["auto", "bfloat16", "float16", "float32", "int8", "fp8"], var.kv_cache_dtype)
    error_message = "kv_cache_dtype must be auto, bfloat16, float16, float32, int8 or fp8."
  }
}

variable "quantization" {
  description = "Number format of weights while they are loaded: auto or none (as dtype), int8, w8a8, int4-g32, int4-g64, int4-g128 or fp8."
  type        = string
  default     = "auto"

  validation {
    condition     = contains(["auto", "none", "int8", "w8a8", "int4-g32", "int4-g64", "int4-g128", "fp8"], var.quantization)
    error_message = "quantization must be auto, none, int8, w8a8, int4-g32, int4-g64, int4-g128 or fp8."
  }
}

variable "quantize_head" {
  description = "What head and embedding become with quantization: int8, same or keep."
  type        = string
  default     = "int8"

  validation {
    condition     = contains(["int8", "same", "keep"], var.quantize_head)
    error_message = "quantize_head must be int8, same or keep."
  }
}

variable "context" {
  description = "Longest prompt plus output, in tokens."
  type        = number

  validation {
    condition     = var.context >= 1 && floor(var.context) == var.context && var.context <= var.model.max_positions
    error_message = "context must be a whole number of tokens from 1 to the model's limit, model.max_positions."
  }
}

variable "mean_tokens" {
  description = "Mean length of prompt plus output; null plans every sequence with the whole context."
  type        = number
  default     = null

  validation {
    condition     = var.mean_tokens == null ? true : (var.mean_tokens >= 1 && floor(var.mean_tokens) == var.mean_tokens && var.mean_tokens <= var.context)
    error_message = "mean_tokens must be a whole number from 1 to context."
  }
}

variable "concurrent" {
  description = "Sequences that are to run at a time, over all replicas."
  type        = number

  validation {
    condition     = var.concurrent >= 1 && floor(var.concurrent) == var.concurrent && var.concurrent <= 1000000
    error_message = "concurrent must be a whole number from 1 to 1000000."
  }
}

variable "gpu_memory_bytes" {
  description = "Memory of one GPU in bytes: its data sheet's gigabytes times 1e9, or what nvidia-smi shows."
  type        = number

  validation {
    condition     = var.gpu_memory_bytes >= pow(2, 30) && var.gpu_memory_bytes <= pow(2, 44) && floor(var.gpu_memory_bytes) == var.gpu_memory_bytes
    error_message = "gpu_memory_bytes must be a whole number of bytes from 1 GiB to 16384 GiB."
  }
}

variable "gpus_per_node" {
  description = "GPUs of each node."
  type        = number
  default     = 8

  validation {
    condition     = var.gpus_per_node >= 1 && var.gpus_per_node <= 128 && floor(var.gpus_per_node) == var.gpus_per_node
    error_message = "gpus_per_node must be a whole number from 1 to 128."
  }
}

variable "tensor_parallel_size" {
  description = "GPUs of a replica; null takes the size that needs the fewest GPUs in all."
  type        = number
  default     = null

  validation {
    condition     = var.tensor_parallel_size == null ? true : var.tensor_parallel_size >= 1
    error_message = "tensor_parallel_size must be at least 1."
  }
}

variable "headroom_percent" {
  description = "Percent of a GPU's memory that stay free."
  type        = number
  default     = 5

  validation {
    condition     = var.headroom_percent >= 0 && var.headroom_percent <= 90 && floor(var.headroom_percent) == var.headroom_percent
    error_message = "headroom_percent must be a whole number from 0 to 90."
  }
}

variable "block_size" {
  description = "Tokens in one block of the KV cache."
  type        = number
  default     = 16

  validation {
    condition     = var.block_size >= 1 && var.block_size <= 256 && floor(var.block_size) == var.block_size
    error_message = "block_size must be a whole number from 1 to 256."
  }
}

variable "max_batched_tokens" {
  description = "Tokens computed in one engine step, at most."
  type        = number
  default     = 2048

  validation {
    condition     = var.max_batched_tokens >= 1 && var.max_batched_tokens <= 1048576 && floor(var.max_batched_tokens) == var.max_batched_tokens
    error_message = "max_batched_tokens must be a whole number from 1 to 1048576."
  }
}
