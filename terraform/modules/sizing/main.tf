# The arithmetic of `tidewright plan` (backends/tidewright/planning/), which a test holds to be the same to the byte.
# What the constants mean is said there.

locals {
  mib           = 1048576
  runtime_bytes = 1073741824
  rounding      = 3 * local.mib
  max_running   = 4096
  max_ranks     = 1024
  scored_rows   = 128

  m           = var.model
  value_bytes = var.dtype == "float32" ? 4 : 2
  # Values of one byte have a scale of four for each head's vector.
  kv_dtype   = var.kv_cache_dtype == "auto" ? var.dtype : var.kv_cache_dtype
  head_bytes = contains(["int8", "fp8"], local.kv_dtype) ? local.m.head_dim + 4 : local.m.head_dim * (local.kv_dtype == "float32" ? 4 : 2)
  # Bytes of a matrix's row, which belongs to an output: inputs filled up to whole blocks, groups' scales and offsets, and
  # the output's own scale.
  formats = {
    plain       = { bits = 8 * local.value_bytes, block = 1, group = 0, output = 0 }
    int8        = { bits = 8, block = 32, group = 0, output = 4 }
    w8a8        = { bits = 8, block = 32, group = 0, output = 4 }
    "int4-g32"  = { bits = 4, block = 64, group = 32, output = 4 }
    "int4-g64"  = { bits = 4, block = 64, group = 64, output = 4 }
    "int4-g128" = { bits = 4, block = 64, group = 128, output = 4 }
    fp8         = { bits = 8, block = 1, group = 0, output = 4 }
  }
  quantized    = contains(keys(local.formats), var.quantization) ? var.quantization : "plain"
  layer_format = local.formats[local.quantized]
  head_format = local.formats[
    local.quantized == "plain" || var.quantize_head == "keep" ? "plain" : var.quantize_head == "same" ? local.quantized : "int8"
  ]
  norm_bytes  = local.m.float32_norms ? 4 : local.value_bytes
  mean_tokens = var.mean_tokens == null ? var.context : var.mean_tokens
  group       = local.m.query_heads / local.m.kv_heads
  usable      = floor(var.gpu_memory_bytes * (100 - var.headroom_percent) / 100) - local.runtime_bytes

  # Whole KV heads are dealt out; beyond as many ranks, several hold a copy of one and share its query heads.
  sizes = [
    for size in concat(
      range(1, local.m.kv_heads + 1),
      [for copies in range(2, local.group + 1) : local.m.kv_heads * copies if local.group % copies == 0],
    ) : size if size <= local.max_ranks && size <= local.m.intermediate_size
  ]
  # Several hosts have equally many ranks each.
  tried = [
    for size in local.sizes : size
    if(var.tensor_parallel_size == null ? true : size == var.tensor_parallel_size) && (size <= var.gpus_per_node || size % var.gpus_per_node == 0)
  ]

  # What the ranks of each size hold.
  unit = {
    for size in local.tried : size => local.m.intermediate_size % 32 == 0 && local.m.intermediate_size >= 32 * size ? 32 : 1
  }
  rows = { for size in local.tried : size => ceil(ceil(local.m.vocab_size / size) / 64) * 64 }
  ranks = {
    for size in local.tried : size => [
      for rank in range(size) : {
        is_first = rank == 0 ? 1 : 0
        kv       = size <= local.m.kv_heads ? floor(local.m.kv_heads * (rank + 1) / size) - floor(local.m.kv_heads * rank / size) : 1
        heads = size <= local.m.kv_heads ? (
          local.group * (floor(local.m.kv_heads * (rank + 1) / size) - floor(local.m.kv_heads * rank / size))
        ) : local.m.query_heads / size
        features = local.unit[size] * (
          floor(local.m.intermediate_size / local.unit[size] * (rank + 1) / size) - floor(local.m.intermediate_size / local.unit[size] * rank / size)
        )
      }
    ]
  }
  norm_values = (
    local.m.layers * ((local.m.norms_after ? 4 : 2) * local.m.hidden_size + (local.m.qk_norm ? 2 * local.m.head_dim : 0)) + local.m.hidden_size
  )
  # By the inputs of a matrix: the hidden size, a rank's heads, its features.
  depths = distinct(flatten([
    local.m.hidden_size,
    [for ranks in local.ranks : [for rank in ranks : [rank.heads * local.m.head_dim, rank.features]]],
  ]))
  row_bytes = {
    for depth in local.depths : depth => (
      ceil(depth / local.layer_format.block) * local.layer_format.block * local.layer_format.bits / 8 +
      (local.layer_format.group > 0 ? ceil(depth / max(local.layer_format.group, 1)) * 4 : 0) + local.layer_format.output
    )
  }
  head_row_bytes = (
    ceil(local.m.hidden_size / local.head_format.block) * local.head_format.block * local.head_format.bits / 8 +
    (local.head_format.group > 0 ? ceil(local.m.hidden_size / max(local.head_format.group, 1)) * 4 : 0) + local.head_format.output
  )
  matrix_bytes = {
    for size, ranks in local.ranks : size => max([
      for rank in ranks : local.m.layers * (
        ((rank.heads + 2 * rank.kv) * local.m.head_dim + 2 * rank.features) * local.row_bytes[local.m.hidden_size] +
        local.m.hidden_size * (local.row_bytes[rank.heads * local.m.head_dim] + local.row_bytes[rank.features]) +
        local.value_bytes * (
          (local.m.qkv_bias ? (rank.heads + 2 * rank.kv) * local.m.head_dim : 0) + (local.m.mlp_bias ? 2 * rank.features : 0) +
          rank.is_first * local.m.hidden_size * ((local.m.output_bias ? 1 : 0) + (local.m.mlp_bias ? 1 : 0))
        )
      )
    ]...) + local.rows[size] * local.head_row_bytes * (local.m.tied_embeddings ? 1 : 2)
  }
  most = {
    for size, ranks in local.ranks : size => {
      heads    = max([for rank in ranks : rank.heads]...)
      kv       = max([for rank in ranks : rank.kv]...)
      features = max([for rank in ranks : rank.features]...)
    }
  }

  tables = local.m.rotary_tables * 2 * var.context * local.m.head_dim * 4
  logits = {
    for size in local.tried : size => (
      (size == 1 ? 1 : 2) * local.rows[size] * size * local.value_bytes + 5 * local.m.vocab_size * 4
    )
  }
  # What a decoding sequence keeps beside its KV blocks: logits, and what the parts of its context leave for each head. Where
  # kernels don't take the heads, attention makes a copy of two layers' blocks instead.
  by_kernels = local.m.head_dim <= 256 && local.m.head_dim % 2 == 0
  gathered   = local.by_kernels ? 0 : 2
  row = {
    for size in local.tried : size => local.logits[size] + (
      local.by_kernels ? local.most[size].heads * min(64, ceil(var.context / 128)) * (local.m.head_dim + 1) * 4 : 0
    )
  }
  replica = {
    for size in local.tried : size => {
      weights = local.matrix_bytes[size] + local.norm_values * local.norm_bytes
      step = local.scored_rows * local.logits[size] + var.max_batched_tokens * local.value_bytes * max(
        3 * local.m.hidden_size + (3 * local.most[size].heads + 4 * local.most[size].kv) * local.m.head_dim,
        3 * local.m.hidden_size + 3 * local.most[size].features,
      )
      per_token = 2 * local.m.layers * local.most[size].kv * local.head_bytes
    }
  }

  # KV blocks of a sequence.
  mean_slots    = ceil(local.mean_tokens / var.block_size) * var.block_size
  longest_slots = ceil(var.context / var.block_size) * var.block_size
  left          = { for size, one in local.replica : size => max(0, local.usable - one.weights - local.tables - one.step - local.rounding) }
  sequences = {
    for size, one in local.replica : size => min(
      floor(local.left[size] / (local.mean_slots * one.per_token * (local.m.layers + local.gathered) / local.m.layers + local.row[size])),
      # However many run, the pool can hold one of the longest.
      floor(max(0, local.left[size] - local.longest_slots * one.per_token * (local.m.layers + local.gathered) / local.m.layers) / local.row[size]),
    )
  }
  longest_sequences = {
    for size, one in local.replica : size =>
    floor(local.left[size] / (local.longest_slots * one.per_token * (local.m.layers + local.gathered) / local.m.layers + local.row[size]))
  }

  # Ranks on one host where that will do; of these the fewest GPUs, then the fewest ranks.
  holding  = [for size in local.tried : size if local.sequences[size] > 0]
  near     = [for size in local.holding : size if size <= var.gpus_per_node]
  fitting  = length(local.near) > 0 ? local.near : local.holding
  replicas = { for size in local.fitting : size => ceil(var.concurrent / min(local.sequences[size], local.max_running)) }
  fewest   = length(local.fitting) > 0 ? min([for size in local.fitting : local.replicas[size] * size]...) : 0
  size     = try([for size in local.fitting : size if local.replicas[size] * size == local.fewest][0], null)

  count   = local.size == null ? 0 : local.replicas[local.size]
  running = local.size == null ? 0 : ceil(var.concurrent / local.count)
  kv_cache = local.size == null ? 0 : local.mib * floor(floor(
    (local.usable - local.replica[local.size].weights - local.tables - local.replica[local.size].step - local.running * local.row[local.size])
    * local.m.layers / (local.m.layers + local.gathered)
  ) / local.mib)
  nodes_per_replica = local.size == null ? 0 : ceil(local.size / var.gpus_per_node)
  nodes = local.size == null ? 0 : (
    local.size > var.gpus_per_node ? local.count * local.nodes_per_replica : ceil(local.count / floor(var.gpus_per_node / local.size))
  )

  # As models' pages count them: without padding.
  parameters = (
    local.m.layers * (
      (local.m.query_heads + 2 * local.m.kv_heads) * local.m.head_dim * (local.m.hidden_size + (local.m.qkv_bias ? 1 : 0)) +
      local.m.hidden_size * (local.m.query_heads * local.m.head_dim + (local.m.output_bias ? 1 : 0)) +
      2 * local.m.intermediate_size * (local.m.hidden_size + (local.m.mlp_bias ? 1 : 0)) +
      local.m.hidden_size * (local.m.intermediate_size + (local.m.mlp_bias ? 1 : 0))
    ) + local.norm_values + local.m.vocab_size * local.m.hidden_size * (local.m.tied_embeddings ? 1 : 2)
  )
}
