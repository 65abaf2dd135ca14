# `terraform test` in this folder; no provider, no network. That all numbers are those of `tidewright plan`, tests/deployment
# in the repository's tests says.

variables {
  model = {
    hidden_size       = 4096
    intermediate_size = 14336
    layers            = 32
    query_heads       = 32
    kv_heads          = 8
    head_dim          = 128
    vocab_size        = 128256
    max_positions     = 131072
    parameters        = 8030261248 # Llama 3.1 8B
  }
  context          = 8192
  concurrent       = 200
  gpu_memory_bytes = 141000000000 # H200
}

run "llama_8b_on_h200" {
  command = apply

  assert {
    condition     = output.parameters == 8030261248 && output.weight_bytes == 2 * 8030261248
    error_message = "Weights are two bytes a parameter."
  }
  assert {
    condition     = output.kv_bytes_per_token == 131072 && output.kv_bytes_per_sequence == 1073741824
    error_message = "32 layers, 8 KV heads of 128, keys and values, two bytes each."
  }
  assert {
    condition     = output.replicas == 2 && output.gpus == 2 && output.nodes == 1 && output.sequences_per_replica == 100
    error_message = "Two GPUs hold 200 sequences of 1 GiB."
  }
  assert {
    condition     = output.tensor_parallel_sizes == [for size in [1, 2, 3, 4, 5, 6, 7, 8, 16, 32] : size]
    error_message = "Up to the KV heads, then multiples that divide the query heads."
  }
  assert {
    condition     = output.serve_options.max_running == 100 && endswith(output.serve_options.kv_cache_memory, "MiB")
    error_message = "Options of tidewright serve."
  }
}

run "shorter_sequences_need_less" {
  variables {
    mean_tokens = 1024
  }
  assert {
    condition     = output.gpus == 1
    error_message = "200 sequences of 1024 tokens fit on one."
  }
}

run "a_model_that_does_not_fit" {
  command = plan
  variables {
    gpu_memory_bytes     = 16000000000
    tensor_parallel_size = 1
  }
  expect_failures = [output.tensor_parallel_size]
}

run "a_size_that_does_not_divide" {
  command = plan
  variables {
    tensor_parallel_size = 12
  }
  expect_failures = [output.tensor_parallel_size]
}

run "a_context_beyond_the_model" {
  command = plan
  variables {
    context = 131073
  }
  expect_failures = [var.context]
}

run "a_mean_beyond_the_context" {
  command = plan
  variables {
    mean_tokens = 8193
  }
  expect_failures = [var.mean_tokens]
}

run "no_sequences" {
  command = plan
  variables {
    concurrent = 0
  }
  expect_failures = [var.concurrent]
}

run "an_unknown_dtype" {
  command = plan
  variables {
    dtype = "int4"
  }
  expect_failures = [var.dtype]
}

run "an_unknown_kv_cache_dtype" {
  command = plan
  variables {
    kv_cache_dtype = "int4"
  }
  expect_failures = [var.kv_cache_dtype]
}

run "gigabytes_for_bytes" {
  command = plan
  variables {
    gpu_memory_bytes = 141
  }
  expect_failures = [var.gpu_memory_bytes]
}

run "heads_that_do_not_divide" {
  command = plan
  variables {
    model = {
      hidden_size       = 64
      intermediate_size = 64
      layers            = 1
      query_heads       = 9
      kv_heads          = 2
      head_dim          = 8
      vocab_size        = 100
      max_positions     = 8192
    }
  }
  expect_failures = [var.model]
}

run "a_wrong_number_of_parameters" {
  command = plan
  variables {
    model = {
      hidden_size       = 4096
      intermediate_size = 14336
      layers            = 23
      query_heads       = 32
      kv_heads          = 8
      head_dim          = 128
      vocab_size        = 128256
      max_positions     = 131072
      parameters        = 8030261248
    }
  }
  expect_failures = [output.parameters]
}
