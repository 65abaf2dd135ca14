# A cluster on EKS with as many GPU nodes as 100 conversations with Llama 3.1 8B need. Then: ../tidewright.

terraform {
  required_version = ">= 1.9"
}

provider "aws" {
  region = var.region
}

variable "region" {
  description = "AWS region, such as eu-central-1."
  type        = string

  validation {
    condition     = can(regex("^[a-z]+(-[a-z]+)+-[0-9]$", var.region))
    error_message = "region must be an AWS region, such as eu-central-1."
  }
}

variable "subnet_ids" {
  description = "Private subnets in at least two zones."
  type        = list(string)
}

variable "kms_key_arn" {
  description = "KMS key that encrypts the cluster's Secrets."
  type        = string
}

module "sizing" {
  source = "../../modules/sizing"

  model            = jsondecode(file("${path.module}/../llama-3.1-8b.json"))
  context          = 8192
  mean_tokens      = 2048
  concurrent       = 100
  gpu_memory_bytes = 24000000000 # L4
  gpus_per_node    = 4           # g6.12xlarge
}

module "cluster" {
  source = "../../modules/eks"

  name              = "tidewright"
  subnet_ids        = var.subnet_ids
  kms_key_arn       = var.kms_key_arn
  gpu_instance_type = "g6.12xlarge"
  gpu_nodes         = { min = module.sizing.nodes, desired = module.sizing.nodes, max = 2 * module.sizing.nodes }
}

output "cluster" {
  description = "Name of the cluster."
  value       = module.cluster.name
}

output "replicas" {
  description = "Replicas for the overlay."
  value       = module.sizing.replicas
}

output "serving_yaml" {
  description = "Options for the overlay's serving.yaml."
  value       = yamlencode(module.sizing.serve_options)
}
