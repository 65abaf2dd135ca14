# A cluster on GKE with as many GPU nodes as 100 conversations with Llama 3.1 8B need. Then: ../tidewright.

terraform {
  required_version = ">= 1.9"
}

variable "project" {
  description = "Project that holds the cluster."
  type        = string
}

variable "network" {
  description = "VPC network, subnetwork, and the names of its secondary ranges for pods and services."
  type        = object({ network = string, subnetwork = string, pods_range = string, services_range = string })
}

variable "authorized_cidr" {
  description = "Addresses that may reach the cluster's API."
  type        = string
}

module "sizing" {
  source = "../../modules/sizing"

  model            = jsondecode(file("${path.module}/../llama-3.1-8b.json"))
  context          = 8192
  mean_tokens      = 2048
  concurrent       = 100
  gpu_memory_bytes = 24000000000 # L4
  gpus_per_node    = 4           # g2-standard-48
}

module "cluster" {
  source = "../../modules/gke"

  project         = var.project
  name            = "tidewright"
  region          = "us-central1"
  zones           = ["us-central1-a", "us-central1-b"]
  network         = var.network
  authorized_cidr = var.authorized_cidr
  gpu             = { machine_type = "g2-standard-48", type = "nvidia-l4", count = 4 }
  gpu_nodes       = { min = module.sizing.nodes, max = 2 * module.sizing.nodes }
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
